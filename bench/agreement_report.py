"""The tables and the picture of :mod:`bench.agreement`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def markdown(report: Row, picture: str) -> str:
    """The report as tables."""
    lines = [
        f"# Streaming agreement, {report['date']}", "",
        f"`{report['command']}` on {report['machine']}; load {report['load_average']} before, "
        f"{report['load_average_after']} after. Times: processor time of one thread.", "",
        "Speech: " + "; ".join(f"{s['utterances']} utterances, {s['seconds']} s ({name})"
                               for name, s in report["speech"].items()) + ".", "",
        f"![Heat maps]({picture})", "",
    ]  # fmt: skip
    return "\n".join([*lines, *_phonetic(report), *_full_size(report), *_others(report)])


def _phonetic(report: Row) -> list[str]:
    cost = {_shape(row): row for row in report["nano_cost"]}
    lines = [
        "## nano's phonetic units", "",
        "Same frames / edit distance, against nano's offline units (its own window: chunk 12, left "
        "60, look-ahead 8) and against listening to the whole utterance. Chunk, look-ahead and "
        "left context in frames of 40 ms; wait: from the start of a chunk's first frame to its "
        "unit.", "",
        *_head("chunk", "look-ahead", "left", "own window", "whole utterance", "wait, ms",
               "real-time factor"),
    ]  # fmt: skip
    for row in report["nano"]:
        c = cost[_shape(row)]
        lines.append(_line(
            row["chunk"], row["look_ahead"], row["left"], _pair(row["defined"]["all"]),
            _pair(row["whole"]["all"]), c["wait_ms"], c["real_time_factor"],
        ))  # fmt: skip
    names = list(report["speech"])
    mine = next(r for r in report["nano"] if _shape(r) == (12, 8, 60))
    lines += ["", "The shipped window against the whole utterance, by speech: " + "; ".join(
        f"{name} {_pair(mine['whole'][name])}" for name in names) + ".", ""]  # fmt: skip
    return lines


def _full_size(report: Row) -> list[str]:
    lines = [
        "## HuBERT BASE at 25 Hz (official shape, layer 11), PyTorch, random weights", "",
        "Cost and latency only.", "",
        *_head("chunk", "look-ahead", "left", "ms a window", "wait, ms", "real-time factor"),
    ]  # fmt: skip
    keys = ("chunk", "look_ahead", "left", "window_ms", "wait_ms", "real_time_factor")
    return [*lines, *(_line(*(row[k] for k in keys)) for row in report["full_size_cost"]), ""]


def _others(report: Row) -> list[str]:
    lines = [
        "## Pitch", "",
        "Same frames, against the exact pitch units. Sizes in pitch units of 80 ms.", "",
        *_head("chunk", "look-ahead", "left", "mean F0 so far", "mean of the utterance before",
               "mean known", "real-time factor"),
    ]  # fmt: skip
    for row in report["pitch"]:
        modes = ("mean_so_far", "mean_before", "mean_known")
        share = (row[mode]["all"]["frames"] for mode in modes)
        lines.append(_line(row["chunk"], row["look_ahead"], row["left"], *map(_share, share),
                           row["real_time_factor"]))  # fmt: skip
    lines += ["", "## Style", "", *_head("judged from, s", "same seconds")]
    lines += [_line(row["past_s"], _share(row["all"]["frames"])) for row in report["style"]]
    lines += ["", "## The whole stream", "",
              "Tokens told before the end that are in place at the end: the longest common prefix, "
              "which is what a language model fed early need not be fed again.", "",
              *_head("speech", "exact tokens", "told early", "in place", "first wrong one"),
    ]  # fmt: skip
    for row in report["stream"]:
        first = ", ".join(f"{kind} {n}" for kind, n in row["first_wrong"].items())
        kept = f"{row['kept']} ({row['share_kept']:.1%})"
        lines.append(_line(row["speech"], row["exact"], row["told"], kept, first))
    return [*lines, ""]


def _shape(row: Row) -> tuple[int, int, int]:
    return row["chunk"], row["look_ahead"], row["left"]


def _share(value: float) -> str:
    return f"{value:.3f}"


def _pair(row: Row) -> str:
    return f"{row['frames']:.3f} / {row['edit_distance']:.3f}"


def _head(*names: str) -> list[str]:
    return [_line(*names), _line(*("---" for _ in names))]


def _line(*values: object) -> str:
    return "| " + " | ".join(str(v) for v in values) + " |"


def draw(report: Row, path: Path) -> None:
    """Heat maps: look-ahead against chunk, a column for each left context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    maps: list[tuple[str, list[Row], Callable[[Row], float], str]] = [
        ("nano: same frames as its own window", report["nano"],
         lambda r: r["defined"]["all"]["frames"], "viridis"),
        ("nano: same frames as the whole utterance", report["nano"],
         lambda r: r["whole"]["all"]["frames"], "viridis"),
        ("nano: real-time factor, one thread", report["nano_cost"],
         lambda r: r["real_time_factor"], "magma_r"),
        ("HuBERT BASE to layer 11: real-time factor, one thread", report["full_size_cost"],
         lambda r: r["real_time_factor"], "magma_r"),
    ]  # fmt: skip
    lefts = sorted({r["left"] for r in report["nano"]})
    figure, axes = plt.subplots(
        len(maps), len(lefts), figsize=(11, 12), layout="constrained", squeeze=False
    )
    for line, (title, rows, value, colours) in zip(axes, maps, strict=True):
        values = [value(r) for r in rows]
        for axis, left in zip(line, lefts, strict=True):
            part = [(r, value(r)) for r in rows if r["left"] == left]
            _heat(axis, part, (min(values), max(values)), colours)
            axis.set_title(f"{title}\nleft context {left * 40 / 1000:g} s", fontsize=8)
    figure.savefig(path, dpi=130)


def _heat(
    axis: Any, cells: Sequence[tuple[Row, float]], span: tuple[float, float], colours: str
) -> None:
    import numpy as np

    chunks = sorted({r["chunk"] for r, _ in cells})
    aheads = sorted({r["look_ahead"] for r, _ in cells})
    grid = np.full((len(aheads), len(chunks)), np.nan)
    for row, value in cells:
        grid[aheads.index(row["look_ahead"]), chunks.index(row["chunk"])] = value
    axis.imshow(grid, cmap=colours, vmin=span[0], vmax=span[1], aspect="auto", origin="lower")
    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = (value - span[0]) / (span[1] - span[0] + 1e-9) < 0.55
            ink = "white" if dark == (colours == "viridis") else "black"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(len(chunks)), [f"{c * 40}" for c in chunks])
    axis.set_yticks(range(len(aheads)), [f"{a * 40}" for a in aheads])
    axis.set_xlabel("chunk, ms", fontsize=8)
    axis.set_ylabel("look-ahead, ms", fontsize=8)
    axis.tick_params(labelsize=8)
