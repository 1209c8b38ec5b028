"""The trace of a turn: when each stage was done, how much work it was, what was dropped.

Wall-clock time lives here and nowhere else. All times of a trace are seconds of one monotonic
clock; what people see is milliseconds after the end of speech.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from stages import SAMPLE_RATE

MARKS: dict[str, str] = {
    "end_of_speech": "the user stopped speaking",
    "endpoint": "decided that they had",
    "encoder_done": "units of the request exact",
    "prefill_done": "request in the language model",
    "first_token": "first token of the reply",
    "first_unit": "first unit of the reply",
    "first_sample": "first sound of the reply",
    "first_heard": "it left the loudspeaker",
    "last_sample": "last sound of the reply",
}
"""The moments of a turn, in order, and what they mean."""

_BAR = 30  # characters of the waterfall


class ArrivalClock:
    """When each sample of the input arrived, for the last few seconds of it."""

    def __init__(self, chunks: int = 2048) -> None:
        self._ends: deque[tuple[int, float]] = deque(maxlen=chunks)

    def arrived(self, end_sample: int, time: float) -> None:
        """Samples up to ``end_sample`` are here, at ``time``."""
        self._ends.append((end_sample, time))

    def when(self, sample: int) -> float:
        """The arrival of ``sample``, or the nearest known."""
        if not self._ends:
            return 0.0
        for end, time in self._ends:
            if sample <= end:
                return time
        return self._ends[-1][1]


@dataclass
class TurnTrace:
    """What one turn took.

    Attributes:
        turn: its number.
        speech: first and last sample of the user's speech, session clock.
        marks: seconds of the monotonic clock, by the names in :data:`MARKS`.
        typed: the request was text: what came before the endpoint took no time.
        heard, said: transcript of the request, text of the reply.
        action: what the reply does besides speaking.
        reply_samples: length of the reply at 16 kHz.
        counts: tokens prefilled, rewound and decoded, chunks, and so on.
        work: seconds of work by stage.
        decode_seconds: time in which the reply's tokens were decoded.
        channels: the counters of every channel when the turn ended.
        ended: why the reply ended.
    """

    turn: int
    speech: tuple[int, int] = (0, 0)
    marks: dict[str, float] = field(default_factory=dict)
    typed: bool = False
    heard: str = ""
    said: str = ""
    action: dict[str, Any] | None = None
    reply_samples: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    decode_seconds: float = 0.0
    channels: dict[str, dict[str, int | str]] = field(default_factory=dict)
    ended: str = ""

    def mark(self, name: str, time: float) -> None:
        """Note the first time that ``name`` happens."""
        if name not in MARKS:
            raise ValueError(f"{name!r} is no moment of a turn: one of {', '.join(MARKS)}")
        self.marks.setdefault(name, time)

    def count(self, name: str, by: int = 1) -> None:
        """Add to the count of ``name``."""
        self.counts[name] = self.counts.get(name, 0) + by

    def spend(self, stage: str, seconds: float) -> None:
        """Add to the work of ``stage``."""
        self.work[stage] = self.work.get(stage, 0.0) + seconds

    @property
    def milliseconds(self) -> dict[str, float]:
        """Each mark in ms after the end of speech, in order."""
        start = self.marks.get("end_of_speech")
        if start is None:
            return {}
        return {name: 1e3 * (self.marks[name] - start) for name in MARKS if name in self.marks}

    @property
    def reply_seconds(self) -> float:
        return self.reply_samples / SAMPLE_RATE

    @property
    def speech_seconds(self) -> float:
        return (self.speech[1] - self.speech[0]) / SAMPLE_RATE

    @property
    def real_time_factor(self) -> float | None:
        """Time from the endpoint to the reply's last sample over the reply's length."""
        if not self.reply_samples or not {"endpoint", "last_sample"} <= set(self.marks):
            return None
        return (self.marks["last_sample"] - self.marks["endpoint"]) / self.reply_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, the language model alone."""
        tokens = self.counts.get("text_tokens", 0) + self.counts.get("speech_tokens", 0)
        return tokens / self.decode_seconds if tokens and self.decode_seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; times in ms after the end of speech."""
        return {
            "turn": self.turn,
            "heard": self.heard,
            "said": self.said,
            "action": self.action,
            "ended": self.ended,
            "speech_seconds": round(self.speech_seconds, 3),
            "reply_seconds": round(self.reply_seconds, 3),
            "real_time_factor": _rounded(self.real_time_factor),
            "tokens_per_second": _rounded(self.tokens_per_second),
            "milliseconds_after_end_of_speech": {
                name: round(value, 1) for name, value in self.milliseconds.items()
            },
            "work_milliseconds": {k: round(1e3 * v, 1) for k, v in self.work.items()},
            "counts": self.counts,
            "channels": self.channels,
        }


def write_json(path: Path, traces: Sequence[TurnTrace], about: Mapping[str, Any]) -> None:
    """Write the traces of a session, with what is known about the machine and the models."""
    document = {"about": dict(about), "turns": [trace.as_dict() for trace in traces]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(trace: TurnTrace) -> Table:
    """The stages of a turn: what took how long, as numbers and as a waterfall."""
    out = Table(title=f"turn {trace.turn}", title_justify="left", caption_justify="left")
    out.add_column("after the end of speech")
    out.add_column("ms", justify="right")
    out.add_column("step", justify="right")
    out.add_column("", no_wrap=True)
    times = trace.milliseconds
    total = max(times.values(), default=0.0)
    before = 0.0
    # As they happened: a reply prepared in the hangover has steps before the endpoint.
    for name, time in sorted(times.items(), key=lambda mark: mark[1]):
        out.add_row(MARKS[name], f"{time:.0f}", f"{time - before:+.0f}", _bar(before, time, total))
        before = time
    out.caption = _caption(trace)
    return out


def _bar(start: float, end: float, total: float) -> Text:
    if total <= 0:
        return Text("")
    first, last = (round(_BAR * max(0.0, t) / total) for t in (start, end))
    return Text(" " * first + "█" * max(last - first, 1), style="cyan")


def _caption(trace: TurnTrace) -> str:
    parts = [f"{trace.speech_seconds:.1f} s heard, {trace.reply_seconds:.1f} s spoken"]
    if trace.tokens_per_second is not None:
        parts.append(f"{trace.tokens_per_second:.0f} tokens/s")
    if trace.real_time_factor is not None:
        parts.append(f"real-time factor {trace.real_time_factor:.2f}")
    dropped = sum(int(counters["dropped"]) for counters in trace.channels.values())
    parts.append(f"{dropped} dropped" if dropped else "nothing dropped")
    return " · ".join(parts)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
