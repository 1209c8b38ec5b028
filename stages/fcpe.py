"""FCPE, the fundamental frequency estimator of Spirit LM's pitch units.

FCPE ("fast context-based pitch estimation", https://github.com/CNChTu/FCPE, MIT licence) reads a
log mel spectrogram at 100 frames a second and scores 360 pitch bins for each frame. Its weights
come with the PyPI package ``torchfcpe``; only the file is used, because importing the package
would pull in torchaudio. Every name and size is read from the file's own configuration.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.checkpoint import CheckpointError, load_state, load_weights, package_file, require

WEIGHTS = "fcpe_c_v001.pt"

_KERNEL = 31  # taps of the depthwise convolution in each block; fixed in FCPE's architecture
_EXPANSION = 2  # inner width of a block over its outer width; likewise
_GROUPS = 4  # groups of the input group norm; likewise
_NEIGHBOURS = 4  # bins on each side of the peak that share in its position
_MAGNITUDE_FLOOR = 1e-9  # added under the square root of the magnitude
_MEL_FLOOR = 1e-5  # mel energies are clipped here before the logarithm


def find_weights() -> Path:
    """The weight file inside the installed ``torchfcpe`` package, which is not imported.

    Raises:
        CheckpointError: the package is not installed or has no such file.
    """
    found = package_file("torchfcpe", f"assets/{WEIGHTS}")
    if found is not None:
        return found
    raise CheckpointError(
        f"{WEIGHTS}: not found. The pitch estimator's weights come with a Python package: "
        "run `pip install --no-deps torchfcpe==0.0.4`"
    )


def slaney_mel_filters(rate: int, n_fft: int, bands: int, low: float, high: float) -> np.ndarray:
    """Triangular mel filters of equal area on the scale of Slaney's Auditory Toolbox.

    Returns ``[bands, n_fft // 2 + 1]`` float32 weights for the bins of a real FFT of ``n_fft``
    points at ``rate`` Hz, from ``low`` to ``high`` Hz.
    """
    edges = _mel_to_hz(np.linspace(_hz_to_mel(low), _hz_to_mel(high), bands + 2))
    bins = np.fft.rfftfreq(n_fft, 1 / rate)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return (np.clip(np.minimum(rise, fall), 0, None) * area[:, None]).astype(np.float32)


_LINEAR_HZ_PER_MEL = 200 / 3
_KNEE_HZ = 1000.0  # the scale is linear below and logarithmic above
_KNEE_MEL = _KNEE_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    if hz < _KNEE_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return _KNEE_MEL + math.log(hz / _KNEE_HZ) / _LOG_STEP


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(
        mel < _KNEE_MEL,
        mel * _LINEAR_HZ_PER_MEL,
        _KNEE_HZ * np.exp(_LOG_STEP * (mel - _KNEE_MEL)),
    )


class LogMel(nn.Module):
    """Wave to FCPE's natural log mel spectrogram.

    ``forward``: ``[n]`` float32 samples at 16 kHz to ``[n // hop + 1, bands]``. The wave is
    reflected at both ends, or padded with zeros where it is too short to reflect.
    """

    def __init__(
        self, rate: int, bands: int, n_fft: int, window: int, hop: int, low: float, high: float
    ):
        super().__init__()
        self.n_fft, self.window_size, self.hop = n_fft, window, hop
        filters = torch.from_numpy(slaney_mel_filters(rate, n_fft, bands, low, high))
        self.filters: Tensor
        self.window: Tensor
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        n = wave.shape[-1]
        spare = self.window_size - self.hop
        left = spare // 2
        right = max((spare + 1) // 2, self.window_size - n - left)
        mode = "reflect" if right < n else "constant"
        padded = F.pad(wave[None, None], (left, right), mode=mode)[0]
        spectrum = torch.stft(
            padded,
            self.n_fft,
            self.hop,
            self.window_size,
            self.window,
            center=False,
            return_complex=True,
        )[0]
        magnitude = torch.sqrt(spectrum.real**2 + spectrum.imag**2 + _MAGNITUDE_FLOOR)
        mel = torch.log(torch.clamp(self.filters @ magnitude, min=_MEL_FLOOR)).T
        frames = n // self.hop + 1
        if mel.shape[0] < frames:
            mel = torch.cat([mel, mel[-1:]])
        return mel[:frames]


class ConvBlock(nn.Module):
    """Residual conformer convolution: norm, widen and gate, depthwise convolution, SiLU, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * _EXPANSION
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * inner)
        self.depthwise = nn.Conv1d(inner, inner, _KERNEL, padding=_KERNEL // 2, groups=inner)
        self.narrow = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]`` to the same."""
        y = F.glu(self.widen(self.norm(x)), dim=-1)
        y = F.silu(self.depthwise(y.transpose(1, 2))).transpose(1, 2)
        return x + self.narrow(y)


class FCPE(nn.Module):
    """The network: log mel ``[B, T, bands]`` to (peak score ``[B, T]``, pitch in Hz ``[B, T]``).

    The peak is the highest of the bin scores (0 to 1); the pitch is the score-weighted mean
    position of the nine bins round it, and is given for every frame, whatever its peak. A group
    norm spans the whole input, so that every frame depends on all of it; everything else reaches
    92 frames far.
    """

    def __init__(self, bands: int, width: int, layers: int, bins: int) -> None:
        super().__init__()
        self.stem_in = nn.Conv1d(bands, width, 3, padding=1)
        self.stem_norm = nn.GroupNorm(_GROUPS, width)
        self.stem_out = nn.Conv1d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList([ConvBlock(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, bins)
        self.cents: Tensor
        self.register_buffer("cents", torch.zeros(bins))

    def scores(self, mel: Tensor) -> Tensor:
        """Log mel ``[B, T, bands]`` to bin scores ``[B, T, bins]`` between 0 and 1."""
        x = F.leaky_relu(self.stem_norm(self.stem_in(mel.transpose(1, 2))))
        x = self.stem_out(x).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return torch.sigmoid(self.output(self.norm(x)))

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(mel)
        peak, best = scores.max(dim=-1, keepdim=True)
        around = torch.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, device=mel.device)
        # At the edges the last bin counts several times, as in FCPE itself.
        index = (best + around).clamp(0, scores.shape[-1] - 1)
        weight = torch.gather(scores, -1, index)
        cents = (self.cents[index] * weight).sum(-1) / weight.sum(-1)
        return peak.squeeze(-1), 10 * 2 ** (cents / 1200)


def load_fcpe(path: str | Path | None = None) -> tuple[LogMel, FCPE]:
    """Spectrogram and network from FCPE's weight file (default: :func:`find_weights`).

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind of FCPE.
    """
    path = Path(path) if path is not None else find_weights()
    state = load_state(path)
    config = require(state, "config_dict", path, dict)
    weights: dict[str, Any] = require(state, "model", path, dict)
    if not config.get("model", {}).get("conv_only"):
        raise CheckpointError(f"{path}: an FCPE with attention; only convolutional ones are known")
    bands = require(config, "mel.num_mels", path, int)
    mel = LogMel(
        rate=require(config, "mel.sr", path, int),
        bands=bands,
        n_fft=require(config, "mel.n_fft", path, int),
        window=require(config, "mel.win_size", path, int),
        hop=require(config, "mel.hop_size", path, int),
        low=require(config, "mel.fmin", path, float),
        high=require(config, "mel.fmax", path, float),
    )
    width, layers = (require(config, f"model.{k}", path, int) for k in ("hidden_dims", "n_layers"))
    network = FCPE(bands, width, layers, require(config, "model.out_dims", path, int))
    load_weights(network, _renamed(weights, layers, path), path)
    return mel.eval().requires_grad_(False), network.eval().requires_grad_(False)


_STEM = {
    "input_stack.0": "stem_in",
    "input_stack.1": "stem_norm",
    "input_stack.3": "stem_out",
    "norm": "norm",
}
_BLOCK = {
    "conformer.net.0": "norm",
    "conformer.net.2": "widen",
    "conformer.net.4.conv": "depthwise",
    "conformer.net.6": "narrow",
}


def _renamed(weights: dict[str, Any], layers: int, path: Path) -> dict[str, Tensor]:
    """FCPE's own keys to ours; point-wise convolutions become linear, the weight norm is folded."""
    names = dict(_STEM)
    for i in range(layers):
        for theirs, ours in _BLOCK.items():
            names[f"net.encoder_layers.{i}.{theirs}"] = f"blocks.{i}.{ours}"
    out: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        for part in ("weight", "bias"):
            key = f"{theirs}.{part}"
            if key not in weights:
                raise CheckpointError(f"{path}: key {key!r} is missing")
            value = weights[key]
            pointwise = part == "weight" and ours.endswith(("widen", "narrow"))
            out[f"{ours}.{part}"] = value.squeeze(-1) if pointwise else value
    for key in ("output_proj.weight_v", "output_proj.weight_g", "output_proj.bias", "cent_table"):
        if key not in weights:
            raise CheckpointError(f"{path}: key {key!r} is missing")
    direction = weights["output_proj.weight_v"]
    norm = direction.norm(dim=1, keepdim=True)
    out["output.weight"] = direction * (weights["output_proj.weight_g"] / norm)
    out["output.bias"] = weights["output_proj.bias"]
    out["cents"] = weights["cent_table"]
    return out
