"""How long one waits for an answer, with speculation and without: ``python -m bench.turns``.

Recorded requests are spoken into the real session at the pace of the clock, and the replies are
played to nobody at that pace. The requests are the hesitant ones of :mod:`bench.endpointing`, so
that an endpoint can be wrong: those of speakers who seldom pause and of speakers who often do.
Everything after the endpoint that speculation could have done before it counts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agent.config import Config, load_config
from agent.events import TurnEnded
from agent.models import Models
from agent.playback import Clocked
from agent.session import Session
from agent.telemetry import TurnTrace
from bench.conversation.sound import matched
from bench.conversation.speaker import Speaker
from bench.endpointing import SPEAKERS, Recording, sessions
from bench.report import RESULTS, about, save

STEPS = {
    "end of speech to endpoint": ("end_of_speech", "endpoint"),
    "endpoint to first sample": ("endpoint", "first_sample"),
    "end of speech to first sample": ("end_of_speech", "first_sample"),
}
HEADS = dict(zip(STEPS, ("to the\nendpoint", "then to\na sound", "both"), strict=True))


@dataclass
class Run:
    """What one way of running gave.

    Attributes:
        traces: of the turns that ended where the request did.
        false_endpoints: turns that ended before it.
        lost: requests that got no turn of their own.
    """

    name: str
    traces: list[TurnTrace] = field(default_factory=list)
    false_endpoints: int = 0
    lost: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    dropped: int = 0

    def took(self, step: str) -> list[float]:
        """Milliseconds of a step in every turn."""
        start, end = STEPS[step]
        return [
            1e3 * (t.marks[end] - t.marks[start])
            for t in self.traces
            if {start, end} <= set(t.marks)
        ]


async def converse(
    models: Models, config: Config, requests: Sequence[Recording], listen: float, run: Run
) -> None:
    """Hold one conversation and note what its turns took."""
    playback = Clocked()
    async with Session(models, config) as session:
        speaker = Speaker(((request, False) for request in requests), listen, noise=0.0)
        traces: list[TurnTrace] = []
        source = speaker.speak(playback, session)
        async with aclosing(session.converse(source, playback)) as events:
            async for event in events:
                if isinstance(event, TurnEnded):
                    traces.append(event.trace)
                    speaker.over()
    for trace in traces:
        for name in ("speculations", "refuted", "speculation_hits", "wasted_tokens"):
            run.counts[name] = run.counts.get(name, 0) + trace.counts.get(name, 0)
    run.dropped += sum(int(c["dropped"]) for t in traces[-1:] for c in t.channels.values())
    begins, ends = [said.start for said in speaker.said], [said.end for said in speaker.said]
    for false, own in matched(begins, ends, traces):
        run.false_endpoints += false
        run.lost += own is None
        run.traces += [] if own is None else [traces[own]]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p95, rounded to 0.1 ms."""
    if not values:
        return {"p50": float("nan"), "p95": float("nan")}
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 1), "p95": round(float(p95), 1)}


def row(run: Run, requests: int) -> dict[str, Any]:
    """The figures of one way of running."""
    return {
        "name": run.name,
        "requests": requests,
        "answered": len(run.traces),
        "false_endpoints": run.false_endpoints,
        "ms": {step: percentiles(run.took(step)) for step in STEPS},
        "dropped": run.dropped,
        **run.counts,
    }


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table."""
    table = Table(box=SIMPLE_HEAD, title="ms, p50 / p95", title_justify="left")
    table.add_column("spec.", no_wrap=True)
    for step in STEPS:
        table.add_column(HEADS[step], justify="right", no_wrap=True)
    for name in ("answered", "false\nends", "refuted", "wasted\ntokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        times = [f"{r['ms'][s]['p50']:.0f} / {r['ms'][s]['p95']:.0f}" for s in STEPS]
        table.add_row(
            r["name"], *times, f"{r['answered']}/{r['requests']}", str(r["false_endpoints"]),
            f"{r['refuted']}/{r['speculations']}", str(r["wasted_tokens"]),
        )  # fmt: skip
    console.print(table)


def hidden(rows: Sequence[dict[str, Any]]) -> float:
    """Share of the time after the endpoint that speculation took away, at the median."""
    on, off = (r["ms"]["endpoint to first sample"]["p50"] for r in rows)
    return round(1 - on / off, 3)


def draw(runs: Sequence[Run], path: Path) -> None:
    """A stacked waterfall of the median turn, with and without speculation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from agent.waterfall import STEPS as PARTS
    from agent.waterfall import steps

    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    colours = plt.get_cmap("tab10")
    for y, run in enumerate(runs):
        found = [{step.name: step for step in steps(trace)} for trace in run.traces]
        for n, name in enumerate(PARTS):
            spans = [(f[name].start, f[name].end) for f in found if name in f]
            if spans:
                start, end = np.median(spans, axis=0)
                label = name if not y else None
                axes.barh(y - 0.12 + 0.24 * (n > 0), end - start, left=start, height=0.22,
                          color=colours(n), label=label)  # fmt: skip
    axes.set_yticks(range(len(runs)), [f"speculation {run.name}" for run in runs])
    axes.invert_yaxis()
    axes.set_xlabel("ms after the end of speech (median of each step)")
    axes.legend(ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main(
    turns: Annotated[
        int, typer.Option(help="Requests in all, half from speakers who pause.")
    ] = 100,
    config: Annotated[str, typer.Option(help="nano, or a YAML file.")] = "nano",
    listen: Annotated[
        float, typer.Option(help="Seconds of each reply that are listened to.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of requests, pauses and noise.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for JSON and PNG.")] = RESULTS,
) -> None:
    """Hold the same conversations with speculation off and on; takes about 10 s a turn."""
    each = max(2, -(-turns // len(SPEAKERS)))
    recorded = sessions(each, seed)
    requests = [r for several in recorded.values() for r in several]
    random.Random(seed).shuffle(requests)
    requests = requests[:turns]
    rows, runs = [], []
    console = Console()
    with Progress(console=console) as progress:
        for name, on in (("on", True), ("off", False)):
            settings = load_config(config, [f"turns.speculate={str(on).lower()}"])
            models = Models.load(settings)
            run = Run(name)
            task = progress.add_task(f"speculation {name}", total=len(requests))
            for start in range(0, len(requests), 10):  # a conversation of ten turns each
                part = requests[start : start + 10]
                asyncio.run(converse(models, settings, part, listen, run))
                progress.advance(task, len(part))
            rows.append(row(run, len(requests)))
            runs.append(run)
    show(rows, console)
    report = {
        **about("turns", ("torch", "onnxruntime", "numpy")),
        "rows": rows,
        "hidden_share": hidden(rows),
    }
    print(f"speculation hides {report['hidden_share']:.0%} of the time after the endpoint (median)")
    path = save("turns", report, out)
    draw(runs, path.with_suffix(".png"))
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
