"""The real conversation, measured from inside: every turn as a row of figures.

The requests are spoken into a :class:`agent.session.Session` at the pace of the clock. Its replies
go through the very loudspeaker that plays them on a sound card, into a function instead of a
device, so that what leaves it, and what was missing in it, is known to the sample.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from agent.config import Config
from agent.events import TurnEnded
from agent.loudspeaker import Loudspeaker
from agent.models import Models
from agent.paced import PacedOutput
from agent.ring import JitterTarget
from agent.session import Session
from agent.telemetry import TurnTrace
from agent.workers import Worker
from bench.conversation.recordings import Request
from bench.conversation.sound import Listener, matched
from bench.conversation.speaker import Said, Speaker
from bench.memory import resident_mb
from stages import SAMPLE_RATE

P = ParamSpec("P")
R = TypeVar("R")
Row = dict[str, Any]
BARGE_IN = "barge-in"
COUNTS = ("speculations", "speculation_hits", "refuted", "wasted_tokens")


class Watched(Loudspeaker):
    """A loudspeaker that notes when it was told to stop, seconds of the performance counter."""

    def __init__(self, target: JitterTarget) -> None:
        super().__init__(target)
        self.stops: list[float] = []

    def stop(self) -> int:
        if self.busy:
            self.stops.append(time.perf_counter())
        return super().stop()

    @property
    def glitches(self) -> int:
        """Times there was nothing to play in the middle of a reply."""
        return self.underruns + (self._current.underruns if self._current else 0)


class Stopwatch(Worker):
    """A worker that notes what each step of a generator took, from asking for it to having it."""

    def __init__(self, name: str, steps: list[float]) -> None:
        super().__init__(name)
        self._steps = steps

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        asked = time.perf_counter()
        result = await super().run(work, *args, **kwargs)
        if args and inspect.isgenerator(args[0]):
            self._steps.append(1e3 * (time.perf_counter() - asked))
        return result


@dataclass
class _Turn:
    """A turn that has ended, and what was known at that moment."""

    trace: TurnTrace
    steps: list[float]
    glitches: int
    memory_mb: float

    @property
    def speech(self) -> tuple[int, int]:
        return self.trace.speech


@dataclass
class Conversation:
    """What was said and what came of it."""

    requests: list[Request] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    turns: list[_Turn] = field(default_factory=list)
    listener: Listener = field(default_factory=Listener)
    stops: list[float] = field(default_factory=list)
    began: float = 0.0

    def rows(self) -> list[Row]:
        """One for each request, in order."""
        bounds = zip(self.requests, self.said, strict=False)
        begins = [said.start + request.begin for request, said in bounds]
        own = matched(begins, [said.end for said in self.said], self.turns)
        rows = [self._row(n, false, turn) for n, (false, turn) in enumerate(own)]
        for name in ("glitches", "dropped"):  # counted since the session began
            before = 0
            for row in rows:
                if name in row:
                    row[name], before = row[name] - before, row[name]
        return rows

    def _row(self, number: int, false: int, own: int | None) -> Row:
        said = self.said[number]
        row: Row = {
            "turn": number + 1,
            "request": self.requests[number].name,
            "at_seconds": round(said.end_time - self.began, 2),
            "false_endpoints": false,
            "barge_in": said.over,
        }
        if own is None:
            return {**row, "outcome": "lost"}
        turn = self.turns[own]
        trace = turn.trace
        counts = {name: trace.counts.get(name, 0) for name in COUNTS}
        ms = self._steps_of(trace, number)
        interrupted = self._interrupted(number) if trace.ended == BARGE_IN else {}
        return {
            **row,
            "outcome": "answered" if "end_to_sample" in ms else "silent",
            "ended": trace.ended,
            "heard": trace.heard,
            "said": trace.said,
            "ms": {name: round(value, 2) for name, value in {**ms, **interrupted}.items()},
            "marks_ms": _after(trace, said.end_time),
            "work_ms": {name: round(1e3 * value, 1) for name, value in trace.work.items()},
            "request_seconds": round(trace.speech_seconds, 2),
            "reply_seconds": round(trace.reply_seconds, 2),
            "real_time_factor": _rounded(trace.real_time_factor),
            "inter_token_ms": [round(step, 2) for step in turn.steps],
            "glitches": turn.glitches,
            "dropped": sum(int(c["dropped"]) for c in trace.channels.values()),
            "memory_mb": turn.memory_mb,
            **counts,
        }

    def _steps_of(self, trace: TurnTrace, number: int) -> dict[str, float]:
        """Steps of the turn, ms; the speech ended where the recording says that it did."""
        marks, end = trace.marks, self.said[number].end_time
        following = self.said[number + 1 : number + 2]
        if "endpoint" not in marks:  # it was let go of before
            return {}
        endpoint = marks["endpoint"]
        found = {"end_to_endpoint": endpoint - end}
        for name, mark in (("token", "first_token"), ("unit", "first_unit")):
            if mark in marks:
                found[f"endpoint_to_{name}"] = marks[mark] - endpoint
        if "first_sample" in marks:
            found["endpoint_to_sample"] = marks["first_sample"] - endpoint
            found["end_to_sample"] = marks["first_sample"] - end
            until = following[0].end_time if following else float("inf")
            sound = self.listener.first_after(endpoint, until)
            if sound is not None:
                found["end_to_sound"] = sound - end
        return {name: 1e3 * value for name, value in found.items()}

    def _interrupted(self, number: int) -> dict[str, float]:
        """How long a barge-in takes: from deciding, and from the first word, to silence."""
        if number + 1 >= len(self.said) or not self.said[number + 1].over:
            return {}
        by, request = self.said[number + 1], self.requests[number + 1]
        onset = by.end_time - (request.end - request.begin) / SAMPLE_RATE
        decided = next((stop for stop in self.stops if stop > onset), None)
        if decided is None:
            return {}
        silent = self.listener.silent_after(decided)
        return {
            "barge_in_to_silence": 1e3 * (silent - decided),
            "speech_to_silence": 1e3 * (silent - onset),
        }


async def converse(
    models: Models,
    config: Config,
    requests: Iterable[tuple[Request, bool]],
    progress: Callable[[int], None],
    between: Callable[[], Awaitable[None]] | None = None,
    listen: float = float("inf"),
    seed: int = 0,
) -> Conversation:
    """Hold one conversation.

    Args:
        requests: each with whether it is to interrupt the reply before it.
        progress: called with the number of requests said, after each turn.
        between: see :class:`bench.conversation.speaker.Speaker`.
        listen: seconds of each reply that are listened to.
    """
    held, steps = Conversation(began=time.perf_counter()), list[float]()
    sound = config.sound
    playback = Watched(JitterTarget(sound.latency_ms / 1000, sound.max_latency_ms / 1000))

    def noted() -> Iterable[tuple[Request, bool]]:
        for request, over in requests:
            held.requests.append(request)
            yield request, over

    speaker = Speaker(noted(), listen, between, seed=seed)
    session = Session(models, config, worker=lambda name: _worker(name, steps))
    with PacedOutput(playback, held.listener.block, sound.block_ms):
        async with session, aclosing(
            session.converse(speaker.speak(playback, session), playback)
        ) as events:  # fmt: skip
            async for event in events:
                if isinstance(event, TurnEnded):
                    held.turns.append(_Turn(event.trace, steps[:], playback.glitches,
                                            resident_mb()))  # fmt: skip
                    steps.clear()
                    speaker.over()
                    progress(len(speaker.said))
    held.said, held.stops = speaker.said, playback.stops
    return held


def _worker(name: str, steps: list[float]) -> Worker:
    return Stopwatch(name, steps) if name == "lm" else Worker(name)


def _after(trace: TurnTrace, end: float) -> dict[str, float]:
    return {name: round(1e3 * (at - end), 1) for name, at in trace.marks.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
