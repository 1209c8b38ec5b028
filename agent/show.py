"""What a person sees of a conversation on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from agent.events import (
    ActionChosen,
    DeviceChanged,
    Event,
    Heard,
    Interrupted,
    ReplyAudio,
    ReplyText,
    Spoken,
    StateChanged,
    TurnEnded,
)
from agent.telemetry import TurnTrace, table
from stages import SAMPLE_RATE


class Transcript:
    """Prints events as they come: the words heard, the words said, the times of the turn.

    Args:
        plain: lines for logs, without colours, tables or half-written lines. Of a live conversation
            they also tell the state, interruptions and devices, and of a reply the words that were
            spoken.
    """

    def __init__(self, console: Console, plain: bool = False) -> None:
        self._console = console
        self._plain = plain
        self._saying = False  # a line of the reply is being written
        self._spoken = ""
        self._stopped = ""  # what is to be said of an interruption

    def __call__(self, event: Event) -> None:
        if isinstance(event, Heard):
            self._line("heard", printable(event.text) or "(no words)")
        elif isinstance(event, ActionChosen):
            self._line("does", printable(event.text))
        elif isinstance(event, ReplyText) and not self._plain:
            text = printable(event.text)
            text = text if self._saying else text.lstrip()
            if text and not self._saying:
                self._console.print(_label("says"), end="")
                self._saying = True
            self._console.out(text, end="", highlight=False)
        elif isinstance(event, ReplyAudio) and not event.first_sample:
            self._break()
        elif isinstance(event, Spoken):
            self._spoken += event.text
        elif isinstance(event, Interrupted):
            heard = event.heard / SAMPLE_RATE
            self._stopped = f"turn={event.turn} heard={heard:.2f}s reason={event.reason}"
        elif isinstance(event, TurnEnded):
            self._ended(event.trace)
        elif isinstance(event, StateChanged) and self._plain:
            self._line("state", f"{event.state} ({event.reason})")
        elif isinstance(event, DeviceChanged):
            self._line("device", printable(event.message))

    def _ended(self, trace: TurnTrace) -> None:
        self._break()
        spoken, stopped, self._spoken, self._stopped = self._spoken, self._stopped, "", ""
        said = printable(spoken if stopped else trace.said).strip()
        if stopped and self._plain:
            self._line("says", said or "(interrupted before a word)")
            self._line("interrupted", stopped)
        elif not said:
            self._line("says", "(speech without words)" if trace.reply_samples else "(nothing)")
        elif self._plain:
            self._line("says", said)
        if trace.ended not in ("complete", "long enough"):
            self._line("ended", printable(trace.ended))
        if self._plain:
            self._line("trace", summary(trace))
        else:
            self._console.print()
            self._console.print(table(trace))

    def _line(self, label: str, text: str) -> None:
        self._break()
        if self._plain:
            self._console.out(f"{label}: {text}", highlight=False)
        else:
            self._console.print(_label(label), Text(text), sep="")

    def _break(self) -> None:
        if self._saying:
            self._console.out()
        self._saying = False


class ExportBar:
    """A progress bar for graphs that are made on first use; nothing if none has to be."""

    def __init__(self, console: Console, plain: bool = False) -> None:
        self._console = console
        self._plain = plain
        self._bar: Progress | None = None

    def __call__(self, name: str, done: int, count: int) -> None:
        """See :data:`agent.graphs.Progress`."""
        if self._plain or not self._console.is_terminal:
            if name:
                self._console.out(f"exporting {name} ({done + 1} of {count})", highlight=False)
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console)
            self._bar.start()
            self._bar.add_task("")
        text = f"exporting {name} to ONNX (once)" if name else "exported to ONNX"
        self._bar.update(self._bar.task_ids[0], description=text, completed=done, total=count)
        if done == count:
            self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def loading(console: Console, what: str, plain: bool = False) -> Iterator[ExportBar]:
    """Say that something is being loaded; gives the bar for graphs that have to be made."""
    bar = ExportBar(console, plain)
    if not plain:
        console.print(f"{what} ...")
    try:
        yield bar
    finally:
        bar.close()


def summary(trace: TurnTrace) -> str:
    """The times of a turn in one line: ms after the end of speech, then the turn as a whole."""
    parts = [f"turn={trace.turn}"]
    parts += [f"{name}={time:.0f}ms" for name, time in trace.milliseconds.items()]
    parts += [f"heard={trace.speech_seconds:.2f}s", f"spoken={trace.reply_seconds:.2f}s"]
    if trace.real_time_factor is not None:
        parts.append(f"real_time_factor={trace.real_time_factor:.2f}")
    dropped = sum(int(counters["dropped"]) for counters in trace.channels.values())
    return " ".join([*parts, f"dropped={dropped}"])


def printable(text: str) -> str:
    """``text`` on one line and without control characters: a model may write any byte."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def _label(name: str) -> Text:
    return Text(f"{name:<7}", style="bold cyan")
