"""Judges that tell the vocoder's speech from recordings, for the last phase of its training.

Spectral losses alone leave harmonics blurred: of all waves that a unit may stand for they ask for
the mean. A judge that knows real speech asks for one of them. Small relatives of the multi-period
(Kong et al. 2020, HiFi-GAN, arXiv:2010.05646) and multi-resolution spectrogram discriminators (Jang
et al. 2021, UnivNet, arXiv:2106.07889), least-squares losses and feature matching as there.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from recipes import together

PERIODS = (2, 3, 5, 7, 11)
SIZES = (2048, 1024, 512)  # FFT lengths: the longest tells harmonics apart
Judged = list[list[Tensor]]
"""Of each judge the outputs of all its layers; the last one is the verdict."""


class PeriodJudge(nn.Module):
    """Looks at every ``period``-th sample."""

    def __init__(self, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        sizes = [1, width, 2 * width, 4 * width, 4 * width]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in pairwise(sizes)
        )
        self.verdict = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> list[Tensor]:
        """Wave [B, N]."""
        wave = F.pad(wave, (0, -wave.shape[1] % self.period), mode="reflect")
        return _layers(wave.reshape(len(wave), 1, -1, self.period), self.layers, self.verdict)


class SpectrumJudge(nn.Module):
    """Looks at the log magnitudes of one short-time spectrum."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.window: Tensor
        self.register_buffer("window", torch.hann_window(size))
        strides = [(2, 1), (2, 1), (2, 2), (1, 1)]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(width if n else 1, width, (7, 3), stride, (3, 1)))
            for n, stride in enumerate(strides)
        )
        self.verdict = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, wave: Tensor) -> list[Tensor]:
        """Wave [B, N]."""
        spectrum = torch.stft(
            wave, self.size, self.size // 4, window=self.window, return_complex=True
        )
        power = spectrum.real.square() + spectrum.imag.square()
        return _layers(torch.log(power + 1e-5)[:, None] / 5, self.layers, self.verdict)


def _layers(x: Tensor, layers: nn.ModuleList, verdict: nn.Module) -> list[Tensor]:
    outputs = []
    for layer in layers:
        x = F.leaky_relu(layer(x), 0.1)
        outputs.append(x)
    return [*outputs, verdict(x)]


class Adversary(nn.Module):
    """All judges, and how they learn.

    Args:
        width: channels of the first layers.
        lr: learning rate of the judges.
    """

    def __init__(self, width: int = 16, lr: float = 2e-4) -> None:
        super().__init__()
        self.judges = nn.ModuleList(
            [*(PeriodJudge(p, width) for p in PERIODS), *(SpectrumJudge(s, width) for s in SIZES)]
        )
        self.optimizer = torch.optim.AdamW(self.parameters(), lr, betas=(0.8, 0.99))

    def forward(self, wave: Tensor) -> Judged:
        """Waves [B, N] as every judge sees them."""
        return [judge(wave) for judge in self.judges]

    def learn(self, made: Tensor, real: Tensor) -> float:
        """One step towards telling ``made`` from ``real`` (both [B, N]); the loss before it."""
        self.requires_grad_(True)
        loss = made.new_zeros(())
        for judge in self.judges:
            loss = loss + (judge(real)[-1] - 1).square().mean()
            loss = loss + judge(made.detach())[-1].square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        together.average(self.parameters())
        nn.utils.clip_grad_norm_(self.parameters(), 10.0)
        self.optimizer.step()
        return float(loss.detach())

    def convince(self, made: Tensor, real: Tensor) -> Tensor:
        """What the vocoder has to lower: the verdicts on ``made``, and how its features differ."""
        self.requires_grad_(False)
        with torch.no_grad():
            wanted = self(real)
        loss = made.new_zeros(())
        for got, want in zip(self(made), wanted, strict=True):
            loss = loss + (got[-1] - 1).square().mean()
            pairs = zip(got[:-1], want[:-1], strict=True)
            loss = loss + 2 * sum(F.l1_loss(a, b) for a, b in pairs)
        return loss / len(self.judges)
