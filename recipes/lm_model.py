"""The network of ``stages.lm`` in a form that trains fast on one CPU core.

Parameter names are those of ``LlamaForCausalLM``; a test holds it equal to ``stages.lm``. What is
special is the attention: in bfloat16 torch's fused CPU attention took 45 % of a training step,
while plain matrix products over blocks of 128 queries, each with the keys that it may see, are 2.9
times faster (AMD EPYC with AVX512-BF16, one thread, 4 x 512 tokens). A GPU has a fused one of its
own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.lm import rotate

BLOCK = 128  # queries


class TrainableLlama(nn.Module):
    """Llama with tied embeddings, for training.

    Args:
        config: the content of ``config.json`` (Hugging Face's names).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if not config["tie_word_embeddings"]:
            raise ValueError("tie_word_embeddings: this recipe trains tied embeddings only")
        self.config, self.eps = config, config["rms_norm_eps"]
        self.model = _Body(config)
        self._initialise(config["num_hidden_layers"])
        self._tables: tuple[Tensor, Tensor] | None = None

    def _initialise(self, layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def forward(self, ids: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits of ids ``[B, T]``: ``[B, T, V]``, or ``[N, V]`` of the ``N`` positions where the
        bool mask ``wanted`` ``[B, T]`` is true; the others are not computed."""
        x = self.states(ids)[-1]
        return self.logits(x if wanted is None else x[wanted])

    def states(self, ids: Tensor) -> list[Tensor]:
        """Hidden states ``[B, T, hidden]`` after every layer, not normalised."""
        batch, length = ids.shape
        x = self.model.embed_tokens(ids)
        heads = self.config["num_attention_heads"]
        kv_heads = self.config["num_key_value_heads"]
        cos, sin = self._rotary(length, x.shape[-1] // heads, x.device)
        states: list[Tensor] = []
        for layer in self.model.layers:
            assert isinstance(layer, _Layer)
            h = self._norm(x, layer.input_layernorm)
            qkv = F.linear(h, layer.self_attn.qkv()).view(batch, length, heads + 2 * kv_heads, -1)
            x = x + layer.self_attn.o_proj(_attend(qkv, heads, kv_heads, cos, sin))
            h = self._norm(x, layer.post_attention_layernorm)
            gate, up = F.linear(h, layer.mlp.gate_up()).chunk(2, -1)
            x = x + layer.mlp.down_proj(F.silu(gate) * up)
            states.append(x)
        return states

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the last layer's hidden states, ``[..., hidden]`` to ``[..., V]``."""
        return F.linear(self._norm(x, self.model.norm), self.model.embed_tokens.weight)

    def _norm(self, x: Tensor, norm: _Norm) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * norm.weight

    def _rotary(self, length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0].shape[0] != length:
            inverse = self.config["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
            angles = torch.outer(torch.arange(length).float(), inverse)
            cos, sin = angles.cos(), angles.sin()
            self._tables = (
                torch.cat((cos, cos), -1)[:, None].to(device),
                torch.cat((-sin, sin), -1)[:, None].to(device),
            )
        return self._tables

    def official_state(self) -> dict[str, Tensor]:
        """The weights in bfloat16 under their official names, ``lm_head`` left to the tying."""
        return {k: v.detach().to(torch.bfloat16).clone() for k, v in self.state_dict().items()}


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class _Attention(nn.Module):
    def __init__(self, hidden: int, shared: int) -> None:
        """``shared``: width of all keys, and of all values; several queries may share one."""
        super().__init__()
        self.q_proj, self.k_proj = _matrix(hidden, hidden), _matrix(hidden, shared)
        self.v_proj, self.o_proj = _matrix(hidden, shared), _matrix(hidden, hidden)

    def qkv(self) -> Tensor:
        return torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))


class _Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = _matrix(hidden, intermediate)
        self.up_proj = _matrix(hidden, intermediate)
        self.down_proj = _matrix(intermediate, hidden)

    def gate_up(self) -> Tensor:
        return torch.cat((self.gate_proj.weight, self.up_proj.weight))


class _Layer(nn.Module):
    def __init__(self, hidden: int, shared: int, intermediate: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = _Norm(hidden), _Norm(hidden)
        self.self_attn, self.mlp = _Attention(hidden, shared), _Mlp(hidden, intermediate)


class _Body(nn.Module):
    """What the official names call ``model``."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, intermediate = config["hidden_size"], config["intermediate_size"]
        shared = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
        layers = range(config["num_hidden_layers"])
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(_Layer(hidden, shared, intermediate) for _ in layers)
        self.norm = _Norm(hidden)


def _matrix(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def _attend(qkv: Tensor, heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention of ``[B, T, H + 2 KV, D]``; ``[B, T, H D]``."""
    batch, length, _, dim = qkv.shape
    both = heads + kv_heads
    rotated = rotate(qkv[:, :, :both], cos.to(qkv.dtype), sin.to(qkv.dtype))
    query, key, value = rotated[:, :, :heads], rotated[:, :, heads:], qkv[:, :, both:]
    if qkv.is_cuda:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=kv_heads != heads
        )
        return out.transpose(1, 2).reshape(batch, length, heads * dim)

    def flat(x: Tensor) -> Tensor:
        if x.shape[2] != heads:
            x = x.repeat_interleave(heads // kv_heads, 2)
        return x.transpose(1, 2).reshape(batch * heads, length, dim)

    out = BlockAttention.apply(flat(query * dim**-0.5), flat(key), flat(value))
    return out.view(batch, heads, length, dim).transpose(1, 2).reshape(batch, length, heads * dim)


class BlockAttention(torch.autograd.Function):
    """Causal ``softmax(q k') v`` of ``[N, T, D]`` in blocks of queries; ``q`` is already scaled."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[1]
        out = torch.empty_like(query)
        future = torch.full((BLOCK, BLOCK), float("-inf"), dtype=query.dtype).triu(1)
        probabilities = []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            scores = query[:, start:stop] @ key[:, :stop].transpose(1, 2)
            scores[..., start:] += future[: stop - start, : stop - start]
            share = torch.softmax(scores, -1, dtype=query.dtype)
            out[:, start:stop] = share @ value[:, :stop]
            probabilities.append(share)
        ctx.save_for_backward(query, key, value, out, *probabilities)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, *probabilities = ctx.saved_tensors
        (grad,) = grads
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        # Sum over keys of probability times its gradient (Dao et al., 2022, equation 4).
        inner = (grad.float() * out.float()).sum(-1, keepdim=True).to(grad.dtype)
        for index, share in enumerate(probabilities):
            start = index * BLOCK
            stop = start + share.shape[1]
            part = grad[:, start:stop]
            grad_value[:, :stop] += share.transpose(1, 2) @ part
            scores = part @ value[:, :stop].transpose(1, 2)
            scores = scores.sub_(inner[:, start:stop]).mul_(share)
            grad_query[:, start:stop] = scores @ key[:, :stop]
            grad_key[:, :stop] += scores.transpose(1, 2) @ query[:, start:stop]
        return grad_query, grad_key, grad_value
