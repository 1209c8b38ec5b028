"""The sound devices of this machine, and the command that lists and tries them."""

from __future__ import annotations

import contextlib
import difflib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import typer

from agent.commands import Debug, Plain, mendable
from agent.errors import UserError

Direction = Literal["input", "output"]
WORDS: dict[Direction, str] = {"input": "microphone", "output": "loudspeaker"}
_TONE_HZ = 440.0
_TONE_LEVEL = 0.1  # peak, -20 dBFS: heard, and not painful in headphones


@dataclass(frozen=True)
class Device:
    """A sound device: ``rate`` in Hz is the one it runs at by itself."""

    number: int
    name: str
    host: str
    inputs: int
    outputs: int
    rate: float
    default_input: bool
    default_output: bool

    def channels(self, direction: Direction) -> int:
        """How many it has in a direction."""
        return self.inputs if direction == "input" else self.outputs


def portaudio() -> Any:
    """The module ``sounddevice``.

    Raises:
        UserError: it is not installed, or the library below it is not.
    """
    try:
        import sounddevice
    except ImportError:
        raise UserError("sounddevice is not installed: pip install 'spiritlm-agent[mic]'") from None
    except OSError as error:
        raise UserError(
            f"the PortAudio library is missing ({error}): on Debian or Ubuntu run "
            "`apt install libportaudio2`, on macOS `brew install portaudio`, on Windows "
            "`pip install --force-reinstall sounddevice`, whose wheel brings it"
        ) from None
    return sounddevice


def refresh() -> None:
    """Look for devices again; no stream may be open. PortAudio looks only when it starts."""
    sd = portaudio()
    sd._terminate()
    sd._initialize()


def list_devices() -> list[Device]:
    """All devices, in PortAudio's order.

    Raises:
        UserError: PortAudio is missing.
    """
    sd = portaudio()
    hosts = sd.query_hostapis()
    inputs, outputs = sd.default.device
    return [
        Device(
            number,
            str(found["name"]),
            str(hosts[found["hostapi"]]["name"]),
            int(found["max_input_channels"]),
            int(found["max_output_channels"]),
            float(found["default_samplerate"]),
            number == inputs,
            number == outputs,
        )
        for number, found in enumerate(sd.query_devices())
    ]


def find_device(direction: Direction, wanted: int | str | None) -> Device:
    """The device meant by a number, by a name or a part of one, or the default.

    Raises:
        UserError: there is none such; the message names those there are.
    """
    usable = [device for device in list_devices() if device.channels(direction)]
    word = WORDS[direction]
    if not usable:
        raise UserError(f"no {word} found: connect one; `python -m agent devices` lists them")
    found = _chosen(direction, wanted, usable)
    if found is not None:
        return found
    names = [device.name for device in usable]
    lowered = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(wanted).lower(), list(lowered), 3, 0.4)
    shown = [lowered[name] for name in near] or names
    known = ", ".join(f"{d.number} {d.name!r}" for d in usable if d.name in shown)
    raise UserError(
        f"sound.{direction}: no {word} {wanted!r}; {'the nearest' if near else 'known'}: {known}; "
        "`python -m agent devices` lists all"
    )


def _chosen(direction: Direction, wanted: int | str | None, usable: list[Device]) -> Device | None:
    if wanted is None:
        defaults = (d for d in usable if getattr(d, f"default_{direction}"))
        return next(defaults, usable[0])
    if isinstance(wanted, int) or wanted.isdigit():
        return next((d for d in usable if d.number == int(wanted)), None)
    name = wanted.lower()
    exact = (d for d in usable if d.name.lower() == name)
    return next(exact, None) or next((d for d in usable if name in d.name.lower()), None)


@mendable
def devices(
    test_tone: Annotated[
        bool, typer.Option("--test-tone", help="Play a second of tone on the loudspeaker.")
    ] = False,
    meter: Annotated[
        bool, typer.Option("--meter", help="Show the microphone's level until Ctrl-C.")
    ] = False,
    microphone: Annotated[
        str | None, typer.Option("--input", metavar="NAME|NUMBER", help="Which microphone.")
    ] = None,
    loudspeaker: Annotated[
        str | None, typer.Option("--output", metavar="NAME|NUMBER", help="Which loudspeaker.")
    ] = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """List the sound devices; try them with --test-tone and --meter.

    Examples: devices · devices --test-tone --output headphones · devices --meter --input 3
    """
    if not (test_tone or meter):
        _print(list_devices(), plain)
    if test_tone:
        device = find_device("output", loudspeaker)
        typer.echo(f"a tone on {device.number} {device.name!r}")
        play_tone(device)
    if meter:
        device = find_device("input", microphone)
        typer.echo(f"the level of {device.number} {device.name!r}; Ctrl-C ends it")
        _show_levels(levels(device), plain)


def _print(found: list[Device], plain: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if not found:
        typer.echo("no sound devices found: connect one")
        return
    table = Table(title="sound devices (* the default)", title_justify="left")
    for column in ("number", "name", "in", "out", "rate, Hz", "host"):
        table.add_column(column, overflow="fold")
    for d in found:
        marks = ("*" * d.default_input, "*" * d.default_output)
        table.add_row(
            str(d.number), d.name, f"{d.inputs}{marks[0]}", f"{d.outputs}{marks[1]}",
            f"{d.rate:.0f}", d.host,
        )  # fmt: skip
    Console(no_color=plain, highlight=False, markup=False).print(table)


def play_tone(device: Device, seconds: float = 1.0) -> None:
    """Play 440 Hz, faded in and out; returns when it was played.

    Raises:
        UserError: the device cannot be opened.
    """
    time = np.arange(round(device.rate * seconds)) / device.rate
    ramp = np.clip(np.minimum(time, seconds - time) / 0.02, 0, 1)
    tone = (_TONE_LEVEL * ramp * np.sin(2 * np.pi * _TONE_HZ * time)).astype(np.float32)
    channels = min(2, device.outputs)
    with opening(device), _stream("OutputStream", device, channels) as stream:
        stream.write(np.repeat(tone[:, None], channels, axis=1))
        stream.write(np.zeros((round(device.rate * stream.latency), channels), np.float32))


def levels(device: Device) -> Iterator[float]:
    """The level of every 100 ms of a microphone (dBFS, RMS), for ever.

    Raises:
        UserError: the device cannot be opened.
    """
    channels = min(2, device.inputs)
    with opening(device), _stream("InputStream", device, channels) as stream:
        while True:
            samples, _ = stream.read(round(device.rate / 10))
            power = float(np.mean(np.square(samples.mean(axis=1))))
            yield 10 * float(np.log10(power + 1e-12))


def _stream(kind: str, device: Device, channels: int) -> Any:
    stream = getattr(portaudio(), kind)
    return stream(device=device.number, channels=channels, samplerate=device.rate, dtype="float32")


@contextlib.contextmanager
def opening(device: Device) -> Iterator[None]:
    """PortAudio's refusals, as something the user can mend.

    Raises:
        UserError: in place of its error.
    """
    try:
        yield
    except portaudio().PortAudioError as error:
        raise UserError(
            f"{device.name!r} ({device.host}): {error}; close what else uses it, or choose "
            "another one (`python -m agent devices`)"
        ) from error


def _show_levels(found: Iterator[float], plain: bool) -> None:
    live = sys.stdout.isatty() and not plain
    shown = 0.0
    for level in found:
        bar = "#" * round(max(0.0, level + 60) / 1.5)
        if live:
            typer.echo(f"\r{level:6.1f} dBFS {bar:<40}", nl=False)
        elif time.monotonic() - shown >= 1:
            shown = time.monotonic()
            typer.echo(f"{level:6.1f} dBFS {bar}")
