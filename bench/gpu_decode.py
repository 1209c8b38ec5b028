"""Decoding the 7B Expressive shape on a GPU: ``python -m bench.gpu_decode``.

Random weights in the official shape. First what must be right: the kernels against PyTorch, tokens
and logits of the engine in float32 at a small size, its logits at full size against the eager
network. Then, taking turns in one run: the engine as it is used, the same with fewer of its own
kernels, with 8-bit weights, eager PyTorch and Hugging Face ``generate``; tokens per second against
the bandwidth measured in the same run, prefill, and rewinding. ``--tune`` also tries other sizes of
the product's kernel, ``--profile`` keeps a table of the kernels of one step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers.utils import logging

from bench.decode import Candidate, Plan, compare, of_engine, of_hugging_face, random_ids
from bench.gpu import (
    EXPRESSIVE_7B,
    TINY,
    bandwidth,
    begin,
    find_device,
    finish,
    hugging_face,
    milliseconds,
    results,
    step_bytes,
)
from stages.llama_weights import LlamaConfig, Weights, random_llama
from stages.lm_cuda import CudaEngine, static_network
from stages.lm_runner import PREFILL_ROWS
from stages.lm_sampling import Sampling
from stages.lm_static import GREEDY, Row, StaticNetwork
from stages.lm_torch import TorchEngine

ROWS = PREFILL_ROWS[-1]
FULL = Plan(contexts=(64, 512, 1500), steps=64, prefills=(50, 200), kept=512)
SMALL = Plan(contexts=(16, 64), steps=4, prefills=(20,), kept=40)
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=0)
TUNED = [
    {"rows": rows, "columns": columns, "warps": warps}
    for rows, columns, warps in (
        (1, 1024, 4),
        (2, 1024, 4),
        (4, 1024, 4),
        (2, 2048, 4),
        (1, 2048, 8),
        (4, 512, 4),
        (8, 512, 4),
        (8, 256, 2),
        (4, 1024, 8),
    )
]


def check_small(device: torch.device) -> dict[str, Any]:
    """Tokens and logits of the engine in float32 against plain PyTorch.

    Raises:
        RuntimeError: they differ.
    """
    weights = random_llama(TINY, device, torch.float32)
    engine, plain = CudaEngine(TINY, weights, 600), TorchEngine(TINY, weights, 600)
    ids, largest = random_ids(540), 0.0
    for sampling in (GREEDY, SAMPLED, Sampling(1.3, 0.8, seed=1, top_k=30)):
        for start, stop in ((0, 200), (200, 207), (100, 540), (30, 50)):
            said = [_continued(each, ids[start:stop], start, sampling) for each in (engine, plain)]
            if said[0] != said[1]:
                raise RuntimeError(f"the engine decodes {said[0]}, plain PyTorch {said[1]}")
            largest = max(largest, float((engine.logits() - plain.logits()).abs().max()))
    if not largest < 1e-3:
        raise RuntimeError(f"logits differ by {largest} from those of plain PyTorch")
    return {"largest_error": largest, "network": type(engine.runner.network).__name__}


def _continued(
    engine: CudaEngine | TorchEngine, ids: list[int], start: int, sampling: Sampling
) -> list[int]:
    """Twelve tokens after ``ids``, decoded as a stream does; the logits of the last are held."""
    engine.feed(ids, start)
    length = start + len(ids)
    said: list[int] = []
    for _ in range(12):
        last, at = ([], length) if engine.held == length else (said[-1:], length - 1)
        said.append(engine.decode(last, at, sampling, None))
        length += 1
    if engine.held != length:
        engine.feed(said[-1:], length - 1)
    return said


def check_full(ways: dict[str, Any], plain: TorchEngine, ids: list[int]) -> dict[str, float]:
    """Largest relative error of logits over prefill and some steps, for each engine.

    Raises:
        RuntimeError: an engine in 16 bits is further off than two roundings of 32 layers explain.
    """
    errors = {}
    first = len(ids) - 4
    parts = [(0, first), *((n, n + 1) for n in range(first, len(ids)))]
    for name, engine in ways.items():
        worst = 0.0
        for start, stop in parts:
            for each in (engine, plain):
                each.feed(ids[start:stop], start)
            expected = plain.logits()
            worst = max(worst, float((engine.logits() - expected).norm() / expected.norm()))
        errors[name] = round(worst, 5)
        if "8" not in name and not worst < 0.1:
            raise RuntimeError(f"{name}: logits are off by {worst:.3f} from the eager network")
    return errors


def engines(
    config: LlamaConfig, weights: Weights, capacity: int, device: torch.device
) -> dict[str, CudaEngine]:
    """Each way of running that is ours; in 8 bits only what runs here."""
    plain = StaticNetwork(config, weights, capacity, 1, ROWS)
    ways = {"engine": CudaEngine(config, weights, capacity)}
    network = static_network(config, weights, capacity, 1, ROWS)
    if hasattr(network, "matvec"):
        network.matvec = {}  # kernels for all but the products
        ways["engine, cuBLAS products"] = CudaEngine(config, weights, capacity, network)
    ways["engine, PyTorch kernels"] = CudaEngine(config, weights, capacity, plain)
    for form in ("int8", "fp8"):
        try:
            held = random_llama(config, device, weights.embedding.dtype, eight_bits=form)
            ways[f"engine, {form}"] = CudaEngine(config, held, capacity)
        except Exception as error:  # of a compiler, say: the others are measured all the same
            print(f"{form} does not run here: {type(error).__name__}: {error}")
    return ways


def device_times(engine: CudaEngine, context: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the device alone: a step, and the choice of a token in it."""
    runner = engine.runner
    row = Row(5, 0, context, SAMPLED, 0.5)
    with runner.on_stream():
        step = milliseconds(lambda: runner.step([row]), device)
        choose = milliseconds(lambda: runner.choose([row]), device)
    engine.forget()
    return {"step": round(step, 3), "choose": round(choose, 3)}


def tune(
    config: LlamaConfig, weights: Weights, context: int, device: torch.device, until: float
) -> list[dict[str, Any]]:
    """Milliseconds of a step for other sizes of the product's kernel, best first; as many as there
    is time for."""
    results = []
    for sizes in TUNED:
        network = static_network(config, weights, context + 64, 1, ROWS)
        if not hasattr(network, "matvec") or time.monotonic() > until:
            break
        network.matvec = sizes
        engine = CudaEngine(config, weights, context + 64, network)
        results.append({**sizes, **device_times(engine, context, device)})
    return sorted(results, key=lambda result: float(result["step"]))


def profile(engine: CudaEngine, context: int, path: Path) -> None:
    """A table of the kernels of one step, not as a graph."""
    runner = engine.runner
    runner.step([Row(5, 0, context, SAMPLED, 0.5)])
    runner.collect(1)
    with torch.profiler.profile() as recorded:
        runner.network.step(1, runner._step_spans[-1])
        if runner._cuda:
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if runner._cuda else "self_cpu_time_total"
    path.write_text(recorded.key_averages().table(sort_by=key, row_limit=25), encoding="utf-8")
    engine.forget()


def tables(report: dict[str, Any], plan: Plan) -> list[Table]:
    read = report["bandwidth"]["read"]
    title = f"{report['shape']} shape, bandwidth {read / 1e12:.2f} TB/s (read)"
    columns = list(report["medians"]["engine"])
    wanted = f"tokens/s at {plan.contexts[1]}"
    table = Table("", *columns, "of the roofline", "x transformers", title=title)
    base = report["medians"]["transformers"][wanted]
    for name, values in report["medians"].items():
        share = report["roofline"].get(name)
        table.add_row(
            name,
            *(f"{values[c]:.1f}" if c in values else "–" for c in columns),
            "–" if share is None else f"{share:.0%}",
            f"{values[wanted] / base:.1f}",
        )
    times = Table("device alone", "step, ms", "of which choosing, ms")
    for name, row in report["device_times"].items():
        times.add_row(name, str(row["step"]), str(row["choose"]))
    out = [times, table]
    if report.get("tuned"):
        tuned = Table(*report["tuned"][0], title="sizes of the product's kernel, best first")
        for row in report["tuned"]:
            tuned.add_row(*map(str, row.values()))
        out.insert(0, tuned)
    return out


def main(
    tiny: Annotated[bool, typer.Option(help="A tiny shape, on a CPU too.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns that every candidate gets.")] = 3,
    tuning: Annotated[bool, typer.Option("--tune", help="Try sizes of the kernel.")] = False,
    profiling: Annotated[bool, typer.Option("--profile", help="Keep a table of kernels.")] = False,
    seconds: Annotated[float, typer.Option(help="No new size is tried after this.")] = 420,
) -> None:
    """Check, measure, keep the report."""
    until = time.monotonic() + seconds
    logging.set_verbosity_error()
    device = find_device(tiny)
    config, plan = (TINY, SMALL) if tiny else (EXPRESSIVE_7B, FULL)
    report = begin("gpu_decode", device, tiny) | {"shape": "tiny" if tiny else "7B Expressive"}
    report["exactness"] = check_small(device)
    report["bandwidth"] = bandwidth(device, tiny)
    torch.cuda.empty_cache()
    weights = random_llama(config, device, torch.bfloat16)
    ways = engines(config, weights, 2048, device)
    plain = TorchEngine(config, weights, 2048)
    report["errors"] = check_full(ways, plain, random_ids(100))
    used = ways["engine"]
    allowed = torch.arange(config.vocab_size) > config.vocab_size - 768  # as many as units, about
    candidates: list[Candidate] = [
        *(of_engine(name, engine) for name, engine in ways.items()),
        of_engine("engine, sampling", used, SAMPLED, allowed),
        of_engine("eager PyTorch", plain),
        of_hugging_face(hugging_face(config, weights)),
    ]
    measured = compare(candidates, random_ids(plan.tokens), rounds, plan, "eager PyTorch")
    report |= measured
    context = plan.contexts[1]
    report["device_times"] = {
        name: device_times(engine, context, device) for name, engine in ways.items()
    }
    report["roofline"] = {}
    for name, engine in ways.items():
        of = engine.runner.network.weights
        floor = step_bytes(config, of, context + plan.steps / 2) / report["bandwidth"]["read"]
        speed = report["medians"][name][f"tokens/s at {context}"]
        report["roofline"][name] = round(speed * floor, 4)
    if profiling:
        profile(used, context, results() / f"{report['date']}-gpu_decode-kernels.txt")
    if tuning:
        report["tuned"] = tune(config, weights, context, device, until)
    finish("gpu_decode", report, tables(report, plan))


if __name__ == "__main__":
    typer.run(main)
