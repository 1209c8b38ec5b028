"""The network of the language model on a CPU: prefill as everywhere, a decoding step of its own.

A small model's step in eager PyTorch is spent between the operators, and with a long context in
reading keys across their rows. Here the step works in buffers made once, through views made once,
leaves vectors of some hundred numbers to numpy, which starts on them several times sooner, and
keeps the keys transposed, so that scores are sums over whole rows. What is left is reading the
weights (see :mod:`stages.lm_linear`) and the cache. ``python -m bench.decode`` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.llama_weights import LlamaConfig, Weights
from stages.lm_torch import TorchEngine, rotate


class CpuEngine(TorchEngine):
    """:class:`TorchEngine` for float32 on the CPU, with a faster step for a single token."""

    def __init__(self, config: LlamaConfig, weights: Weights, capacity: int) -> None:
        super().__init__(config, weights, capacity)
        heads, kv, size = config.heads, config.kv_heads, config.head_dim
        self._x = torch.zeros(1, config.hidden)
        self._h = torch.zeros(1, config.hidden)
        self._y = torch.zeros(1, config.hidden)
        self._qkv = torch.zeros(1, (heads + 2 * kv) * size)
        self._gate_up = torch.zeros(1, 2 * config.intermediate)
        self._gate, self._up = self._gate_up.chunk(2, dim=-1)
        self._mlp = torch.zeros(1, config.intermediate)
        self._attended = torch.zeros(1, heads * size)
        self._attended_heads = self._attended.view(kv, heads // kv, size).numpy()
        self._x_array, self._h_array = self._x[0].numpy(), self._h[0].numpy()
        self._y_array = self._y[0].numpy()
        # Queries and keys, whole and as [first half, second half]; rotated ones; values.
        by_head = self._qkv.view(-1, size)
        self._plain = by_head[: heads + kv].view(-1, 2, size // 2).numpy()
        self._swapped = self._plain[:, ::-1]
        self._rotated = np.zeros_like(self._plain)
        self._product = np.zeros_like(self._plain)
        self._query_array = self._rotated[:heads]
        self._query = self._query_array.reshape(kv, heads // kv, size)
        self._key = self._rotated[heads:].reshape(kv, size)
        self._value = by_head[heads + kv :].numpy()
        self._cos_halves = self._cos.view(-1, 2, size // 2).numpy()
        self._sin_halves = self._sin.view(-1, 2, size // 2).numpy()
        self._layers = [
            (layer, layer.attention_norm.numpy(), layer.mlp_norm.numpy(), *_arrays(cache))
            for layer, cache in zip(weights.layers, self._cache, strict=True)
        ]
        self._norm_array = weights.norm.numpy()

    @torch.inference_mode()
    def _run(self, ids: Sequence[int], start: int) -> Tensor:
        if len(ids) > 1:
            return super()._run(ids, start)
        self._x.copy_(self.weights.embedding[ids[0]])
        stop = start + 1
        for layer, attention_norm, mlp_norm, keys, values in self._layers:
            self._normalise(attention_norm)
            layer.qkv(self._h, self._qkv)
            self._rotate(start)
            keys[:, :, start] = self._key
            values[:, start] = self._value
            scores = np.matmul(self._query, keys[:, :, :stop])
            torch.softmax(torch.from_numpy(scores), -1, out=torch.from_numpy(scores))
            np.matmul(scores, values[:, :stop], out=self._attended_heads)
            layer.out(self._attended, self._y)
            np.add(self._x_array, self._y_array, out=self._x_array)
            self._normalise(mlp_norm)
            layer.gate_up(self._h, self._gate_up)
            torch.mul(F.silu(self._gate), self._up, out=self._mlp)
            layer.down(self._mlp, self._y)
            np.add(self._x_array, self._y_array, out=self._x_array)
        self._normalise(self._norm_array)
        return self.weights.head(self._h)[0]

    def _attend(
        self,
        qkv: Tensor,
        cache: Tensor,
        start: int,
        stop: int,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        heads, kv, size = self.config.heads, self.config.kv_heads, self.config.head_dim
        by_head = qkv.view(stop - start, heads + 2 * kv, size)
        rotated = rotate(by_head[:, : heads + kv], *rotary)
        keys, values = _views(cache)
        keys[:, :, start:stop] = rotated[:, heads:].permute(1, 2, 0)
        values[:, start:stop] = by_head[:, heads + kv :].transpose(0, 1)
        # [T, kv, group, size] to [kv, group * T, size]: a group shares its keys.
        queries = rotated[:, :heads].unflatten(1, (kv, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        scores = torch.bmm(queries, keys[:, :, :stop]).div_(math.sqrt(size))
        if mask is not None:
            scores.view(heads, -1, stop).masked_fill_(~mask, float("-inf"))
        out = torch.bmm(scores.softmax(-1), values[:, :stop])
        return out.view(heads, -1, size).transpose(0, 1).reshape(stop - start, -1)

    def _normalise(self, weight: np.ndarray) -> None:
        """RMS norm of the stream, into the buffer that the projections read."""
        x, h = self._x_array, self._h_array
        mean = float(np.dot(x, x)) / len(x)
        np.multiply(x, 1 / math.sqrt(mean + self.config.rms_norm_eps), out=h)
        np.multiply(h, weight, out=h)

    def _rotate(self, position: int) -> None:
        """Rotary positions: :func:`stages.lm_torch.rotate` in place; queries scaled as well."""
        np.multiply(self._plain, self._cos_halves[position], out=self._rotated)
        np.multiply(self._swapped, self._sin_halves[position], out=self._product)
        np.add(self._rotated, self._product, out=self._rotated)
        np.multiply(self._query_array, self.config.head_dim**-0.5, out=self._query_array)


def _views(cache: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's keys ``[kv, head_dim, capacity]`` and values ``[kv, capacity, head_dim]``: the
    memory of :meth:`TorchEngine._empty_cache`, keys transposed."""
    values = cache[1, 0]
    kv, capacity, size = values.shape
    return cache[0, 0].view(kv, size, capacity), values


def _arrays(cache: Tensor) -> tuple[np.ndarray, np.ndarray]:
    keys, values = _views(cache)
    return keys.numpy(), values.numpy()
