"""The latency waterfall: which step of a turn took place when.

On the terminal, for one turn; as a picture, for a session (needs matplotlib, the extra [plot]).
A reply that is prepared while the hangover is still running has most of its steps in it, so steps
overlap the hangover, and in an odd turn lie before the end of speech.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from agent.errors import UserError
from agent.telemetry import TurnTrace

STEPS: dict[str, tuple[str, str]] = {
    "hangover": ("endpoint", "bright_black"),
    "encode": ("encoder_done", "blue"),
    "prefill": ("prefill_done", "cyan"),
    "first token": ("first_token", "green"),
    "first sample": ("first_sample", "yellow"),
    "device": ("first_heard", "magenta"),
}
"""The steps in order: the mark (:data:`agent.telemetry.MARKS`) that ends each, and its colour."""

_COLOURS = ("#c7cdd4", "#1f77b4", "#17becf", "#2ca02c", "#e0a800", "#b04fb8")  # the same, on paper


@dataclass(frozen=True)
class Step:
    """A step of a turn, ``start`` to ``end`` in ms after the end of speech."""

    name: str
    start: float
    end: float


def steps(trace: TurnTrace) -> list[Step]:
    """The steps that ``trace`` has marks for, in order.

    Each begins where the one before it ended. The first begins at the end of speech if the reply
    was prepared in the hangover, else at the endpoint; and no sound is let out before the endpoint.
    """
    times = trace.milliseconds
    endpoint = times.get("endpoint", 0.0)
    done = 0.0 if trace.counts.get("speculation_hits") else endpoint
    found = []
    for name, (mark, _) in STEPS.items():
        if mark not in times:
            continue
        end = times[mark]
        if name == "hangover":
            found.append(Step(name, min(0.0, end), end))
            continue
        if name == "first sample" and end >= endpoint:
            done = max(done, endpoint)
        found.append(Step(name, min(done, end), end))
        done = end
    return found


def chart(trace: TurnTrace, width: int = 60, ascii_only: bool = False) -> Table:
    """The waterfall of one turn for the terminal: a line for each step, at most ``width`` wide."""
    found = steps(trace)
    first = min((step.start for step in found), default=0.0)
    last = max((step.end for step in found), default=0.0)
    cells = max(8, min(width, 100) - 24)
    out = Table.grid(padding=(0, 1))
    out.add_column(no_wrap=True)
    out.add_column(no_wrap=True)
    out.add_column(no_wrap=True, overflow="crop")
    for step in found:
        begin, end = (
            round(cells * (t - first) / max(last - first, 1.0)) for t in (step.start, step.end)
        )
        begin = min(begin, cells - 1)
        bar = ("#" if ascii_only else "━") * max(1, end - begin)
        line = Text(" " * begin).append(bar, style=STEPS[step.name][1])
        out.add_row(Text(step.name), Text(f"{step.end - step.start:4.0f} ms", style="dim"), line)
    return out


def headline(trace: TurnTrace) -> str:
    """What counts for who talks: from the end of speech to the first sound, and what hid in it."""
    times = trace.milliseconds
    sound = times.get("first_heard", times.get("first_sample"))
    if sound is None:
        return f"turn {trace.turn}: no sound"
    text = f"turn {trace.turn}: {sound:.0f} ms to the first sound"
    if "endpoint" in times:
        text += f", {sound - times['endpoint']:.0f} ms of them after the hangover"
    return text


def check_plot(path: Path) -> None:
    """Whether a picture can be made at ``path``, asked before any work is done.

    Raises:
        UserError: matplotlib is not installed, or the ending or the folder is none.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "--plot needs the package matplotlib: pip install 'spiritlm-agent[plot]'"
        ) from None
    matplotlib.use("Agg")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"{path}: ending not known, expected .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; create it, or write elsewhere")


def plot(path: Path, traces: Sequence[TurnTrace]) -> None:
    """One bar for each turn, one colour for each step, in ms after the end of speech.

    Raises:
        UserError: see :func:`check_plot`, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.4 * len(traces)), layout="constrained")
    colours = dict(zip(STEPS, _COLOURS, strict=True))
    labelled: set[str] = set()
    for row, trace in enumerate(traces):
        for step in steps(trace):
            # What is done in the hangover must not hide it: a narrow bar on a broad one.
            height = 0.8 if step.name == "hangover" else 0.4
            label = None if step.name in labelled else step.name
            labelled.add(step.name)
            length = step.end - step.start
            colour = colours[step.name]
            axes.barh(row, length, height, left=step.start, color=colour, label=label)
    axes.set_yticks(range(len(traces)), [f"turn {trace.turn}" for trace in traces])
    axes.invert_yaxis()
    axes.set_xlabel("ms after the end of speech")
    figure.legend(loc="outside upper center", ncols=6, fontsize="small", frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)
