"""Training of the style classifier: a small wav2vec2 that names the manner of each second.

The labels are those with which the recordings were synthesised. Crops of one to two and a half
seconds, styles equally often, light noise; the loss is taken on every second's logits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import Wav2Vec2Config

from recipes.f0 import Row, read_wave
from stages import SAMPLE_RATE
from stages.style import FRAMES_PER_UNIT, StyleEncoder, StyleNetwork, normalise

STYLES = ("neutral", "lively", "monotone", "whispered", "fast")
CLASSES = 100  # the form has a hundred; the first five are used


def config() -> Wav2Vec2Config:
    """A wav2vec2 of 0.3 million parameters with the official strides (320 samples a frame)."""
    labels = {i: STYLES[i] if i < len(STYLES) else str(i) for i in range(CLASSES)}
    return Wav2Vec2Config(
        architectures=["Wav2Vec2ForSequenceClassification"],
        conv_dim=[48] * 7,
        conv_kernel=[10, 3, 3, 3, 3, 2, 2],
        conv_stride=[5, 2, 2, 2, 2, 2, 2],
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        num_conv_pos_embeddings=64,
        num_conv_pos_embedding_groups=16,
        classifier_proj_size=64,
        mask_time_prob=0.0,
        layerdrop=0.0,
        feat_proj_dropout=0.0,
        id2label=labels,
        label2id={name: i for i, name in labels.items()},
    )


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int = 2400
    batch: int = 12
    rate: float = 1.5e-3
    ramp: int = 150  # steps until the full rate
    save_every: int = 250


def train(work: Path, rows: Sequence[Row], plan: Plan, state_path: Path, seed: int) -> StyleNetwork:
    """Train on ``rows``; ``state_path`` keeps the state of an interrupted run."""
    torch.manual_seed(seed)
    network = StyleNetwork(config()).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.rate, weight_decay=0.01)
    start = 0
    if state_path.is_file():
        saved = torch.load(state_path, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        start = int(saved["step"])
    groups = [[row for row in rows if row["style"] == style] for style in range(len(STYLES))]
    for step in track(range(start, plan.steps), description="style classifier"):
        rng = np.random.default_rng([seed, step])
        torch.manual_seed(seed * 1_000_003 + step)  # dropout, the same when resumed
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _schedule(step, plan)
        waves, labels = batch(work, groups, plan.batch, rng)
        logits = network(waves)
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), label_smoothing=0.05
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % plan.save_every == 0:
            _save_state(state_path, network, optimizer, step + 1)
    return network.eval().requires_grad_(False)


def _schedule(step: int, plan: Plan) -> float:
    rising = min(1.0, (step + 1) / plan.ramp)
    return rising * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * step / plan.steps))))


def batch(
    work: Path, groups: Sequence[Sequence[Row]], size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Crops of one random length, styles drawn equally: waves ``[size, n]``, labels ``[size]``.

    Never padded, since padding would take part in wav2vec2's group norm: a recording shorter than
    the crop is passed over.
    """
    length = int(rng.uniform(1.0, 2.5) * SAMPLE_RATE)
    waves: list[np.ndarray] = []
    labels: list[int] = []
    while len(waves) < size:
        style = int(rng.integers(len(groups)))
        row = groups[style][int(rng.integers(len(groups[style])))]
        if row["samples"] < length:
            continue
        wave = read_wave(work, row)
        at = int(rng.integers(len(wave) - length + 1))
        crop = wave[at : at + length]
        level = np.sqrt(np.mean(crop**2)) * 10 ** (-rng.uniform(15, 50) / 20)
        noisy = crop + level * rng.standard_normal(length).astype(np.float32)
        waves.append(normalise(noisy))
        labels.append(style)
    return torch.from_numpy(np.stack(waves)), torch.tensor(labels)


def _save_state(
    path: Path, network: StyleNetwork, optimizer: torch.optim.Optimizer, step: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, partial)
    partial.replace(path)


def save(network: StyleNetwork, folder: Path) -> None:
    """Write ``config.json`` and ``pytorch_model.bin`` (half precision) in the official form."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(network.wav2vec2.config.to_diff_dict(), indent=1)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    state = {key: value.detach().clone() for key, value in network.state_dict().items()}
    name = "wav2vec2.encoder.pos_conv_embed.conv.weight"
    direction = state.pop(name)
    state[f"{name}_v"] = direction
    state[f"{name}_g"] = direction.norm(dim=(0, 1), keepdim=True)
    torch.save({key: value.half() for key, value in state.items()}, folder / "pytorch_model.bin")


def evaluate(encoder: StyleEncoder, work: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Right styles by the second and by the recording (majority), with the confusions.

    Seconds that the recording's end cuts short are left out of the figures by the second.
    """
    confusion = np.zeros((len(STYLES), len(STYLES) + 1), np.int64)  # last column: another class
    right_recordings = []
    for row in track(rows, description="style, held out"):
        wave = read_wave(work, row)
        units = encoder.units(wave)
        whole = units[: max(1, len(wave) // (320 * FRAMES_PER_UNIT))]
        for unit in whole:
            confusion[row["style"], min(int(unit), len(STYLES))] += 1
        right_recordings.append((row["style"], np.bincount(units).argmax() == row["style"]))
    recall = {
        name: round(float(confusion[i, i] / max(1, confusion[i].sum())), 3)
        for i, name in enumerate(STYLES)
    }
    by_style = [[right for s, right in right_recordings if s == i] for i in range(len(STYLES))]
    return {
        "recordings": len(rows),
        "accuracy_by_second": round(float(np.trace(confusion) / confusion.sum()), 3),
        "balanced_accuracy_by_second": round(float(np.mean(list(recall.values()))), 3),
        "accuracy_by_recording": round(float(np.mean([right for _, right in right_recordings])), 3),
        "recall_by_second": recall,
        "recall_by_recording": {
            name: round(float(np.mean(rights)), 3)
            for name, rights in zip(STYLES, by_style, strict=True)
            if rights
        },
        "confusion_by_second": confusion.tolist(),
    }
