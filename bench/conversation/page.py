"""Results as one HTML file that needs nothing else: tables, and drawings as SVG in the text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.conversation.document import FIGURES, Document, Row, cost, values
from bench.conversation.show import counters, number

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 240, 70, 42
_COLOURS = ("#2563a8", "#c2571a", "#4a8f3c", "#7d4fa0", "#a8922a", "#3f8f8c")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 760px; margin: 2rem auto; padding: 0 1rem;
       color: #1c2733; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #b8c2cc; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #4a5866; }
.about { color: #4a5866; font-size: .9rem; } pre { white-space: pre-wrap; }
"""
WATERFALL = {
    "hangover": ("end", "endpoint"),
    "encode": ("silence", "encoder_done"),
    "prefill": ("encoder_done", "prefill_done"),
    "first token": ("prefill_done", "first_token"),
    "first unit": ("first_token", "first_unit"),
    "vocode, wait": ("first_unit", "first_sample"),
    "loudspeaker": ("first_sample", "sound"),
}
"""Steps of a turn by the marks they lie between; "silence" is when a silence was noticed."""


def page(found: Document) -> str:
    """The whole report."""
    about, plan = found["about"], found["plan"]
    parts = [f"<h1>{_text(_title(found))}</h1>", _about(about)]
    if found["ratios"]:
        lines = (
            f"<li>{_text(FIGURES[name])}: <b>{ratio:g} times</b> sooner than the reference flow "
            "(medians of this run)</li>"
            for name, ratio in found["ratios"].items()
        )
        parts.append(f"<ul>{''.join(lines)}</ul>")
    for name, system in found["systems"].items():
        parts.append(f"<h2>{_text(name)}</h2>{_table(system['summary'])}")
        parts.append(f"<p>{_text(counters(system['summary'])).replace(chr(10), '<br>')}</p>")
    parts += _drawings({name: system["turns"] for name, system in found["systems"].items()})
    parts.append(f"<h2>What was asked for</h2><pre>{_text(_lines(plan))}</pre>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
        f"{_text(_title(found))}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(parts)}</body></html>\n"
    )


def _title(found: Document) -> str:
    return f"Voice agent benchmark, {found['about'].get('date', '')[:10]}"


def _text(value: object) -> str:
    return html.escape(str(value))


def _about(about: dict[str, Any]) -> str:
    load = about.get("load_average") or {}
    machine = about.get("processor") or about.get("platform", "")
    lines = [
        f"{machine}, {about.get('cores')} cores, load {load.get('before')} to {load.get('after')}",
        f"model {about.get('model', 'not ours')}, commit {about.get('commit') or 'unknown'}",
        ", ".join(f"{k} {v}" for k, v in about.get("packages", {}).items() if v),
    ]
    shown = "<br>".join(map(_text, lines))
    return f'<p class="about">{shown}<br><code>{_text(about.get("command", ""))}</code></p>'


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items() if value is not None)


def _table(summary: dict[str, Any]) -> str:
    head = "<tr><th>ms</th><th>p50</th><th>p95</th><th>p99</th><th>n</th></tr>"
    rows = []
    for name, found in summary["figures"].items():
        cells = "".join(f"<td>{number(name, found[key])}</td>" for key in ("p50", "p95", "p99"))
        rows.append(f"<tr><td>{_text(FIGURES[name])}</td>{cells}<td>{found['n']}</td></tr>")
    return f"<table>{head}{''.join(rows)}</table>"


def _drawings(systems: Mapping[str, Sequence[Row]]) -> list[str]:
    out = []
    inside = systems.get("agent", ())
    if any(row.get("marks_ms") for row in inside):
        out += ["<h2>Where the time goes (median of each moment)</h2>", waterfall(inside)]
    for figure in ("end_to_sample", "end_to_sound", "endpoint_to_sample", "barge_in_to_silence"):
        several = {name: values(rows, figure) for name, rows in systems.items()}
        several = {name: found for name, found in several.items() if found}
        if several:
            out += [f"<h2>{_text(FIGURES[figure])}: share of the turns within</h2>",
                    cumulative(several)]  # fmt: skip
    costs = {name: _points(rows, "turn", cost) for name, rows in systems.items()}
    costs = {name: points for name, points in costs.items() if len(points) > 1}
    if costs:
        out += ["<h2>Cost against the turn: ms of work for each second of speech</h2>",
                lines(costs, "turn", "ms")]  # fmt: skip
    memory = _points(inside, "at_seconds", lambda row: row.get("memory_mb"), 1 / 60)
    if len(memory) > 1:
        out += ["<h2>Memory against time</h2>", lines({"agent": memory}, "minutes", "MB")]
    return out


def _points(rows: Iterable[Row], x: str, y: Any, scale: float = 1.0) -> list[tuple[float, float]]:
    return [(row[x] * scale, found) for row in rows if x in row and (found := y(row)) is not None]


def waterfall(rows: Sequence[Row]) -> str:
    """A bar for each step, from and to the median moments of the turns, ms after the speech."""
    marks = [_moments(row) for row in rows if row["outcome"] == "answered"]
    bars = []
    for name, (start, stop) in WATERFALL.items():
        spans = [(m[start], m[stop]) for m in marks if start in m and stop in m]
        if spans:
            first, last = (float(v) for v in np.median(spans, axis=0))
            bars.append((name, min(first, last), last))
    most = max((end for _, _, end in bars), default=1.0)
    left, step = 96, 24
    plot = _Plot((0.0, most), (0.0, 1.0), len(bars) * step + _BOTTOM + 6, left)
    for n, (name, begin, end) in enumerate(bars):
        x, wide = plot.x(begin), max(1.5, plot.x(end) - plot.x(begin))
        y, colour = n * step + 4, _COLOURS[n % len(_COLOURS)]
        plot.add(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="14" fill="{colour}"/>')
        plot.text(left - 6, y + 11, name, "end")
        outside = x + wide + 70 > _WIDTH
        at, anchor = (x - 4, "end") if outside else (x + wide + 4, "start")
        plot.text(at, y + 11, f"{end - begin:.0f} ms", anchor)
    return plot.done("ms after the end of speech")


def _moments(row: Row) -> dict[str, float]:
    found = {"end": 0.0, **row.get("marks_ms", {})}
    if "end_to_sound" in row.get("ms", {}):
        found["sound"] = row["ms"]["end_to_sound"]
    found["silence"] = max(0.0, found["end_of_speech"]) if "end_of_speech" in found else 0.0
    return found


def cumulative(several: Mapping[str, Sequence[float]]) -> str:
    """For each system, the share of the turns that took at most so long."""
    curves = {}
    for name, found in several.items():
        ordered = sorted(found)
        shares = [(n + 1) / len(ordered) * 100 for n in range(len(ordered))]
        curves[name] = [(ordered[0], 0.0), *zip(ordered, shares, strict=True)]
    return lines(curves, "ms", "%")


def lines(several: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """A line through the points of each system; far-apart systems share a logarithmic axis."""
    everything = np.array([point for points in several.values() for point in points])
    (left, low), (right, high) = everything.min(axis=0), everything.max(axis=0)
    across = y == "%" and left > 0 and right > 20 * left
    bottom = 0.0 if y in ("%", "ms") else max(0.0, low - max(5.0, high - low))
    plot = _Plot((float(left), float(right)), (float(bottom), float(high)), logarithmic=across)
    plot.grid(y)
    for n, (name, points) in enumerate(several.items()):
        path = " ".join(f"{plot.x(a):.1f},{plot.y(b):.1f}" for a, b in points)
        colour = _COLOURS[n % len(_COLOURS)]
        plot.add(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(several) > 1:
            at, below = _LEFT + 130 * n, _HEIGHT - 12
            plot.add(f'<rect x="{at}" y="{below}" width="10" height="10" fill="{colour}"/>')
            plot.text(at + 16, below + 9, name, "start")
    return plot.done(x)


class _Plot:
    """An SVG with two axes."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], height: int = _HEIGHT,
        left: int = _LEFT, logarithmic: bool = False,
    ) -> None:  # fmt: skip
        self._log = logarithmic
        self._from, self._to = x[0], x[1] if x[1] > x[0] else x[0] + 1
        self._low, self._high = y[0], y[1] if y[1] > y[0] else y[0] + 1
        self._height, self._left = height, left
        self._parts: list[str] = []

    def x(self, value: float) -> float:
        """Where ``value`` is, from the left."""
        share = (value - self._from) / (self._to - self._from)
        if self._log:
            share = np.log(value / self._from) / np.log(self._to / self._from)
        return float(self._left + share * (_WIDTH - self._left - 20))

    def y(self, value: float) -> float:
        """Where ``value`` is, from the top."""
        share = (value - self._low) / (self._high - self._low)
        return float((self._height - _BOTTOM - 8) * (1 - share) + 8)

    def add(self, part: str) -> None:
        """Draw on."""
        self._parts.append(part)

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        """Write."""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>')

    def grid(self, unit: str) -> None:
        """Lines across, with their values."""
        for value in _ticks(self._low, self._high):
            y = self.y(value)
            self.add(f'<path d="M{self._left} {y:.1f}H{_WIDTH - 20}" stroke="#dfe4ea"/>')
            self.text(self._left - 6, y + 4, f"{value:g} {unit}", "end")

    def done(self, unit: str) -> str:
        """The drawing, with the values of the axis below it."""
        below = self._height - 22
        ticks = _ticks(self._from, self._to)
        if self._log:
            first, last = np.floor(np.log10(self._from)), np.ceil(np.log10(self._to))
            decades = (m * 10.0**d for d in np.arange(first, last + 1) for m in (1, 2, 5))
            ticks = [t for t in decades if self._from <= t <= self._to]
        for value in ticks:
            self.text(self.x(value), below, f"{value:g}", "middle")
        self.text(_WIDTH - 4, below + 19, unit, "end")
        inside = "".join(self._parts)
        return f'<svg viewBox="0 0 {_WIDTH} {self._height}" role="img">{inside}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round values between the two."""
    raw = (high - low) / 5
    size = 10.0 ** np.floor(np.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw)
    first = np.ceil(low / step)
    return [float(round(step * n, 10)) for n in np.arange(first, np.floor(high / step) + 1)]
