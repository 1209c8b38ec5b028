"""How fast the language model decodes on this CPU: ``python -m bench.decode``.

Three ways of running the same weights, taking turns in one run, so that whatever else the machine
does falls on all of them: the engine in use, the same network in eager PyTorch, and Hugging Face
``generate``. The shapes are ``nano``'s own weights and larger ones with random weights, one of them
that of ``smol``. Greedy tokens must agree before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM
from transformers.utils import logging

from bench.report import RESULTS, about, load_average, save
from stages.llama_weights import load_llama
from stages.lm import Engine, LanguageModel, Sampling
from stages.lm_torch import TorchEngine

NANO = Path("checkpoints/nano/spiritlm_model/spirit-lm-nano")
_GREEDY = Sampling(greedy=True)
SHAPES = {
    "30M": {"hidden": 512, "intermediate": 1408, "layers": 8, "heads": 8, "vocabulary": 8192},
    "60M": {"hidden": 768, "intermediate": 2048, "layers": 8, "heads": 12, "vocabulary": 8192},
    "smol": {
        "hidden": 576,
        "intermediate": 1536,
        "layers": 30,
        "heads": 9,
        "vocabulary": 49856,
        "kv_heads": 3,
    },
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        contexts: tokens before those that are decoded, ascending.
        steps: tokens that are decoded.
        prefills: tokens of a prompt.
        kept: tokens left by a rewind, after which 20 are appended.
    """

    contexts: tuple[int, ...] = (64, 256, 900)
    steps: int = 24
    prefills: tuple[int, ...] = (50, 200)
    kept: int = 300

    @property
    def tokens(self) -> int:
        """Tokens that a model must have room for."""
        return max(self.contexts[-1] + self.steps + 1, *self.prefills, self.kept + 20)


@dataclass
class Candidate:
    """One way of running a model.

    Attributes:
        prefill: feeds tokens after the first ``start``, which have been fed before.
        decode: tokens after the context: greedy ones, as many as asked for.
    """

    name: str
    prefill: Callable[[Sequence[int], int], None]
    decode: Callable[[list[int], int], tuple[list[int], float]]


def of_engine(
    name: str, engine: Engine, sampling: Sampling = _GREEDY, mask: Tensor | None = None
) -> Candidate:
    def prefill(ids: Sequence[int], start: int) -> None:
        engine.feed(ids, start)
        engine.logits()  # once they are there

    def decode(context: list[int], count: int) -> tuple[list[int], float]:
        prefill(context, 0)
        tokens: list[int] = []
        begin = time.perf_counter()
        for length in range(len(context), len(context) + count):
            ahead = engine.held == length
            last, start = ([], length) if ahead else (tokens[-1:], length - 1)
            tokens.append(engine.decode(last, start, sampling, mask))
        engine.feed(tokens[-1:], len(context) + count - 1)
        engine.logits()
        return tokens, time.perf_counter() - begin

    return Candidate(name, prefill, decode)


def of_hugging_face(model: LlamaForCausalLM) -> Candidate:
    """Its decoding time is the difference between ``count`` tokens and one: ``generate`` has no
    way to start from a cache that is already full."""
    generate_ids: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009

    def generate(context: list[int], count: int) -> tuple[list[int], float]:
        ids = torch.tensor([context], device=model.device)
        begin = time.perf_counter()
        out = generate_ids(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, len(context) :].tolist(), time.perf_counter() - begin

    def prefill(ids: Sequence[int], start: int) -> None:
        with torch.inference_mode():
            model(torch.tensor([list(ids)], device=model.device), logits_to_keep=1).logits.cpu()

    def decode(context: list[int], count: int) -> tuple[list[int], float]:
        _, first = generate(context, 1)
        tokens, whole = generate(context, count + 1)
        return tokens[:count], max(whole - first, 1e-9)

    return Candidate("transformers", prefill, decode)


def random_model(folder: Path, shape: dict[str, int]) -> None:
    """A Llama with random weights in bfloat16, as published ones are."""
    torch.manual_seed(0)
    config = HFConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape.get("kv_heads", shape["heads"]),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def candidates(folder: Path) -> tuple[list[Candidate], dict[str, Any]]:
    """The engine in use, eager PyTorch and transformers, on the weights in ``folder``."""
    lm = LanguageModel.load(folder)
    config, dense = load_llama(folder, torch.device("cpu"), torch.float32, halve=False)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    facts = {
        "parameters": model.num_parameters(),
        "engine": type(lm._engine).__name__,
        "matrices": type(lm._weights.head).__name__,
    }
    return [
        of_engine("engine in use", lm._engine),
        of_engine("eager PyTorch", TorchEngine(config, dense, lm.capacity)),
        of_hugging_face(model),
    ], facts


def agree(ways: Sequence[Candidate], context: list[int], count: int) -> None:
    """Raises :class:`RuntimeError` if two candidates decode different tokens."""
    expected = ways[0].decode(context, count)[0]
    for way in ways[1:]:
        if way.decode(context, count)[0] != expected:
            raise RuntimeError(f"{way.name} decodes other tokens than {ways[0].name}")


def compare(
    ways: Sequence[Candidate], ids: list[int], rounds: int, plan: Plan, eager: str
) -> dict[str, Any]:
    """Medians over ``rounds``, in each of which every candidate has its turn at everything.

    Args:
        ids: as many as the plan wants.
        eager: the name of the candidate that the first one is compared with.
    """
    times: dict[str, dict[str, list[float]]] = {way.name: {} for way in ways}
    for _ in range(rounds):
        for what, measure in _measures(ids, plan).items():
            for way in ways:
                value = measure(way)
                if value is not None:
                    times[way.name].setdefault(what, []).append(value)
    medians = {
        name: {what: round(median(values), 2) for what, values in of.items()}
        for name, of in times.items()
    }
    used, other = times[ways[0].name], times[eager]
    faster = {what: round(_ratio(what, used[what], other[what]), 2) for what in used}
    return {"medians": medians, "times_eager": faster}


def _ratio(what: str, used: list[float], eager: list[float]) -> float:
    """How many times faster: the median over the rounds, neighbours in time compared."""
    faster = [a / b for a, b in zip(used, eager, strict=True)]
    return median(faster) if what.startswith("tokens/s") else 1 / median(faster)


def _measures(ids: list[int], plan: Plan) -> dict[str, Callable[[Candidate], float | None]]:
    def speed(context: int) -> Callable[[Candidate], float | None]:
        return lambda way: plan.steps / way.decode(ids[:context], plan.steps)[1]

    def prefill(start: int, count: int) -> Callable[[Candidate], float | None]:
        def measure(way: Candidate) -> float | None:
            if start and way.name == "transformers":
                return None  # its cache is not cut and continued
            if start:
                way.prefill(ids[:start], 0)
            begin = time.perf_counter()
            way.prefill(ids[start : start + count], start)
            return 1e3 * (time.perf_counter() - begin)

        return measure

    return {
        **{f"tokens/s at {context}": speed(context) for context in plan.contexts},
        **{f"prefill {count}, ms": prefill(0, count) for count in plan.prefills},
        f"rewind to {plan.kept} + append 20, ms": prefill(plan.kept, 20),
    }


def random_ids(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 1900, (count,), generator=generator).tolist()


def show(console: Console, name: str, report: dict[str, Any]) -> None:
    columns = list(report["times_eager"])
    title = f"{name}: {report['parameters'] / 1e6:.1f}M parameters, {report['matrices']} matrices"
    table = Table("", *columns, box=SIMPLE_HEAD, title=title)
    for way, values in report["medians"].items():
        table.add_row(way, *(f"{values[c]:.1f}" if c in values else "–" for c in columns))
    table.add_row("times eager", *(f"{report['times_eager'][c]:.2f}×" for c in columns))
    console.print(table)


def main(
    rounds: Annotated[int, typer.Option(help="Turns that every candidate gets.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    only: Annotated[str, typer.Option(help="One of nano, 30M, 60M, smol; empty for all.")] = "",
    out: Annotated[Path, typer.Option(help="Where the report is kept.")] = RESULTS,
) -> None:
    """Measure and keep the report."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(width=120)
    report: dict[str, Any] = about("decode", ["torch", "transformers"])
    plan = Plan()
    report |= {"threads": threads, "rounds": rounds, "models": {}}
    with TemporaryDirectory() as temporary:
        for name in ["nano", *SHAPES]:
            if only and only != name:
                continue
            folder = NANO
            if name != "nano":
                folder = Path(temporary) / name
                random_model(folder, SHAPES[name])
            ways, facts = candidates(folder)
            ids = random_ids(plan.tokens)
            agree(ways, ids[:32], plan.steps)
            report["models"][name] = facts | compare(ways, ids, rounds, plan, "eager PyTorch")
            show(console, name, report["models"][name])
    report["load_average_after"] = load_average()
    name = f"decode-{only}" if only else "decode"
    console.print(
        f"load average {report['load_average']} before, {report['load_average_after']} after; "
        f"kept in {save(name, report, out)}"
    )


if __name__ == "__main__":
    typer.run(main)
