"""Several conversations on one GPU: ``python -m bench.gpu_batch``.

The 7B Expressive shape with random weights, 1 to 128 streams that all stand at 512 tokens. First,
at a small size: streams in one batch must decode what each decodes alone. Then for each number of
streams: the device's own time of a step, and, with a thread for each stream as in a program, the
time from one token of a stream to its next one. Real time is 28 tokens per second of speech.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

from bench.decode import random_ids
from bench.gpu import (
    EXPRESSIVE_7B,
    SPEECH_RATE,
    TINY,
    begin,
    find_device,
    finish,
    milliseconds,
)
from stages.llama_weights import LlamaConfig, random_llama
from stages.lm import LanguageModel
from stages.lm_batch import SharedDecoder
from stages.lm_sampling import Sampling
from stages.lm_static import Row
from stages.lm_torch import TorchEngine

STREAMS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 512


def sampling(stream: int) -> Sampling:
    return Sampling(temperature=0.9, top_p=0.95, seed=stream)


def check(device: torch.device) -> int:
    """Streams that decode together against each alone, in float32; how many tokens were compared.

    Raises:
        RuntimeError: they differ.
    """
    weights = random_llama(TINY, device, torch.float32)

    def said(lm: LanguageModel, stream: int) -> list[int]:
        lm.append(random_ids(40)[: 10 + 3 * stream])
        first = [lm.decode(sampling(stream)) for _ in range(20)]
        lm.rewind(lm.length - stream)
        return first + [lm.decode(sampling(stream)) for _ in range(12)]

    with SharedDecoder(TINY, weights, 128, 8) as shared, ThreadPoolExecutor(8) as threads:
        lms = [LanguageModel(TINY, weights, 128, shared.stream()) for _ in range(8)]
        together = list(threads.map(said, lms, range(8)))
    for stream, tokens in enumerate(together):
        alone = LanguageModel(TINY, weights, 128, TorchEngine(TINY, weights, 128))
        if said(alone, stream) != tokens:
            raise RuntimeError(f"stream {stream} decodes other tokens than alone")
    return sum(map(len, together))


def device_step(shared: SharedDecoder, count: int, context: int, device: torch.device) -> float:
    """Milliseconds of a step of ``count`` streams on the device alone."""
    runner = shared._runner
    rows = [Row(5 + i, i, context, sampling(i), 0.5) for i in range(count)]
    with runner.on_stream():
        return milliseconds(lambda: runner.step(rows), device)


def intervals(lms: list[LanguageModel], tokens: int, mask: torch.Tensor) -> np.ndarray:
    """Seconds from token to token, ``[streams, tokens - 1]``, a thread for each stream."""
    start = threading.Barrier(len(lms))

    def talk(lm: LanguageModel, stream: int) -> list[float]:
        way = sampling(stream)
        lm.decode(way, mask)
        start.wait()
        times = []
        for _ in range(tokens):
            lm.decode(way, mask)
            times.append(time.perf_counter())
        return times

    with ThreadPoolExecutor(len(lms)) as threads:
        return np.diff(np.array(list(threads.map(talk, lms, range(len(lms))))), axis=1)


def measure(
    shared: SharedDecoder, lms: list[LanguageModel], count: int, tokens: int, context: int
) -> dict[str, Any]:
    config = lms[0].config
    for lm in lms[:count]:
        lm.rewind(min(lm.length, context))
        lm.append(random_ids(context - lm.length))
    mask = torch.arange(config.vocab_size) > config.vocab_size - 768
    before = dict(shared.steps)
    times = 1e3 * intervals(lms[:count], tokens, mask)
    steps = {n: k - before.get(n, 0) for n, k in shared.steps.items()}
    p50, p95, p99 = np.percentile(times, (50, 95, 99))
    return {
        "streams": count,
        "device step, ms": round(device_step(shared, count, context, lms[0].device), 2),
        "token p50, ms": round(p50, 2),
        "token p95, ms": round(p95, 2),
        "token p99, ms": round(p99, 2),
        "x real time at p95": round(1e3 / p95 / SPEECH_RATE, 2),
        "tokens/s of all": round(count * 1e3 / float(times.mean()), 1),
        "full steps": f"{steps.get(count, 0) / max(1, sum(steps.values())):.0%}",
    }


def setting(tiny: bool) -> tuple[LlamaConfig, tuple[int, ...], int]:
    return (TINY, (1, 2, 4), 32) if tiny else (EXPRESSIVE_7B, STREAMS, CONTEXT)


def main(
    tiny: Annotated[bool, typer.Option(help="A tiny shape, on a CPU too.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens of each stream.")] = 96,
) -> None:
    """Check, measure, keep the report."""
    device = find_device(tiny)
    config, counts, context = setting(tiny)
    report = begin("gpu_batch", device, tiny) | {"context": context, "tokens": tokens}
    report["compared_tokens"] = check(device)
    weights = random_llama(config, device, torch.bfloat16)
    # Room for the context, the tokens of a measurement and the one before it.
    capacity = context + tokens + 32
    began = time.perf_counter()
    with SharedDecoder(config, weights, capacity, counts[-1]) as shared:
        report["prepared_s"] = round(time.perf_counter() - began, 1)
        report["network"] = type(shared._runner.network).__name__
        lms = [LanguageModel(config, weights, capacity, shared.stream()) for _ in range(counts[-1])]
        rows = [measure(shared, lms, count, tokens, context) for count in counts]
    report["rows"] = rows
    if device.type == "cuda":
        report["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    title = f"{config.layers} layers, context {context}, {report['network']}"
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    finish("gpu_batch", report, [table])


if __name__ == "__main__":
    typer.run(main)
