"""``python -m recipes lm``: train nano's language model and write it in the official layout.

The schedule is by the clock: ``--minutes`` of training on one thread, whatever the machine makes
of them. The state is saved every two minutes; a run that was interrupted goes on from there, also
with another mix. The log tells the losses by kind of token, and every ten minutes what matters:
how well held-out requests are transcribed and how many are answered rightly.

Besides the streams themselves, it learns from what is being said at each of their tokens (see
lm_hints.py): without that, a good part of the time goes by until it finds out where to look.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from recipes import dialogues, lm_hints
from recipes.lm_corpus import Corpus, Vocabulary, load_corpus, load_units
from recipes.lm_data import DEFAULT_MIX, KINDS, REPLY_UNITS, WEIGHTS, Streams
from recipes.lm_measure import heldout_questions, measure
from recipes.lm_model import TrainableLlama
from recipes.text_tokenizer import DEFAULT_OUT

SAVE_SECONDS, MEASURE_SECONDS, LOG_SECONDS = 120.0, 600.0, 20.0
FINALLY_MEASURED = 160  # held-out requests of each kind
ROW_MULTIPLE = 64  # rows of the embedding; those past the last piece are padding


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run. ``length`` and ``rows`` make a step's batch; every
    ``long_every``-th step has rows of ``2 * length`` instead, that long conversations hold."""

    hidden: int = 256
    layers: int = 8
    heads: int = 4
    intermediate: int = 640
    length: int = 512
    rows: int = 6
    long_every: int = 5
    rate: float = 2e-3
    warmup: float = 0.02  # share of the time
    weight_decay: float = 0.05
    noise: float = 0.15
    middle: int = 4  # layers before the heads for what is heard
    late: int = 6  # and before the head for what is spoken (see lm_hints.py)
    seed: int = 0
    mix: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MIX))

    def config(self, pieces: int) -> dict[str, Any]:
        """The content of ``config.json`` for a tokenizer of ``pieces``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": -(-pieces // ROW_MULTIPLE) * ROW_MULTIPLE,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 2 * self.length,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


class Trainer:
    """Model, optimiser, and where the run is."""

    def __init__(self, settings: Settings, vocabulary: Vocabulary, streams: Streams) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.streams = settings, streams
        self.model = TrainableLlama(settings.config(len(vocabulary)))
        self.heads = lm_hints.Heads(settings.hidden, len(streams.phones))
        self.text_pieces = vocabulary.text_tag  # the ids before it
        self.optimizers = self._optimizers()
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.told: dict[str, float] = {}  # losses of the heads, averaged over some steps

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon (Jordan, 2024) for the layers' matrices, AdamW for embedding and gains.

        A step costs a fifth more than with AdamW alone and learns more than that.
        """
        decay = self.settings.weight_decay
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
        embedding = [p for n, p in named if "embed" in n]
        gains = [p for _, p in named if p.dim() < 2]
        groups = [
            {"params": embedding, "weight_decay": decay},
            {"params": [*gains, *self.heads.parameters()], "weight_decay": 0.0},
        ]
        return [
            torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True),
        ]

    def rate(self, share: float) -> float:
        """Learning rate at ``share`` (0 to 1) of the time: linear warm-up, then cosine to zero."""
        warm = min(1.0, (share + 1e-4) / self.settings.warmup)
        return self.settings.rate * warm * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    def train_step(self, share: float) -> tuple[Tensor, Tensor]:
        """One step; returns sum of losses and number of tokens by kind."""
        started = time.monotonic()
        s = self.settings
        long = s.long_every > 0 and self.step % s.long_every == s.long_every - 1
        rows, length = (max(1, s.rows // 2), 2 * s.length) if long else (s.rows, s.length)
        batch = self.streams.batch(self.step, rows, length)
        loss, sums, counts = self._losses(*(torch.from_numpy(a) for a in batch))
        loss.backward()
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(share)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += rows * length
        self.seconds += time.monotonic() - started
        return sums, counts

    def _losses(self, ids: Tensor, kinds: Tensor, hints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to make smaller, and for the log sum of losses and number of tokens by kind."""
        kinds_before, kind = kinds[:, :-1], kinds[:, 1:]
        wanted = torch.tensor(WEIGHTS)[kind] > 0
        with torch.autocast("cpu", torch.bfloat16):
            states = self.model.states(ids[:, :-1])
            logits = self.model.logits(states[-1][wanted])
            extra, parts = self.heads(
                states[self.settings.middle - 1],
                states[self.settings.late - 1],
                self.model.model.embed_tokens.weight[: self.text_pieces],
                hints[:, :-1],
                kinds_before == REPLY_UNITS,
            )
        losses = F.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
        weight = torch.tensor(WEIGHTS)[kind[wanted]]
        self.told = {k: 0.9 * self.told.get(k, v) + 0.1 * v for k, v in parts.items()}
        sums = torch.zeros(len(KINDS)).index_add_(0, kind[wanted], losses.detach())
        counts = torch.bincount(kind[wanted], minlength=len(KINDS))
        return (losses * weight).sum() / weight.sum() + extra, sums, counts

    def save(self, path: Path) -> None:
        """Save the state; the file is either the old or the new one, never half."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def begin_with(self, path: Path) -> None:
        """Take over what another run has learnt; not its optimiser nor its clock."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        phones = state.get("heads", {}).get("phone.weight")
        if phones is not None and phones.shape == self.heads.phone.weight.shape:
            self.heads.load_state_dict(state["heads"])

    def resume(self, path: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]


def write_model(model: TrainableLlama, tokenizer: Path, out: Path) -> None:
    """Write the official folder: configuration, weights in bfloat16, tokenizer files."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    partial = out / "pytorch_model.partial"
    torch.save(model.official_state(), partial)
    partial.replace(out / "pytorch_model.bin")
    if tokenizer.resolve() != out.resolve():
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy2(tokenizer / name, out / name)


# ------------------------------------------------------------------------------------- the run


class Log:
    """Losses by kind, to the console and to ``log.jsonl``."""

    def __init__(self, path: Path, console: Console, tokens: int = 0) -> None:
        self.path, self.console = path, console
        self.sums, self.counts = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
        self.since, self.tokens = time.monotonic(), tokens

    def add(self, sums: Tensor, counts: Tensor) -> None:
        self.sums += sums
        self.counts += counts

    def write(self, trainer: Trainer) -> None:
        """Write and forget the losses so far."""
        now = time.monotonic()
        means = (self.sums / self.counts.clamp(min=1)).tolist()
        row = {
            "step": trainer.step,
            "minutes": round(trainer.seconds / 60, 2),
            "tokens": trainer.tokens,
            "per_second": round((trainer.tokens - self.tokens) / (now - self.since)),
            **{k: round(m, 3) for k, m in list(zip(KINDS, means, strict=True))[1:]},
            **{k: round(v, 3) for k, v in trainer.told.items()},
        }
        self.record(row)
        self.sums.zero_()
        self.counts.zero_()
        self.since, self.tokens = now, trainer.tokens

    def record(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        text = ", ".join(f"{k} {v}" for k, v in row.items() if k != "examples")
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)
        for example in row.get("examples", ()):
            self.console.print(f"    {example}", highlight=False, markup=False, soft_wrap=True)


def run(
    trainer: Trainer,
    minutes: float,
    work: Path,
    tokenizer: Path,
    corpus: Corpus,
    world: dialogues.Dialogues,
    log: Log,
) -> None:
    """Train until the clock says stop, saving and measuring on the way."""
    questions = heldout_questions(corpus, world)
    vocabulary = trainer.streams.vocabulary
    due = dict.fromkeys(("save", "measure", "log"), time.monotonic())
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=log.console) as progress:
        task = progress.add_task("lm", total=minutes * 60, completed=int(trainer.seconds))
        while trainer.seconds < minutes * 60:
            log.add(*trainer.train_step(trainer.seconds / (minutes * 60)))
            progress.update(task, completed=trainer.seconds, description=f"step {trainer.step}")
            now = time.monotonic()
            if now - due["log"] > LOG_SECONDS:
                log.write(trainer)
                due["log"] = now
            if now - due["save"] > SAVE_SECONDS:
                trainer.save(work / "state.pt")
                due["save"] = now
            if now - due["measure"] > MEASURE_SECONDS:
                write_model(trainer.model, tokenizer, work / "snapshot")
                log.record(measure(work / "snapshot", vocabulary, questions, world))
                due["measure"] = time.monotonic()
    trainer.save(work / "state.pt")


def main(
    work: Annotated[Path, typer.Option(help="Directory with corpus and units.")] = Path("work"),
    out: Annotated[Path, typer.Option(help="Folder of the model; its tokenizer must be there.")] = (
        DEFAULT_OUT
    ),
    minutes: Annotated[
        float, typer.Option(help="Minutes of training, resumed ones included.")
    ] = 100,
    weights: Annotated[
        Path | None, typer.Option(help="state.pt of an earlier run to begin with.")
    ] = None,
    mix: Annotated[str, typer.Option(help="Shares of turns to change: dialog=0.4,asr=0.2")] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = Settings.rate,
    noise: Annotated[float, typer.Option(help="Highest rate of replaced units.")] = Settings.noise,
    seed: Annotated[int, typer.Option(help="Seed of weights and streams.")] = 0,
) -> None:
    """Train nano's language model; resumes where an earlier run stopped."""
    torch.set_num_threads(threads)
    settings = Settings(rate=rate, noise=noise, seed=seed, mix=parse_mix(mix))
    vocabulary = Vocabulary(out / "tokenizer.model")
    world = dialogues.load()
    trainer, corpus = train(settings, vocabulary, work, minutes, out, world, weights)
    write_model(trainer.model, out, out)
    final = measure(out, vocabulary, heldout_questions(corpus, world, FINALLY_MEASURED), world)
    Log(work / "lm" / "log.jsonl", Console()).record(final)


def train(
    settings: Settings,
    vocabulary: Vocabulary,
    work: Path,
    minutes: float,
    tokenizer: Path,
    world: dialogues.Dialogues,
    weights: Path | None = None,
) -> tuple[Trainer, Corpus]:
    """Train for ``minutes``, or what is left of them, with state and log in {work}/lm.

    Args:
        tokenizer: folder of the files that a snapshot of the model needs beside its weights.
        world: the domain: what may be said and answered besides what was recorded.
        weights: state of another run to begin with; its optimiser and clock are not taken over.

    Returns:
        The trainer and the held-out part of the corpus.
    """
    folder = work / "lm"
    folder.mkdir(parents=True, exist_ok=True)
    corpora = load_corpus(work, vocabulary, load_units(work))
    streams = Streams(
        corpora["train"],
        vocabulary,
        settings.mix,
        settings.noise,
        settings.seed,
        examples=world.split("train"),
    )
    trainer = Trainer(settings, vocabulary, streams)
    if (folder / "state.pt").is_file():
        trainer.resume(folder / "state.pt")
    elif weights is not None:
        trainer.begin_with(weights)
    log = Log(folder / "log.jsonl", Console(), trainer.tokens)
    log.record({"pid": os.getpid(), "from_step": trainer.step, **asdict(settings)})
    run(trainer, minutes, folder, tokenizer, corpora["heldout"], world, log)
    return trainer, corpora["heldout"]


def parse_mix(text: str) -> dict[str, float]:
    """The default mix with the shares named in ``text``, e.g. ``"dialog=0.4,asr=0.2"``."""
    mix = dict(DEFAULT_MIX)
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, share = item.partition("=")
        if name not in mix:
            raise typer.BadParameter(f"mix {name!r}: known are {', '.join(mix)}")
        try:
            mix[name] = float(share)
        except ValueError as error:
            raise typer.BadParameter(f"mix {item!r}: expected name=number") from error
    return mix
