"""Commands for researchers: units of a recording, sound of units, generation from a prompt."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from agent.audio_files import AudioFileSink, check_audio
from agent.commands import ConfigName, Debug, Overrides, mendable
from agent.config import Config, load_config
from agent.errors import UserError

if TYPE_CHECKING:
    from stages.parts import Speech, Text
    from stages.spiritlm import SpiritLM

Speaker = Annotated[
    int | None, typer.Option(min=0, help="Number of the voice; by default the model's.")
]


class Output(str, Enum):
    """What is to be generated."""

    text = "text"
    speech = "speech"
    any = "any"


@mendable
def encode(
    recording: Annotated[Path, typer.Argument(metavar="IN", help="WAV, FLAC, OGG...; any rate.")],
    channel: Annotated[
        int | None, typer.Option(min=0, help="The channel to take; by default their mean.")
    ] = None,
    allow_unvoiced: Annotated[
        bool, typer.Option(help="Take a recording without any pitch, such as a whisper.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Each stream at its own rate, repeats included.")
    ] = False,
    config: ConfigName = "nano",
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Print the units of a recording, as the language model reads them.

    Example: encode question.wav prints \\[St0]\\[Pi12]\\[Hu99]...
    """
    settings = load_config(config, overrides or ())
    samples, rate = _read(recording, settings)
    model = _model(settings)
    with _asked(str(recording)):
        units = model.speech_tokenizer.encode(samples, rate, channel, allow_unvoiced)
    if not units.hubert:
        raise UserError(f"{recording}: shorter than one unit (80 ms); record more")
    typer.echo(json.dumps(units.to_strings()) if as_json else model.units_string(units))


@mendable
def decode(
    units: Annotated[
        str, typer.Argument(help="Tokens, a file with tokens, or - for standard input.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT")] = Path("speech.wav"),
    speaker: Speaker = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the style, drawn where there is none.")
    ] = None,
    config: ConfigName = "nano",
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Speak units.

    Examples: decode "\\[St0]\\[Pi12]\\[Hu99]" out.wav · encode in.wav | decode - out.wav
    """
    settings = load_config(config, overrides or ())
    sink = AudioFileSink(out)
    string = _units(units)
    model = _model(settings)
    with _asked("units"):
        wave = model.decode(string, _speaker(settings, speaker), seed)
    _write(sink, wave)


@mendable
def generate(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="PART...", help="text:WORDS, wav:FILE or units:TOKENS, in order."),
    ],
    output: Annotated[Output, typer.Option(help="What to generate.")] = Output.any,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Where speech goes; more of it to FILE-2...")
    ] = Path("generated.wav"),
    max_tokens: Annotated[int, typer.Option(min=1, help="The most that is generated.")] = 200,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 0.9,
    top_p: Annotated[float, typer.Option(help="Likeliest tokens up to this probability.")] = 0.95,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes it repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End where this comes; repeatable.")
    ] = None,
    speaker: Speaker = None,
    config: ConfigName = "nano",
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Continue a prompt of text and speech, in text, speech or both.

    Examples: generate "text:My name is Nano." --output speech · generate wav:question.wav
    --output text --greedy · generate wav:a.wav "text:what a says" wav:b.wav --output text --stop
    "\\[Speech]"
    """
    settings = load_config(config, overrides or ())
    sink = AudioFileSink(out)
    prompt = [_part(part, settings) for part in parts]
    model = _model(settings)
    with _asked("generate"):
        pieces = model.generate(
            prompt,
            output.value,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            greedy=greedy,
            seed=seed,
            speaker=_speaker(settings, speaker),
            stop=stop or (),
        )
    _show(pieces, sink)


def _show(pieces: list[Text | Speech], sink: AudioFileSink) -> None:
    from stages.parts import Text

    written = 0
    for piece in pieces:
        if isinstance(piece, Text):
            typer.echo(piece.text)
            continue
        typer.echo(piece.tokens)
        if len(piece.wave):
            written += 1
            path = sink.path
            name = path.name if written == 1 else f"{path.stem}-{written}{path.suffix}"
            _write(AudioFileSink(path.with_name(name)), piece.wave)
    if not pieces:
        typer.echo("nothing was generated", err=True)


def _model(settings: Config) -> SpiritLM:
    import torch

    from agent.models import torch_device
    from stages.spiritlm import SpiritLM

    if settings.threads.lm:
        torch.set_num_threads(settings.threads.lm)
    dtype = settings.model.dtype
    return SpiritLM(
        settings.model.layout(),
        str(torch_device(settings.model.device)),
        None if dtype == "auto" else getattr(torch, dtype),
    )


def _speaker(settings: Config, given: int | None) -> int | None:
    return settings.vocoder.speaker if given is None else given


def _read(path: Path, settings: Config) -> tuple[np.ndarray, int]:
    """Samples ``[n, channels]`` and rate of a recording; refuses what cannot be encoded."""
    from stages.parts import read_audio

    path = path.expanduser()
    check_audio(path, settings.audio.max_seconds)
    with _asked(str(path)):
        samples, rate = read_audio(path)
    if not np.isfinite(samples).all():
        bad = int(np.argmin(np.isfinite(samples).all(axis=1)))
        raise UserError(
            f"{path}: sample {bad} ({bad / rate:.2f} s) is NaN or infinite; export the audio "
            "again as PCM"
        )
    return samples, rate


def _units(given: str) -> str:
    """A string with tokens from an argument, a file or standard input."""
    from stages.units import speech_tokens

    text = given
    if given == "-":
        text = sys.stdin.read()
    elif "[" not in given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise UserError(f"{given}: neither tokens such as [Pi12][Hu99] nor a file with them")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path}: cannot be read as text with tokens") from None
    if not speech_tokens(text):
        raise UserError("units: no token such as [Hu99] in what was given; `encode` prints some")
    return text


def _part(part: str, settings: Config) -> str | Path | Speech:
    from stages.parts import Speech

    kind, found, content = part.partition(":")
    if not found or kind not in ("text", "wav", "units"):
        raise UserError(f"part {part!r}: expected text:WORDS, wav:FILE or units:TOKENS")
    if kind == "text":
        return content
    if kind == "units":
        return Speech(tokens=_units(content))
    samples, rate = _read(Path(content), settings)
    return Speech(samples, rate)


def _write(sink: AudioFileSink, wave: np.ndarray) -> None:
    with sink:
        sink.write(wave)
    typer.echo(f"{sink.path}: {len(wave) / sink.rate:.1f} s written", err=True)


@contextlib.contextmanager
def _asked(what: str) -> Iterator[None]:
    """What the offline API refuses is for the user to mend."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error).replace("Pass allow_unvoiced=True", "Give --allow-unvoiced")
        raise UserError(text if text.startswith(what) else f"{what}: {text}") from error
