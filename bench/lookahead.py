"""What a vocoder's look-ahead is worth: ``python -m bench.lookahead``.

nano's units of held-out sentences are spoken with every look-ahead from none to the exact one: how
far the wave is from the exact one (dB), how much less an independent recognizer understands (WER),
and how much sooner the first sample is there. Then what halo windows compute beyond the sound
itself, for schedules of growing chunks, in nano's shape and in the official one; that is counted,
in multiplications.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agent.graphs import graphs
from bench.held_out import Utterance, sentences, spoken
from bench.report import RESULTS, about, load_average, save
from recipes.scoring import RECOGNIZER, Recognizer, word_errors
from stages.checkpoint import Layout, find_layout
from stages.encoder import SpeechTokenizer
from stages.hifigan import VocoderConfig, reach, receptive_field
from stages.lm import LanguageModel, Sampling
from stages.units import Unit, UnitFrame, interleave
from stages.vocoder import Vocoder
from stages.vocoder_stream import AudioChunk, StreamingVocoder

VOICE = "heart"  # that of nano's replies
FRAME_MS = 40
SCHEDULES = ((1, 32), (2, 32), (4, 16), (4, 32), (4, 64), (8, 32))  # first and largest chunk
REPLY = 75  # frames, 3 s
Row = dict[str, Any]


def speak(
    vocoder: Vocoder, units: Sequence[UnitFrame], look_ahead: int | None
) -> tuple[np.ndarray, int, float]:
    """A reply; the tokens that came before its first sound; ms of one thread for that sound."""
    stream = StreamingVocoder(vocoder, lookahead_frames=look_ahead)
    chunks: list[AudioChunk] = []
    tokens, first = len(units), 0.0
    for number, unit in enumerate(units, 1):
        begin = time.thread_time()
        new = stream.push(Unit(unit.kind, unit.index))
        if new and not chunks:
            tokens, first = number, 1e3 * (time.thread_time() - begin)
        chunks += new
    chunks += stream.flush()
    return np.concatenate([chunk.samples for chunk in chunks]), tokens, first


def decibels(wave: np.ndarray, exact: np.ndarray) -> float:
    """Error against signal, dB; -inf where there is none."""
    error, power = float(np.square(wave - exact).sum()), float(np.square(exact).sum())
    return 10 * float(np.log10(error / power)) if error else float("-inf")


def token_ms(lm: LanguageModel) -> float:
    """Median ms of one thread for a token, after 100 others."""
    lm.reset()
    lm.append([3 + n % 1000 for n in range(100)])
    spent = []
    for _ in range(40):
        begin = time.thread_time()
        lm.decode(Sampling(greedy=True))
        spent.append(1e3 * (time.thread_time() - begin))
    lm.reset()
    return median(spent)


def look_aheads(
    vocoder: Vocoder, tokenizer: SpeechTokenizer, said: Sequence[Utterance], each_ms: float
) -> list[Row]:
    """A row for each look-ahead; the last one is exact."""
    exact_frames = receptive_field(vocoder.config)[1]
    judge = Recognizer()
    replies = [interleave(tokenizer.encode(u.wave, allow_unvoiced=True)) for u in said]
    exact = [speak(vocoder, units, None) for units in replies]
    latest = median(tokens for _, tokens, _ in exact)
    rows = []
    for frames in track(range(exact_frames + 1), "look-ahead"):
        found = [speak(vocoder, units, frames) for units in replies]
        waves = [wave for wave, _, _ in found]
        errors = [decibels(w, e) for w, (e, _, _) in zip(waves, exact, strict=True)]
        tokens = median(tokens for _, tokens, _ in found)
        heard = [judge.hear(wave) for wave in waves]
        exactly = frames == exact_frames
        rows.append({
            "look_ahead": frames, "ms_of_speech": frames * FRAME_MS, "exact": exactly,
            "error_db": None if exactly else round(median(errors), 1),
            "worst_db": None if exactly else round(max(errors), 1),
            "wer": word_errors([u.text for u in said], heard)["wer"],
            "tokens_before_sound": tokens, "sooner_ms": round((latest - tokens) * each_ms, 1),
            "first_chunk_ms": round(median(first for _, _, first in found), 2),
        })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------- halo windows


def chunks(first: int, most: int, frames: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each chunk of a reply, as :class:`StreamingVocoder` has them at its end."""
    begin, size = 0, first
    while begin < frames:
        left = frames - begin
        end = begin + (left if left <= size + size // 2 else size)
        yield begin, end
        begin, size = end, min(2 * size, most)


def work(config: VocoderConfig, frames: int, left: int, right: int, trimmed: bool) -> float:
    """Multiplications for ``frames`` and the context that there is on both sides of them."""
    need = reach(config)
    channels = config.initial_channels
    length = float(frames + left + right)
    total = length * config.channels_in * channels * 7
    plain = 2 if config.resblock == "1" else 1
    blocks = sum(
        plain * kernel * len(dilations)
        for kernel, dilations in zip(config.resblock_kernels, config.dilations, strict=True)
    )
    rates = zip(config.rates, config.kernels, need, strict=False)
    for rate, kernel, (before, after) in rates:
        if trimmed:
            length -= max(0, left - before) + max(0, right - after)
            left, right = min(left, before), min(right, after)
        total += length * channels * (channels // 2) * kernel
        length, left, right, channels = length * rate, left * rate, right * rate, channels // 2
        total += length * channels * channels * blocks
    return total + length * channels * 7


def schedules(shapes: dict[str, VocoderConfig]) -> list[Row]:
    """How much of the work for a reply of 3 s is halo, with whole halos and with trimmed ones."""
    rows = []
    for name, config in shapes.items():
        before, after = receptive_field(config)
        alone = work(config, REPLY, 0, 0, True)
        for first, most in SCHEDULES:
            cost = {True: 0.0, False: 0.0}
            for begin, end in chunks(first, most, REPLY):
                left, right = min(begin, before), min(REPLY - end, after)
                for trimmed in cost:
                    cost[trimmed] += work(config, end - begin, left, right, trimmed)
            whole, trim = (
                work(config, first, 0, after, trimmed) / alone * REPLY for trimmed in (False, True)
            )
            rows.append({
                "shape": name, "first": first, "most": most, "halo": [before, after],
                "redundant_whole": round(1 - alone / cost[False], 3),
                "redundant_trimmed": round(1 - alone / cost[True], 3),
                "first_chunk_whole": round(whole, 1), "first_chunk_trimmed": round(trim, 1),
            })  # fmt: skip
    return rows


def official() -> VocoderConfig:
    """The shape of the official Expressive vocoder, as far as it decides the work."""
    return VocoderConfig.parse({
        "resblock": "1", "upsample_rates": [5, 4, 4, 4, 2],
        "upsample_kernel_sizes": [11, 8, 8, 8, 4], "upsample_initial_channel": 512,
        "resblock_kernel_sizes": [3, 7, 11], "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "num_embeddings": 500, "embedding_dim": 128, "model_in_dim": 512, "code_hop_size": 640,
        "sampling_rate": 16000, "multispkr": "from_input_file", "num_speakers": 4,
        "num_f0_tokens": 64, "f0_hop_size": 1280, "num_style_tokens": 100,
        "style_hop_size": 16000,
        "dur_predictor_params": {
            "encoder_embed_dim": 128, "var_pred_hidden_dim": 128, "var_pred_kernel_size": 3,
        },
    }, "official shape")  # fmt: skip


# ------------------------------------------------------------------------------------- the program


def show(report: Row, console: Console) -> None:
    """Both tables."""
    table = Table(
        "frames", "ms of speech", "error, dB", "worst", "WER", "tokens before\nthe first sound",
        "sooner, ms", "first chunk,\nms", box=SIMPLE_HEAD, title="look-ahead", title_justify="left",
    )  # fmt: skip
    for r in report["look_ahead"]:
        errors = ["exact", ""] if r["exact"] else [f"{r['error_db']:.1f}", f"{r['worst_db']:.1f}"]
        table.add_row(
            str(r["look_ahead"]), str(r["ms_of_speech"]), *errors, f"{r['wer']:.1%}",
            f"{r['tokens_before_sound']:g}", f"{r['sooner_ms']:g}", f"{r['first_chunk_ms']:g}",
        )  # fmt: skip
    console.print(table)
    table = Table(
        "shape", "first", "largest", "halo", "redundant,\nwhole halos", "redundant,\ntrimmed",
        "first chunk, in\nframes of work", "trimmed", box=SIMPLE_HEAD, title="chunks of 3 s",
        title_justify="left",
    )  # fmt: skip
    for r in report["schedules"]:
        table.add_row(
            r["shape"], str(r["first"]), str(r["most"]), "{} + {}".format(*r["halo"]),
            f"{r['redundant_whole']:.0%}", f"{r['redundant_trimmed']:.0%}",
            f"{r['first_chunk_whole']:.1f}", f"{r['first_chunk_trimmed']:.1f}",
        )  # fmt: skip
    console.print(table)


def draw(report: Row, path: Path) -> None:
    """Error and WER against look-ahead; redundant work against the schedule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    rows = report["look_ahead"]
    inexact = [r for r in rows if not r["exact"]]
    left.plot([r["ms_of_speech"] for r in inexact], [r["error_db"] for r in inexact], "o-")
    left.set_xlabel("look-ahead, ms of speech")
    left.set_ylabel("error against the exact wave, dB", color="C0")
    words = left.twinx()
    words.plot([r["ms_of_speech"] for r in rows], [100 * r["wer"] for r in rows], "s--", color="C1")
    words.set_ylabel("word error rate, %", color="C1")
    words.set_ylim(bottom=0)
    left.set_title("nano: what a shorter look-ahead costs")
    rows = report["schedules"]
    names = [f"{first}–{most}" for first, most in SCHEDULES]
    series = [(s, k) for s in dict.fromkeys(r["shape"] for r in rows) for k in ("whole", "trimmed")]
    for n, (shape, kind) in enumerate(series):
        values = [100 * r[f"redundant_{kind}"] for r in rows if r["shape"] == shape]
        at = np.arange(len(values)) + 0.2 * (n - 1.5)
        right.bar(at, values, 0.19, label=f"{shape}, {kind}", color=plt.get_cmap("Paired")(n))
    right.set_xticks(range(len(names)), names)
    right.set_xlabel("first–largest chunk, frames")
    right.set_ylabel("redundant work, %")
    right.set_title("halo windows over 3 s of speech")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)


def load(checkpoint: Path) -> tuple[Layout, SpeechTokenizer, Vocoder]:
    layout = find_layout(checkpoint)
    made = graphs(layout, device="cpu", threads=1)
    vocoder = Vocoder.load(layout, "cpu", made["vocoder"], made["durations"])
    return layout, SpeechTokenizer.load(layout, graphs=made), vocoder


def main(
    count: Annotated[int, typer.Option(help="Sentences.")] = 60,
    checkpoint: Annotated[Path, typer.Option(help="The model to measure.")] = Path(
        "checkpoints/nano"
    ),
    out: Annotated[Path, typer.Option(help="Where the report is kept.")] = RESULTS,
) -> None:
    """Measure look-aheads and schedules; keep JSON and a picture."""
    torch.set_num_threads(1)
    layout, tokenizer, vocoder = load(checkpoint)
    each_ms = token_ms(LanguageModel.load(layout))
    said = spoken(sentences(count), [VOICE])
    report = about("lookahead", ("torch", "onnxruntime", "faster-whisper", "numpy")) | {
        "recognizer": RECOGNIZER,
        "sentences": len(said),
        "wer_of_recordings": word_errors(
            [u.text for u in said], list(map(Recognizer().hear, (u.wave for u in said)))
        )["wer"],
        "token_ms": round(each_ms, 2),
        "look_ahead": look_aheads(vocoder, tokenizer, said, each_ms),
        "schedules": schedules({"nano": vocoder.config, "official": official()}),
    }
    report["load_average_after"] = load_average()
    show(report, Console(width=120))
    path = save("lookahead", report, out)
    draw(report, path.with_suffix(".png"))
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
