"""``python -m agent bench``: measure the agent, or any other voice agent, and compare results."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agent.commands import ConfigName, Debug, Overrides, Plain, mendable, stderr
from agent.config import Config, load_config
from agent.errors import UserError
from agent.show import loading
from bench.conversation import document
from bench.conversation.compare import compare_command
from bench.conversation.document import Row
from bench.conversation.recordings import Request, load
from bench.conversation.show import show
from bench.report import load_average

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help"]},
)
Advance = Callable[[int], None]


class Baseline(str, Enum):
    """What the agent is compared with in the same run."""

    reference_flow = "reference-flow"


@app.callback(invoke_without_command=True)
@mendable
def bench(
    context: typer.Context,
    turns: Annotated[int, typer.Option(min=1, help="Requests, in one conversation.")] = 100,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Go on for so long, instead of --turns: for memory."),
    ] = None,
    barge_in_every: Annotated[
        int, typer.Option(metavar="K", min=0, help="Every K-th request interrupts a reply; 0 none.")
    ] = 0,
    baseline: Annotated[
        Baseline | None, typer.Option(help="Do each turn the reference's way, too, by turns.")
    ] = None,
    baseline_turns: Annotated[
        int | None, typer.Option(min=1, help="So many turns of the baseline, not all.")
    ] = None,
    listen: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds of each reply listened to, not all.")
    ] = None,
    black_box: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Measure another agent from outside: a program that "
                     "takes raw 16-bit mono sound at 16 kHz on standard input, at the pace of the "
                     "clock, and gives such sound on standard output."),
    ] = None,
    rate: Annotated[
        int, typer.Option(min=8000, max=96000, help="Of what the --black-box gives, Hz.")
    ] = 16000,
    devices: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="OUTPUT INPUT", help="Measure an agent that hears the loudspeaker "
                     "OUTPUT and speaks into the microphone INPUT."),
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Seconds that another agent has for an answer.")
    ] = 15.0,
    requests: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Other recordings, with a requests.json.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of requests and of the noise.")] = 0,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the JSON and the HTML report go.")
    ] = Path(),
    name: Annotated[str, typer.Option(help="Files are called DATE-NAME.json, .html.")] = "bench",
    config: ConfigName = "nano",
    overrides: Overrides = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Measure a conversation at the pace of speech: how soon it answers, what it costs.

    Recorded requests, of which the true end of speech is known, are spoken to the real agent; the
    replies are played to nobody. A turn takes six to eight seconds.

    Examples: bench --turns 20 · bench --barge-in-every 5 --baseline reference-flow ·
    bench --minutes 60 --name memory · bench compare before.json after.json --fail ·
    bench --black-box "python -m agent talk --stdio" --turns 20
    """
    if context.invoked_subcommand is not None:
        return
    if black_box is not None and devices is not None:
        raise UserError("--black-box and --devices exclude each other: one agent at a time")
    path = _target(out, name)
    settings = load_config(config, overrides or ())
    recordings = load(requests)
    plan: dict[str, Any] = {
        "turns": turns, "minutes": minutes, "barge_in_every": barge_in_every, "seed": seed,
        "listen_seconds": listen, "baseline": baseline.value if baseline else None,
        "baseline_turns": baseline_turns, "requests": [r.text for r in recordings],
    }  # fmt: skip
    before = load_average()
    document.commit()
    if black_box is None and devices is None:
        systems = _measure(settings, config, recordings, plan, plain)
        layout, values = settings.model.layout(), settings.model_dump(mode="json")
        found = document.build(config, layout, plan, values, systems, before)
    else:
        plan |= {"black_box": black_box, "devices": devices, "rate": rate, "patience": patience}
        systems = {"black-box": _outside(recordings, plan, plain)}
        found = document.build("", None, plan, {}, systems, before)
    _finish(found, path, plain)


def _finish(found: document.Document, path: Path, plain: bool) -> None:
    """Write the results and show them."""
    document.write(found, path)
    show(found, Console(no_color=plain, highlight=False, markup=False))
    typer.echo(f"{path}\n{_report(found, path)}")


def _report(found: document.Document, path: Path) -> Path:
    from bench.conversation.page import page

    html = path.with_suffix(".html")
    document.save(html, page(found))
    return html


def _target(out: Path, name: str) -> Path:
    """Where the JSON goes; asked before any work is done."""
    out = out.expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None
    if "/" in name or not name:
        raise UserError(f"--name {name!r}: expected part of a file name, without a folder")
    return out / f"{date.today().isoformat()}-{name}.json"


def _measure(
    settings: Config, config: str, recordings: list[Request], plan: dict[str, Any], plain: bool
) -> dict[str, list[Row]]:
    from agent.models import Models
    from bench.conversation.inside import converse

    with loading(stderr(), f"loading {config}", plain) as exporting:
        models = Models.load(settings, exporting)
        flow = _flow(settings) if plan["baseline"] else None
    other: list[Row] = []
    share = min(1.0, (plan["baseline_turns"] or plan["turns"]) / plan["turns"])
    order = list(requests_of(plan, recordings))
    alone = iter([request for request, over in order if not over])
    asked: list[Request | None] = []

    async def between() -> None:
        request = next(alone, None)  # the one that the agent is asked next
        asked.append(request)
        if flow is not None and request is not None and share * len(asked) > len(other):
            other.append(await asyncio.to_thread(flow.answer, request, len(other) + 1))

    planned = iter(order) if not plan["minutes"] else _until(order, plan["minutes"])
    with progress_bar(plan, plain) as advance:
        held = asyncio.run(
            converse(
                models, settings, planned, advance, between if flow else None,
                plan["listen_seconds"] or float("inf"), plan["seed"],
            )
        )  # fmt: skip
    return {"agent": held.rows(), **({plan["baseline"]: other} if flow else {})}


def _outside(recordings: list[Request], plan: dict[str, Any], plain: bool) -> list[Row]:
    """Another agent, or one's own from outside."""
    from bench.conversation.black_box import measure_process
    from bench.conversation.devices import measure_devices

    said = [request for request, _ in requests_of({**plan, "barge_in_every": 0}, recordings)]
    patience, seed = plan["patience"], plan["seed"]
    with progress_bar(plan, plain) as advance:
        if plan["devices"]:
            output, input = plan["devices"]
            return asyncio.run(measure_devices(output, input, said, advance, patience, seed))
        return asyncio.run(
            measure_process(
                plan["black_box"], said, plan["rate"], advance, patience, seed=plan["seed"]
            )
        )


def _flow(settings: Config) -> Any:
    from bench.conversation.reference_flow import ReferenceFlow

    return ReferenceFlow(settings)


def requests_of(plan: dict[str, Any], recordings: list[Request]) -> Iterator[tuple[Request, bool]]:
    """The requests of a run, each with whether it interrupts the reply before it."""
    rng = random.Random(plan["seed"])
    every = plan["barge_in_every"]
    said: list[Request] = []
    for number in range(plan["turns"]):
        if not said:
            said = rng.sample(recordings, len(recordings))
        yield said.pop(), bool(every) and number % every == every - 1 and number > 0


def _until(order: list[tuple[Request, bool]], minutes: float) -> Iterator[tuple[Request, bool]]:
    """The requests over and over, until so many minutes have passed."""
    over = time.perf_counter() + 60 * minutes
    while True:
        for request in order:
            if time.perf_counter() > over:
                return
            yield request


@app.command("report")
@mendable
def report(
    result: Annotated[Path, typer.Argument(metavar="A.json", help="A result.")],
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Show a result again, and write its HTML report anew, beside it."""
    found = document.read(result)
    show(found, Console(no_color=plain, highlight=False, markup=False))
    typer.echo(_report(found, result))


@contextmanager
def progress_bar(plan: dict[str, Any], plain: bool) -> Iterator[Advance]:
    """Tells how far it is; gives what is to be called with the number of turns."""
    minutes, began = plan["minutes"], time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    if plain:
        yield _told
        return
    with Progress(*columns, TimeRemainingColumn(), console=stderr()) as bar:
        task = bar.add_task("turn 0", total=60 * minutes if minutes else plan["turns"])

        def advance(turn: int) -> None:
            done = time.perf_counter() - began if minutes else turn
            bar.update(task, completed=done, description=f"turn {turn}")

        yield advance


def _told(turn: int) -> None:
    if turn % 10 == 0:
        typer.echo(f"turn {turn}", err=True)


def main() -> None:
    """Run the command line; exits the interpreter."""
    app(prog_name="python -m agent bench")


app.command("compare")(compare_command)


if __name__ == "__main__":
    main()
