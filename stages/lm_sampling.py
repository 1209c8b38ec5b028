"""How the next token is chosen from the logits: mask, temperature, top-k, top-p, one draw.

A draw is one number from ``[0, 1)`` that depends on the seed and the position only
(:func:`uniform`), looked up in the cumulated probabilities in the order of the ids. So a stream
that is rewound and decoded again repeats itself, and every engine draws alike: :func:`choose` on
the host, :func:`choose_rows` for many streams on a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Applied in the order of Hugging Face's logits warpers: mask, ``temperature``, ``top_k``,
    ``top_p``. The defaults are those of the Spirit LM reference for one modality (DESIGN.md
    section 6); note that the library under the reference adds ``top_k=50`` unless told otherwise.

    Attributes:
        temperature: divides the logits; must be positive.
        top_p: the smallest set of most likely tokens whose probability reaches ``top_p``; 1 keeps
            all.
        seed: makes the draws repeatable: a draw depends on the seed and the position only, so
            rewinding and decoding again repeats it. ``None`` uses torch's global generator.
        greedy: take the most likely token; everything above is ignored.
        top_k: keep the ``top_k`` most likely tokens; 0 keeps all.
    """

    temperature: float = 0.9
    top_p: float = 0.95
    seed: int | None = None
    greedy: bool = False
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature {self.temperature}: must be above 0 (greedy=True picks the likeliest)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (off) or more")

    def draw(self, position: int) -> float:
        """The number in ``[0, 1)`` that decides the token at ``position``."""
        if self.greedy:
            return 0.0
        if self.seed is None:
            return float(torch.randint(2**24, ()).item()) / 2**24
        return uniform(self.seed, position)


def uniform(seed: int, position: int) -> float:
    """A number in ``[0, 1)`` that float32 holds exactly, from ``seed`` and ``position`` alone.

    The finaliser of SplitMix64 (Steele, Lea, Flood, 2014), once over each of the two.
    """
    return (_mixed(_mixed(seed & _WORD) + position & _WORD) >> 40) / 2**24


def _mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)


def distribution(
    logits: np.ndarray, sampling: Sampling, mask: np.ndarray | None = None
) -> np.ndarray:
    """What is drawn from: float32 ``[V]``, not normalised, 0 for a token that is cut.

    Hugging Face's ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and ``TopPLogitsWarper``, the
    last of which breaks ties by chance: here all tokens that tie with the last one kept stay.

    Args:
        logits: float32 ``[V]``.
        mask: bool ``[V]``, True = allowed; it allows at least one.
    """
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    p = np.exp((logits - logits.max()) * np.float32(1 / sampling.temperature))
    if 0 < sampling.top_k < len(p):
        p[p < np.partition(p, -sampling.top_k)[-sampling.top_k]] = 0
    if sampling.top_p < 1:
        ascending = np.sort(p)
        mass = np.cumsum(ascending)
        cut = np.searchsorted(mass, (1 - sampling.top_p) * mass[-1], side="right")
        p[p < ascending[min(cut, len(p) - 1)]] = 0
    return p


def choose(
    logits: Tensor, sampling: Sampling, mask: Tensor | None = None, draw: float = 0.0
) -> int:
    """A token id from ``logits`` ``[V]``.

    Args:
        mask: bool ``[V]`` on the CPU, True = allowed.
        draw: a number in ``[0, 1)``; not used when ``sampling.greedy``.

    Raises:
        ValueError: the mask allows no token.
    """
    values = logits.float().cpu().numpy()
    allowed = None if mask is None else checked(mask.numpy())
    if sampling.greedy:
        return int((values if allowed is None else np.where(allowed, values, -np.inf)).argmax())
    mass = np.cumsum(distribution(values, sampling, allowed))
    # At most the last token with a probability: its mass is the first that equals the whole.
    return int(
        min(
            np.searchsorted(mass, np.float32(draw) * mass[-1], side="right"),
            np.searchsorted(mass, mass[-1]),
        )
    )


def checked(allowed: np.ndarray) -> np.ndarray:
    """``allowed`` as it is. Raises :class:`ValueError` if it allows no token."""
    if not allowed.any():
        raise ValueError("the mask allows no token")
    return allowed


def choose_rows(logits: Tensor, banned: Tensor, controls: Controls) -> Tensor:
    """:func:`choose` for ``B`` rows at once, without a word to the host: int64 ``[B]``.

    Args:
        logits: float32 ``[B, V]``.
        banned: bool ``[B, V]``; not all of a row.
    """
    logits = logits.masked_fill(banned, float("-inf"))
    best = logits.argmax(-1)
    highest = logits.amax(-1, keepdim=True)
    p = torch.exp((logits - highest) * controls.cold[:, None])
    ascending = p.sort(-1).values
    last = p.shape[-1] - 1
    kth = ascending.gather(1, (last + 1 - controls.top_k.long()).clamp(0, last)[:, None])
    limited = controls.top_k[:, None] > 0
    p = p.masked_fill(limited & (p < kth), 0)
    ascending = ascending.masked_fill(limited & (ascending < kth), 0)
    mass = ascending.cumsum(-1)
    cut = (mass <= (1 - controls.top_p[:, None]) * mass[:, -1:]).sum(-1, keepdim=True)
    p = p.masked_fill(p < ascending.gather(1, cut.clamp(max=last)), 0)
    mass = p.cumsum(-1)
    drawn = (mass <= controls.draw[:, None] * mass[:, -1:]).sum(-1)
    drawn = torch.minimum(drawn, (mass < mass[:, -1:]).sum(-1))
    return torch.where(controls.greedy, best, drawn)


@dataclass(frozen=True)
class Controls:
    """What :func:`choose_rows` is told about each row: tensors ``[B]``.

    Attributes:
        cold: 1 / temperature, float32.
        top_p: float32; 1 keeps all.
        top_k: integers; 0 keeps all.
        draw: float32 in ``[0, 1)``.
        greedy: bool.
    """

    cold: Tensor
    top_p: Tensor
    top_k: Tensor
    draw: Tensor
    greedy: Tensor

    @classmethod
    def of(cls, samplings: list[Sampling], draws: list[float]) -> Controls:
        """From one sampling and one draw for each row, on the CPU."""

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype)

        return cls(
            column([1 / s.temperature for s in samplings], torch.float32),
            column([s.top_p for s in samplings], torch.float32),
            column([s.top_k for s in samplings], torch.int32),
            column(draws, torch.float32),
            column([s.greedy for s in samplings], torch.bool),
        )
