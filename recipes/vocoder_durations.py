"""How long each unit lasts: the duration predictor of the vocoder."""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.vocoder_data import Recording
from stages.hifigan import UnitHiFiGAN

log = logging.getLogger("recipes.vocoder")


def run_lengths(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Units with repeats dropped and the frames each lasted, int64 [N] twice."""
    starts = recording.starts
    return recording.code[starts], np.diff(np.r_[starts, len(recording.code)])


def train_durations(
    generator: UnitHiFiGAN,
    recordings: list[Recording],
    seed: int = 0,
    steps: int = 3000,
    batch: int = 16,
    lr: float = 2e-3,
) -> float:
    """Fit ``log(frames + 1)`` of deduplicated units by mean squared error; embeddings stay fixed.

    The mean of a logarithm is below the logarithm of the mean, so speech would come out fast: in
    the end the bias is shifted until predicted and true frames add up to the same.

    Returns:
        the mean squared error over the last tenth of the steps.
    """
    predictor = generator.dur_predictor.requires_grad_(True)
    place = generator.dict.weight.device
    optimizer = torch.optim.AdamW(predictor.parameters(), lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = np.random.default_rng(seed)
    pairs = [run_lengths(r) for r in recordings]
    errors = []
    for _ in range(steps):
        drawn = _batch([pairs[i] for i in random.integers(0, len(pairs), batch)])
        code, goal, mask = (tensor.to(place) for tensor in drawn)
        embedded = generator.dict(code).detach() * mask[..., None]
        embedded = F.dropout(embedded, 0.1)
        error = (predictor(embedded) - torch.log(goal + 1)).square()
        loss = (error * mask).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(float(loss.detach()))
    predictor.requires_grad_(False)
    result = float(np.mean(errors[-steps // 10 :]))
    bias = _calibrate(generator, pairs[:: max(1, len(pairs) // 200)])
    log.info("durations: mean squared error %.4f (log frames), bias shifted by %.3f", result, bias)
    return result


def _batch(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(len(code) for code, _ in pairs)
    code = torch.zeros(len(pairs), width, dtype=torch.int64)
    goal, mask = torch.zeros(len(pairs), width), torch.zeros(len(pairs), width)
    for row, (units, frames) in enumerate(pairs):
        code[row, : len(units)] = torch.from_numpy(units)
        goal[row, : len(units)] = torch.from_numpy(frames).float()
        mask[row, : len(units)] = 1
    return code, goal, mask


@torch.no_grad()
def _calibrate(generator: UnitHiFiGAN, pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Shift the output bias so that the rounded predictions add up to the true frames."""
    place = generator.dict.weight.device
    codes = (torch.from_numpy(code)[None].to(place) for code, _ in pairs)
    logs = torch.cat([generator.log_durations(code)[0] for code in codes])
    total = sum(int(frames.sum()) for _, frames in pairs)
    low, high = -1.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        spoken = ((logs + middle).exp() - 1).round().clamp(min=1).sum()
        low, high = (middle, high) if spoken < total else (low, middle)
    generator.dur_predictor.proj.bias.add_(low)
    return low
