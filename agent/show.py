"""What a person sees of a conversation on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from agent.events import Event, Heard, ReplyAudio, ReplyText, TurnEnded
from agent.telemetry import TurnTrace, table


class Transcript:
    """Prints events as they come: the words heard, the words said, the times of the turn.

    Args:
        plain: lines for logs, without colours, tables or half-written lines.
    """

    def __init__(self, console: Console, plain: bool = False) -> None:
        self._console = console
        self._plain = plain
        self._saying = False  # a line of the reply is being written

    def __call__(self, event: Event) -> None:
        if isinstance(event, Heard):
            self._line("heard", event.text or "(no words)")
        elif isinstance(event, ReplyText) and not self._plain:
            text = event.text if self._saying else event.text.lstrip()
            if text and not self._saying:
                self._console.print(_label("says"), end="")
                self._saying = True
            self._console.out(text, end="", highlight=False)
        elif isinstance(event, ReplyAudio) and not event.first_sample:
            self._break()
        elif isinstance(event, TurnEnded):
            self._ended(event.trace)

    def _ended(self, trace: TurnTrace) -> None:
        self._break()
        said = trace.said.strip()
        if not said:
            self._line("says", "(speech without words)" if trace.reply_samples else "(nothing)")
        elif self._plain:
            self._line("says", said)
        if trace.ended not in ("complete", "long enough"):
            self._line("ended", trace.ended)
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


def _label(name: str) -> Text:
    return Text(f"{name:<7}", style="bold cyan")
