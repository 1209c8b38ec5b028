"""Steps of the language model in Triton kernels: seven to a layer, each one pass over its bytes.

A step of one stream does nothing but read the weights and the live part of the cache, once. What is
not that is small, but there is much of it: so norms, residuals and SwiGLU are part of the products,
attention reads as far as the stream reaches and no further (the length is read on the device, by
the split kernel of flash decoding, Dao et al., 2023), and a token is chosen in one kernel without
sorting: the cuts of top-k and top-p are found by bisection over the bits of the probabilities.

The products are for one row. With more rows they are matrix products, which cuBLAS does, as it does
prefill. All sums are float32.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from stages import lm_kernels
from stages.llama_weights import LlamaConfig, Weights, random_llama
from stages.lm_linear import Dense, Linear, Scaled
from stages.lm_sampling import Controls, Sampling, choose_rows, uniform
from stages.lm_static import LAST_CHOSEN, WIDTH, Row, StaticNetwork, table

MATVEC = {"rows": 4, "columns": 1024, "warps": 4}
"""Outputs of a program of the product, columns it reads at a time, warps (bench.gpu_decode tries
others)."""
_KEYS = 32  # keys that a program of the attention reads at a time
_PROGRAMS = 1024  # how many programs of the attention are wanted, to fill a large GPU
_MOST_SPLITS = 16


def choose(
    rows: int, logits: Tensor, banned: Tensor, controls: Tensor, chosen: Tensor, picked: Tensor
) -> None:
    """Choose a token for each of the first ``rows`` rows of ``controls``; the tensors are those of
    :class:`stages.lm_static.StaticNetwork`."""
    size = logits.shape[-1]
    lm_kernels.choose[(rows,)](
        logits,
        banned.view(torch.uint8),
        controls,
        controls.view(torch.float32),
        chosen,
        picked,
        size,
        BLOCK=triton.next_power_of_2(size),
        WIDTH=WIDTH,
        num_warps=32 if size > 8192 else 8,
    )


class TritonNetwork(StaticNetwork):
    """:class:`StaticNetwork` with kernels for its steps."""

    def __init__(
        self, config: LlamaConfig, weights: Weights, capacity: int, slots: int, rows: int
    ) -> None:
        super().__init__(config, weights, capacity, slots, rows)
        self.matvec: dict[str, int] = dict(MATVEC)

    def step_spans(self) -> list[int]:
        """One for all: the kernel reads the length itself."""
        return [self.capacity]

    @torch.inference_mode()
    def choose(self, rows: int) -> None:
        choose(rows, self.logits, self.banned, self.controls, self.chosen, self.picked)

    def _norm_linear(self, x: Tensor, norm: Tensor, matrix: Linear) -> Tensor:
        # float32 for the logits: in bfloat16 the likeliest ones would tie.
        dtype = torch.float32 if matrix is self.weights.head else self.dtype
        out = self._product(x, matrix, norm=norm, dtype=dtype)
        return super()._norm_linear(x, norm, matrix) if out is None else out

    def _add_linear(self, h: Tensor, matrix: Linear, x: Tensor) -> None:
        if self._product(h, matrix, add=x) is None:
            super()._add_linear(h, matrix, x)

    def _gated(self, x: Tensor, norm: Tensor, matrix: Linear) -> Tensor:
        out = self._product(x, matrix, norm=norm, gated=True, dtype=self.dtype)
        return super()._gated(x, norm, matrix) if out is None else out

    def _product(
        self,
        x: Tensor,
        matrix: Linear,
        norm: Tensor | None = None,
        gated: bool = False,
        add: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor | None:
        """``matrix`` of one row ``x``; None where the kernel is not for it."""
        weight = _weight(matrix)
        if len(x) > 1 or weight is None or not self.matvec:
            return None
        n_out, n_in = weight.shape
        n_out = n_out // 2 if gated else n_out
        out = torch.empty(1, n_out, dtype=dtype, device=x.device) if add is None else add
        scale = matrix.scale if isinstance(matrix, Scaled) else x
        rows, columns = self.matvec["rows"], self.matvec["columns"]
        lm_kernels.matvec[(triton.cdiv(n_out, rows),)](
            x,
            x if norm is None else norm,
            weight,
            scale,
            out,
            n_out,
            n_in,
            weight.stride(0),
            weight.stride(1),
            self.config.rms_norm_eps,
            NORM=norm is not None,
            GATED=gated,
            ADD=add is not None,
            SCALED=isinstance(matrix, Scaled),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=self.matvec["warps"],
        )
        return out

    def _attend_step(
        self, qkv: Tensor, cache: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        c, rows = self.config, len(qkv)
        size, block = c.head_dim, triton.next_power_of_2(c.head_dim)
        keys, values = cache[0], cache[1]
        shared: dict[str, Any] = {"HEADS": c.heads, "KV": c.kv_heads, "WIDTH": WIDTH}
        where = self.slots, self.capacity, keys.stride(0)
        lm_kernels.rotate_and_write[(rows, c.heads + 2 * c.kv_heads)](
            qkv,
            keys,
            values,
            self.controls,
            self._cos,
            self._sin,
            *where,
            HALF=size // 2,
            BLOCK=triton.next_power_of_2(size // 2),
            num_warps=1,
            **shared,
        )
        splits = self._splits(rows)
        parts = torch.empty(rows * c.heads * splits, size, device=self.device)
        tops = torch.empty(rows * c.heads * splits, 2, device=self.device)
        lm_kernels.attend_split[(rows * c.heads, splits)](
            qkv,
            keys,
            values,
            self.controls,
            parts,
            tops,
            *where,
            size**-0.5,
            SIZE=size,
            BLOCK=block,
            KEYS=_KEYS,
            SPLITS=splits,
            num_warps=4,
            **shared,
        )
        out = torch.empty(rows, c.heads * size, dtype=self.dtype, device=self.device)
        lm_kernels.attend_join[(rows * c.heads,)](
            parts, tops, out, SIZE=size, BLOCK=block, SPLITS=splits, num_warps=2
        )
        return out

    def _splits(self, rows: int) -> int:
        """Into how many parts each row's cache is cut, a power of two."""
        wanted = _PROGRAMS // (rows * self.config.heads)
        most = min(_MOST_SPLITS, triton.next_power_of_2(triton.cdiv(self.capacity, _KEYS)))
        splits = 1
        while splits * 2 <= min(wanted, most):
            splits *= 2
        return splits


def _weight(matrix: Linear) -> Tensor | None:
    """The matrix ``[out, in]`` of a product without a bias, if it is held as numbers."""
    if isinstance(matrix, Dense) and matrix.bias is None:
        return matrix.weight.T
    if isinstance(matrix, Scaled) and matrix.bias is None:
        return matrix.weight
    return None


@cache
def usable(device: torch.device) -> bool:
    """Whether the kernels compile here and compute what PyTorch does; a warning says why not."""
    try:
        wrong = disagreement(device)
    except Exception as error:  # a compiler may fail in many ways
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"the Triton kernels are not used on {device} ({wrong}): decoding is slower, and as "
            "exact. Is there a C compiler, and a Triton that fits this PyTorch?",
            RuntimeWarning,
            stacklevel=2,
        )
    return not wrong


@torch.inference_mode()
def disagreement(device: torch.device) -> str:
    """Where a small random network in float32, or the choice among many tokens, differs between
    kernels and PyTorch; empty if nowhere."""
    for vocabulary in (2000, 32768):
        if choices(device, vocabulary) < 0.9:  # a draw may fall on the border of two tokens
            return f"tokens chosen among {vocabulary}"
    weights = random_llama(SMALL, device, torch.float32)
    plain, fast = (kind(SMALL, weights, 96, 2, 64) for kind in (StaticNetwork, TritonNetwork))
    ids = torch.arange(3, 43).tolist()
    draws = [Sampling(seed=1), Sampling(0.7, 0.8, seed=2, top_k=9)]
    for slot in range(2):
        rows = [Row(i + slot, slot, at) for at, i in enumerate(ids)]
        for network in (plain, fast):
            network.controls[: len(rows)].copy_(table(rows))
            network.banned[slot, 40 * slot : 80].fill_(True)
            network.prefill(len(rows), 96)
    for at, width in enumerate((1, 2, 3, 1, 2), start=len(ids)):
        token = LAST_CHOSEN if at > len(ids) + 2 else 7
        rows = [Row(token, i, at, s, s.draw(at)) for i, s in enumerate(draws[:width])]
        rows += [fast.padding()] * (width - len(rows))
        for network in (plain, fast):
            network.controls[: len(rows)].copy_(table(rows))
            network.step(len(rows), 96)
        live = min(width, 2)
        if not torch.allclose(fast.logits[:live], plain.logits[:live], rtol=1e-3, atol=1e-3):
            return f"logits of a step of {width}"
        if not torch.equal(fast.picked[:live], plain.picked[:live]):
            return f"tokens of a step of {width}"
    return ""


def choices(device: torch.device, vocabulary: int, count: int = 18) -> float:
    """The share of tokens that are chosen as PyTorch chooses them."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(count + 1, vocabulary, generator=generator)
    banned = torch.rand(count + 1, vocabulary, generator=generator) < 0.4
    logits[:, 7] = logits[:, 9]
    kinds = [
        Sampling(greedy=True),
        Sampling(),
        Sampling(temperature=0.7, top_p=1.0),
        Sampling(temperature=1.3, top_p=0.5, top_k=40),
        Sampling(temperature=2.0, top_p=1.0, top_k=3),
        Sampling(top_p=1e-4),
    ]
    samplings = [kinds[i % len(kinds)] for i in range(count)]
    rows = [Row(0, i, 5, s, uniform(0, i)) for i, s in enumerate(samplings)]
    chosen = torch.full((count + 1,), -1, device=device)
    picked = torch.full((count,), -1, device=device)
    choose(count, logits.to(device), banned.to(device), table(rows).to(device), chosen, picked)
    given = Controls.of(samplings, [row.draw for row in rows])
    expected = choose_rows(logits[:count], banned[:count], given)
    same = (picked.cpu() == expected) & (chosen[:count].cpu() == expected)
    return float(same.float().mean())


SMALL = LlamaConfig(
    vocab_size=200,
    hidden=96,
    intermediate=160,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=24,
    max_positions=128,
)
