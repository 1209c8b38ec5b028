"""The language model: ``LlamaForCausalLM`` weights with a key-value cache that can be cut.

One :class:`LanguageModel` holds one stream of token ids. :meth:`~LanguageModel.append` prefills
known tokens, :meth:`~LanguageModel.decode` samples a new one, :meth:`~LanguageModel.rewind` goes
back to an earlier length for nothing: the cache is a fixed buffer indexed by position, so cutting
it moves one integer (DESIGN.md section 5).

What is here counts tokens and chooses them; the network itself runs in an *engine*, which sees ids
and positions only: :mod:`stages.lm_cpu` for float32 on a CPU, :mod:`stages.lm_torch` for all else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stages.checkpoint import Layout
from stages.llama_weights import LlamaConfig, Weights, load_llama
from stages.lm_cpu import CpuEngine
from stages.lm_torch import TorchEngine
from stages.lm_torch import rotate as rotate  # for those who build the same network

_DEFAULT_CAPACITY = 4096
_SEED_STRIDE = 1_000_003  # prime: the draws of neighbouring seeds do not walk over each other


class CacheFullError(RuntimeError):
    """More tokens were asked for than the key-value cache can hold."""


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


class LanguageModel:
    """One token stream over Llama weights.

    Attributes:
        config: the dimensions, from ``config.json``.
        capacity: tokens that fit into the cache.
        device, dtype: where and in which type the weights are.
    """

    def __init__(self, config: LlamaConfig, weights: Weights, capacity: int | None = None) -> None:
        """Wrap loaded weights; ``capacity`` (tokens) defaults to the model's positions, at most
        4096. Raises :class:`ValueError` if it exceeds the positions the model knows."""
        if capacity is None:
            capacity = min(config.max_positions, _DEFAULT_CAPACITY)
        if not 0 < capacity <= config.max_positions:
            raise ValueError(
                f"capacity {capacity}: the model has positions for 1 to {config.max_positions} "
                "tokens (max_position_embeddings in config.json)"
            )
        self.config = config
        self.capacity = capacity
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self._weights = weights
        self._engine = _engine(config, weights, capacity)
        self._generator = torch.Generator(self.device)
        self._ids: list[int] = []
        self._fed = 0  # tokens whose keys and values are in the cache
        self._logits: Tensor | None = None
        self._logits_length = -1  # the length that _logits are for

    @classmethod
    def load(
        cls,
        layout: Layout | str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ) -> LanguageModel:
        """Load the language model of ``layout``, or of a folder with ``config.json`` and weights.

        Args:
            dtype: by default float32 on the CPU, bfloat16 elsewhere.
            capacity: tokens of the key-value cache.

        Raises:
            CheckpointError: naming the file and the key that is missing or wrong.
        """
        device = torch.device(device)
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        folder = layout.lm if isinstance(layout, Layout) else Path(layout)
        config, weights = load_llama(folder, device, dtype)
        return cls(config, weights, capacity)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, padding rows included."""
        return self.config.vocab_size

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens so far."""
        return tuple(self._ids)

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return len(self._ids)

    @property
    def logits(self) -> Tensor:
        """Logits of the next token, float32 ``[vocab_size]``. Feeds what has not been fed yet."""
        if not self._ids:
            raise ValueError("no tokens yet: append at least the beginning-of-sequence token")
        if self._logits is None or self._logits_length != self.length:
            # After a rewind the last token's logits are gone: run that one token again.
            self._feed(min(self._fed, self.length - 1))
        assert self._logits is not None
        return self._logits

    def append(self, ids: Sequence[int]) -> None:
        """Prefill ``ids`` after the tokens so far.

        Raises:
            CacheFullError: they do not fit; nothing has been appended.
            ValueError: an id is no row of the embedding.
        """
        new = [int(i) for i in ids]
        for i in new:
            if not 0 <= i < self.config.vocab_size:
                raise ValueError(f"token id {i}: the model has rows 0 to {self.vocab_size - 1}")
        self._reserve(len(new))
        self._ids += new
        if new:
            self._feed(self._fed)

    def decode(self, sampling: Sampling, mask: Tensor | None = None) -> int:
        """Choose the next token from :attr:`logits`, append it and return it.

        The token, end-of-sequence included, is part of :attr:`ids` at once; it runs through the
        network only when the logits after it are needed, so the last one costs nothing.

        Args:
            mask: bool ``[vocab_size]``, True where a token is allowed; ``None`` allows all. The
                tokenizer's masks ban the padding rows.

        Raises:
            CacheFullError: there is no room for one more token.
            ValueError: the mask has another shape or allows nothing.
        """
        self._reserve(1)
        generator = None if sampling.greedy else self._seeded(sampling.seed)
        token = choose(self.logits, sampling, self._checked(mask), generator)
        self._ids.append(token)
        return token

    def rewind(self, length: int) -> None:
        """Forget all tokens from position ``length`` on. Free: only the length moves."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: there are {self.length} tokens")
        if self._logits_length > length:
            self._logits, self._logits_length = None, -1
        del self._ids[length:]
        self._fed = min(self._fed, length)

    def reset(self) -> None:
        """Forget everything but the weights."""
        self.rewind(0)

    def hidden_states(self, ids: Sequence[int]) -> Tensor:
        """Hidden states after the final norm, ``[len(ids), hidden]``, of ``ids`` taken alone.

        For analysis; it uses a stream of its own and leaves this one as it is.
        """
        if len(ids) > self.capacity:
            raise CacheFullError(f"{len(ids)} tokens: the model was loaded for {self.capacity}")
        return TorchEngine(self.config, self._weights, len(ids)).hidden(ids, 0)

    @torch.inference_mode()
    def project(self, hidden: Tensor) -> Tensor:
        """Logits, float32 ``[..., vocab_size]``, of hidden states after the final norm."""
        return self._weights.head(hidden).float()

    def _reserve(self, count: int) -> None:
        if self.length + count > self.capacity:
            raise CacheFullError(
                f"{self.length} tokens and {count} more do not fit into a cache of "
                f"{self.capacity}: rewind first, or load the model with a larger capacity (up to "
                f"{self.config.max_positions})"
            )

    def _checked(self, mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        if mask.dtype != torch.bool or mask.shape != (self.vocab_size,):
            raise ValueError(
                f"mask {mask.dtype} {list(mask.shape)}: expected torch.bool [{self.vocab_size}]"
            )
        return mask.to(self.device)

    def _seeded(self, seed: int | None) -> torch.Generator | None:
        if seed is None:
            return None
        return self._generator.manual_seed((seed * _SEED_STRIDE + self.length) % 2**63)

    def _feed(self, start: int) -> None:
        self._logits = self._engine.feed(self._ids[start:], start)
        self._logits_length = self._fed = self.length


class Engine(Protocol):
    """The network with its key-value cache, fixed in size and indexed by position."""

    def feed(self, ids: Sequence[int], start: int) -> Tensor:
        """Run ``ids`` after the first ``start`` tokens, over whatever stood there; the logits after
        the last of them, float32 ``[vocab_size]``, which no later call changes."""
        ...


def _engine(config: LlamaConfig, weights: Weights, capacity: int) -> Engine:
    """The fastest engine for where the weights are. One for CUDA (graphs) would be chosen here."""
    embedding = weights.embedding
    if embedding.device.type == "cpu" and embedding.dtype == torch.float32:
        return CpuEngine(config, weights, capacity)
    return TorchEngine(config, weights, capacity)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, top-k and top-p on ``logits`` ``[V]``; what is cut becomes ``-inf``.

    The semantics of Hugging Face's ``TemperatureLogitsWarper``, ``TopKLogitsWarper`` and
    ``TopPLogitsWarper``: ties at the k-th place stay, the token that crosses ``top_p`` stays.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = torch.topk(logits, sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.top_p < 1:
        ascending, order = torch.sort(logits)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        removed[-1] = False
        logits = logits.masked_fill(
            torch.zeros_like(removed).scatter_(0, order, removed), float("-inf")
        )
    return logits


@torch.inference_mode()
def choose(
    logits: Tensor,
    sampling: Sampling,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """A token id from ``logits`` ``[V]``.

    Args:
        mask: bool ``[V]``, True = allowed.
        generator: source of chance, not needed when ``sampling.greedy``.
    """
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    best = int(logits.argmax())
    if logits[best] == float("-inf"):
        raise ValueError("the mask allows no token")
    if sampling.greedy:
        return best
    probabilities = warp(logits, sampling).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
