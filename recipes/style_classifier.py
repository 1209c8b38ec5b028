"""Training of the style classifier: a small wav2vec2 that names the manner of each second.

The labels are those with which the recordings were synthesised. A few minutes are short for
learning from one label a second, so that during training two further outputs are asked of the
hidden states, frame by frame: pitch and voicing (from FCPE), and how fast the phones follow each
other (from the alignment). They are what manner is made of; they are thrown away afterwards.
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
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Wav2Vec2Config

from recipes.f0 import Row, load_f0, read_wave
from stages import SAMPLE_RATE
from stages.style import FRAMES_PER_UNIT, StyleEncoder, StyleNetwork, normalise

STYLES = ("neutral", "lively", "monotone", "whispered", "fast")
CLASSES = 100  # the form has a hundred; the first five are used
HOP = 320  # samples to a frame


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

    steps: int = 3200
    batch: int = 12
    rate: float = 1.5e-3
    ramp: int = 150  # steps until the full rate
    save_every: int = 250
    share: tuple[float, ...] = (0.4, 0.17, 0.17, 0.09, 0.17)  # of each style in a batch


@dataclass(frozen=True)
class Batch:
    """Crops of one length, and what is to be said of them.

    Waves ``[B, n]``, normalised; labels ``[B]``; by frame ``[B, T]``: octaves above 150 Hz,
    voicing, and speaking rate (phones per second over ten, less one; NaN where there is no
    alignment).
    """

    waves: Tensor
    labels: Tensor
    octaves: Tensor
    voicing: Tensor
    rate: Tensor


class Trainee(nn.Module):
    """The classifier with its two further outputs: ``[B, n]`` to logits and ``[B, T, 3]``."""

    def __init__(self) -> None:
        super().__init__()
        self.network = StyleNetwork(config())
        self.frames = nn.Linear(self.network.projector.in_features, 3)

    def forward(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.network.hidden(waves)
        logits: Tensor = self.network.classifier(self.network.pool(hidden))
        return logits, self.frames(hidden)

    def loss(self, batch: Batch) -> Tensor:
        logits, frames = self(batch.waves)
        targets = batch.labels.repeat_interleave(logits.shape[1])
        style = F.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=0.05)
        length = frames.shape[1]
        voicing, known = batch.voicing[:, :length], ~batch.rate[:, :length].isnan()
        pitch = F.smooth_l1_loss(frames[..., 0], batch.octaves[:, :length], reduction="none")
        voiced = F.binary_cross_entropy_with_logits(frames[..., 1], voicing)
        rate = (frames[..., 2] - batch.rate[:, :length].nan_to_num()).square()
        return style + (pitch * voicing).mean() + 0.3 * voiced + (rate * known).mean()


def train(work: Path, rows: Sequence[Row], plan: Plan, state_path: Path, seed: int) -> StyleNetwork:
    """Train on ``rows``; ``state_path`` keeps the state of an interrupted run."""
    torch.manual_seed(seed)
    trainee = Trainee().train()
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=plan.rate, weight_decay=0.01)
    start = 0
    if state_path.is_file():
        saved = torch.load(state_path, weights_only=True)
        trainee.load_state_dict(saved["trainee"])
        optimizer.load_state_dict(saved["optimizer"])
        start = int(saved["step"])
    groups = [[row for row in rows if row["style"] == style] for style in range(len(STYLES))]
    for step in track(range(start, plan.steps), description="style classifier"):
        torch.manual_seed(seed * 1_000_003 + step)  # dropout, the same when resumed
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _schedule(step, plan)
        loss = trainee.loss(draw(work, groups, plan, np.random.default_rng([seed, step])))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % plan.save_every == 0:
            _save_state(state_path, trainee, optimizer, step + 1)
    return trainee.network.eval().requires_grad_(False)


def _schedule(step: int, plan: Plan) -> float:
    rising = min(1.0, (step + 1) / plan.ramp)
    return rising * (0.02 + 0.98 * 0.5 * (1 + float(np.cos(np.pi * step / plan.steps))))


def draw(
    work: Path, groups: Sequence[Sequence[Row]], plan: Plan, rng: np.random.Generator
) -> Batch:
    """A batch of random crops, all of one random length of one to two and a half seconds.

    Never padded, since padding would take part in wav2vec2's group norm: a recording shorter than
    the crop is passed over.
    """
    length = int(rng.uniform(1.0, 2.5) * SAMPLE_RATE)
    frames = length // HOP
    waves: list[np.ndarray] = []
    labels: list[int] = []
    targets: list[list[np.ndarray]] = []
    while len(waves) < plan.batch:
        style = int(rng.choice(len(groups), p=plan.share))
        row = groups[style][int(rng.integers(len(groups[style])))]
        if row["samples"] < length:
            continue
        wave = read_wave(work, row)
        at = int(rng.integers(len(wave) - length + 1))
        crop = wave[at : at + length]
        level = np.sqrt(np.mean(crop**2)) * 10 ** (-rng.uniform(15, 50) / 20)
        waves.append(normalise(crop + level * rng.standard_normal(length).astype(np.float32)))
        labels.append(style)
        centres = at + HOP * np.arange(frames) + HOP // 2
        targets.append([*_pitch(load_f0(work, row), centres), speaking_rate(row, centres)])
    by_frame = torch.from_numpy(np.array(targets, np.float32))
    octaves, voicing, rate = by_frame.unbind(1)
    return Batch(torch.from_numpy(np.stack(waves)), torch.tensor(labels), octaves, voicing, rate)


def _pitch(f0: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Octaves above 150 Hz, and voicing, at the samples ``centres``."""
    at = np.minimum(centres // 80, f0.shape[1] - 1)
    return np.log2(np.maximum(f0[0, at], 20) / 150), f0[1, at]


def speaking_rate(row: Row, centres: np.ndarray) -> np.ndarray:
    """Phones per second round each of the samples ``centres``, over ten, less one.

    Phones count with a Gaussian weight of 0.3 s; pauses count neither as phones nor as time.
    """
    phones = [p for p in row["phones"] or () if p[0] != "sil"]
    if not phones:
        return np.full(len(centres), np.nan)
    start, end = np.array([p[1:] for p in phones]).T
    distance = centres[:, None] / SAMPLE_RATE - (start + end) / 2
    weight = np.exp(-0.5 * (distance / 0.3) ** 2) + 1e-9
    return weight.sum(1) / (weight * (end - start)).sum(1) / 10 - 1


def _save_state(path: Path, trainee: Trainee, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {"trainee": trainee.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
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
    by_style: dict[str, list[bool]] = {name: [] for name in STYLES}
    by_voice: dict[str, list[bool]] = {}
    for row in track(rows, description="style, held out"):
        wave, style = read_wave(work, row), row["style"]
        units = encoder.units(wave)
        for unit in units[: max(1, len(wave) // (HOP * FRAMES_PER_UNIT))]:
            confusion[style, min(int(unit), len(STYLES))] += 1
        right = bool(np.bincount(units).argmax() == style)
        by_style[STYLES[style]].append(right)
        by_voice.setdefault(row["voice"], []).append(right)
    recall = {
        name: _share(int(row[i]), int(row.sum()))
        for i, (name, row) in enumerate(zip(STYLES, confusion, strict=True))
        if row.sum()
    }
    return {
        "recordings": len(rows),
        "accuracy_by_second": _share(int(np.trace(confusion)), int(confusion.sum())),
        "balanced_accuracy_by_second": round(float(np.mean(list(recall.values()))), 3),
        "accuracy_by_recording": _mean([r for rights in by_voice.values() for r in rights]),
        "recall_by_second": recall,
        "recall_by_recording": {name: _mean(r) for name, r in by_style.items() if r},
        "accuracy_by_recording_by_voice": {v: _mean(r) for v, r in sorted(by_voice.items())},
        "confusion_by_second": confusion.tolist(),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 3)


def _mean(rights: Sequence[bool]) -> float:
    return _share(sum(rights), len(rights))
