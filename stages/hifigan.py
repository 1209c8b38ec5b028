"""The unit HiFi-GAN network, Base and Expressive, in the official checkpoint form.

One unit frame is 640 samples (40 ms at 16 kHz). Embeddings of the phonetic unit and, Expressive, of
its pitch and style are repeated by predicted durations, concatenated with speaker (and, Base,
style) embeddings, and upsampled by a HiFi-GAN generator (Kong et al. 2020, arXiv:2010.05646; unit
input and duration predictor: Lee et al. 2021, arXiv:2107.05604). Every dimension comes from
``config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.checkpoint import CheckpointError, load_json, require

DEFAULT_SPEAKER = 2
DEFAULT_STYLE = 8
SLOPE = 0.1


@dataclass(frozen=True)
class VocoderConfig:
    """The shape of one unit HiFi-GAN, as read from ``config.json``.

    ``pitches`` and ``style_tokens`` are 0 in a Base vocoder, ``styles`` in an Expressive one.
    Rates, kernels and hops are in samples of the stage concerned.
    """

    resblock: str
    rates: tuple[int, ...]
    kernels: tuple[int, ...]
    initial_channels: int
    resblock_kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    units: int
    dim: int
    hop: int
    speakers: int
    styles: int
    pitches: int
    style_tokens: int
    pitch_repeat: int
    style_repeat: int
    duration_hidden: int
    duration_kernel: int
    sample_rate: int
    default_speaker: int
    default_style: int

    @property
    def expressive(self) -> bool:
        return self.pitches > 0

    @property
    def channels_in(self) -> int:
        tables = (self.units, self.pitches, self.style_tokens, self.speakers, self.styles)
        return self.dim * sum(size > 0 for size in tables)

    @classmethod
    def load(cls, path: Path) -> VocoderConfig:
        """Read an official ``config.json``. Raises :class:`CheckpointError` naming file and key."""
        return cls.parse(load_json(path), path)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], path: str | Path) -> VocoderConfig:
        """As :meth:`load`, for an already read mapping; ``path`` is for messages."""

        def number(key: str) -> int:
            return require(raw, key, path, int)

        def numbers(key: str) -> tuple[int, ...]:
            return tuple(int(n) for n in require(raw, key, path, list))

        def repeat(key: str) -> int:
            return round(number(key) / number("code_hop_size"))

        expressive = bool(raw.get("num_f0_tokens"))
        config = cls(
            resblock=str(require(raw, "resblock", path)),
            rates=numbers("upsample_rates"),
            kernels=numbers("upsample_kernel_sizes"),
            initial_channels=number("upsample_initial_channel"),
            resblock_kernels=numbers("resblock_kernel_sizes"),
            dilations=tuple(tuple(d) for d in require(raw, "resblock_dilation_sizes", path, list)),
            units=number("num_embeddings"),
            dim=number("embedding_dim"),
            hop=number("code_hop_size"),
            speakers=number("num_speakers") if raw.get("multispkr") else 0,
            styles=number("num_styles") if raw.get("multistyle") else 0,
            pitches=number("num_f0_tokens") if expressive else 0,
            style_tokens=number("num_style_tokens") if expressive else 0,
            pitch_repeat=repeat("f0_hop_size") if expressive else 1,
            style_repeat=repeat("style_hop_size") if expressive else 1,
            duration_hidden=number("dur_predictor_params.var_pred_hidden_dim"),
            duration_kernel=number("dur_predictor_params.var_pred_kernel_size"),
            sample_rate=number("sampling_rate"),
            default_speaker=int(raw.get("default_speaker", DEFAULT_SPEAKER)),
            default_style=int(raw.get("default_style", DEFAULT_STYLE)),
        )
        config._check(raw, path)
        return config

    def _check(self, raw: Mapping[str, Any], path: str | Path) -> None:
        if self.resblock not in ("1", "2"):
            raise CheckpointError(f"{path}: resblock {self.resblock!r}, expected '1' or '2'")
        if len(self.rates) != len(self.kernels):
            raise CheckpointError(
                f"{path}: upsample_rates has {len(self.rates)} entries, upsample_kernel_sizes "
                f"{len(self.kernels)}; expected as many of each"
            )
        if len(self.resblock_kernels) != len(self.dilations):
            raise CheckpointError(
                f"{path}: resblock_kernel_sizes and resblock_dilation_sizes differ in length"
            )
        if math.prod(self.rates) != self.hop:
            raise CheckpointError(
                f"{path}: upsample_rates multiply to {math.prod(self.rates)}, "
                f"code_hop_size is {self.hop}"
            )
        for key, have in (("model_in_dim", self.channels_in),
                          ("dur_predictor_params.encoder_embed_dim", self.dim)):  # fmt: skip
            if require(raw, key, path, int) != have:
                raise CheckpointError(
                    f"{path}: {key} is {require(raw, key, path)}, the embeddings give {have}"
                )


def reach(config: VocoderConfig) -> list[tuple[int, int]]:
    """How much around a stretch of the wave the layers look at, before and after it, exactly.

    One entry for the input of each upsampling stage, and one for that of the last convolution, each
    in samples at that layer's own rate.
    """
    spread = max(
        _block_reach(config.resblock, kernel, dilations)
        for kernel, dilations in zip(config.resblock_kernels, config.dilations, strict=True)
    )
    before = after = _ENDS
    found = [(before, after)]
    for rate, kernel in zip(reversed(config.rates), reversed(config.kernels), strict=True):
        # Output o of the transposed one reads inputs i with 0 <= o + padding - i rate < kernel.
        padding = (kernel - rate) // 2
        before = (kernel - 1 - padding + before + spread) // rate
        after = (rate - 1 + padding + after + spread) // rate
        found.append((before, after))
    return found[::-1]


def receptive_field(config: VocoderConfig) -> tuple[int, int]:
    """Frames before and after a frame on which its samples depend, exactly."""
    before, after = reach(config)[0]
    return before + _ENDS, after + _ENDS


def _block_reach(resblock: str, kernel: int, dilations: Sequence[int]) -> int:
    half = (kernel - 1) // 2
    plain = len(dilations) if resblock == "1" else 0
    return half * (sum(dilations) + plain)


_ENDS = 3  # samples that the first and the last convolution, of kernel 7, reach to either side


class ResBlock1(nn.Module):
    """Residual block of pairs of a dilated and a plain convolution. [B, C, T] -> [B, C, T]."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_conv(channels, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(_conv(channels, kernel, 1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2, strict=True):
            x = x + conv2(F.leaky_relu(conv1(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class ResBlock2(nn.Module):
    """Residual block of dilated convolutions, without the second ones of :class:`ResBlock1`."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(channels, kernel, d) for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(F.leaky_relu(x, SLOPE))
        return x


class DurationPredictor(nn.Module):
    """Log durations of units from their embeddings: [B, T, dim] -> [B, T], ``log(frames + 1)``."""

    def __init__(self, dim: int, hidden: int, kernel: int) -> None:
        super().__init__()
        padding = (kernel - 1) // 2
        self.conv1 = nn.Sequential(nn.Conv1d(dim, hidden, kernel, padding=padding), nn.ReLU())
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(nn.Conv1d(hidden, hidden, kernel, padding=padding), nn.ReLU())
        self.ln2 = nn.LayerNorm(hidden)
        self.proj = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln1(self.conv1(x.transpose(1, 2)).transpose(1, 2))
        x = self.ln2(self.conv2(x.transpose(1, 2)).transpose(1, 2))
        return self.proj(x).squeeze(-1)


class UnitHiFiGAN(nn.Module):
    """The generator with its embeddings and duration predictor, official key names.

    Weight normalisation is not part of the module: :func:`stages.checkpoint.fold_weight_norm`
    turns an official state dict into this module's, :func:`official_state` does the reverse.
    """

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self._reach = reach(config)
        self.dict = nn.Embedding(config.units, config.dim)
        if config.expressive:
            self.f0_dict = nn.Embedding(config.pitches, config.dim)
            self.style_dict = nn.Embedding(config.style_tokens, config.dim)
        if config.speakers:
            self.spkr = nn.Embedding(config.speakers, config.dim)
        if config.styles:
            self.style = nn.Embedding(config.styles, config.dim)
        self.dur_predictor = DurationPredictor(
            config.dim, config.duration_hidden, config.duration_kernel
        )
        channels = config.initial_channels
        self.conv_pre = nn.Conv1d(config.channels_in, channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        block = ResBlock1 if config.resblock == "1" else ResBlock2
        for rate, kernel in zip(config.rates, config.kernels, strict=True):
            up = nn.ConvTranspose1d(
                channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2
            )
            channels //= 2
            self.ups.append(up)
            for size, dilations in zip(config.resblock_kernels, config.dilations, strict=True):
                self.resblocks.append(block(channels, size, dilations))
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3)

    def embed(
        self,
        code: Tensor,
        pitch: Tensor | None = None,
        style: Tensor | None = None,
        speaker: Tensor | None = None,
        style_id: Tensor | None = None,
    ) -> Tensor:
        """Frames [B, T] and utterance-wide ids [B] -> generator input [B, channels_in, T]."""
        parts = [self.dict(code)]
        if self.config.expressive:
            assert pitch is not None and style is not None, "an Expressive vocoder needs both"
            parts += [self.f0_dict(pitch), self.style_dict(style)]
        wide = (code.shape[0], code.shape[1], self.config.dim)
        if self.config.speakers:
            assert speaker is not None
            parts.append(self.spkr(speaker)[:, None].expand(wide))
        if self.config.styles:
            assert style_id is not None
            parts.append(self.style(style_id)[:, None].expand(wide))
        return torch.cat(parts, dim=-1).transpose(1, 2)

    def upsample(self, x: Tensor, stage: int) -> Tensor:
        """One upsampling and the mean of its residual blocks."""
        x = self.ups[stage](F.leaky_relu(x, SLOPE))
        count = len(self.config.resblock_kernels)
        blocks = [self.resblocks[stage * count + j](x) for j in range(count)]
        return torch.stack(blocks).mean(0) if count > 1 else blocks[0]

    def generate(self, x: Tensor, left: int = 0, right: int = 0) -> Tensor:
        """Generator input [B, channels_in, T] -> waveform in [-1, 1].

        Args:
            left, right: frames at the ends that are there only for what is between them, and of
                which no wave is wanted. Later layers look less far, and what they do not look at
                is left out before each of them, which changes nothing of what remains.

        Returns:
            [B, 1, (T - left - right) * hop].
        """
        tail = self._tail() * torch.sym_min(right, 1)
        x = self.conv_pre(x)
        before, after = left, right
        for stage, rate in enumerate(self.config.rates):
            if not self._tail():
                x, before, after = self._trim(x, before, after, stage)
            x, before, after = self.upsample(x, stage), before * rate, after * rate
        # The published generator leaves the default slope, 0.01, here.
        wave = torch.tanh(self.conv_post(F.leaky_relu(x)))
        return wave[:, :, before : wave.shape[2] - after - tail]

    def _trim(self, x: Tensor, left: int, right: int, stage: int) -> tuple[Tensor, int, int]:
        """``x`` without what ``stage`` need not see; what it then has too much of at each end."""
        before, after = self._reach[stage]
        first, last = torch.sym_max(left - before, 0), torch.sym_max(right - after, 0)
        return x[:, :, first : x.shape[2] - last], left - first, right - last

    def _tail(self) -> int:
        """Samples beyond a whole number of frames, which odd kernels leave at the end."""
        length = 1
        for rate, kernel in zip(self.config.rates, self.config.kernels, strict=True):
            length = (length - 1) * rate + kernel - 2 * ((kernel - rate) // 2)
        return length - self.config.hop

    def forward(
        self,
        code: Tensor,
        pitch: Tensor | None = None,
        style: Tensor | None = None,
        speaker: Tensor | None = None,
        style_id: Tensor | None = None,
        left: int = 0,
        right: int = 0,
    ) -> Tensor:
        """Unit frames [B, T] (int64) -> waveform [B, 1, (T - left - right) * hop] in [-1, 1].

        ``left``, ``right``: see :meth:`generate`.
        """
        return self.generate(self.embed(code, pitch, style, speaker, style_id), left, right)

    def log_durations(self, code: Tensor) -> Tensor:
        """Units [B, N] -> log(frames + 1) [B, N]."""
        return self.dur_predictor(self.dict(code))


def _conv(channels: int, kernel: int, dilation: int) -> nn.Conv1d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding)


def official_state(model: UnitHiFiGAN, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The module's weights under the official keys, convolutions as gain and direction."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        value = value.detach().float().cpu()
        if value.dim() == 3 and not key.startswith("dur_predictor"):
            stem = key.removesuffix("weight")
            norm = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
            state[stem + "weight_g"] = norm.to(dtype)
            state[stem + "weight_v"] = value.to(dtype)
        else:
            state[key] = value.to(dtype)
    return state
