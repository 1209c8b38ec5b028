"""A fairseq HuBERT checkpoint as a ``transformers.HubertModel`` that ends at one of its layers.

Serves the official 25 Hz checkpoint and its relatives (group norm in the first convolution, or a
layer norm in each; weight norm or batch norm at the positional convolution; post- or pre-norm
layers) and nano's, whose ``model_cfg`` says more, every key optional:

``features_layer``        the layer whose output, with nothing after it, is wanted (default 11)
``feat_proj_layer_norm``  false: no layer norm before the projection (default true)
``input_padding``         zeros put before and after the wave, in samples (default [0, 0])
``pool``                  this many frames are averaged into one (default 1)
``window``                see :class:`stages.phonetic.Window` (default null)
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import HubertConfig, HubertModel

from stages.checkpoint import CheckpointError, fold_weight_norm, load_weights, require

_DEFAULT_LAYER = 11
_MODES = {"default": "group", "layer_norm": "layer"}
_TRAINING_ONLY = ("mask_emb", "label_embs_concat", "final_proj.")
_MAX_CONVOLUTIONS = 32


class Hubert(nn.Module):
    """``forward``: waves ``[B, n]`` at 16 kHz to features ``[B, frames(n), width]``."""

    def __init__(
        self, config: HubertConfig, projected: bool, padding: tuple[int, int], pool: int
    ) -> None:
        super().__init__()
        self.model = HubertModel(config)
        if config.do_stable_layer_norm:  # pre-norm: the output of a layer comes before this norm
            self.model.encoder.register_module("layer_norm", nn.Identity())
        if not projected:
            self.model.feature_projection.register_module("projection", nn.Identity())
        # Folding the weight norm saves time at run time and spares an export the detour.
        positions = self.model.encoder.pos_conv_embed.conv
        if parametrize.is_parametrized(positions):
            parametrize.remove_parametrizations(positions, "weight")
        self.padding, self.pool = padding, pool
        self.width: int = config.hidden_size
        self.hop: int = math.prod(config.conv_stride) * pool
        """Samples from one frame to the next."""

    def frames(self, samples: int) -> int:
        """How many frames ``samples`` samples give."""
        config, length = self.model.config, samples + sum(self.padding)
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            if length < kernel:
                return 0
            length = (length - kernel) // stride + 1
        return length // self.pool

    def forward(self, wave: Tensor) -> Tensor:
        if any(self.padding):
            wave = F.pad(wave, self.padding)
        features: Tensor = self.model(wave).last_hidden_state
        if self.pool > 1:
            features = F.avg_pool1d(features.transpose(1, 2), self.pool).transpose(1, 2)
        return features


def build_hubert(checkpoint: Mapping[str, Any], path: Path) -> Hubert:
    """The network of a checkpoint: a mapping with ``model_cfg``, ``task_cfg``, ``model_weight``.

    Layers above the wanted one are dropped, and so are the weights that only training uses.

    Raises:
        CheckpointError: a key is missing or of the wrong shape, or the model is of a kind that
            the reference does not handle either (``normalize`` true among them).
    """
    cfg = require(checkpoint, "model_cfg", path, dict)
    state = require(checkpoint, "model_weight", path, dict)
    if require(checkpoint, "task_cfg", path, dict).get("normalize"):
        raise CheckpointError(
            f"{path}: task_cfg.normalize is true. Spirit LM's tokenizer feeds the wave as it is "
            "and its checkpoints have it false; this is another model's file"
        )
    config = _config(cfg, state, path)
    embedding = config.conv_dim[-1]
    projected = embedding != config.hidden_size or "post_extract_proj.weight" in state
    padding = _pair(cfg.get("input_padding", [0, 0]), path)
    pool = cfg.get("pool", 1)
    if not isinstance(pool, int) or pool < 1:
        raise CheckpointError(f"{path}: model_cfg.pool is {pool!r}, expected a positive integer")
    try:
        hubert = Hubert(config, projected, padding, pool)
    except Exception as error:  # transformers raises many kinds for values that do not fit
        raise CheckpointError(f"{path}: model_cfg describes no HuBERT ({error})") from error
    load_weights(hubert.model, _renamed(state, config, path), path)
    return hubert.eval().requires_grad_(False)


def _config(cfg: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> HubertConfig:
    def key(name: str, kind: type[Any]) -> Any:
        return require(cfg, name, f"{path}: model_cfg", kind)

    mode = key("extractor_mode", str)
    if mode not in _MODES:
        raise CheckpointError(
            f"{path}: model_cfg.extractor_mode {mode!r}, expected one of {_MODES}"
        )
    if cfg.get("layer_type", "transformer") != "transformer":
        raise CheckpointError(f"{path}: model_cfg.layer_type {cfg['layer_type']!r} is unsupported")
    layers, wanted = key("encoder_layers", int), cfg.get("features_layer", _DEFAULT_LAYER)
    if not isinstance(wanted, int) or not 1 <= wanted <= layers:
        raise CheckpointError(
            f"{path}: features of layer {wanted} are wanted, but model_cfg.encoder_layers is "
            f"{layers}"
        )
    convolutions = parse_convolutions(key("conv_feature_layers", str), path)
    dims, kernels, strides = (list(column) for column in zip(*convolutions, strict=True))
    return HubertConfig(
        hidden_size=key("encoder_embed_dim", int),
        intermediate_size=key("encoder_ffn_embed_dim", int),
        num_attention_heads=key("encoder_attention_heads", int),
        num_hidden_layers=wanted,
        hidden_act=key("activation_fn", str),
        feat_extract_norm=_MODES[mode],
        feat_proj_layer_norm=cfg.get("feat_proj_layer_norm", True),
        conv_dim=dims,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=cfg.get("conv_bias", False),
        do_stable_layer_norm=cfg.get("layer_norm_first", False),
        num_conv_pos_embeddings=key("conv_pos", int),
        num_conv_pos_embedding_groups=key("conv_pos_groups", int),
        conv_pos_batch_norm="encoder.pos_conv.0.running_mean" in state,
        # Training only: masking would need an embedding, layer drop a random choice.
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        layerdrop=0.0,
    )


def parse_convolutions(text: str, path: Path) -> list[tuple[int, int, int]]:
    """fairseq's ``"[(512,10,5)] + [(512,3,2)] * 4"`` as (channels, kernel, stride), unevaluated.

    fairseq runs ``eval`` on this string; here only lists of integer triples, ``+`` and ``*`` pass.

    Raises:
        CheckpointError: the string is anything else.
    """
    fault = CheckpointError(
        f"{path}: model_cfg.conv_feature_layers {text[:80]!r}: expected lists of (channels, "
        "kernel, stride) joined by + and repeated by *"
    )

    def read(node: ast.expr) -> list[tuple[int, int, int]]:
        if isinstance(node, ast.List):
            return [_triple(item, fault) for item in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return read(node.left) + read(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            times = node.right
            if isinstance(times, ast.Constant) and type(times.value) is int:
                if times.value > _MAX_CONVOLUTIONS:
                    raise fault
                return read(node.left) * times.value
        raise fault

    try:
        out = read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise fault from error
    if not 0 < len(out) <= _MAX_CONVOLUTIONS:
        raise fault
    return out


def _triple(node: ast.expr, fault: CheckpointError) -> tuple[int, int, int]:
    values = (
        [e.value for e in node.elts if isinstance(e, ast.Constant)]
        if (isinstance(node, ast.Tuple))
        else []
    )
    if len(values) != 3 or not all(type(v) is int and v > 0 for v in values):
        raise fault
    channels, kernel, stride = (int(str(v)) for v in values)
    return channels, kernel, stride


def _pair(value: Any, path: Path) -> tuple[int, int]:
    if isinstance(value, list | tuple) and len(value) == 2:
        first, second = value
        if isinstance(first, int) and isinstance(second, int) and min(first, second) >= 0:
            return first, second
    raise CheckpointError(
        f"{path}: model_cfg.input_padding is {value!r}, expected two sample counts [before, after]"
    )


_LAYER_PARTS = {
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.out_proj": "attention.out_proj",
    "self_attn_layer_norm": "layer_norm",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
    "final_layer_norm": "final_layer_norm",
}
_OTHER_PARTS = {
    "layer_norm": "feature_projection.layer_norm",
    "post_extract_proj": "feature_projection.projection",
    "encoder.layer_norm": "encoder.layer_norm",
}
_POSITIONS = "encoder.pos_conv_embed."


def _renamed(state: Mapping[str, Any], config: HubertConfig, path: Path) -> dict[str, Any]:
    """fairseq's names to those of transformers, without what inference does not use."""
    out: dict[str, Any] = {}
    # The positional convolution has one gain per tap.
    for key, value in fold_weight_norm(state, path, axis=2).items():
        if key.startswith(_TRAINING_ONLY):
            continue
        if config.do_stable_layer_norm and key.startswith("encoder.layer_norm."):
            continue
        name = _name(key, config)
        if name is not None:
            out[name] = value
    if config.conv_pos_batch_norm:
        # A counter that fairseq's and torch's batch norm carry and inference ignores.
        out.setdefault(f"{_POSITIONS}batch_norm.num_batches_tracked", torch.tensor(0))
    return out


def _name(key: str, config: HubertConfig) -> str | None:
    """The name in transformers of fairseq's ``key``; ``None`` for a layer that is not needed."""
    if key.startswith("encoder.layers."):
        index, rest = key.removeprefix("encoder.layers.").split(".", 1)
        part, _, leaf = rest.rpartition(".")
        if index.isdigit() and int(index) >= config.num_hidden_layers:
            return None
        return f"encoder.layers.{index}.{_LAYER_PARTS.get(part, part)}.{leaf}"
    if key.startswith("feature_extractor.conv_layers."):
        index, rest = key.removeprefix("feature_extractor.conv_layers.").split(".", 1)
        # Sequential(conv, dropout, norm, gelu); a layer norm stands between two transpositions.
        for fairseq, ours in (("0.", "conv."), ("2.1.", "layer_norm."), ("2.", "layer_norm.")):
            if rest.startswith(fairseq):
                rest = ours + rest.removeprefix(fairseq)
                break
        return f"feature_extractor.conv_layers.{index}.{rest}"
    if key.startswith("encoder.pos_conv."):
        index, rest = key.removeprefix("encoder.pos_conv.").split(".", 1)
        normed = config.conv_pos_batch_norm and index == "0"
        return f"{_POSITIONS}{'batch_norm' if normed else 'conv'}.{rest}"
    part, _, leaf = key.rpartition(".")
    return f"{_OTHER_PARTS.get(part, part)}.{leaf}"
