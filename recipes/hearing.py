"""nano's ears: a HubertModel put together from Whisper's blocks and an analytic front end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.whisper import HEADS, MELS, WhisperEncoder, mel_filters

FRAME, HOP, BINS = 400, 160, 200
PHASES = 3
NEUTRAL = 8


@dataclass(frozen=True)
class FrontEnd:
    """Constants of the construction.

    Attributes:
        gain: scale of the spectrum before the first GELU.
        pins: the constant in each layer's neutral channels.
        knees: energies at which the GELUs of the second layer bend.
        sharpness: of the bends.
        floor: energy added before the logarithm.
        positions: taps of the positional convolution; half as many frames get a position.
        carrier: the constant that the positions are written on.
    """

    gain: float = 1 / 20
    pins: tuple[float, float, float, float] = (5.0, 100.0, 400.0, 400.0)
    knees: int = 14
    lowest: float = 10**-4.7
    highest: float = 10**2.5
    sharpness: float = 1.0
    floor: float = 1e-5
    positions: int = 384
    carrier: float = 1000.0


def spectrum_bank(gain: float) -> Tensor:
    t = np.arange(FRAME)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * t / FRAME)
    bins = np.arange(1, BINS + 1)[:, None, None]
    phase = 2 * np.pi * np.arange(PHASES)[None, :, None] / PHASES
    bank = gain * hann * np.cos(2 * np.pi * bins * t / FRAME + phase)
    return torch.from_numpy(bank.reshape(-1, 1, FRAME))


def fit_logarithm(front: FrontEnd) -> tuple[np.ndarray, np.ndarray, float]:
    energies = np.logspace(np.log10(front.lowest), np.log10(front.highest), front.knees)
    grid = np.concatenate([[0.0], np.logspace(-7, 3, 2000)])
    basis = gelu(front.sharpness * (1 - grid[:, None] / energies))
    basis = np.concatenate([basis, np.ones((len(grid), 1))], 1)
    target = (np.log10(grid + front.floor) + 4) / 4
    solution = np.linalg.lstsq(basis, target, rcond=None)[0]
    return energies, solution[:-1], float(solution[-1])


def gelu(x: np.ndarray) -> np.ndarray:
    return F.gelu(torch.from_numpy(x)).numpy()


def pinned(weight: Tensor, bias: Tensor, pin: float, balanced: bool) -> tuple[Tensor, Tensor]:
    """Append balancing (if the outputs do not sum to zero) and neutral channels."""
    if balanced:
        weight = torch.cat([weight, -weight.sum(0, keepdim=True).expand(NEUTRAL, -1, -1) / NEUTRAL])
        bias = torch.cat([bias, -bias.sum().expand(NEUTRAL) / NEUTRAL])
    signs = torch.tensor([1.0, -1.0], dtype=weight.dtype).repeat(NEUTRAL // 2)
    weight = torch.cat([weight, weight.new_zeros(NEUTRAL, *weight.shape[1:])])
    return weight, torch.cat([bias, pin * signs])


def norm(channels: int, pin: float, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scale = (NEUTRAL * pin**2 / channels) ** 0.5
    pad = (0, channels - len(gain))
    return F.pad(gain * scale, pad), F.pad(bias, pad)


def front_end(whisper: dict[str, Tensor], front: FrontEnd) -> list[tuple[Tensor, ...]]:
    """conv weight, conv bias, norm gain, norm bias of the four layers."""
    out = []
    # 1
    bank = spectrum_bank(front.gain)
    weight, bias = pinned(bank, bank.new_zeros(len(bank)), front.pins[0], False)
    one = torch.ones(len(bank), dtype=bank.dtype)
    out.append((weight, bias, *norm(len(weight), front.pins[0], one, 0 * one)))
    # 2
    energies, combination, constant = fit_logarithm(front)
    # sum over phases of gelu(A cos) = (PHASES / 2) A^2 / sqrt(2 pi) + ...
    per_power = PHASES / 2 * front.gain**2 / np.sqrt(2 * np.pi)
    filters = torch.from_numpy(mel_filters()[:, 1:]) / per_power  # 80 x 200
    signs = torch.tensor([1.0, -1.0], dtype=bank.dtype).repeat(front.knees // 2)
    mels = filters.repeat_interleave(PHASES, 1)  # 80 x 600
    weight = (signs[None, :, None] * mels[:, None]).reshape(-1, len(bank), 1)
    copies = len(weight)
    weight = F.pad(weight, (0, 0, 0, NEUTRAL))
    weight, bias = pinned(weight, weight.new_zeros(copies), front.pins[1], False)
    gain = -signs * front.sharpness / torch.from_numpy(energies)
    gain = gain.repeat(MELS)
    knee = torch.full_like(gain, front.sharpness)
    out.append((weight, bias, *norm(len(weight), front.pins[1], gain, knee)))
    # 3
    conv = whisper["conv1/weight"].double()
    mix = torch.from_numpy(combination)
    weight = (conv[:, :, None] * mix[None, None, :, None]).reshape(len(conv), copies, 3)
    bias = whisper["conv1/bias"].double() + constant * conv.sum((1, 2))
    weight = F.pad(weight, (0, 0, 0, NEUTRAL))
    weight, bias = pinned(weight, bias, front.pins[2], True)
    one = torch.ones(len(conv), dtype=bank.dtype)
    out.append((weight, bias, *norm(len(weight), front.pins[2], one, 0 * one)))
    # 4
    weight = F.pad(whisper["conv2/weight"].double(), (0, 0, 0, 2 * NEUTRAL))
    weight, bias = pinned(weight, whisper["conv2/bias"].double(), front.pins[3], True)
    out.append((weight, bias, *norm(len(weight), front.pins[3], one, 0 * one)))
    return out


def positional(whisper: dict[str, Tensor], front: FrontEnd) -> tuple[Tensor, Tensor]:
    table = whisper["position_encodings/encodings"].double()[: front.positions // 2].T
    steps = torch.diff(table, dim=1, prepend=table.new_zeros(len(table), 1))
    weight = F.pad(-steps.flip(1) / front.carrier, (1, front.positions // 2 - 1))
    return weight[:, None], weight.new_full((len(table),), front.carrier)


def fairseq_state(teacher: WhisperEncoder, front: FrontEnd) -> dict[str, Tensor]:
    whisper, width = teacher.w, len(teacher.w["conv1/bias"])
    state: dict[str, Tensor] = {}
    for i, (weight, bias, gain, offset) in enumerate(front_end(whisper, front)):
        name = f"feature_extractor.conv_layers.{i}"
        state |= {f"{name}.0.weight": weight, f"{name}.0.bias": bias}
        state |= {f"{name}.2.1.weight": gain, f"{name}.2.1.bias": offset}
    channels = len(state["feature_extractor.conv_layers.3.0.bias"])
    state["post_extract_proj.weight"] = torch.eye(width, channels)
    state["post_extract_proj.bias"] = torch.full((width,), -front.carrier)
    weight, bias = positional(whisper, front)
    norm_of = weight.norm(dim=(0, 1), keepdim=True)
    state["encoder.pos_conv.0.weight_g"] = norm_of
    state["encoder.pos_conv.0.weight_v"] = torch.where(norm_of > 0, weight, 1.0)
    state["encoder.pos_conv.0.bias"] = bias
    for i in range(teacher.layers):
        state |= _block(whisper, i)
    state["encoder.layer_norm.weight"] = whisper["layer_norm/gamma"]
    state["encoder.layer_norm.bias"] = whisper["layer_norm/beta"]
    return {k: v.float() for k, v in state.items()}


def _block(whisper: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    ours, theirs = f"encoder.layers.{i}", f"layer_{i}"
    attention, ffn = f"{theirs}/self_attention", f"{theirs}/ffn"
    out = {}
    for leaf in ("weight", "bias"):
        q, k, v = whisper[f"{attention}/linear_0/{leaf}"].chunk(3)
        out[f"{ours}.self_attn.q_proj.{leaf}"] = q
        out[f"{ours}.self_attn.k_proj.{leaf}"] = k
        out[f"{ours}.self_attn.v_proj.{leaf}"] = v
        out[f"{ours}.self_attn.out_proj.{leaf}"] = whisper[f"{attention}/linear_1/{leaf}"]
        out[f"{ours}.fc1.{leaf}"] = whisper[f"{ffn}/linear_0/{leaf}"]
        out[f"{ours}.fc2.{leaf}"] = whisper[f"{ffn}/linear_1/{leaf}"]
    for leaf, name in (("weight", "gamma"), ("bias", "beta")):
        out[f"{ours}.self_attn_layer_norm.{leaf}"] = whisper[f"{attention}/layer_norm/{name}"]
        out[f"{ours}.final_layer_norm.{leaf}"] = whisper[f"{ffn}/layer_norm/{name}"]
    return out


def model_config(state: dict[str, Tensor], front: FrontEnd, layers: int) -> dict[str, object]:
    shapes = [tuple(state[f"feature_extractor.conv_layers.{i}.0.weight"].shape) for i in range(4)]
    strides = (HOP, 1, 1, 2)
    convolutions = [(c, k, s) for (c, _, k), s in zip(shapes, strides, strict=True)]
    width = len(state["post_extract_proj.bias"])
    return {
        "_name": "hubert",
        "label_rate": 25,
        "extractor_mode": "layer_norm",
        "conv_feature_layers": str(convolutions),
        "conv_bias": True,
        "feat_proj_layer_norm": False,
        "encoder_layers": layers,
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": 4 * width,
        "encoder_attention_heads": HEADS,
        "activation_fn": "gelu",
        "layer_type": "transformer",
        "layer_norm_first": True,
        "conv_pos": front.positions,
        "conv_pos_groups": width,
        "features_layer": layers,
        "pool": 2,
        "input_padding": [520, 200],
        "window": {"chunk": 12, "left": 60, "right": 8},
    }


def checkpoint(teacher: WhisperEncoder, front: FrontEnd) -> dict[str, object]:
    state = fairseq_state(teacher, front)
    config = model_config(state, front, teacher.layers)
    return {
        "model_cfg": config,
        "task_cfg": {"_name": "hubert_pretraining", "sample_rate": 16_000, "normalize": False},
        "model_weight": {k: v.half() if _in_half(k) else v for k, v in state.items()},
        "dictionaries_symbols": [],
    }


def _in_half(key: str) -> bool:
    """Matrices may be stored in half precision; the spectrum's may not, whose phases must cancel."""
    if not key.endswith("weight") or key == "feature_extractor.conv_layers.0.0.weight":
        return False
    return key.startswith(("encoder.layers.", "post_extract_proj")) or key.endswith(".0.weight")
