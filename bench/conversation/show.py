"""Results as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench.conversation.document import COUNTERS, FIGURES, Document

_HEADS = ("p50", "p95", "p99", "n")


def show(found: Document, console: Console) -> None:
    """The figures of every system, what should be 0, memory, and the comparison of the two."""
    about = found["about"]
    load = about["load_average"]
    for name, system in found["systems"].items():
        console.print(_figures(name, system["summary"]))
        console.print(counters(system["summary"]), soft_wrap=True)
        for died in (row for row in system["turns"] if row["outcome"] == "died"):
            console.print(f"in turn {died['turn']} {died['ended']}; nothing more was asked",
                          soft_wrap=True)  # fmt: skip
    for figure, ratio in found["ratios"].items():
        console.print(f"{FIGURES[figure]}: {ratio:g} times sooner than the reference flow (p50)")
    console.print(
        f"{about.get('processor') or about['platform']}, {about['cores']} cores, load "
        f"{load['before']} to {load['after']}, commit {about['commit'] or 'unknown'}",
        soft_wrap=True,
    )


def _figures(name: str, summary: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=f"{name}, {summary['turns']} turns, ms",
                  title_justify="left")  # fmt: skip
    table.add_column("")
    for head in _HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for figure, title in FIGURES.items():
        found = summary["figures"].get(figure)
        if found:
            cells = (number(figure, found[key]) for key in _HEADS[:3])
            table.add_row(title, *cells, str(found["n"]))
    return table


def number(figure: str, value: float) -> str:
    """A figure as people read it."""
    if figure == "real_time_factor":
        return f"{value:.3f}"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def counters(summary: dict[str, Any]) -> str:
    """In words: what should be 0 and is not, what speculation did, memory, the cost's trend."""
    counted = summary["counters"]
    wrong = [f"{counted[name]} {title}" for name, title in COUNTERS.items() if counted[name]]
    parts = ["; ".join(wrong) if wrong else "no glitch, drop, loss or false endpoint"]
    guess = summary["speculation"]
    if guess["speculations"]:
        parts.append(
            f"{guess['speculations']} speculations, {guess['refuted']} refuted, "
            f"{guess['wasted_tokens']} tokens wasted"
        )
    memory, trend = summary.get("memory"), summary.get("cost_trend")
    if memory:
        parts.append(
            f"memory {memory['first_mb']:.0f} MB after the first turn, "
            f"{memory['after_10_turns_mb']:.0f} after ten, {memory['last_mb']:.0f} at the end, "
            f"{memory['most_mb']:.0f} at most"
        )
    if trend:
        parts.append(f"cost of the last turn {trend['ratio']:g} times that of the first (trend)")
    return "\n".join(parts)
