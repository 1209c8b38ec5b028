"""Reading ``LlamaForCausalLM`` weights in every form in which they are published.

``config.json`` with ``pytorch_model.bin`` or ``model.safetensors``, whole or in shards listed by an
``*.index.json``; or with an adapter of another model (:mod:`stages.llama_adapter`). The final
buffers are allocated once, in the wanted type and on the wanted device, and the tensors of the
(memory-mapped) files are copied into them one by one: a 7B model needs its own size and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.checkpoint import CheckpointError, check_tensor, load_json, load_state, require
from stages.llama_adapter import ADAPTER, adapted_tensors
from stages.lm_linear import Dense, Linear, halved, scaled

_FILES = (
    ADAPTER,
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a Llama, as in Hugging Face's ``config.json``; the rest as Llama 2 has it."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def read(cls, path: Path) -> LlamaConfig:
        """Read ``config.json``. Raises :class:`CheckpointError` for what is not a plain Llama."""
        raw = load_json(path)
        if raw.get("model_type", "llama") != "llama":
            raise CheckpointError(f"{path}: model_type {raw['model_type']!r}, expected 'llama'")
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{path}: hidden_act {raw['hidden_act']!r}, expected 'silu'")
        hidden = require(raw, "hidden_size", path, int)
        heads = require(raw, "num_attention_heads", path, int)
        theta, factor = _rope(raw, path)
        config = cls(
            vocab_size=require(raw, "vocab_size", path, int),
            hidden=hidden,
            intermediate=require(raw, "intermediate_size", path, int),
            layers=require(raw, "num_hidden_layers", path, int),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // max(heads, 1)),
            max_positions=int(raw.get("max_position_embeddings", 2048)),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_factor=factor,
            tied=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
        )
        config.check(path)
        return config

    def check(self, path: Path) -> None:
        """Raise :class:`CheckpointError` for dimensions that cannot be."""
        for name in ("vocab_size", "hidden", "intermediate", "layers", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise CheckpointError(
                    f"{path}: {name} is {getattr(self, name)}, expected 1 or more"
                )
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"{path}: num_attention_heads {self.heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise CheckpointError(f"{path}: head_dim {self.head_dim}, expected an even number")


@dataclass(frozen=True)
class Layer:
    """One layer. Query, key and value, and gate and up, are fused."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """All weights: ``embedding`` ``[vocabulary, hidden]``; the head may share its memory."""

    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Linear


@dataclass(frozen=True)
class _LayerBuffers:
    attention_norm: Tensor
    qkv: Dense
    out: Dense
    mlp_norm: Tensor
    gate_up: Dense
    down: Dense


@dataclass(frozen=True)
class _Buffers:
    """What a checkpoint is read into."""

    embedding: Tensor
    layers: list[_LayerBuffers]
    norm: Tensor
    head: Dense


def load_llama(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    halve: bool = True,
    eight_bits: str | None = None,
) -> tuple[LlamaConfig, Weights]:
    """Read configuration and weights of the model in ``folder``.

    Args:
        halve: hold float32 matrices in 16 bits where that changes nothing
            (:func:`stages.lm_linear.halved`).
        eight_bits: hold the matrices in 8 bits, in one of :data:`stages.lm_linear.FORMS`, which
            does change something.

    Raises:
        CheckpointError: naming the file and the key that is missing, unexpected or of the wrong
            shape.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; expected config.json and the weights")
    config = LlamaConfig.read(folder / "config.json")
    buffers = _allocate(config, device, dtype)
    targets = _targets(config, buffers)
    source, shards = _find_weights(folder)
    filled: set[str] = set()
    for path in shards:
        for key, value in _tensors(path):
            if key.endswith(".rotary_emb.inv_freq") or (config.tied and key == "lm_head.weight"):
                continue
            if key not in targets:
                raise CheckpointError(
                    f"{path}: key {key!r} does not belong to the model that "
                    f"{folder / 'config.json'} describes"
                )
            targets[key].copy_(check_tensor(value, tuple(targets[key].shape), path, key))
            filled.add(key)
    missing = [key for key in targets if key not in filled]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{source}: key {missing[0]!r}{more} missing from the checkpoint")
    targets.clear()
    return config, _finished(buffers, _form_of_matrices(halve, eight_bits))


def _form_of_matrices(halve: bool, eight_bits: str | None) -> Callable[[Dense], Linear]:
    """What makes of a matrix the form in which it is held; see :func:`load_llama`."""
    if eight_bits is not None:
        form = eight_bits
        return lambda matrix: scaled(matrix, form)
    return halved if halve else lambda matrix: matrix


def random_llama(
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    eight_bits: str | None = None,
) -> Weights:
    """Weights of the shape of ``config`` with random numbers, scaled to keep a stream's size."""
    buffers = _allocate(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for key, tensor in _targets(config, buffers).items():
        if tensor.dim() == 1:
            tensor.fill_(0.0 if key.endswith(".bias") else 1.0)
        else:
            tensor.normal_(0, tensor.shape[1] ** -0.5, generator=generator)
    return _finished(buffers, _form_of_matrices(False, eight_bits))


def _rope(raw: Mapping[str, Any], path: Path) -> tuple[float, float]:
    """Base of the rotary frequencies and the divisor of positions (1 unless scaled linearly).

    ``rope_parameters`` is the form that transformers 5 writes.
    """
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"{path}: rope_scaling is a {type(scaling).__name__}, expected null")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise CheckpointError(
            f"{path}: rope_scaling {kind!r}: only 'default' and 'linear' are known"
        )
    theta = scaling.get("rope_theta", raw.get("rope_theta", 10000.0))
    return float(theta), float(scaling.get("factor", 1.0)) if kind == "linear" else 1.0


def _allocate(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> _Buffers:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def dense(size: int, out: int, bias: bool) -> Dense:
        # A GPU reads the rows of the checkpoint's matrices, a CPU their columns.
        weight = empty(out, size).T if device.type == "cuda" else empty(size, out)
        return Dense(weight, empty(out) if bias else None)

    hidden, heads, mlp = config.hidden, config.heads * config.head_dim, config.intermediate
    fused = heads + 2 * config.kv_heads * config.head_dim
    layers = [
        _LayerBuffers(
            attention_norm=empty(hidden),
            qkv=dense(hidden, fused, config.attention_bias),
            out=dense(heads, hidden, config.attention_bias),
            mlp_norm=empty(hidden),
            gate_up=dense(hidden, 2 * mlp, config.mlp_bias),
            down=dense(mlp, hidden, config.mlp_bias),
        )
        for _ in range(config.layers)
    ]
    embedding = empty(config.vocab_size, hidden)
    head = Dense(embedding.T) if config.tied else dense(hidden, config.vocab_size, False)
    return _Buffers(embedding, layers, empty(hidden), head)


def _targets(config: LlamaConfig, buffers: _Buffers) -> dict[str, Tensor]:
    """The checkpoint's names and the views, shaped as in the checkpoint, that they fill."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    mlp = config.intermediate
    targets: dict[str, Tensor] = {
        "model.embed_tokens.weight": buffers.embedding,
        "model.norm.weight": buffers.norm,
    }
    if not config.tied:
        targets["lm_head.weight"] = buffers.head.weight.T
    for i, layer in enumerate(buffers.layers):
        p = f"model.layers.{i}"
        targets[f"{p}.input_layernorm.weight"] = layer.attention_norm
        targets[f"{p}.post_attention_layernorm.weight"] = layer.mlp_norm
        for name, matrix, sizes in (
            ("self_attn.{}_proj", layer.qkv, {"q": q, "k": kv, "v": kv}),
            ("self_attn.{}_proj", layer.out, {"o": config.hidden}),
            ("mlp.{}_proj", layer.gate_up, {"gate": mlp, "up": mlp}),
            ("mlp.{}_proj", layer.down, {"down": config.hidden}),
        ):
            at = 0
            for part, size in sizes.items():
                key = f"{p}.{name.format(part)}"
                targets[f"{key}.weight"] = matrix.weight[:, at : at + size].T
                if matrix.bias is not None:
                    targets[f"{key}.bias"] = matrix.bias[at : at + size]
                at += size
    return targets


def _finished(buffers: _Buffers, held: Callable[[Dense], Linear]) -> Weights:
    """The filled buffers, each matrix in the form that ``held`` gives it."""
    layers = []
    while buffers.layers:  # taken one by one, so that only one layer is held in both forms
        layer = buffers.layers.pop(0)
        layers.append(
            Layer(
                layer.attention_norm,
                held(layer.qkv),
                held(layer.out),
                layer.mlp_norm,
                held(layer.gate_up),
                held(layer.down),
            )
        )
    return Weights(buffers.embedding, layers, buffers.norm, held(buffers.head))


def _find_weights(folder: Path) -> tuple[Path, list[Path]]:
    """The file that lists or holds the weights, and the files that hold them."""
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return path, [path]
        names = set(require(load_json(path), "weight_map", path, dict).values())
        for shard in names:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(f"{path}: shard {shard!r} is not a file name in {folder}")
        return path, sorted(folder / shard for shard in names)
    raise CheckpointError(f"{folder}: no weights; expected one of {', '.join(reversed(_FILES))}")


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    if path.name == ADAPTER:
        yield from adapted_tensors(path)
        return
    state = load_state(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: expected a state dict, found a {type(state).__name__}")
    yield from state.items()
