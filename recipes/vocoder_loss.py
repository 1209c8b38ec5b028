"""Spectral losses of the vocoder: log-mel and multi-resolution STFT magnitudes.

After Yamamoto et al. 2020 (Parallel WaveGAN, arXiv:1910.11480) and Kong et al. 2020 (HiFi-GAN).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 1e-2  # magnitude of a full-scale sine is about a quarter of the window's length


def mel_filters(n_fft: int, mels: int, rate: int = 16000) -> Tensor:
    """Triangular filters of unit peak, equally spaced on the HTK mel scale: [mels, n_fft/2 + 1]."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    return torch.tensor(filters / np.maximum(filters.sum(1, keepdims=True), 1e-6)).float()


class SpectralLoss(nn.Module):
    """Mean over resolutions of log-magnitude L1, spectral convergence and log-mel L1.

    Args:
        sizes: FFT lengths; the hop is a quarter, the window a Hann of full length.
        mels: mel bands for each size; 0 leaves the mel term out.
    """

    def __init__(
        self,
        sizes: tuple[int, ...] = (2048, 1024, 512, 256),
        mels: tuple[int, ...] = (80, 80, 40, 0),
        mel_weight: float = 2.0,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.mel_weight = mel_weight
        for size, bands in zip(sizes, mels, strict=True):
            self.register_buffer(f"window{size}", torch.hann_window(size))
            if bands:
                self.register_buffer(f"mel{size}", mel_filters(size, bands))

    def magnitude(self, wave: Tensor, size: int) -> Tensor:
        """Wave [B, N] -> magnitudes [B, size/2 + 1, frames]."""
        window = getattr(self, f"window{size}")
        spectrum = torch.stft(wave, size, size // 4, window=window, return_complex=True)
        return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-7)

    def forward(self, wave: Tensor, target: Tensor) -> Tensor:
        """Waves [B, N] and their targets -> scalar."""
        total = wave.new_zeros(())
        for size in self.sizes:
            got = self.magnitude(wave, size)
            with torch.no_grad():
                want = self.magnitude(target, size)
            total = total + F.l1_loss(torch.log(got + FLOOR), torch.log(want + FLOOR))
            total = total + torch.linalg.norm(got - want) / torch.linalg.norm(want).clamp(min=1.0)
            filters = getattr(self, f"mel{size}", None)
            if filters is not None:
                got, want = filters @ got, filters @ want
                gap = F.l1_loss(torch.log(got + FLOOR), torch.log(want + FLOOR))
                total = total + self.mel_weight * gap
        return total / len(self.sizes)


class FrameMel(nn.Module):
    """Log-mel of every 128 samples (125 Hz), the window centred on them: target of the mel head."""

    def __init__(self, mels: int = 80, size: int = 1024, hop: int = 128) -> None:
        super().__init__()
        self.size, self.hop = size, hop
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hann_window(size))
        self.register_buffer("filters", mel_filters(size, mels))

    def forward(self, wave: Tensor) -> Tensor:
        """Wave [B, N], N a multiple of the hop -> [B, mels, N / hop]."""
        pad = (self.size - self.hop) // 2
        wave = F.pad(wave, (pad, pad))
        spectrum = torch.stft(
            wave, self.size, self.hop, window=self.window, center=False, return_complex=True
        )
        return torch.log(self.filters @ spectrum.abs() + FLOOR)
