"""The language model: ``LlamaForCausalLM`` weights with a key-value cache that can be cut.

One :class:`LanguageModel` holds one stream of token ids. :meth:`~LanguageModel.append` prefills
known tokens, :meth:`~LanguageModel.decode` samples a new one, :meth:`~LanguageModel.rewind` goes
back to an earlier length for nothing: the cache is a fixed buffer indexed by position, so cutting
it moves one integer (DESIGN.md section 5).

What is here counts the tokens; the network itself runs in an *engine*, which sees ids and positions
only: :mod:`stages.lm_cpu` for float32 on a CPU, :mod:`stages.lm_cuda` for a GPU,
:mod:`stages.lm_batch` for several streams on one GPU, :mod:`stages.lm_torch` for all else. How a
token is chosen is in :mod:`stages.lm_sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stages.checkpoint import Layout
from stages.llama_weights import LlamaConfig, Weights, load_llama
from stages.lm_cpu import CpuEngine
from stages.lm_sampling import Sampling as Sampling
from stages.lm_torch import TorchEngine
from stages.lm_torch import rotate as rotate  # for those who build the same network

_DEFAULT_CAPACITY = 4096
_NO_TOKENS = "no tokens yet: append at least the beginning-of-sequence token"


class CacheFullError(RuntimeError):
    """More tokens were asked for than the key-value cache can hold."""


class Engine(Protocol):
    """The network with its key-value cache, fixed in size and indexed by position.

    Attributes:
        held: the number of tokens after which it holds the logits; -1 if it holds none. The keys
            and values of those tokens are in the cache.
    """

    held: int

    def feed(self, ids: Sequence[int], start: int) -> None:
        """Run ``ids`` after the first ``start`` tokens, over whatever stood there."""
        ...

    def logits(self) -> Tensor:
        """The logits held, float32 ``[vocab_size]``; no later call changes them."""
        ...

    def decode(
        self, ids: Sequence[int], start: int, sampling: Sampling, mask: Tensor | None
    ) -> int:
        """:meth:`feed`, then the token chosen from the logits held. Without ``ids``, ``start``
        tokens after which they are held. It may already run that token, and move :attr:`held`."""
        ...

    def forget(self) -> None:
        """The stream has been cut: no logits are held."""
        ...

    def another(self) -> Engine:
        """One like this over the same weights, with a cache of its own."""
        ...

    def close(self) -> None:
        """It is not used any more."""
        ...


class LanguageModel:
    """One token stream over Llama weights.

    Attributes:
        config: the dimensions, from ``config.json``.
        capacity: tokens that fit into the cache.
        device, dtype: where and in which type the weights are.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        capacity: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        """Wrap loaded weights; ``capacity`` (tokens) defaults to the model's positions, at most
        4096; ``engine`` to the fastest for where the weights are. Raises :class:`ValueError` if
        the capacity exceeds the positions the model knows."""
        capacity = _capacity(config, capacity)
        self.config = config
        self.capacity = capacity
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self._weights = weights
        self._engine = engine or _engine(config, weights, capacity)
        self._ids: list[int] = []
        self._fed = 0  # tokens whose keys and values are in the cache

    @classmethod
    def load(
        cls,
        layout: Layout | str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
        streams: int = 1,
        eight_bits: str | None = None,
    ) -> LanguageModel:
        """Load the language model of ``layout``, or of a folder with ``config.json`` and weights.

        Args:
            dtype: by default float32 on the CPU, bfloat16 elsewhere.
            capacity: tokens of the key-value cache.
            streams: on a GPU, for how many streams there is to be room; they are decoded together
                (:mod:`stages.lm_batch`), and :meth:`another` gives the others. With 1, and on a
                CPU, every stream is run by itself, and there may be any number.
            eight_bits: on a GPU, "int8" or "fp8": half of the memory, faster, not the same.

        Raises:
            CheckpointError: naming the file and the key that is missing or wrong.
            ValueError: ``eight_bits`` is no form of a matrix, or is meant for a CPU.
        """
        device = torch.device(device)
        if eight_bits is not None and device.type != "cuda":
            raise ValueError(f"8-bit weights ({eight_bits}) are for a GPU, not for {device}")
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        folder = layout.lm if isinstance(layout, Layout) else Path(layout)
        config, weights = load_llama(folder, device, dtype, eight_bits=eight_bits)
        if streams > 1 and device.type == "cuda":
            return cls.shared(config, weights, capacity, streams)
        return cls(config, weights, capacity)

    @classmethod
    def shared(
        cls, config: LlamaConfig, weights: Weights, capacity: int | None, streams: int
    ) -> LanguageModel:
        """One of ``streams`` streams that are decoded together."""
        from stages.lm_batch import SharedDecoder

        capacity = _capacity(config, capacity)
        decoder = SharedDecoder(config, weights, capacity, streams)
        return cls(config, weights, capacity, decoder.stream())

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
            raise ValueError(_NO_TOKENS)
        if self._engine.held != self.length:
            self._feed(self._unfed())
        return self._engine.logits()

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
        if not self._ids:
            raise ValueError(_NO_TOKENS)
        start = self.length if self._engine.held == self.length else self._unfed()
        token = self._engine.decode(self._ids[start:], start, sampling, self._checked(mask))
        self._ids.append(token)
        self._fed = max(self._fed, self._engine.held)
        return token

    def rewind(self, length: int) -> None:
        """Forget all tokens from position ``length`` on. Free: only the length moves."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind to {length}: there are {self.length} tokens")
        if self._engine.held > length:
            self._engine.forget()
        del self._ids[length:]
        self._fed = min(self._fed, length)

    def reset(self) -> None:
        """Forget everything but the weights."""
        self.rewind(0)

    def another(self) -> LanguageModel:
        """An empty stream over the same weights, with a cache of its own.

        Raises:
            StreamsTakenError: the model was loaded for a number of streams, and all are in use.
        """
        return LanguageModel(self.config, self._weights, self.capacity, self._engine.another())

    def close(self) -> None:
        """Give the cache back to the other streams, if it is one of several. Use it no more."""
        self._engine.close()

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
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (self.vocab_size,)):
            raise ValueError(
                f"mask {mask.dtype} {list(mask.shape)}: expected torch.bool [{self.vocab_size}]"
            )
        return mask

    def _unfed(self) -> int:
        """Where to feed from. After a rewind the logits of the last token are gone: it runs
        again."""
        return min(self._fed, self.length - 1)

    def _feed(self, start: int) -> None:
        self._engine.feed(self._ids[start:], start)
        self._fed = self.length


def _capacity(config: LlamaConfig, wanted: int | None) -> int:
    capacity = min(config.max_positions, _DEFAULT_CAPACITY) if wanted is None else wanted
    if not 0 < capacity <= config.max_positions:
        raise ValueError(
            f"capacity {capacity}: the model has positions for 1 to {config.max_positions} "
            "tokens (max_position_embeddings in config.json)"
        )
    return capacity


def _engine(config: LlamaConfig, weights: Weights, capacity: int) -> Engine:
    """The fastest engine for where the weights are."""
    embedding = weights.embedding
    if embedding.device.type == "cuda":
        from stages.lm_cuda import CudaEngine

        return CudaEngine(config, weights, capacity)
    if embedding.device.type == "cpu" and embedding.dtype == torch.float32:
        return CpuEngine(config, weights, capacity)
    return TorchEngine(config, weights, capacity)
