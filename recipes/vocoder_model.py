"""nano's vocoder: its shape, what only training adds to it, and how it is written to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.errors import UserError
from stages.hifigan import UnitHiFiGAN, VocoderConfig, official_state

FOLDER = "hifigan_spiritlm_expressive_w2v2"
MELS = 80
CONTEXT = 4  # frames either side that the stages below 125 Hz see around a crop
PHASES = ("mel", "units", "joint", "sharpen")

CONFIG: dict[str, Any] = {
    "resblock": "1",
    "upsample_rates": [5, 4, 4, 8],
    "upsample_kernel_sizes": [11, 8, 8, 16],
    "upsample_initial_channel": 256,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "num_embeddings": 500,
    "embedding_dim": 64,
    "model_in_dim": 256,
    "segment_size": 10240,
    "code_hop_size": 640,
    "f0": False,
    "num_mels": 80,
    "num_freq": 1025,
    "n_fft": 1024,
    "hop_size": 256,
    "win_size": 1024,
    "sampling_rate": 16000,
    "dur_prediction_weight": 1.0,
    "dur_predictor_params": {
        "encoder_embed_dim": 64,
        "var_pred_hidden_dim": 128,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
    "fmin": 0,
    "fmax": 8000,
    "fmax_for_loss": None,
    "multispkr": "from_input_file",
    "num_speakers": 4,
    "default_speaker": 0,
    "num_f0_tokens": 64,
    "f0_hop_size": 1280,
    "num_style_tokens": 100,
    "style_hop_size": 16000,
}


def config_of(kernels: tuple[int, ...] = (3,)) -> dict[str, Any]:
    """The content of ``config.json`` with residual blocks of these kernels.

    Raises:
        UserError: a kernel that is no odd number, or none at all.
    """
    if not kernels or any(size < 1 or size % 2 == 0 for size in kernels):
        raise UserError(f"vocoder kernels {kernels}: expected odd numbers such as 3,7,11")
    dilations = [list(CONFIG["resblock_dilation_sizes"][0]) for _ in kernels]
    changed = {"resblock_kernel_sizes": list(kernels), "resblock_dilation_sizes": dilations}
    return CONFIG | changed


def parse_kernels(text: str) -> tuple[int, ...]:
    """``"3,7,11"`` as numbers. Raises UserError for anything else."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise UserError(f"vocoder kernels {text!r}: expected numbers such as 3,7,11") from None


class Model(nn.Module):
    """The generator with what only training needs: the mel adapter and the mel head at 125 Hz."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.generator = UnitHiFiGAN(config)
        hidden = config.initial_channels // 2
        self.adapter = nn.Conv1d(MELS, hidden, 3, padding=1)
        self.head = nn.Conv1d(hidden, MELS, 1)

    def lower(self, code: Tensor, pitch: Tensor, style: Tensor, inside: Tensor) -> Tensor:
        """Unit frames [B, T] -> hidden [B, C, 5 T]; frames not ``inside`` are as if absent."""
        g, mask = self.generator, inside[:, None].float()
        x = g.embed(code, pitch, style, torch.zeros_like(code[:, 0]))
        return g.upsample(g.conv_pre(x * mask) * mask, 0)

    def upper(self, hidden: Tensor) -> Tensor:
        """Hidden [B, C, 5 T] -> waveform [B, 640 T]."""
        g = self.generator
        for stage in range(1, len(g.ups)):
            hidden = g.upsample(hidden, stage)
        return torch.tanh(g.conv_post(F.leaky_relu(hidden)))[:, 0]

    def parts(self, phase: str) -> list[nn.Module]:
        """What a phase trains."""
        g = self.generator
        low = [g.conv_pre, g.ups[0], *list(g.resblocks)[: len(g.config.resblock_kernels)]]
        high = [*list(g.ups)[1:], *list(g.resblocks)[len(g.config.resblock_kernels) :], g.conv_post]
        if phase == "mel":
            return [self.adapter, *high]
        if phase == "units":
            return [g.dict, g.f0_dict, g.style_dict, g.spkr, *low, self.head]
        return [*low, *high, self.head]


def write_checkpoint(
    generator: UnitHiFiGAN, folder: Path, config: dict[str, Any] | None = None
) -> None:
    """``config.json``, ``generator.pt`` (fp16, 3 MB with one kernel), ``speakers.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config or CONFIG, indent=1)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    names = ["heart", *(f"unused{i}" for i in range(1, CONFIG["num_speakers"]))]
    (folder / "speakers.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    part = folder / "generator.part"
    torch.save({"generator": official_state(generator, torch.float16)}, part)
    part.replace(folder / "generator.pt")
