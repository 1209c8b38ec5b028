"""``python -m recipes tokenizers``: nano's pitch and style units, learnt, then given to the corpus.

1. F0 of the corpus, in two processes, the reply voice first; 2. the pitch VQ-VAE; 3. pitch units of
every recording to {work}/units/pitch.jsonl; 4. the style classifier; 5. style units to
{work}/units/style.jsonl. Every step goes on where an interrupted run stopped. Reports to
{work}/reports/tokenizers.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track

from recipes import f0, pitch_vq, style_classifier
from recipes.f0 import Row
from recipes.manifest import PROCESSES
from stages.style import StyleEncoder, load_style_network
from stages.vqvae import load_vqvae

VQ_RECORDINGS = 1200  # of the training split, in the manifest's shuffled order: some 50 minutes
VQ_HELD_OUT = 300


def report(work: Path, **parts: Any) -> None:
    """Add ``parts`` to {work}/reports/tokenizers.json."""
    path = work / "reports" / "tokenizers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(known | parts, indent=2) + "\n", encoding="utf-8")


def train_pitch(work: Path, out: Path, seed: int, processes: int, plan: pitch_vq.Plan) -> None:
    """Make ``out`` (the folder ``vqvae_f0_quantizer``) unless it is there, and report on it."""
    if (out / "model.pt").is_file():
        return
    manifest = f0.read_manifest(work / "corpus")
    train = [row for row in manifest if row["split"] == "train"][:VQ_RECORDINGS]
    held_out = [row for row in manifest if row["split"] == "heldout"][:VQ_HELD_OUT]
    f0.extract(work, train + held_out, processes)
    state = work / "tokenizers" / "pitch_vq.state"
    model, settings = pitch_vq.train(pitch_vq.inputs(work, train), plan, state, seed=seed)
    pitch_vq.save(model, settings, out)
    model, _ = load_vqvae(out)  # as stored, rounded to half precision
    full = [f0.load_f0(work, row) for row in held_out]
    scores = pitch_vq.evaluate(model, pitch_vq.inputs(work, held_out), full)
    report(work, pitch={"trained_on": len(train)} | scores)


def extract_units(
    path: Path, rows: Sequence[Row], key: str, units: Callable[[Row], np.ndarray]
) -> None:
    """Add ``{"id", key: [...]}`` to the JSON-lines file ``path`` for every row it does not have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    have = {json.loads(line)["id"] for line in lines}
    todo = [row for row in rows if row["id"] not in have]
    with path.open("a", encoding="utf-8") as file:
        for row in track(todo, description=f"units {key}"):
            line = {"id": row["id"], key: [int(unit) for unit in units(row)]}
            file.write(json.dumps(line) + "\n")


def extract_pitch(work: Path, out: Path, processes: int) -> None:
    """Pitch units of the corpus, the reply voice's first."""
    model, _ = load_vqvae(out)
    rows = f0.rows(work)

    @torch.inference_mode()
    def units(row: Row) -> np.ndarray:
        x = f0.PitchEncoder.remove_mean(*f0.load_f0(work, row))
        return model(torch.from_numpy(x)[None])[0].numpy()

    reply = [row for row in rows if row["voice"] == f0.REPLY_VOICE]
    for part in (reply, rows):
        f0.extract(work, part, processes)
        extract_units(work / "units" / "pitch.jsonl", part, "pi", units)


def train_style(work: Path, out: Path, seed: int, plan: style_classifier.Plan) -> None:
    """Make ``out`` (the folder ``style_encoder_w2v2``) unless it is there, and report on it."""
    if (out / "pytorch_model.bin").is_file():
        return
    manifest = f0.read_manifest(work / "corpus")
    train = [row for row in manifest if row["split"] == "train"]
    held_out = [row for row in manifest if row["split"] == "heldout"]
    state = work / "tokenizers" / "style.state"
    network = style_classifier.train(work, train, plan, state, seed)
    style_classifier.save(network, out)
    encoder = StyleEncoder(load_style_network(out))  # as stored, rounded to half precision
    scores = style_classifier.evaluate(encoder, work, held_out)
    report(work, style={"trained_on": len(train)} | scores)


def extract_style(work: Path, out: Path) -> None:
    """Style units of the corpus."""
    encoder = StyleEncoder(load_style_network(out))
    path = work / "units" / "style.jsonl"
    extract_units(path, f0.rows(work), "st", lambda row: encoder.units(f0.read_wave(work, row)))


def main(
    work: Annotated[Path, typer.Option(help="Folder for what the recipes make.")] = Path("work"),
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")] = Path(
        "checkpoints/nano/speech_tokenizer"
    ),
    seed: Annotated[int, typer.Option(help="Seed of both trainings.")] = 0,
    processes: Annotated[int, typer.Option(help="Processes that compute F0.")] = PROCESSES,
    ready: Annotated[
        Path | None, typer.Option(help="Take the two trained ones in this folder.")
    ] = None,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the trainings' steps; small to try it out.")
    ] = 1.0,
) -> None:
    """Train the pitch and style tokenizers and give their units to the whole corpus."""
    torch.set_num_threads(1)
    pitch, style = pitch_vq.Plan(), style_classifier.Plan()
    pitch = replace(
        pitch, steps=max(2, int(share * pitch.steps)), warmup=max(1, int(share * pitch.warmup))
    )
    style = replace(style, steps=max(1, int(share * style.steps)))
    if ready is not None:
        for folder in ("vqvae_f0_quantizer", "style_encoder_w2v2"):
            shutil.copytree(ready / folder, out / folder, dirs_exist_ok=True)
    train_pitch(work, out / "vqvae_f0_quantizer", seed, processes, pitch)
    extract_pitch(work, out / "vqvae_f0_quantizer", processes)
    train_style(work, out / "style_encoder_w2v2", seed, style)
    extract_style(work, out / "style_encoder_w2v2")


if __name__ == "__main__":
    typer.run(main)
