"""What one sees of a live conversation on the terminal.

Above, ordinary lines that scroll away: what was heard, what was said of it, how long it took.
Below, a few lines that are drawn again and again: level, state, units, the words as they are
spoken. Nothing runs in the background: it is drawn when an event comes and the last drawing is old
enough, and levels come all the time.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.text import Text

from agent.events import (
    ActionChosen,
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
from agent.show import Transcript, printable
from agent.telemetry import TurnTrace
from agent.waterfall import chart, headline
from stages import SAMPLE_RATE
from stages.vocoder_stream import UnitSpan

_INTERVAL = 1 / 12  # seconds between drawings
_REVISED = 0.5  # seconds for which a revised unit is marked
_WIDEST = 100  # columns; longer lines are hard to read
_FLOOR = -60.0  # dBFS: an empty meter
_UNITS_KEPT = 400  # more than fit on any line
_UNIT_STYLES = {"H": "cyan", "P": "magenta", "S": "yellow"}
_STATE_STYLES = {
    "listening": "bright_black",
    "hearing": "bold green",
    "maybe-finished": "bold yellow",
    "answering": "bold blue",
}
_TALLIES = "▁▂▃▄▅▆▇█"  # a reply's unit, as tall as it is long
_FRAME = 640  # samples: the shortest that a unit is spoken


@dataclass
class _Turn:
    """What is shown of one turn."""

    units: list[str] = field(default_factory=list)
    revised: int = 0  # units before this one were taken over as they were
    revised_until: float = 0.0
    heard: str = ""
    does: str = ""
    planned: str = ""
    spoken: str = ""
    heard_samples: int = 0
    spans: list[UnitSpan] = field(default_factory=list)
    interrupted: float | None = None  # seconds of the reply that were heard

    def revise(self, event: RequestUnits, now: float) -> None:
        if event.keep < len(self.units):
            self.revised, self.revised_until = event.keep, now + _REVISED
        self.units[event.keep :] = map(printable, event.units)
        self.take_back()

    def take_back(self) -> None:
        """The speaker went on: what was planned as the reply is none."""
        self.heard = self.planned = self.spoken = self.does = ""
        self.spans.clear()


class LiveView:
    """Shows a conversation: ``with LiveView(console) as view``, then call it with each event.

    Where the console is no terminal, or with ``plain``, it prints lines for logs
    (:class:`agent.show.Transcript`). On leaving, whatever the reason, the cursor is back, the
    moving part is gone and the lines above it stay. Everything happens in the thread that calls.

    Args:
        clock: seconds of a monotonic clock; replaced in tests.
    """

    def __init__(
        self,
        console: Console,
        plain: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        moving = console.is_terminal and not console.is_dumb_terminal and not plain
        self._plain = None if moving else Transcript(console, plain=True)
        self._clock = clock
        self._drawn = -_INTERVAL
        self._state, self._level = "listening", Level(_FLOOR, False)
        # More than one where the speech that interrupts is told before the end of what it broke.
        self._turns: dict[int, _Turn] = {}
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            get_renderable=self.picture,
            vertical_overflow="crop",
        )

    def __enter__(self) -> LiveView:
        if self._plain is None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._plain is None:
            for turn in self._turns.values():
                self._above(*self._words(turn, over=True))
            self._turns.clear()
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show what ``event`` changes."""
        if self._plain is not None:
            self._plain(event)
            return
        self._take(event)
        now = self._clock()
        if now - self._drawn >= _INTERVAL:
            self._drawn = now
            self._live.refresh()

    def tell(self, sentence: str) -> None:
        """Put a sentence for the user among the lines, highlighted."""
        if self._plain is not None:
            self._console.out(f"note: {printable(sentence)}", highlight=False)
        else:
            self._above(_labelled("note", Text(printable(sentence), style="bold yellow")))

    def _take(self, event: Event) -> None:
        if isinstance(event, Level):
            self._level = event
        elif isinstance(event, StateChanged):
            self._state = event.state
        elif isinstance(event, DeviceChanged):
            style = "bold green" if event.present else "bold red"
            self._above(_labelled("device", Text(printable(event.message), style=style)))
        elif isinstance(event, TurnEnded):
            self._end(event.trace)
        else:
            self._take_of_turn(event, self._turns.setdefault(event.turn, _Turn()))

    def _take_of_turn(
        self,
        event: TurnStarted
        | Heard
        | RequestUnits
        | ActionChosen
        | ReplyText
        | ReplyAudio
        | Spoken
        | Interrupted,
        turn: _Turn,
    ) -> None:
        if isinstance(event, RequestUnits):
            turn.revise(event, self._clock())
        elif isinstance(event, Heard):
            turn.take_back()
            turn.heard = printable(event.text)
        elif isinstance(event, ActionChosen):
            turn.does = printable(event.text)
        elif isinstance(event, ReplyText):
            turn.planned += printable(event.text)
        elif isinstance(event, ReplyAudio):
            turn.spans += event.units
        elif isinstance(event, Spoken):
            turn.spoken += printable(event.text)
            turn.heard_samples = event.heard
        elif isinstance(event, Interrupted):
            turn.heard_samples = event.heard
            turn.interrupted = event.heard / SAMPLE_RATE

    def _end(self, trace: TurnTrace) -> None:
        turn = self._turns.pop(trace.turn, _Turn())
        turn.heard = turn.heard or printable(trace.heard)
        turn.planned = turn.planned or printable(trace.said)
        if turn.interrupted is None:
            turn.spoken = turn.planned
        lines = self._words(turn, over=True)
        if trace.ended not in ("complete", "long enough", "") and turn.interrupted is None:
            lines.append(_labelled("ended", Text(printable(trace.ended), style="yellow")))
        width, plain = self._width, self._console.options.ascii_only
        head = Text(headline(trace), style="dim", no_wrap=True, overflow="ellipsis")
        self._above(*lines, head, chart(trace, width, plain), Text())

    def _above(self, *lines: RenderableType) -> None:
        for line in lines:
            self._console.print(line, width=self._width, highlight=False)

    # Drawing.

    @property
    def _width(self) -> int:
        # The last column stays free: a full line wraps when the terminal gets narrower.
        return max(10, min(self._console.width - 1, _WIDEST))

    def picture(self) -> RenderableType:
        """The moving part as it is now."""
        lines = [self._meter()]
        for turn in self._turns.values():
            lines += self._words(turn, over=False)
        if self._turns:
            latest = self._turns[max(self._turns)]
            lines += [self._request(latest), self._reply(latest)]
        return Constrain(Group(*(line for line in lines if line.plain)), self._width)

    def _meter(self) -> Text:
        full, empty = ("#", "-") if self._console.options.ascii_only else ("━", "─")
        cells = max(4, min(32, self._width - 40))
        share = (self._level.dbfs - _FLOOR) / -_FLOOR
        filled = max(0, min(cells, round(cells * share)))
        hot = filled > 0.9 * cells
        out = Text(no_wrap=True)
        out.append(f"{self._state:<15}", style=_STATE_STYLES.get(self._state, ""))
        out.append(full * filled, style="red" if hot else "green" if self._level.voiced else "blue")
        out.append(empty * (cells - filled), style="bright_black")
        out.append(f" {max(self._level.dbfs, -99):4.0f} dB ", style="dim")
        out.append("speech" if self._level.voiced else "", style="bold green")
        out.truncate(self._width, overflow="crop")
        return out

    def _words(self, turn: _Turn, over: bool) -> list[Text]:
        """The request, and the reply: what was spoken, and what is planned or was never heard."""
        lines = []
        if turn.heard or over:
            lines.append(_labelled("heard", Text(turn.heard.strip() or "(no words)")))
        if turn.does:
            lines.append(_labelled("does", Text(turn.does)))
        rest = turn.planned[len(turn.spoken) :]
        says = Text(turn.spoken.lstrip())
        says.append(rest if turn.spoken else rest.lstrip(), "dim strike" if over else "dim")
        if turn.interrupted is not None:
            says.append(f" (interrupted after {turn.interrupted:.1f} s)", "yellow")
        if says or over:
            lines.append(_labelled("says", says or Text("(no words)", style="dim")))
        return lines

    def _request(self, turn: _Turn) -> Text:
        """The latest units of the request; those that were just revised are marked."""
        if not turn.units:
            return Text()
        marked = turn.revised if self._clock() < turn.revised_until else len(turn.units)
        room, shown = self._width - 7, []
        for index in range(len(turn.units) - 1, max(-1, len(turn.units) - _UNITS_KEPT), -1):
            name = turn.units[index].strip("[]")
            room -= len(name) + 1
            if room < 0:
                break
            style = _UNIT_STYLES.get(name[:1], "")
            shown.append((name, f"reverse {style}" if index >= marked else style))
        line = Text(no_wrap=True)
        for name, style in reversed(shown):
            line.append(name, style).append(" ")
        return _labelled("in", line)

    def _reply(self, turn: _Turn) -> Text:
        """The reply's units around the playhead, each as tall as it is long."""
        if not turn.spans:
            return Text()
        room = max(1, self._width - 7)
        played = sum(span.start < turn.heard_samples for span in turn.spans)
        first = max(0, min(played - room // 2, len(turn.spans) - room))
        line = Text(no_wrap=True)
        for index, span in enumerate(turn.spans[first : first + room], first):
            frames = max(1, (span.end - span.start) // _FRAME)
            tally = str(min(frames, 9))
            if not self._console.options.ascii_only:
                tally = _TALLIES[min(frames, len(_TALLIES)) - 1]
            line.append(tally, "bold blue" if index < played else "bright_black")
        return _labelled("out", line)


def screenshot(events: Iterable[Event], path: Path, title: str, width: int = 92) -> None:
    """Save what one sees after ``events`` as an SVG picture, ``width`` columns wide."""
    console = Console(
        file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor", width=width
    )
    view = LiveView(console, clock=lambda: -1.0)  # before its first drawing, for ever
    for event in events:
        view(event)
    console.print(view.picture())
    # Pictures must not fetch anything: the reader's own monospaced font will do.
    svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL)
    path.write_text("\n".join(map(str.rstrip, svg.splitlines())) + "\n", encoding="utf-8")


def _labelled(name: str, text: Text) -> Text:
    line = Text(no_wrap=text.no_wrap)
    return line.append(f"{name:<7}", style="bold cyan").append_text(text)
