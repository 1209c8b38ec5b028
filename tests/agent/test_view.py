"""What one sees of a live conversation."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from agent.events import (
    DeviceChanged,
    Event,
    Heard,
    Interrupted,
    Level,
    ReplyAudio,
    ReplyText,
    RequestUnits,
    Spoken,
    StateChanged,
    TurnEnded,
    TurnStarted,
)
from agent.telemetry import TurnTrace
from agent.view import LiveView, screenshot
from agent.waterfall import chart, headline, steps
from stages.vocoder_stream import UnitSpan

PICTURE = Path(__file__).parents[2] / "docs" / "talk.svg"


def spans(count: int) -> tuple[UnitSpan, ...]:
    lengths = [640 * (1 + n**3 % 11 // 3 + n % 3) for n in range(count)]
    ends = np.cumsum(lengths)
    return tuple(
        UnitSpan(n, n, int(end) - length, int(end))
        for n, (length, end) in enumerate(zip(lengths, ends, strict=True))
    )


def units(*numbers: int) -> tuple[str, ...]:
    return tuple(f"[{'Pi' if n < 60 else 'Hu'}{n}]" for n in numbers)


def trace(turn: int, hidden: bool = True, ended: str = "complete", extra: float = 0.0) -> TurnTrace:
    """A turn of which all but the last steps were done in the hangover, or none.

    The times are the medians of bench/results/2026-11-21-turns.json, and 40 ms for the device.
    """
    late = extra if hidden else 0.5
    marks = {
        "end_of_speech": 100.0,
        "endpoint": 100.562,
        "encoder_done": 100.292 + late,
        "prefill_done": 100.308 + late,
        "first_token": 100.313 + late,
        "first_unit": 100.36 + late,
        "first_sample": 100.563 + (0.0 if hidden else late),
        "first_heard": 100.602 + (0.0 if hidden else late),
    }
    return TurnTrace(
        turn,
        marks=marks,
        counts={"speculation_hits": int(hidden)},
        reply_samples=32000,
        ended=ended,
    )


def scene() -> Iterator[Event]:
    """A question answered, an answer interrupted, a third turn going on."""
    yield TurnStarted(1, 0)
    yield Heard(1, "What is your name?")
    yield ReplyText(1, "My name is Nano.")
    yield Spoken(1, "My name is Nano.", 22000)
    yield TurnEnded(1, trace(1))
    yield DeviceChanged("input", False, "The microphone is gone; looking for it again")
    yield DeviceChanged("input", True, "The microphone is back: USB Audio")
    yield TurnStarted(2, 60000)
    yield Heard(2, "What can you do?")
    yield ReplyText(2, "I can count, I can tell the time, and I can spell.")
    yield Spoken(2, "I can count, ", 14000)
    yield Interrupted(2, 15200, "barge-in")
    yield TurnEnded(2, trace(2, ended="barge-in", extra=0.09))
    yield TurnStarted(3, 90000)
    yield RequestUnits(3, 0, units(12, 311, 87, 402, 23, 118, 240, 77, 9, 365, 190, 411, 93, 288))
    yield RequestUnits(3, 11, units(414, 93, 41, 288, 276, 130, 18, 455))
    yield Heard(3, "Stop. What is three and four?")
    yield StateChanged("answering", "endpoint", 150000)
    yield ReplyText(3, "Three and four is seven.")
    yield ReplyAudio(3, np.zeros(9600, np.float32), 0, spans(52))
    yield Spoken(3, "Three and four ", 40000)
    yield Level(-37.0, False)


class Terminal:
    """A terminal of ``width`` columns, of which everything written is kept."""

    def __init__(self, width: int = 80, **options: object) -> None:
        self.file, self.now = io.StringIO(), 0.0
        self.console = Console(
            file=self.file, force_terminal=True, width=width, height=24, **options  # type: ignore[arg-type]
        )  # fmt: skip
        self.view = LiveView(self.console, clock=lambda: self.now)

    def seen(self) -> str:
        """The moving part as it is now."""
        plain = Console(file=io.StringIO(), width=self.console.width)
        plain.print(self.view.picture())
        text: str = plain.file.getvalue()  # type: ignore[attr-defined]
        return text


def lines(*events: Event) -> list[str]:
    """What is printed where there is no terminal."""
    file = io.StringIO()
    with LiveView(Console(file=file, width=200)) as view:
        for event in events:
            view(event)
    return file.getvalue().splitlines()


def test_words_appear_as_they_are_spoken() -> None:
    terminal = Terminal(color_system=None)
    terminal.view(ReplyText(1, "My name is Nano."))
    terminal.view(Spoken(1, "My name ", 8000))
    with terminal.console.capture() as capture:
        terminal.console.print(terminal.view.picture())
    assert "says   My name is Nano." in capture.get()
    (says,) = terminal.view._words(terminal.view._turns[1], over=False)
    assert [(says.plain[s.start : s.end], s.style) for s in says.spans][1:] == [("is Nano.", "dim")]


def test_what_nobody_heard_is_struck_through() -> None:
    terminal = Terminal(color_system="standard")
    for event in (
        ReplyText(1, "One two."),
        Spoken(1, "One ", 800),
        Interrupted(1, 8000, "barge-in"),
    ):
        terminal.view(event)
    terminal.view(TurnEnded(1, trace(1)))
    assert "One \x1b[2;9mtwo.\x1b[0m\x1b[33m (interrupted after 0.5 s)" in terminal.file.getvalue()


def test_units_that_are_taken_back_are_replaced_and_marked_for_a_moment() -> None:
    terminal = Terminal()
    terminal.view(RequestUnits(1, 0, units(99, 30, 71)))
    assert "in     Hu99 Pi30 Hu71 \n" in terminal.seen()
    terminal.view(RequestUnits(1, 1, units(31, 72)))
    assert "in     Hu99 Pi31 Hu72 \n" in terminal.seen()
    turn = terminal.view._turns[1]
    assert [s.style for s in terminal.view._request(turn).spans] == [
        "bold cyan", "cyan", "reverse magenta", "reverse cyan",
    ]  # fmt: skip
    terminal.now = 1.0
    assert not any("reverse" in str(s.style) for s in terminal.view._request(turn).spans)


def test_a_reply_that_is_taken_back_is_not_shown() -> None:
    terminal = Terminal()
    terminal.view(Heard(1, "I want"))
    terminal.view(ReplyText(1, "What do you want?"))
    terminal.view(RequestUnits(1, 0, units(99)))  # the speaker went on
    assert "want" not in terminal.seen()


def test_only_the_latest_units_are_shown() -> None:
    terminal = Terminal(40)
    terminal.view(RequestUnits(1, 0, units(*range(100, 500))))
    (line,) = [line for line in terminal.seen().splitlines() if line.startswith("in ")]
    assert line.rstrip().endswith("Hu499") and len(line) < 40


@pytest.mark.parametrize("width", [1, 8, 20, 40, 80, 300])
def test_it_fits_any_terminal(width: int) -> None:
    terminal = Terminal(width)
    with terminal.view as view:
        for event in scene():
            terminal.now += 1.0
            view(event)
            assert all(len(line) <= max(width, 1) for line in terminal.seen().splitlines())


def test_a_terminal_that_is_resized_does_no_harm() -> None:
    terminal = Terminal(100)
    with terminal.view as view:
        for width, event in zip([100, 30, 5, 120, 60] * 20, scene(), strict=False):
            terminal.now += 1.0
            terminal.console.width = width
            view(event)


def test_it_draws_no_more_often_than_twelve_times_a_second() -> None:
    terminal = Terminal()
    drawn = 0

    def count() -> None:
        nonlocal drawn
        drawn += 1

    terminal.view._live.refresh = count  # type: ignore[method-assign]
    for n in range(1000):
        terminal.now = n / 100
        terminal.view(Level(-30.0, True))
    assert 100 <= drawn <= 121


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, None])
def test_the_terminal_is_left_as_it_was(kind: type[BaseException] | None) -> None:
    terminal = Terminal()
    try:
        with terminal.view as view:
            view(Heard(1, "half a turn"))
            if kind:
                raise kind
    except BaseException as error:
        assert kind and isinstance(error, kind)
    written = terminal.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is back
    assert "\x1b[?1049h" not in written  # the other screen was never used
    assert "half a turn" in written


def test_without_colours_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal(color_system="standard")
    with terminal.view as view:
        for event in scene():
            terminal.now += 1.0
            view(event)
    assert not any(f"\x1b[{code}m" in terminal.file.getvalue() for code in (31, 32, 34, 36, 91))


def test_a_model_cannot_write_control_characters_to_the_terminal() -> None:
    terminal = Terminal(color_system=None)
    terminal.view(Heard(1, "a\x1b[2Jb\nc"))
    terminal.view(ReplyText(1, "d\x07\x1b]0;title\x07"))
    terminal.view(TurnEnded(1, trace(1)))
    assert "\x1b" not in terminal.file.getvalue() and "\x07" not in terminal.file.getvalue()
    assert "\x1b" not in "".join(lines(Heard(1, "a\x1b[2Jb")))


def test_where_there_is_no_terminal_there_are_lines() -> None:
    assert lines(
        StateChanged("hearing", "speech", 0),
        Level(-20.0, True),
        RequestUnits(1, 0, units(99)),
        Heard(1, "hello"),
        ReplyText(1, "Hello, I am Nano."),
        Spoken(1, "Hello, ", 3200),
        Interrupted(1, 3200, "barge-in"),
        DeviceChanged("output", False, "the loudspeaker is gone"),
        TurnEnded(1, TurnTrace(1, ended="barge-in")),
    ) == [
        "state: hearing (speech)",
        "heard: hello",
        "device: the loudspeaker is gone",
        "says: Hello,",
        "interrupted: turn=1 heard=0.20s reason=barge-in",
        "ended: barge-in",
        "trace: turn=1 heard=0.00s spoken=0.00s dropped=0",
    ]


def test_steps_done_in_the_hangover_lie_under_it() -> None:
    found = {s.name: (round(s.start), round(s.end)) for s in steps(trace(1))}
    assert found == {
        "hangover": (0, 562),
        "encode": (0, 292),
        "prefill": (292, 308),
        "first token": (308, 313),
        "first sample": (562, 563),
        "device": (563, 602),
    }
    assert headline(trace(1)).endswith(
        "602 ms to the first sound, 40 ms of them after the hangover"
    )


def test_steps_done_after_the_endpoint_follow_it() -> None:
    found = {s.name: (round(s.start), round(s.end)) for s in steps(trace(1, hidden=False))}
    assert found["encode"] == (562, 792) and found["first sample"] == (813, 1063)


@pytest.mark.parametrize("early", [-300.0, -0.4, 0.0])
def test_marks_before_the_end_of_speech_are_drawn(early: float) -> None:
    odd = trace(1)
    odd.marks["encoder_done"] = 100 + early
    for width in (10, 30, 200):
        console = Console(file=io.StringIO(), width=width)
        console.print(chart(odd, width))
    assert all(step.start <= step.end for step in steps(odd))


def test_a_turn_without_marks_has_an_empty_waterfall() -> None:
    assert chart(TurnTrace(1)).row_count == 0 and headline(TurnTrace(1)) == "turn 1: no sound"


def test_the_picture_for_the_readme(tmp_path: Path) -> None:
    """Redraw it with SPIRIT_REDRAW=1 when the view has changed."""
    path = PICTURE if os.environ.get("SPIRIT_REDRAW") else tmp_path / "talk.svg"
    screenshot(scene(), path, "python -m agent talk")
    assert "interrupted" in path.read_text(encoding="utf-8")
    assert "http" not in path.read_text(encoding="utf-8").replace("http://www.w3.org", "").replace(
        "https://www.textualize.io", ""
    )
    assert "�" not in path.read_text(encoding="utf-8")
