"""The network of ``smol`` in training: a frozen Llama, low-rank changes of it, new embedding rows.

What is learnt bears the names under which it is shipped (:mod:`stages.llama_adapter`); what is
frozen is no part of a saved state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from recipes.lm_model import TrainableLlama
from recipes.smol_base import BaseModel
from stages.llama_adapter import ADAPTER, EMBEDDING, ROWS, SETTINGS

SPREAD = 0.1  # of new rows, of that of the others


class Adapted(nn.Module):
    """A frozen matrix ``[out, in]`` with a change of rank ``rank`` (LoRA; Hu et al., 2021), zero to
    begin with.

    The sum is what is multiplied with, since queries, keys and values share one product.
    """

    base: Tensor

    def __init__(self, base: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("base", base, persistent=False)
        self.scale = scale
        self.lora_A = nn.Parameter(torch.randn(rank, base.shape[1]) * base.shape[1] ** -0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.shape[0], rank))

    @property
    def weight(self) -> Tensor:
        return self.base + self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Extended(nn.Module):
    """A frozen embedding ``[pieces, hidden]`` and new rows after it, which begin near the mean of
    those it has, so that a new token is neither likely nor unlikely (Hewitt, 2021)."""

    base: Tensor

    def __init__(self, base: Tensor, rows: int) -> None:
        super().__init__()
        self.register_buffer("base", base, persistent=False)
        noise = SPREAD * base.std(0) * torch.randn(rows, base.shape[1])
        self.rows = nn.Parameter(base.mean(0) + noise)

    @property
    def weight(self) -> Tensor:
        return torch.cat((self.base, self.rows))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Frozen(nn.Module):
    """A gain that is not learnt."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)


def extended(base: BaseModel, positions: int, rank: int, alpha: float) -> TrainableLlama:
    """The base, ready to learn: until then its logits of text are what they were.

    Args:
        positions: tokens of the longest sequence.
        rank, alpha: of the low-rank changes, which count ``alpha / rank`` times.
    """
    config = base.config(positions)
    with torch.device("meta"):
        model = TrainableLlama(config)
    for name, value in base.tensors():
        path, _, attribute = name.removesuffix(".weight").rpartition(".")
        module: nn.Module = Frozen(value)
        if name == EMBEDDING:
            module = Extended(value, config["vocab_size"] - base.pieces)
        elif value.dim() == 2:
            module = Adapted(value, rank, alpha / rank)
        setattr(model.get_submodule(path), attribute, module)
    return model


def learnt(model: TrainableLlama) -> dict[str, Tensor]:
    """What is shipped of a model made by :func:`extended`: float16, on the CPU."""
    return {name: value.half().cpu().contiguous() for name, value in model.state_dict().items()}


def write_adapter(
    base: BaseModel, state: dict[str, Tensor], settings: dict[str, Any], positions: int, out: Path
) -> None:
    """Write the folder that :mod:`stages` loads: adapter, configuration, tokenizer."""
    base.write(out, positions)
    (out / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    partial = out / "adapter.partial"
    partial.write_bytes(save(state))
    partial.replace(out / ADAPTER)


def write_untrained(base: BaseModel, positions: int, out: Path) -> None:
    """Write the base as it is, its new rows zero."""
    rows = base.config(positions)["vocab_size"] - base.pieces
    hidden = base.config(positions)["hidden_size"]
    state = {ROWS: torch.zeros(rows, hidden, dtype=torch.float16)}
    write_adapter(base, state, base.adapter_settings(1, 1.0), positions, out)
