"""What the benches for a GPU have in common: the machine, its bandwidth, the full-size model.

Everything runs on a CPU as well, at the sizes of ``--tiny``, so that a script is known to work
before it meets a GPU.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.report import RESULTS, about, save
from stages.llama_weights import LlamaConfig, Weights
from stages.lm_linear import Dense, Linear, Scaled

EXPRESSIVE_7B = LlamaConfig(
    vocab_size=32768,
    hidden=4096,
    intermediate=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    max_positions=4096,
)
TINY = LlamaConfig(
    vocab_size=2048,
    hidden=64,
    intermediate=96,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=16,
    max_positions=4096,
)
SPEECH_RATE = 28
"""Tokens of a second of Expressive speech (DESIGN.md section 6)."""


def find_device(tiny: bool) -> torch.device:
    """CUDA, or with ``tiny`` the CPU where there is no CUDA.

    Raises:
        RuntimeError: there is no CUDA device, and full size is wanted.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if tiny:
        return torch.device("cpu")
    raise RuntimeError("no CUDA device: full size needs one; --tiny runs the same code on a CPU")


def begin(bench: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """The head of a report."""
    report = about(bench, ["torch", "transformers"])
    report |= {"device": device_name(device), "tiny": tiny, "cuda": torch.version.cuda}
    return report


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}"


def finish(bench: str, report: dict[str, Any], tables: Sequence[Table]) -> None:
    """Keep the report as JSON and its tables as Markdown, in ``$OUT`` or ``bench/results``; print
    the tables last."""
    path = save(bench, report, results())
    with path.with_suffix(".md").open("w", encoding="utf-8") as file:
        file.write(f"`{report['command']}`, {report['device']}, {report['date']}\n\n")
        writer = Console(file=file, width=200)
        for table in tables:
            table.box = MARKDOWN
            writer.print(table)
    console = Console(width=118)
    for table in tables:
        table.box = SIMPLE_HEAD
        console.print(table)
    console.print(f"{report['device']}; kept in {path} and .md")


def results() -> Path:
    """Where reports are kept: ``$OUT``, or ``bench/results``."""
    return Path(os.environ.get("OUT", RESULTS))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median time of ``run`` on the device, after three that are not counted."""
    for _ in range(3):
        run()
    synchronize(device)
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for first, last in events:
        first.record()
        run()
        last.record()
    synchronize(device)
    return median(first.elapsed_time(last) for first, last in events)


def bandwidth(device: torch.device, tiny: bool) -> dict[str, float]:
    """Bytes per second through the device's memory: reading alone (the faster of two sums), and a
    copy (read and written bytes added). Random numbers: zeros may go faster than anything real."""
    count = 2**22 if tiny else 2**31
    source = torch.empty(count, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    bytes_ = source.numel() * source.element_size()
    views = [source.view(dtype) for dtype in (torch.int32, torch.float32)]
    read = min(milliseconds(view.sum, device) for view in views)
    copy = milliseconds(lambda: target.copy_(source), device)
    return {"read": 1e3 * bytes_ / read, "copy": 2e3 * bytes_ / copy}


def bytes_of(matrix: Linear) -> int:
    """What one product reads of its matrix."""
    assert isinstance(matrix, Dense | Scaled)
    total = matrix.weight.numel() * matrix.weight.element_size()
    if isinstance(matrix, Scaled):
        total += matrix.scale.numel() * matrix.scale.element_size()
    return total


def step_bytes(config: LlamaConfig, weights: Weights, context: float) -> float:
    """The fewest bytes that a step of one stream moves: every matrix, and the live cache."""
    matrices = [weights.head]
    for layer in weights.layers:
        matrices += [layer.qkv, layer.out, layer.gate_up, layer.down]
    size = weights.embedding.element_size()
    cache = 2 * config.layers * config.kv_heads * config.head_dim * size * context
    return sum(bytes_of(matrix) for matrix in matrices) + cache


def hugging_face(config: LlamaConfig, weights: Weights) -> Any:
    """transformers' Llama over the memory of ``weights``: nothing is held twice."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = HFConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    model.load_state_dict(_official_names(config, weights), assign=True)
    # Computed, not loaded: with the model it was made on no device.
    model.model.rotary_emb = LlamaRotaryEmbedding(shape).to(weights.embedding.device)
    return model.eval().requires_grad_(False)


def _official_names(config: LlamaConfig, weights: Weights) -> dict[str, Tensor]:
    def rows(matrix: Linear) -> Tensor:
        assert isinstance(matrix, Dense)
        return matrix.weight.T

    query, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    state = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.norm,
        "lm_head.weight": rows(weights.head),
    }
    for i, layer in enumerate(weights.layers):
        at = f"model.layers.{i}"
        q, k, v = rows(layer.qkv).split([query, kv, kv])
        gate, up = rows(layer.gate_up).chunk(2)
        state |= {
            f"{at}.input_layernorm.weight": layer.attention_norm,
            f"{at}.post_attention_layernorm.weight": layer.mlp_norm,
            f"{at}.self_attn.q_proj.weight": q,
            f"{at}.self_attn.k_proj.weight": k,
            f"{at}.self_attn.v_proj.weight": v,
            f"{at}.self_attn.o_proj.weight": rows(layer.out),
            f"{at}.mlp.gate_proj.weight": gate,
            f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": rows(layer.down),
        }
    return state
