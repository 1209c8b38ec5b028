"""The VQ-VAE that turns F0 and voicing into 64 codes, and back.

Encoder: for each halving a strided convolution and a stack of dilated residual blocks; decoder: the
mirror, with transposed convolutions. Every size comes from the checkpoint's ``config.yaml``; module
names follow the keys of its ``model.pt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.checkpoint import CheckpointError, load_state, load_weights, load_yaml, require


@dataclass(frozen=True)
class StackConfig:
    """Sizes of one encoder or decoder, under the names of ``config.yaml``."""

    input_emb_width: int
    output_emb_width: int
    down_t: int  # number of halvings
    stride_t: int  # factor of each "halving"
    width: int
    depth: int
    m_conv: float
    dilation_growth_rate: int

    @classmethod
    def read(cls, config: Mapping[str, Any], part: str, path: str | Path) -> StackConfig:
        """From ``config[part]``. Raises :class:`CheckpointError` for what this model cannot be."""
        if require(config, f"{part}.levels", path, int) != 1:
            raise CheckpointError(f"{path}: key '{part}.levels': only one level is known")
        single: dict[str, int] = {}
        for key in ("downs_t", "strides_t"):
            values = require(config, f"{part}.{key}", path, list)
            if len(values) != 1 or not isinstance(values[0], int) or values[0] < 1:
                raise CheckpointError(f"{path}: key '{part}.{key}' is {values}, expected one count")
            single[key] = values[0]
        whole = ("input_emb_width", "output_emb_width", "width", "depth", "dilation_growth_rate")
        return cls(
            down_t=single["downs_t"],
            stride_t=single["strides_t"],
            m_conv=require(config, f"{part}.m_conv", path, float),
            **{key: require(config, f"{part}.{key}", path, int) for key in whole},
        )


class _Model(nn.Module):
    """Modules in a row under the name ``model``, as the checkpoint's keys have it."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class _Residual(_Model):
    """``x + conv1(relu(conv3(relu(x))))``, the first convolution dilated."""

    def __init__(self, width: int, inner: int, dilation: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv1d(width, inner, 3, padding=dilation, dilation=dilation),
            nn.ReLU(),
            nn.Conv1d(inner, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _residuals(c: StackConfig) -> _Model:
    """Residual blocks of growing dilation, in the decoder as in the encoder."""
    inner = int(c.m_conv * c.width)
    dilations = (c.dilation_growth_rate**i for i in range(c.depth))
    return _Model(*(_Residual(c.width, inner, dilation) for dilation in dilations))


class Encoder(nn.Module):
    """``[B, inputs, T]`` to latents ``[B, outputs, T // stride // stride ...]``."""

    def __init__(self, c: StackConfig) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i in range(c.down_t):
            channels = c.input_emb_width if i == 0 else c.width
            down = nn.Conv1d(channels, c.width, 2 * c.stride_t, c.stride_t, c.stride_t // 2)
            parts.append(nn.Sequential(down, _residuals(c)))
        parts.append(nn.Conv1d(c.width, c.output_emb_width, 3, padding=1))
        self.level_blocks = nn.ModuleList([_Model(*parts)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.level_blocks[0](x)
        return out


class Decoder(nn.Module):
    """The mirror of :class:`Encoder`: ``[B, outputs, T]`` to ``[B, inputs, T * 2^downs]``."""

    def __init__(self, c: StackConfig) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv1d(c.output_emb_width, c.width, 3, padding=1)]
        for i in range(c.down_t):
            channels = c.output_emb_width if i == c.down_t - 1 else c.width
            up = nn.ConvTranspose1d(c.width, channels, 2 * c.stride_t, c.stride_t, c.stride_t // 2)
            parts.append(nn.Sequential(_residuals(c), up))
        self.level_blocks = nn.ModuleList([_Model(*parts)])
        self.out = nn.Conv1d(c.output_emb_width, c.input_emb_width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.level_blocks[0](x))
        return out


class _Codebook(nn.Module):
    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.k: Tensor
        self.register_buffer("k", torch.zeros(codes, width))


class _Quantizer(nn.Module):
    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.level_blocks = nn.ModuleList([_Codebook(codes, width)])


class PitchVQVAE(nn.Module):
    """Encoder, code vectors, decoder. ``forward``: ``[B, 2, T]`` to int64 codes ``[B, T']``."""

    def __init__(self, encoder: StackConfig, decoder: StackConfig, codes: int) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.vq = _Quantizer(codes, encoder.output_emb_width)
        self.decoder = Decoder(decoder)
        self.factor = encoder.stride_t**encoder.down_t  # F0 frames to a code

    @property
    def codebook(self) -> Tensor:
        """``[codes, D]``."""
        k: Tensor = self.vq.level_blocks[0].k  # type: ignore[assignment]
        return k

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(self.encoder(x))

    def quantize(self, latent: Tensor) -> Tensor:
        """Nearest code vector (Euclidean) of each latent: ``[B, D, T]`` to ``[B, T]``."""
        # |x|^2 is the same for every code and left out.
        k = self.codebook
        distance = (k * k).sum(-1) - 2 * (latent.transpose(1, 2) @ k.T)
        return distance.argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[B, T]`` to mean-removed F0 and voicing ``[B, 2, factor * T]``."""
        out: Tensor = self.decoder(self.codebook[codes].transpose(1, 2))
        return out


def build_vqvae(config: Mapping[str, Any], path: str | Path) -> PitchVQVAE:
    """An untrained network of the sizes in ``config``, the content of a ``config.yaml``."""
    encoder = StackConfig.read(config, "encoder_params", path)
    decoder = StackConfig.read(config, "decoder_params", path)
    width = require(config, "vq_params.emb_width", path, int)
    if width != encoder.output_emb_width:
        raise CheckpointError(
            f"{path}: vq_params.emb_width is {width}, but the encoder puts out "
            f"{encoder.output_emb_width}"
        )
    return PitchVQVAE(encoder, decoder, require(config, "vq_params.l_bins", path, int))


def load_vqvae(folder: Path) -> tuple[PitchVQVAE, dict[str, Any]]:
    """The network in ``folder`` and its configuration.

    Raises:
        CheckpointError: ``config.yaml`` or ``model.pt`` is missing, damaged, or they do not match.
    """
    config = load_yaml(folder / "config.yaml")
    model = build_vqvae(config, folder / "config.yaml")
    path = folder / "model.pt"
    load_weights(model, require(load_state(path), "model", path, dict), path)
    return model.eval().requires_grad_(False), config
