"""The command line: ``python -m agent --help``.

Here are ``run``, ``export`` and ``info``; the live conversation is in :mod:`agent.talk`. Those for
researchers (``encode``, ``decode``, ``generate``) are in :mod:`agent.research`. What needs PyTorch
is imported when it is needed, so that ``--help`` is instant.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from agent import devices, mqtt, mqtt_client, research, talk
from agent.commands import ConfigName, Debug, Overrides, Plain, mendable, stderr, writable
from agent.config import Config, describe, keys, load_config
from agent.errors import UserError

app = typer.Typer(
    help="Speech in, speech out, one language model in between: a streaming agent around Spirit LM."
    "\n\n"
    "Talk with it:  [bold]python -m agent talk[/bold]  ([bold]devices[/bold] lists microphones "
    "and loudspeakers)"
    "\n\n"
    "Answer a recording:  [bold]python -m agent run question.wav reply.wav[/bold]"
    "\n\n"
    "Look inside:  [bold]encode[/bold] a recording to units, [bold]decode[/bold] units to sound, "
    "[bold]generate[/bold] from a prompt of text and speech."
    "\n\n"
    "Every command takes --config (nano, base-7b, expressive-7b or a YAML file) and "
    "--set section.key=value. [bold]info[/bold] says what is here, what is missing and how to mend "
    "it; info --keys lists everything that can be set.",
    epilog="Exit codes: 0 done, also when nobody spoke; 2 something given is not as it should be "
    "(one sentence says what, and the mend); 1 a fault of the program (please report it).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(talk.talk)
app.command()(devices.devices)
app.command()(mqtt.serve)
app.command()(mqtt_client.mqtt_client)
app.command()(research.encode)
app.command()(research.decode)
app.command()(research.generate)


class Pace(str, Enum):
    """How fast a recording is played to the agent."""

    realtime = "realtime"
    fast = "fast"


@app.command()
@mendable
def run(
    recording: Annotated[Path, typer.Argument(metavar="IN", help="WAV, FLAC, OGG...; any rate.")],
    reply: Annotated[
        Path, typer.Argument(metavar="OUT", help="The spoken reply: .wav, .flac or .ogg.")
    ] = Path("reply.wav"),
    config: ConfigName = "nano",
    overrides: Overrides = None,
    pace: Annotated[
        Pace,
        typer.Option(help="Hear the recording as it was spoken, or as fast as possible. The times "
                          "shown are those of a conversation only with the first."),
    ] = Pace.realtime,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the times of each turn as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw them as a picture (.png, .svg).")
    ] = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Answer a recording: print what it heard, what it says and what took how long.

    Every utterance in IN gets a reply; they are written to OUT one after another, as they come.

    Examples: run question.wav · run talk.flac reply.ogg --pace fast · run question.wav reply.wav
    --set vad.hangover_ms=400 --trace trace.json
    """
    from agent.audio_files import AudioFileSink, AudioFileSource

    settings = load_config(config, overrides or ())
    source = AudioFileSource(
        recording,
        pace.value,
        chunk_samples=16 * settings.audio.chunk_ms,
        max_seconds=settings.audio.max_seconds,
    )
    sink = AudioFileSink(reply)
    if sink.path.exists() and sink.path.resolve() == source.path.resolve():
        raise UserError(f"{reply}: is the recording itself; give the reply another name")
    for path in filter(None, (trace, plot)):
        writable(path)
    if plot:
        from agent.waterfall import check_plot

        check_plot(plot)
    _answer(settings, config, source, sink, trace, plot, plain)


def _answer(
    settings: Config, config: str, source: object, sink: object, trace: Path | None,
    plot: Path | None, plain: bool,
) -> None:  # fmt: skip
    from agent.answer import answer
    from agent.audio_files import AudioFileSink, AudioFileSource
    from agent.inventory import about
    from agent.models import Models
    from agent.show import Transcript, loading
    from agent.telemetry import write_json
    from stages import SAMPLE_RATE

    assert isinstance(source, AudioFileSource) and isinstance(sink, AudioFileSink)
    with loading(stderr(), f"loading {config}", plain) as progress:
        models = Models.load(settings, progress)
    console = Console(no_color=plain, highlight=False, soft_wrap=plain)
    traces = asyncio.run(answer(models, settings, source, sink, Transcript(console, plain)))
    if trace:
        write_json(trace, traces, about(config, models.layout))
    if plot and traces:
        from agent.waterfall import plot as draw

        draw(plot, traces)
    if not traces:
        console.print(f"{source.path}: no speech found", soft_wrap=True, markup=False)
    elif not sink.samples:
        console.print("nothing was spoken, so nothing is written", soft_wrap=True)
    else:
        seconds = sink.samples / SAMPLE_RATE
        console.print(f"{sink.path}: {seconds:.1f} s written", soft_wrap=True, markup=False)


@app.command()
@mendable
def export(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to; by default the cache that `run` looks into.")
    ] = None,
    config: ConfigName = "nano",
    overrides: Overrides = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Export the encoders and the vocoder to ONNX; onnx/README.md says what each graph takes.

    `run` does this by itself on first use.
    """
    from agent.graphs import exporter, graphs
    from agent.show import loading

    layout = load_config(config, overrides or ()).model.layout()
    with loading(stderr(), "looking for graphs", plain) as progress:
        if folder is None:
            paths = [graph.path for graph in graphs(layout, progress=progress).values()]
        else:
            folder = folder.expanduser()
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder}: is a file, expected a folder to export to")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
            paths = exporter().export_all(layout, folder, progress)
    for path in paths:
        typer.echo(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


@app.command()
@mendable
def info(
    config: ConfigName = "nano",
    overrides: Overrides = None,
    all_keys: Annotated[
        bool, typer.Option("--keys", help="List everything that can be set, with its value.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    debug: Debug = False,
) -> None:
    """What is installed, which devices and models there are, what is missing and the mend."""
    if all_keys:
        _print_keys(load_config(config, overrides or ()), config, as_json)
        return
    from agent.inventory import OPTIONAL, PACKAGES, take_inventory

    found = take_inventory()
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    out = Table.grid(padding=(0, 2))
    out.add_column(no_wrap=True)
    out.add_column(overflow="fold")
    for name, value in found.system.items():
        out.add_row(name, value)
    out.add_row("devices", "\n".join(found.devices))
    out.add_row("ONNX Runtime", ", ".join(found.providers) or "missing")
    out.add_row("graph cache", found.cache)
    for title, packages, purposes in (
        ("packages", found.packages, PACKAGES),
        ("optional", found.optional, {k: f"extra [{v}]" for k, v in OPTIONAL.items()}),
    ):
        rows = (f"{k} {v or 'missing'} ({purposes[k]})" for k, v in packages.items())
        out.add_row(title, "\n".join(rows))
    models = (
        f"{m.name}: {m.version}, {m.megabytes:.0f} MB, {m.root}" if m.root else f"{m.name}: none"
        for m in found.models
    )
    out.add_row("models", "\n".join(models))
    states = (f"{name}: {state}" for name, state in found.configurations.items())
    out.add_row("configurations", "\n".join(states))
    out.add_row("missing", "\n".join(found.missing) or "nothing")
    Console(highlight=False, markup=False).print(out, soft_wrap=not sys.stdout.isatty())


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure how soon it answers, or another agent, or compare two results (bench --help)."""
    # By name: nothing here depends on the benchmarks, and only who wants them loads them.
    bench = importlib.import_module("bench.conversation.cli")
    bench.app(context.args, prog_name="python -m agent bench")


def _print_keys(settings: Config, name: str, as_json: bool) -> None:
    values = {key: _value(settings, key) for key in keys()}
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    table = Table(title=f"what can be set, and what {name} sets", title_justify="left")
    for column in ("key", "value", "meaning"):
        table.add_column(column, overflow="fold")
    for key, value in values.items():
        table.add_row(key, json.dumps(value), describe(key))
    console = Console(highlight=False, markup=False)
    console.print(table, width=None if console.is_terminal else 140)


def _value(settings: object, key: str) -> object:
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


def main() -> None:
    """Run the command line; exits the interpreter."""
    app(prog_name="python -m agent")
