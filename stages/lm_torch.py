"""The network of the language model in plain PyTorch: any device, any type, any number of tokens.

The network is Llama as published (Touvron et al., 2023: pre-norm RMS norm, rotary positions,
grouped-query attention, SwiGLU), every dimension taken from ``config.json``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.llama_weights import LlamaConfig, Weights
from stages.lm_sampling import Sampling, choose


class TorchEngine:
    """Runs tokens over a key-value cache of fixed size, indexed by position.

    It keeps no count of the tokens: whoever calls it says where new ones stand, and everything from
    there on counts as not there. That is what makes rewinding free.
    """

    def __init__(self, config: LlamaConfig, weights: Weights, capacity: int) -> None:
        self.config, self.weights, self.capacity = config, weights, capacity
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self._cos, self._sin = rotary_tables(config, capacity, device, dtype)
        self._cache = self._empty_cache()
        self._logits: Tensor | None = None
        self.held = -1

    def feed(self, ids: Sequence[int], start: int) -> None:
        """Run ``ids`` after the first ``start`` tokens and hold the logits after the last."""
        self._logits, self.held = self._run(ids, start), start + len(ids)

    def logits(self) -> Tensor:
        """The logits held, float32 ``[vocab_size]``."""
        if self._logits is None:
            raise RuntimeError("no logits are held: feed the last token first")
        return self._logits

    def decode(
        self, ids: Sequence[int], start: int, sampling: Sampling, mask: Tensor | None
    ) -> int:
        """:meth:`feed` ``ids``, if there are any; the token chosen from the logits held."""
        if ids:
            self.feed(ids, start)
        mask = mask if mask is None else mask.cpu()
        return choose(self.logits(), sampling, mask, sampling.draw(self.held))

    def forget(self) -> None:
        """Hold no logits any more."""
        self._logits, self.held = None, -1

    def another(self) -> TorchEngine:
        """An engine like this over the same weights."""
        return type(self)(self.config, self.weights, self.capacity)

    def close(self) -> None:
        """Nothing to give back."""

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int], start: int) -> Tensor:
        """Run ``ids`` after the first ``start`` tokens; the hidden states after the final norm,
        ``[len(ids), hidden]``."""
        w, config, stop = self.weights, self.config, start + len(ids)
        x = F.embedding(torch.tensor(ids, device=w.embedding.device), w.embedding)
        size, eps = (config.hidden,), config.rms_norm_eps
        rotary = self._cos[start:stop], self._sin[start:stop]
        mask = _causal_mask(start, stop, x.device)
        for layer, cache in zip(w.layers, self._cache, strict=True):
            h = F.rms_norm(x, size, layer.attention_norm, eps)
            x = x + layer.out(self._attend(layer.qkv(h), cache, start, stop, rotary, mask))
            h = F.rms_norm(x, size, layer.mlp_norm, eps)
            gate, up = layer.gate_up(h).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return F.rms_norm(x, size, w.norm, eps)

    def _empty_cache(self) -> Tensor:
        """Keys and values: ``[layers, 2, 1, kv_heads, capacity, head_dim]``."""
        c, like = self.config, self.weights.embedding
        shape = (c.layers, 2, 1, c.kv_heads, self.capacity, c.head_dim)
        return torch.zeros(shape, device=like.device, dtype=like.dtype)

    @torch.inference_mode()
    def _run(self, ids: Sequence[int], start: int) -> Tensor:
        return self.weights.head(self.hidden(ids, start)[-1:])[0].float()

    def _attend(
        self,
        qkv: Tensor,
        cache: Tensor,
        start: int,
        stop: int,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Self-attention of ``qkv`` ``[T, (H + 2 KV) * head_dim]``; writes keys and values."""
        heads, kv = self.config.heads, self.config.kv_heads
        by_head = qkv.view(stop - start, heads + 2 * kv, self.config.head_dim)
        rotated = rotate(by_head[:, : heads + kv], *rotary).transpose(0, 1)
        cache[0, 0, :, start:stop] = rotated[heads:]
        cache[1, 0, :, start:stop] = by_head[:, heads + kv :].transpose(0, 1)
        out = F.scaled_dot_product_attention(
            rotated[None, :heads],
            cache[0, :, :, :stop],
            cache[1, :, :, :stop],
            attn_mask=mask,
            enable_gqa=kv != heads,
        )
        return out[0].transpose(0, 1).reshape(stop - start, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021) in Llama's half-split layout.

    Args:
        x: ``[T, heads, head_dim]``.
        cos, sin: ``[T, 1, head_dim]``; the sign of the rotation is already in ``sin``.
    """
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.cat((x[..., half:], x[..., :half]), dim=-1), sin)


def rotary_tables(
    config: LlamaConfig, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines ``[length, 1, head_dim]``, computed in float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    angles = torch.outer(torch.arange(length).float() / config.rope_factor, frequencies)
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), dim=-1)[:, None].to(device, dtype),
        torch.cat((-sin, sin), dim=-1)[:, None].to(device, dtype),
    )


def _causal_mask(start: int, stop: int, device: torch.device) -> Tensor | None:
    """``[T, stop]``, True where token ``start + i`` may look; ``None`` for a single token."""
    if stop - start == 1:
        return None
    positions = torch.arange(stop, device=device)
    return positions[None] <= positions[start:, None]
