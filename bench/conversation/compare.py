"""Two results side by side: what became slower beyond noise. ``python -m agent bench compare``.

The turns of a run are drawn again with replacement, a thousand times for both runs, and the figure
taken anew each time; so the spread of the difference is known without assuming a distribution.
Turns are drawn whole: tokens of one turn are alike, and counting each would make noise look small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agent.commands import Debug, Plain, mendable
from agent.errors import UserError
from bench.conversation.document import COUNTERS, FIGURES, Document, Row, read
from bench.conversation.document import values as values_of

WORSE, BETTER, SAME = "worse", "better", ""
QUANTILES = {"p50": 50, "p95": 95}
_DRAWS = 1000
_DOUBT = 0.01  # chance, about, of marking a difference that is none
_LEAST_SHARE, _LEAST_MS = 0.05, 1.0  # what is smaller than both of these matters to nobody
_FEWEST = 5  # turns below which nothing is said of noise
_LONGEST = 60  # characters of a value that is shown
_MEMORY = 1.1, 20.0  # times as much and MB more


@dataclass(frozen=True)
class Difference:
    """One figure of one system in both runs.

    Attributes:
        low, high: where the difference lies with a confidence of 99 %, in the figure's unit; not a
            number where nothing was drawn.
        verdict: "worse", "better", or empty if it is within noise.
    """

    system: str
    figure: str
    before: float
    after: float
    low: float
    high: float
    verdict: str


def compare(before: Document, after: Document, seed: int = 0) -> list[Difference]:
    """Every figure that both have.

    Raises:
        UserError: they have no system in common.
    """
    common = [name for name in before["systems"] if name in after["systems"]]
    if not common:
        one, other = (", ".join(document["systems"]) for document in (before, after))
        raise UserError(f"one result measures {one}, the other {other}: nothing to compare")
    rng = np.random.default_rng(seed)
    found = []
    for name in common:
        turns = [document["systems"][name]["turns"] for document in (before, after)]
        for figure in FIGURES:
            several = [_per_turn(rows, figure) for rows in turns]
            if all(several):
                found += [_spread(name, figure, q, several, rng) for q in QUANTILES]
        found += [_count(name, counter, turns) for counter in COUNTERS]
        found += _memory(name, turns)
    return found


def _per_turn(rows: Sequence[Row], figure: str) -> list[float]:
    """One value for each turn that has any: the mean of its tokens, where they are what counts."""
    each = (values_of([row], figure) for row in rows)
    return [float(np.mean(values)) for values in each if values]


def _spread(
    system: str,
    figure: str,
    quantile: str,
    several: Sequence[Sequence[float]],
    rng: np.random.Generator,
) -> Difference:
    q = QUANTILES[quantile]
    before, after = (float(np.percentile(values, q)) for values in several)
    drawn = [np.percentile(_again(values, rng), q, axis=1) for values in several]
    low, high = np.percentile(drawn[1] - drawn[0], [50 * _DOUBT, 100 - 50 * _DOUBT])
    least = max(_LEAST_SHARE * abs(before), 0.0 if figure == "real_time_factor" else _LEAST_MS)
    verdict = SAME
    if min(map(len, several)) >= _FEWEST and abs(after - before) > least:
        verdict = WORSE if low > 0 else BETTER if high < 0 else SAME
    name = f"{FIGURES[figure]}, {quantile}"
    return Difference(system, name, before, after, float(low), float(high), verdict)


def _again(values: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    return rng.choice(np.asarray(values), size=(_DRAWS, len(values)))


def _count(system: str, counter: str, turns: Sequence[Sequence[Row]]) -> Difference:
    """What should be 0. Of all that was counted in both, is the share of the later too large?"""
    counts = [sum(_counted(row, counter) for row in rows) for rows in turns]
    before, after = counts
    share = len(turns[1]) / max(1, len(turns[0]) + len(turns[1]))
    worse = _tail(sum(counts), after, share) < _DOUBT
    better = _tail(sum(counts), before, 1 - share) < _DOUBT
    verdict = WORSE if worse else BETTER if better else SAME
    return Difference(system, COUNTERS[counter], before, after, math.nan, math.nan, verdict)


def _counted(row: Row, counter: str) -> int:
    outcomes = {"lost": "lost", "no_answer": "silent"}
    if counter in outcomes:
        return int(row["outcome"] == outcomes[counter])
    return int(row.get(counter, 0))


def _tail(count: int, least: int, share: float) -> float:
    """The chance of ``least`` or more of ``count`` where each is one with chance ``share``."""
    if not least:
        return 1.0
    if count > 1000:  # by then a normal distribution is close enough
        deviation = math.sqrt(count * share * (1 - share)) or 1.0
        return 0.5 * math.erfc((least - 0.5 - count * share) / (deviation * math.sqrt(2)))
    chances = (
        math.comb(count, n) * share**n * (1 - share) ** (count - n) for n in range(least, count + 1)
    )
    return math.fsum(chances)


def _memory(system: str, turns: Sequence[Sequence[Row]]) -> list[Difference]:
    most = [max((row.get("memory_mb", 0.0) for row in rows), default=0.0) for rows in turns]
    before, after = most
    if not (before and after):
        return []
    times, more = _MEMORY
    worse = after > times * before and after > before + more
    better = before > times * after and before > after + more
    verdict = WORSE if worse else BETTER if better else SAME
    return [Difference(system, "memory, MB", before, after, math.nan, math.nan, verdict)]


def doubts(before: Document, after: Document) -> list[str]:
    """Why the two may differ for other reasons than the program."""
    found = []
    names = ("processor", "cores", "config", "model", "python")
    for name in names:
        one, other = before["about"].get(name), after["about"].get(name)
        if one != other:
            found.append(f"{name}: {one} before, {other} after")
    for name, one in before["plan"].items():
        other = after["plan"].get(name)
        if one != other:
            found.append(f"plan, {name}: {_short(one)} before, {_short(other)} after")
    loads = [_load(document) for document in (before, after)]
    if max(loads) > 1.0 + 2 * min(loads):
        found.append(f"load average: {loads[0]:.1f} before, {loads[1]:.1f} after")
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _load(document: Document) -> float:
    load = document["about"].get("load_average") or {}
    return max((float(value) for value in load.values()), default=0.0)


def table(found: Sequence[Difference]) -> Table:
    """One line for each figure; what is beyond noise is marked."""
    out = Table(box=SIMPLE_HEAD, title="ms unless said otherwise", title_justify="left")
    for head in ("", "before", "after", "difference, 99 % between", ""):
        out.add_column(head, justify="left" if not head else "right")
    styles = {WORSE: "bold red", BETTER: "green", SAME: ""}
    system = ""
    for row in found:
        if row.system != system:
            system = row.system
            out.add_section()
            out.add_row(system, style="bold")
        exact = row.before == int(row.before) and row.after == int(row.after)
        form = "{:.0f}" if exact else "{:.3f}" if "factor" in row.figure else "{:.1f}"
        spread = "" if math.isnan(row.low) else f"{form} to {form}".format(row.low, row.high)
        out.add_row(
            row.figure, form.format(row.before), form.format(row.after), spread, row.verdict,
            style=styles[row.verdict],
        )  # fmt: skip
    return out


@mendable
def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The earlier result.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The later one.")],
    fail: Annotated[
        bool, typer.Option("--fail", help="Exit with 1 if something became worse: for CI.")
    ] = False,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Compare two results; what became worse or better beyond noise is marked.

    Both should come from the same machine under the same load, or nothing can be said of the
    program. A difference counts if it is larger than 5 % and 1 ms and unlikely to be chance (1 %).
    """
    one, other = read(before), read(after)
    found = compare(one, other)
    console = Console(no_color=plain, highlight=False, markup=False)
    console.print(table(found))
    for doubt in doubts(one, other):
        console.print(f"not alike: {doubt}", soft_wrap=True)
    worse = [d for d in found if d.verdict == WORSE]
    better = [d for d in found if d.verdict == BETTER]
    console.print(f"{len(worse)} worse, {len(better)} better, the rest within noise")
    if worse and fail:
        raise typer.Exit(1)
