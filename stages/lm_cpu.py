"""The network of the language model on a CPU: prefill as everywhere, a decoding step of its own.

A small model's step in eager PyTorch is spent between the operators. Here the step works in buffers
made once, through views made once, and leaves vectors of some hundred numbers to numpy, which
starts on them several times sooner. What is left is reading the weights (see
:mod:`stages.lm_linear`). ``python -m bench.decode`` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.llama_weights import LlamaConfig, Weights
from stages.lm_torch import TorchEngine


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
        self._x_array, self._h_array = self._x[0].numpy(), self._h[0].numpy()
        # Queries and keys, whole and as [first half, second half]; rotated ones; values.
        by_head = self._qkv.view(-1, size)
        self._plain = by_head[: heads + kv].view(-1, 2, size // 2).numpy()
        self._swapped = self._plain[:, ::-1]
        self._rotated = np.zeros_like(self._plain)
        self._product = np.zeros_like(self._plain)
        self._query = torch.from_numpy(self._rotated[:heads]).view(1, heads, 1, size)
        self._key = self._rotated[heads:].reshape(kv, size)
        self._value = by_head[heads + kv :].numpy()
        self._cos_halves = self._cos.view(-1, 2, size // 2).numpy()
        self._sin_halves = self._sin.view(-1, 2, size // 2).numpy()
        self._layers = [
            (
                layer,
                layer.attention_norm.numpy(),
                layer.mlp_norm.numpy(),
                cache,
                cache[:, 0].numpy(),
            )
            for layer, cache in zip(weights.layers, self._cache, strict=True)
        ]
        self._norm_array = weights.norm.numpy()

    @torch.inference_mode()
    def feed(self, ids: Sequence[int], start: int) -> Tensor:
        if len(ids) > 1:
            return super().feed(ids, start)
        self._x.copy_(self.weights.embedding[ids[0]])
        stop = start + 1
        grouped = self.config.heads != self.config.kv_heads
        for layer, attention_norm, mlp_norm, cache, (keys, values) in self._layers:
            self._normalise(attention_norm)
            layer.qkv(self._h, self._qkv)
            self._rotate(start)
            keys[:, start] = self._key
            values[:, start] = self._value
            seen = cache.narrow(3, 0, stop)
            attended = F.scaled_dot_product_attention(
                self._query, seen[0], seen[1], enable_gqa=grouped
            )
            self._x.add_(layer.out(attended.view(1, -1), self._y))
            self._normalise(mlp_norm)
            layer.gate_up(self._h, self._gate_up)
            torch.mul(F.silu(self._gate), self._up, out=self._mlp)
            self._x.add_(layer.down(self._mlp, self._y))
        self._normalise(self._norm_array)
        return self.weights.head(self._h)[0]

    def _normalise(self, weight: np.ndarray) -> None:
        """RMS norm of the stream, into the buffer that the projections read."""
        x, h = self._x_array, self._h_array
        mean = float(np.dot(x, x)) / len(x)
        np.multiply(x, 1 / math.sqrt(mean + self.config.rms_norm_eps), out=h)
        np.multiply(h, weight, out=h)

    def _rotate(self, position: int) -> None:
        """Rotary positions: :func:`stages.lm_torch.rotate` in place."""
        np.multiply(self._plain, self._cos_halves[position], out=self._rotated)
        np.multiply(self._swapped, self._sin_halves[position], out=self._product)
        np.add(self._rotated, self._product, out=self._rotated)
