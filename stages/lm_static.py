"""The network of the language model in buffers made once: what a CUDA graph can hold.

A graph repeats the same kernels on the same addresses. So nothing here depends on a number that the
host knows: tokens, positions and sampling stand in one small table on the device
(:attr:`StaticNetwork.controls`), written before each run, and every shape is one of a few.

The caches of several streams lie in one tensor, a *slot* each. A *row* is one token to be run. Two
runs exist: a *step* feeds one token of each of several slots and chooses the next ones; a *prefill*
feeds several tokens of one slot. Rows that are not needed are padding: they write to a place that
is never read.

:class:`StaticNetwork` is plain PyTorch, on any device; :mod:`stages.lm_triton` puts kernels of its
own in its place.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.llama_weights import LlamaConfig, Weights
from stages.lm_linear import Linear
from stages.lm_sampling import Controls, Sampling, choose_rows
from stages.lm_torch import rotary_tables, rotate

GREEDY = Sampling(greedy=True)
LAST_CHOSEN = -1
"""As a row's id: the token that was last chosen in its slot, known to the device alone."""

_ID, _SLOT, _POSITION, _TOP_K, _COLD, _TOP_P, _DRAW, _GREEDY = range(8)
WIDTH = 8  # int32 numbers in a row of the controls; the three fractions are float32 bits
_FRACTIONS = struct.Struct("<3f")
_INTEGERS = struct.Struct("<3i")


@dataclass(frozen=True)
class Row:
    """One token to be run, and how the one after it is chosen.

    Attributes:
        id: the token, or :data:`LAST_CHOSEN`.
        slot: the cache.
        position: where the token stands; -1 in padding.
        draw: see :meth:`stages.lm_sampling.Sampling.draw`, for the position after it.
    """

    id: int
    slot: int
    position: int
    sampling: Sampling = GREEDY
    draw: float = 0.0

    def numbers(self) -> list[int]:
        """The row of :attr:`StaticNetwork.controls`."""
        s = self.sampling
        fractions = _FRACTIONS.pack(1 / s.temperature, s.top_p, self.draw)
        cold, top_p, draw = _INTEGERS.unpack(fractions)
        return [self.id, self.slot, self.position, s.top_k, cold, top_p, draw, int(s.greedy)]


class StaticNetwork:
    """Llama over ``slots`` caches of ``capacity`` tokens.

    Attributes:
        controls: int32 ``[rows, WIDTH]``, a :class:`Row` each.
        chosen: int64 ``[slots + 1]``, the token last chosen in each slot.
        picked: int64 ``[rows]``, the tokens chosen in the latest run.
        logits: float32 ``[slots + 1, vocabulary]``, after the last token fed to each slot.
        banned: bool ``[slots + 1, vocabulary]``: what may not be chosen. Of these three the last
            row belongs to padding.
    """

    def __init__(
        self, config: LlamaConfig, weights: Weights, capacity: int, slots: int, rows: int
    ) -> None:
        self.config, self.weights = config, weights
        self.capacity, self.slots = capacity, slots
        like = weights.embedding
        self.device, self.dtype = like.device, like.dtype
        cos, sin = rotary_tables(config, capacity, self.device, torch.float32)
        self._cos, self._sin = cos, sin
        # One place more than the capacity: where padding writes to.
        self._cache = torch.zeros(
            (config.layers, 2, slots, config.kv_heads, capacity + 1, config.head_dim),
            device=self.device,
            dtype=self.dtype,
        )
        self._norms = [(w.attention_norm.float(), w.mlp_norm.float()) for w in weights.layers]
        self._last_norm = weights.norm.float()
        vocabulary = config.vocab_size
        self.controls = torch.zeros(rows, WIDTH, dtype=torch.int32, device=self.device)
        self._fractions = self.controls.view(torch.float32)
        self.chosen = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        self.picked = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.logits = torch.zeros(slots + 1, vocabulary, device=self.device)
        self.banned = torch.zeros(slots + 1, vocabulary, dtype=torch.bool, device=self.device)

    def spans(self) -> list[int]:
        """The lengths to which attention is bounded: a run is made for each, and the shortest that
        holds all live tokens is used."""
        lengths = [512 * 2**i for i in range(16)]
        return [n for n in lengths if n < self.capacity] + [self.capacity]

    def step_spans(self) -> list[int]:
        """As :meth:`spans`, for steps."""
        return self.spans()

    def padding(self) -> Row:
        return Row(0, self.slots, -1)

    @torch.inference_mode()
    def step(self, rows: int, span: int) -> None:
        """Feed the first ``rows`` rows, each to its slot, and choose the next token of each.

        Args:
            span: every position is below it.
        """
        x = self._embed(rows)
        rotary, mask = self._places(rows, span)
        for i, layer in enumerate(self.weights.layers):
            attention_norm, mlp_norm = self._norms[i]
            qkv = self._norm_linear(x, attention_norm, layer.qkv)
            attended = self._attend_step(qkv, self._cache[i], rotary, mask)
            self._add_linear(attended, layer.out, x)
            self._add_linear(self._gated(x, mlp_norm, layer.gate_up), layer.down, x)
        self._hold(x, rows)
        self.choose(rows)

    @torch.inference_mode()
    def prefill(self, rows: int, span: int) -> None:
        """Feed the first ``rows`` rows to the slot of the last one; padding comes first."""
        x = self._embed(rows)
        rotary, mask = self._places(rows, span)
        for i, layer in enumerate(self.weights.layers):
            attention_norm, mlp_norm = self._norms[i]
            h = F.rms_norm(x, x.shape[-1:], attention_norm, self.config.rms_norm_eps)
            qkv = layer.qkv(h.to(self.dtype))
            x += layer.out(self._attend_prefill(qkv, self._cache[i], rotary, mask))
            h = F.rms_norm(x, x.shape[-1:], mlp_norm, self.config.rms_norm_eps)
            gate, up = layer.gate_up(h.to(self.dtype)).chunk(2, dim=-1)
            x += layer.down(F.silu(gate) * up)
        self._hold(x[-1:], rows, first=rows - 1)

    @torch.inference_mode()
    def choose(self, rows: int) -> None:
        """Choose a token for the slot of each of the first ``rows`` rows, from its logits."""
        slots = self.controls[:rows, _SLOT].long()
        picked = choose_rows(
            self.logits.index_select(0, slots),
            self.banned.index_select(0, slots),
            Controls(
                cold=self._fractions[:rows, _COLD],
                top_p=self._fractions[:rows, _TOP_P],
                top_k=self.controls[:rows, _TOP_K],
                draw=self._fractions[:rows, _DRAW],
                greedy=self.controls[:rows, _GREEDY] > 0,
            ),
        )
        self.picked[:rows].copy_(picked)
        self.chosen.index_copy_(0, slots, picked)

    # Pieces of a step, each of which lm_triton does in one kernel.

    def _norm_linear(self, x: Tensor, norm: Tensor, matrix: Linear) -> Tensor:
        """``matrix`` of the RMS norm of ``x``."""
        h = F.rms_norm(x, x.shape[-1:], norm, self.config.rms_norm_eps)
        return matrix(h.to(self.dtype))

    def _add_linear(self, h: Tensor, matrix: Linear, x: Tensor) -> None:
        """Add ``matrix`` of ``h`` to ``x``."""
        x += matrix(h)

    def _gated(self, x: Tensor, norm: Tensor, matrix: Linear) -> Tensor:
        """SwiGLU of the RMS norm of ``x``."""
        gate, up = self._norm_linear(x, norm, matrix).chunk(2, dim=-1)
        return F.silu(gate) * up

    def _attend_step(
        self, qkv: Tensor, cache: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """Write keys and values of all rows; self-attention of each row over its own slot."""
        slots = self.controls[: len(qkv), _SLOT].long().clamp(max=self.slots - 1)
        queries = self._write(qkv, cache, rotary, slots)
        live = cache[:, :, :, : mask.shape[-1]]
        if self.slots > 1:
            live = live.index_select(1, slots)
        out = F.scaled_dot_product_attention(
            queries[:, :, None], live[0], live[1], mask[:, None, None], enable_gqa=self._grouped
        )
        return out.reshape(len(qkv), -1)

    def _attend_prefill(
        self, qkv: Tensor, cache: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """Write keys and values of all rows; self-attention of all over one slot."""
        slots = self.controls[: len(qkv), _SLOT].long().clamp(max=self.slots - 1)
        queries = self._write(qkv, cache, rotary, slots)
        live = cache[:, :, :, : mask.shape[-1]]
        if self.slots > 1:
            live = live.index_select(1, slots[-1:])
        out = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None], live[0], live[1], mask, enable_gqa=self._grouped
        )
        return out[0].transpose(0, 1).reshape(len(qkv), -1)

    @property
    def _grouped(self) -> bool:
        return self.config.heads != self.config.kv_heads

    def _write(
        self, qkv: Tensor, cache: Tensor, rotary: tuple[Tensor, Tensor], slots: Tensor
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache; the queries, ``[rows, heads,
        head_dim]``."""
        heads, kv = self.config.heads, self.config.kv_heads
        by_head = qkv.view(len(qkv), heads + 2 * kv, self.config.head_dim)
        rotated = rotate(by_head[:, : heads + kv].float(), *rotary).to(self.dtype)
        positions = self.controls[: len(qkv), _POSITION].long()
        places = positions.masked_fill(positions < 0, self.capacity)
        index = (slots[:, None], torch.arange(kv, device=self.device)[None], places[:, None])
        cache[0].index_put_(index, rotated[:, heads:])
        cache[1].index_put_(index, by_head[:, heads + kv :])
        return rotated[:, :heads]

    def _embed(self, rows: int) -> Tensor:
        """The stream that runs through the layers, float32 ``[rows, hidden]``."""
        controls = self.controls[:rows]
        ids = controls[:, _ID].long()
        last = self.chosen.index_select(0, controls[:, _SLOT].long())
        ids = torch.where(ids == LAST_CHOSEN, last, ids)
        return F.embedding(ids, self.weights.embedding).float()

    def _places(self, rows: int, span: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Cosines and sines of the rows' positions, and what each row may look at, ``[rows,
        span]``. Padding looks at the first place, whatever is there: it must look somewhere."""
        positions = self.controls[:rows, _POSITION].long().clamp(min=0)
        rotary = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        return rotary, torch.arange(span, device=self.device)[None] <= positions[:, None]

    def _hold(self, x: Tensor, rows: int, first: int = 0) -> None:
        """Keep the logits after rows ``first`` to ``rows``."""
        logits = self._norm_linear(x, self._last_norm, self.weights.head)
        slots = self.controls[first:rows, _SLOT].long()
        self.logits.index_copy_(0, slots, logits.float())


def table(rows: Sequence[Row]) -> Tensor:
    """The controls of ``rows``, on the CPU."""
    return torch.tensor([row.numbers() for row in rows], dtype=torch.int32)
