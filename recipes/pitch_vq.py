"""Training of the pitch VQ-VAE: 64 codes for 80 ms of melody and voicing each.

The network learns on F0 scaled to about unit variance; the scale is then multiplied into its first
and last convolutions, because the official input is plain Hz. It starts as an autoencoder; after a
warm-up the codes are set by k-means, follow their vectors by exponential averages, and are put
elsewhere when nothing uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from recipes.f0 import Row, load_f0
from stages.pitch import PitchEncoder
from stages.vqvae import PitchVQVAE, build_vqvae

SCALE = 40.0  # Hz; about the standard deviation of mean-removed F0


def config(width: int = 32, depth: int = 3, codes: int = 64, latent: int = 64) -> dict[str, Any]:
    """The content of ``config.yaml``, in the official form."""
    stack = {
        "input_emb_width": 2,
        "output_emb_width": latent,
        "levels": 1,
        "downs_t": [4],
        "strides_t": [2],
        "width": width,
        "depth": depth,
        "m_conv": 1.0,
        "dilation_growth_rate": 3,
    }
    return {
        "features": "norm_f0_interp,vuv",
        "sampling_rate": 16000,
        "code_hop_size": 80,
        "multispkr": False,
        "lambda_commit": 0.25,
        "encoder_params": dict(stack),
        "vq_params": {"l_bins": codes, "emb_width": latent, "mu": 0.99, "levels": 1},
        "decoder_params": dict(stack),
    }


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int = 3500
    warmup: int = 400  # steps without quantization, before the codes are set
    batch: int = 16
    crop: int = 384  # F0 frames: 1.92 s
    rate: float = 1.5e-3
    save_every: int = 500


class Codes:
    """Keeps the code vectors at the running mean of the latents that chose them."""

    def __init__(self, model: PitchVQVAE, mu: float) -> None:
        self.model, self.mu = model, mu
        codes, width = model.codebook.shape
        self.count = torch.ones(codes)
        self.total = torch.zeros(codes, width)

    def set_by_kmeans(self, latents: Tensor, generator: torch.Generator, rounds: int = 20) -> None:
        """Place the codes by k-means on ``latents`` ``[N, D]``."""
        k = latents[torch.randperm(len(latents), generator=generator)[: len(self.count)]].clone()
        for _ in range(rounds):
            nearest = torch.cdist(latents, k).argmin(1)
            for i in range(len(k)):
                if (nearest == i).any():
                    k[i] = latents[nearest == i].mean(0)
        self._place(k)

    def _place(self, k: Tensor) -> None:
        self.model.codebook.copy_(k)
        self.count.fill_(1.0)
        self.total.copy_(k)

    @torch.no_grad()
    def follow(self, latents: Tensor, chosen: Tensor, generator: torch.Generator) -> None:
        """One step of averaging; codes that went out of use restart at random latents."""
        codes = len(self.count)
        onehot = F.one_hot(chosen, codes).to(latents.dtype)
        self.count.mul_(self.mu).add_(onehot.sum(0), alpha=1 - self.mu)
        self.total.mul_(self.mu).add_(onehot.T @ latents, alpha=1 - self.mu)
        dead = self.count < 0.1
        if dead.any():
            pick = torch.randint(len(latents), (int(dead.sum()),), generator=generator)
            self.total[dead] = latents[pick]
            self.count[dead] = 1.0
        self.model.codebook.copy_(self.total / self.count[:, None])

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "total": self.total}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.count.copy_(state["count"])
        self.total.copy_(state["total"])


def inputs(work: Path, rows: Sequence[Row]) -> list[np.ndarray]:
    """The VQ-VAE's input ``[2, T]`` for each recording: mean-removed Hz, voicing."""
    return [PitchEncoder.remove_mean(*load_f0(work, row)) for row in rows]


def train(
    data: Sequence[np.ndarray], plan: Plan, state_path: Path, seed: int = 0
) -> tuple[PitchVQVAE, dict[str, Any]]:
    """Train on inputs ``[2, T]`` and return the network for raw Hz, with its configuration.

    ``state_path`` holds the state of an interrupted run and is taken up from there.
    """
    settings = config()
    torch.manual_seed(seed)
    model = build_vqvae(settings, "the recipe's configuration")
    codes = Codes(model, settings["vq_params"]["mu"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.rate, betas=(0.9, 0.99))
    start = 0
    if state_path.is_file():
        saved = torch.load(state_path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        codes.restore(saved["codes"])
        start = int(saved["step"])
    for step in track(range(start, plan.steps), description="pitch VQ-VAE"):
        # Seeding every step anew makes a resumed run the same as an uninterrupted one.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _cosine(step, plan.steps)
        batch = crops(data, plan, generator)
        if step == plan.warmup:
            many = torch.cat([crops(data, plan, generator) for _ in range(8)])
            with torch.no_grad():
                codes.set_by_kmeans(_flat(model.encoder(many)), generator)
        loss = _loss(model, batch, codes if step >= plan.warmup else None, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % plan.save_every == 0:
            _save_state(state_path, model, optimizer, codes, step + 1)
    model.eval().requires_grad_(False)
    take_hertz(model)
    return model, settings


def _cosine(step: int, steps: int) -> float:
    return 0.05 + 0.95 * 0.5 * (1 + float(np.cos(np.pi * step / steps)))


def crops(data: Sequence[np.ndarray], plan: Plan, generator: torch.Generator) -> Tensor:
    """Random pieces ``[batch, 2, crop]``, F0 scaled; short recordings are repeated."""
    out = np.empty((plan.batch, 2, plan.crop), np.float32)
    for row in out:
        x = data[int(torch.randint(len(data), (1,), generator=generator))]
        while x.shape[1] < plan.crop:
            x = np.concatenate([x, x], axis=1)
        at = int(torch.randint(x.shape[1] - plan.crop + 1, (1,), generator=generator))
        row[:] = x[:, at : at + plan.crop]
    out[:, 0] /= SCALE
    return torch.from_numpy(out)


def _flat(latent: Tensor) -> Tensor:
    """``[B, D, T]`` to ``[B * T, D]``."""
    return latent.transpose(1, 2).reshape(-1, latent.shape[1])


def _loss(
    model: PitchVQVAE, batch: Tensor, codes: Codes | None, generator: torch.Generator
) -> Tensor:
    latent = model.encoder(batch)
    commit = latent.new_zeros(())
    passed = latent
    if codes is not None:
        chosen = model.quantize(latent)
        quantized = model.codebook[chosen].transpose(1, 2)
        commit = F.mse_loss(latent, quantized.detach())
        passed = latent + (quantized - latent).detach()
        codes.follow(_flat(latent.detach()), chosen.reshape(-1), generator)
    out = model.decoder(passed)
    voiced = batch[:, 1]
    # Interpolated stretches carry no melody of their own; they only keep the curve in place.
    weight = 0.1 + 0.9 * voiced
    f0 = (weight * F.smooth_l1_loss(out[:, 0], batch[:, 0], reduction="none", beta=0.2)).mean()
    return f0 + 0.5 * F.mse_loss(out[:, 1], voiced) + 0.25 * commit


def _save_state(
    path: Path, model: PitchVQVAE, optimizer: torch.optim.Optimizer, codes: Codes, step: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "codes": codes.state(),
        "step": step,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@torch.no_grad()
def take_hertz(model: PitchVQVAE) -> None:
    """Multiply the training scale into the weights: from now on the network's F0 is in Hz."""
    first = next(m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv1d))
    first.weight[:, 0] /= SCALE
    model.decoder.out.weight[0] *= SCALE
    bias = model.decoder.out.bias
    assert bias is not None
    bias[0] *= SCALE


def save(model: PitchVQVAE, settings: dict[str, Any], folder: Path) -> None:
    """Write ``config.yaml`` and ``model.pt`` (half precision) in the official form."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(settings, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    state = {key: value.half() for key, value in model.state_dict().items()}
    torch.save({"model": state}, folder / "model.pt")


@torch.inference_mode()
def evaluate(
    model: PitchVQVAE, data: Sequence[np.ndarray], f0: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Reconstruction error over voiced frames and use of the codes.

    Args:
        data: inputs ``[2, T]``.
        f0: the same recordings before the mean was removed, to tell semitones from Hz.
    """
    hertz, semitones, voicing, used = [], [], [], []
    for x, full in zip(data, f0, strict=True):
        if x.shape[1] < model.factor:
            continue
        chosen = model(torch.from_numpy(x)[None])
        used.append(chosen[0].numpy())
        out = model.decode(chosen)[0].numpy()
        length = out.shape[1]
        voiced = x[1, :length] > 0
        voicing.append((out[1] > 0.5) == voiced)
        error = (out[0] - x[0, :length])[voiced]
        hertz.append(np.abs(error))
        true = full[0, :length][voiced]
        semitones.append(np.abs(12 * np.log2(np.maximum(true + error, 20) / true)))
    count = np.bincount(np.concatenate(used), minlength=len(model.codebook))
    share = count / count.sum()
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum()
    return {
        "recordings": len(used),
        "f0_error_hz_mean": round(float(np.concatenate(hertz).mean()), 2),
        "f0_error_semitones_mean": round(float(np.concatenate(semitones).mean()), 3),
        "f0_error_semitones_median": round(float(np.median(np.concatenate(semitones))), 3),
        "voicing_accuracy": round(float(np.concatenate(voicing).mean()), 4),
        "codes_used": int((count > 0).sum()),
        "codes_over_a_thousandth": int((share > 1e-3).sum()),
        "code_perplexity": round(float(np.exp(entropy)), 1),
    }
