"""The latency waterfall of a session as a picture (needs matplotlib, the extra [plot])."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent.errors import UserError
from agent.telemetry import MARKS, TurnTrace


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
    colours = dict(zip(MARKS, pyplot.get_cmap("viridis")([n / 8 for n in range(9)]), strict=False))
    for row, trace in enumerate(traces):
        before = 0.0
        for name, time in trace.milliseconds.items():
            label = MARKS[name] if row == 0 else None
            axes.barh(row, time - before, left=before, color=colours[name], label=label)
            before = time
    axes.set_yticks(range(len(traces)), [f"turn {trace.turn}" for trace in traces])
    axes.invert_yaxis()
    axes.set_xlabel("ms after the end of speech")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)
