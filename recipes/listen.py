"""``python -m recipes listen``: a page on which one hears what the model hears and says.

A dozen questions that training never saw, in known and unknown voices, some of them after other
turns or for a robot to do something, with the model's answers: sound, spectrogram, unit streams and
actions, in one HTML file that needs nothing else.
"""

from __future__ import annotations

import base64
import io
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, NamedTuple

import jinja2
import numpy as np
import soundfile
import typer
from rich.progress import track

from recipes import dialogues
from recipes.dialogues import action_text
from recipes.evaluate import Exam, Row, load_wave
from recipes.manifest import corpus_seed, read_manifest
from recipes.nano import Nano
from recipes.voices import SAMPLE_RATE, VOICES
from stages.lm import Sampling
from stages.units import HUBERT, KINDS, PITCH, STYLE, Unit, Units, string_to_units
from stages.vocoder import VocoderError
from stages.vocoder_stream import AudioChunk, StreamingVocoder

PAGE = Path(__file__).with_name("listen.html")
RATES = {HUBERT: 25.0, PITCH: 12.5, STYLE: 1.0}  # units a second
GOLDEN = 0.618034  # multiples of it, without their integers, lie far apart: so do the colours


class Segment(NamedTuple):
    """A unit from ``start`` to ``end``, in seconds."""

    kind: str
    index: int  # type: ignore[assignment]  # tuple.index is of no use here
    start: float
    end: float


@dataclass
class Side:
    """Half of a pair: what was said, how it sounds and looks."""

    words: str
    sound: str
    picture: str


@dataclass
class Pair:
    """A question and its answer.

    Attributes:
        heard: the model's own transcript of the question.
        right: whether the reply, with its action, is one of those that were wanted.
        before: the turns before it, which the model was given as text.
        action: what the reply makes a robot do, as JSON; "" for nothing.
    """

    voice: str
    known: bool
    heard: str
    right: bool
    question: Side
    answer: Side
    before: Sequence[dialogues.Turn] = ()
    action: str = ""


def choose(exam: Exam, rows: Iterable[Row], count: int, seed: int = 0) -> list[Row]:
    """``count`` held-out requests in turns of every kind and of known and unknown voices: those of
    the first domain, those added, robot commands, follow-ups."""
    kinds: dict[tuple[str, bool], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: str(row["id"])):
        example = exam.examples.get(row["transcript"])
        if row["split"] == "heldout" and row["role"] == "request" and example is not None:
            kind = "added" if example.added else "first"
            if example.action is not None:
                kind = "command"
            if example.before:
                kind = "follow-up"
            kinds[kind, VOICES[row["voice"]].trained].append(row)
    rng = random.Random(seed)
    for some in kinds.values():
        rng.shuffle(some)
    rounds = zip_longest(*(kinds[key] for key in sorted(kinds)))
    return [row for one_of_each in rounds for row in one_of_each if row is not None][:count]


def ask(nano: Nano, exam: Exam, row: Row, folder: Path) -> Pair:
    """One recording of the corpus answered."""
    wave = load_wave(folder / row["wav"])
    example = exam.examples[row["transcript"]]
    turn = nano.listen(wave, example.before)
    nano.phrase(turn)
    return Pair(
        voice=row["voice"],
        known=VOICES[row["voice"]].trained,
        heard=turn.heard,
        right=exam.judge(example, turn)["right"],
        question=_side(row["text"], wave, segments(nano.ears.encode(wave, allow_unvoiced=True))),
        answer=_side(turn.reply, *speak(nano, string_to_units(turn.units))),
        before=example.before,
        action=action_text(turn.action),
    )


def page(pairs: Sequence[Pair], model: str) -> str:
    """The HTML."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        pairs=pairs, model=model
    )


def segments(units: Units) -> list[Segment]:
    """The units of a recording, each stream at its own rate."""
    return [
        Segment(kind, index, n / RATES[kind], (n + 1) / RATES[kind])
        for kind, stream in units.streams().items()
        for n, index in enumerate(stream)
    ]


def speak(nano: Nano, units: Units) -> tuple[np.ndarray, list[Segment]]:
    """Units with one pitch and style each, as sound (float32 at 16 kHz) and where each is in it.

    What cannot be spoken (a model that has learnt nothing yet) is a moment of silence.
    """
    streams = units.streams()
    vocoder = StreamingVocoder(nano.voice)
    chunks: list[AudioChunk] = []
    try:
        for n in range(len(units.hubert)):
            for kind in KINDS:
                chunks += vocoder.push(Unit(kind, streams[kind][n]))
        chunks += vocoder.flush()
    except (KeyError, VocoderError):
        return np.zeros(SAMPLE_RATE // 10, np.float32), []
    where = [
        Segment(kind, streams[kind][span.unit], span.start / SAMPLE_RATE, span.end / SAMPLE_RATE)
        for chunk in chunks
        for span in chunk.units
        for kind in KINDS
    ]
    return np.concatenate([chunk.samples for chunk in chunks]), where


def _side(words: str, wave: np.ndarray, units: list[Segment]) -> Side:
    return Side(words, _ogg(wave), picture(wave, units))


def _ogg(wave: np.ndarray) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE, format="OGG", subtype="VORBIS")
    return _data("audio/ogg", buffer)


def _data(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(wave: np.ndarray, units: Sequence[Segment]) -> str:
    """Spectrogram over the unit streams, as a data URI; ``wave`` is float32 at 16 kHz."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    seconds = max(len(wave) / SAMPLE_RATE, 0.1)
    if len(wave) >= 512:
        loudest = float(np.abs(wave).max()) or 1.0
        above.specgram(
            wave / loudest + 1e-9, NFFT=512, noverlap=352, Fs=SAMPLE_RATE, cmap="magma", vmin=-130
        )
    above.set(ylim=(0, 5000), yticks=[0, 2500, 5000], yticklabels=["0", "2.5", "5 kHz"])
    for row, kind in enumerate(KINDS):
        own = [unit for unit in units if unit.kind == kind]
        colours = colormaps["turbo"](np.array([unit.index for unit in own]) * GOLDEN % 1)
        spans = [(unit.start, unit.end - unit.start) for unit in own]
        below.broken_barh(spans, (row, 0.9), facecolors=colours, linewidth=0)
    below.set(xlim=(0, seconds), yticks=[0.45, 1.45, 2.45], yticklabels=KINDS, xlabel="s")
    below.invert_yaxis()
    for axes in (above, below):
        axes.tick_params(labelsize=7)
        axes.spines[:].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="webp", dpi=110)
    return _data("image/webp", buffer)


def main(
    work: Annotated[Path, typer.Option(help="Folder with the corpus.")] = Path("work"),
    checkpoint: Annotated[Path, typer.Option(help="The model.")] = Path("checkpoints/nano"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/listen.html"),
    count: Annotated[int, typer.Option(min=1, help="Pairs on it.")] = 12,
    temperature: Annotated[float, typer.Option(help="For the units.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of choices and sampling.")] = 0,
) -> None:
    """Write a page of questions and answers to listen to."""
    folder = work / "corpus"
    exam = Exam(dialogues.load(corpus_seed(work)))
    rows = choose(exam, read_manifest(folder), count, seed)
    if not rows:
        raise FileNotFoundError(f"no heldout recordings in {folder}: run `recipes corpus` first")
    nano = Nano(checkpoint, Sampling(temperature, 0.9, seed))
    pairs = [ask(nano, exam, row, folder) for row in track(rows, "answering")]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(pairs, checkpoint.name), encoding="utf-8")
    typer.echo(f"{out}: {len(pairs)} pairs, {out.stat().st_size / 1e6:.1f} MB")
