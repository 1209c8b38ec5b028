"""How well units that are named early agree with the exact ones: ``python -m bench.agreement``.

For windows of many shapes (chunk, look-ahead and left context, in unit frames of 40 ms) on held-out
speech: the share of frames with the same unit and the edit distance of the unit strings, what a
frame waits for at most, and what a second of speech costs. nano's ears are measured against their
offline units, which its own window defines, and against listening to the utterance as a whole. The
full-size HuBERT has random weights here: cost and latency only, for the agreement of random weights
says nothing about trained ones.

Pitch and style follow, which lean on the whole utterance, and how much of what was told early
stands when the utterance ends. Times are processor time of one thread, so that they mean the same
on a busy machine.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rapidfuzz.distance import Levenshtein
from rich.progress import track
from transformers import HubertConfig

from agent.graphs import graphs
from bench.agreement_report import draw, markdown
from bench.held_out import Utterance, person, sentences, spoken
from bench.report import RESULTS, about, load_average, save
from stages import SAMPLE_RATE
from stages.checkpoint import find_layout
from stages.encoder import SpeechTokenizer, UnitEncoder
from stages.hubert import Hubert
from stages.phonetic import PhoneticEncoder, PhoneticNetwork, Quantizer, Window, fill_blanks
from stages.pitch import PitchEncoder
from stages.provisional import PitchListener, Sound, style_of
from stages.style import StyleEncoder
from stages.units import UnitFrame

CHUNKS = (4, 8, 12, 24)
LOOK_AHEADS = (0, 2, 4, 8, 16)
LEFTS = (15, 30, 60)
LONGEST = 96  # unit frames that nano's positions reach: 3.84 s
SECONDS = (2.4, LONGEST / 25)  # of the utterances: long enough for the left context to matter
VOICES = ("joe", "kal16", "heart_man", "heart")  # the first two were never trained on
FRAME_MS = 40
PITCH_WINDOWS = [Window(c, p, a) for c in (4, 12) for p in (6, 12) for a in (2, 4, 8)]
MEANS = ("mean_so_far", "mean_before", "mean_known")
PASTS = (1, 2, 3, 5)  # seconds that a style is judged from

Speech = dict[str, list[Utterance]]
Row = dict[str, Any]


@dataclass
class Agreement:
    """Readings of speech, some provisional and some exact, compared and counted up."""

    same: int = 0
    frames: int = 0
    edits: int = 0
    units: int = 0

    def add(self, found: Sequence[int], exact: Sequence[int]) -> None:
        """``found`` may end early: only what it names is compared."""
        exact = exact[: len(found)]
        short, long = ([unit for unit, _ in itertools.groupby(x)] for x in (found, exact))
        self.same += sum(a == b for a, b in zip(found, exact, strict=True))
        self.frames += len(found)
        self.edits += Levenshtein.distance(short, long)
        self.units += len(long)

    def row(self) -> Row:
        """Share of equal frames; edits (repeats dropped) for each exact unit."""
        return {
            "frames": round(self.same / max(1, self.frames), 4),
            "edit_distance": round(self.edits / max(1, self.units), 4),
        }


Counts = dict[str, Agreement]


def rows_of(counts: Counts) -> Row:
    """Per kind of speech, and all of it."""
    every = Agreement()
    for part in counts.values():
        every.same, every.frames = every.same + part.same, every.frames + part.frames
        every.edits, every.units = every.edits + part.edits, every.units + part.units
    return {name: part.row() for name, part in {**counts, "all": every}.items()}


def windows() -> Iterator[Window]:
    """Every shape that is measured."""
    for left, ahead, chunk in itertools.product(LEFTS, LOOK_AHEADS, CHUNKS):
        if left + chunk + ahead <= LONGEST:
            yield Window(chunk, left, ahead)


def agreement(encoder: PhoneticEncoder, speech: Speech) -> list[Row]:
    """Every window on every utterance, against the encoder's own window and against none."""

    def units(listener: PhoneticEncoder) -> dict[str, list[list[int]]]:
        def read(wave: np.ndarray) -> list[int]:
            return fill_blanks(listener.raw_codes(wave), listener.blank).tolist()

        return {name: [read(u.wave) for u in several] for name, several in speech.items()}

    defined, entire = units(encoder), units(encoder.through(None))
    rows = []
    for window in track(list(windows()), "windows"):
        found = units(encoder.through(window))
        row: Row = {"chunk": window.chunk, "look_ahead": window.right, "left": window.left}
        for against, exact in (("defined", defined), ("whole", entire)):
            counts: Counts = {name: Agreement() for name in speech}
            for name, several in found.items():
                for mine, theirs in zip(several, exact[name], strict=True):
                    counts[name].add(mine, theirs)
            row[against] = rows_of(counts)
        rows.append(row)
    return rows


def costs(run: Callable[[int], object], rounds: int) -> dict[int, float]:
    """Median ms of one thread for each window's number of frames; lengths take turns."""
    lengths = sorted({w.left + w.chunk + w.right for w in windows()})
    spent: dict[int, list[float]] = {length: [] for length in lengths}
    run(lengths[-1])
    for _ in range(rounds):
        for length in lengths:
            begin = time.thread_time()
            run(length)
            spent[length].append(1e3 * (time.thread_time() - begin))
    return {length: median(values) for length, values in spent.items()}


def cost_rows(encoder: PhoneticEncoder, extra: int, rounds: int) -> list[Row]:
    """What each window costs and how long the first frame of its chunk waits, from its start on.

    ``extra``: samples beyond a whole number of frames that the network needs.
    """
    encoder = encoder.through(None)
    noise = np.random.default_rng(0).normal(0, 0.1, LONGEST * encoder.hop + extra)
    wave = noise.astype(np.float32)
    took = costs(lambda frames: encoder.raw_codes(wave[: frames * encoder.hop + extra]), rounds)
    rows = []
    for w in windows():
        ms = took[w.left + w.chunk + w.right]
        rows.append({
            "chunk": w.chunk, "look_ahead": w.right, "left": w.left, "window_ms": round(ms, 1),
            "wait_ms": round((w.chunk + w.right) * FRAME_MS + ms),
            "real_time_factor": round(ms / (w.chunk * FRAME_MS), 3),
        })  # fmt: skip
    return rows


def full_size() -> PhoneticEncoder:
    """HuBERT BASE at 25 Hz as the official checkpoint has it, up to layer 11; random weights."""
    torch.manual_seed(0)
    config = HubertConfig(
        conv_dim=[512] * 8, conv_kernel=[10, 3, 3, 3, 3, 2, 2, 2],
        conv_stride=[5, 2, 2, 2, 2, 2, 2, 2], num_hidden_layers=11,
    )  # fmt: skip
    return PhoneticEncoder(
        PhoneticNetwork(Hubert(config, True, (0, 0), 1), Quantizer(768, 768, 501))
    )


# ------------------------------------------------------------------------ pitch, style, the stream


def pitch_rows(encoder: PitchEncoder, speech: Speech) -> list[Row]:
    """How often a pitch named early is the exact one.

    It is measured against the mean F0 so far, or that of the speaker's utterance before where
    there is one, or that of the whole utterance, as if it were known.
    """
    exact: dict[str, list[list[int]]] = {}
    means: dict[str, dict[str, list[float | None]]] = {}
    for name, several in speech.items():
        contours = [encoder.f0(u.wave, allow_unvoiced=True) for u in several]
        exact[name] = [encoder.codes_of(encoder.remove_mean(*c)).tolist() for c in contours]
        known = [float(f0[voiced > 0].mean()) for f0, voiced in contours]
        last: dict[str, float] = {}
        before: list[float | None] = []
        for u, its in zip(several, known, strict=True):
            before.append(last.get(u.speaker))
            last[u.speaker] = its
        means[name] = {
            "mean_so_far": [None] * len(several), "mean_before": before, "mean_known": [*known],
        }  # fmt: skip
    rows = []
    for window in track(PITCH_WINDOWS, "pitch"):
        row: Row = {"chunk": window.chunk, "look_ahead": window.right, "left": window.left}
        begin = time.thread_time()
        for mode in MEANS:
            counts: Counts = {name: Agreement() for name in speech}
            for name, several in speech.items():
                for u, units, mean in zip(several, exact[name], means[name][mode], strict=True):
                    found = PitchListener(encoder, window, mean).listen(_sound(u.wave))
                    counts[name].add(found, units)
            row[mode] = rows_of(counts)
        took = (time.thread_time() - begin) / len(MEANS)
        seconds = sum(u.seconds for several in speech.values() for u in several)
        rows.append(row | {"real_time_factor": round(took / seconds, 3)})
    return rows


def style_rows(encoder: StyleEncoder, speech: Speech) -> list[Row]:
    """How often the style of a complete second is the exact one, by the past it is judged from."""
    rows = []
    for past in PASTS:
        counts: Counts = {name: Agreement() for name in speech}
        for name, several in speech.items():
            for u in several:
                sound = _sound(u.wave)
                seconds = range(sound.length // SAMPLE_RATE)
                found = [style_of(encoder, sound, second, past) for second in seconds]
                counts[name].add(found, encoder.units(u.wave).tolist())
        rows.append({"past_s": past, **rows_of(counts)})
    return rows


def stream_rows(tokenizer: SpeechTokenizer, speech: Speech) -> list[Row]:
    """How much of what was told during an utterance is in place when it ends."""
    rows = []
    for name, several in speech.items():
        told_in_all, kept, exact = 0, 0, 0
        first: Counter[str] = Counter()
        for u in several:
            encoder, told = UnitEncoder(tokenizer), list[UnitFrame]()
            for start in range(0, len(u.wave), 320):
                for revision in encoder.push(u.wave[start : start + 320]):
                    told = revision.apply(told)
            (last,) = encoder.flush()
            told_in_all, kept = told_in_all + len(told), kept + last.keep
            exact += last.keep + len(last.frames)
            first[told[last.keep].kind if last.keep < len(told) else "none"] += 1
        rows.append({
            "speech": name, "exact": exact, "told": told_in_all, "kept": kept,
            "share_kept": round(kept / exact, 3), "first_wrong": dict(first),
        })  # fmt: skip
    return rows


def _sound(wave: np.ndarray) -> Sound:
    sound = Sound()
    sound.append(wave)
    return sound


# ------------------------------------------------------------------------------------- the program


def held_out(count: int) -> Speech:
    """``count`` utterances of each kind; the person is left out where the prompts are missing."""

    def fitting(several: Iterable[Utterance]) -> list[Utterance]:
        found = [u for u in several if SECONDS[0] <= u.seconds <= SECONDS[1]]
        return [replace(u, wave=u.wave[: len(u.wave) // 640 * 640]) for u in found[:count]]

    speech = {
        "synthetic": fitting(spoken(sentences(4 * count), VOICES)),
        "person": fitting(person(count, *SECONDS)),
    }
    return {name: several for name, several in speech.items() if several}


def main(
    count: Annotated[int, typer.Option(help="Utterances of each kind of speech.")] = 16,
    rounds: Annotated[int, typer.Option(help="Times that each window is timed.")] = 5,
    checkpoint: Annotated[Path, typer.Option(help="The model to measure.")] = Path(
        "checkpoints/nano"
    ),
    out: Annotated[Path, typer.Option(help="Where the report is kept.")] = RESULTS,
) -> None:
    """Measure agreement, latency and cost; keep JSON, Markdown and a picture."""
    torch.set_num_threads(1)
    layout = find_layout(checkpoint)
    tokenizer = SpeechTokenizer.load(layout, graphs=graphs(layout, device="cpu", threads=1))
    if tokenizer.pitch is None or tokenizer.style is None:
        raise typer.BadParameter("an Expressive checkpoint is needed", param_hint="--checkpoint")
    speech = held_out(count)
    report = about("agreement", ("torch", "onnxruntime", "transformers", "numpy")) | {
        "speech": {
            n: {"utterances": len(us), "seconds": round(sum(u.seconds for u in us), 1)}
            for n, us in speech.items()
        },
        "nano_cost": cost_rows(tokenizer.phonetic, 0, rounds),
        "full_size_cost": cost_rows(full_size(), 80, max(2, rounds // 2)),
        "nano": agreement(tokenizer.phonetic, speech),
        "pitch": pitch_rows(tokenizer.pitch, speech),
        "style": style_rows(tokenizer.style, speech),
        "stream": stream_rows(tokenizer, speech),
    }
    report["load_average_after"] = load_average()
    path = save("agreement", report, out)
    draw(report, path.with_suffix(".png"))
    text = markdown(report, path.with_suffix(".png").name)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\n{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
