"""``python -m recipes lm``: train nano's language model and write it in the official layout.

The schedule is by the clock: ``--minutes`` of training, whatever the machine makes of them; or,
for a run that can be repeated exactly, by ``--steps``. The state is saved every two minutes; a run
that was interrupted goes on from there, also with another mix. The log tells the losses by kind of
token, and every ten minutes what matters: how well held-out requests are transcribed and how many
are answered rightly. On several GPUs: ``torchrun --standalone --nproc-per-node 2 -m recipes lm``.

Besides the streams themselves, it learns from what is being said at each of their tokens (see
lm_hints.py): without that, a good part of the time goes by until it finds out where to look.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from agent.errors import UserError
from recipes import chance, dialogues, lm_hints, together
from recipes.board import Board
from recipes.clock import Stopwatch
from recipes.lm_corpus import Corpus, Vocabulary, load_corpus, load_units
from recipes.lm_data import DEFAULT_MIX, KINDS, REPLY_UNITS, WEIGHTS, Streams
from recipes.lm_measure import heldout_questions, measure
from recipes.lm_model import TrainableLlama
from recipes.manifest import corpus_seed
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

    def shape(self, step: int) -> tuple[int, int]:
        """Rows and length of the batch of a step."""
        if self.long_every > 0 and step % self.long_every == self.long_every - 1:
            return max(1, self.rows // 2), 2 * self.length
        return self.rows, self.length

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

    def __init__(
        self,
        settings: Settings,
        vocabulary: Vocabulary,
        streams: Streams,
        device: torch.device | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.streams = settings, streams
        self.device = device or torch.device("cpu")
        self.model = self._network(len(vocabulary)).to(self.device)
        self.heads = lm_hints.Heads(settings.hidden, len(streams.phones)).to(self.device)
        self.text_pieces = vocabulary.text_tag  # the ids before it
        self.optimizers = self._optimizers()
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.told: dict[str, float] = {}  # losses of the heads, averaged over some steps

    def _network(self, pieces: int) -> TrainableLlama:
        return TrainableLlama(self.settings.config(pieces))

    def _batch(self, number: int, rows: int, length: int) -> Sequence[np.ndarray]:
        """Ids, kinds and hints, as :meth:`Streams.batch` gives them."""
        return self.streams.batch(number, rows, length)

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
        watch = Stopwatch()
        s = self.settings
        rows, length = s.shape(self.step)
        batch = self._batch(self.step * together.size() + together.rank(), rows, length)
        loss, sums, counts = self._losses(*(torch.from_numpy(a).to(self.device) for a in batch))
        loss.backward()
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        together.average(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(share)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += rows * length * together.size()
        (self.seconds,) = together.agree(self.seconds + watch.lap(), device=self.device)
        return sums.cpu(), counts.cpu()

    def _losses(self, ids: Tensor, kinds: Tensor, hints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to make smaller, and for the log sum of losses and number of tokens by kind."""
        kinds_before, kind = kinds[:, :-1], kinds[:, 1:]
        weights = torch.tensor(WEIGHTS, device=self.device)
        wanted = weights[kind] > 0
        with torch.autocast(self.device.type, torch.bfloat16):
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
        weight = weights[kind[wanted]]
        self.told = {k: 0.9 * self.told.get(k, v) + 0.1 * v for k, v in parts.items()}
        sums = losses.new_zeros(len(KINDS)).index_add_(0, kind[wanted], losses.detach())
        counts = torch.bincount(kind[wanted], minlength=len(KINDS))
        return (losses * weight).sum() / weight.sum() + extra, sums, counts

    def write(self, tokenizer: Path, out: Path) -> None:
        """Write the model as it is loaded, with the files of ``tokenizer``."""
        write_model(self.model, tokenizer, out)

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

    @torch.no_grad()
    def losses(self, ids: np.ndarray) -> np.ndarray:
        """Loss of every token of ``[rows, length + 1]`` but the first, in nats, float32."""
        given = torch.from_numpy(ids).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(given[:, :-1]).float()
        lost = F.cross_entropy(logits.transpose(1, 2), given[:, 1:], reduction="none")
        return np.asarray(lost.cpu().numpy())

    def begin_with(self, path: Path) -> None:
        """Take over what another run has learnt; not its optimiser nor its clock."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        phones = state.get("heads", {}).get("phone.weight")
        if phones is not None and phones.shape == self.heads.phone.weight.shape:
            self.heads.load_state_dict(state["heads"])

    def resume(self, path: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(path, weights_only=True, map_location="cpu")
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


@dataclass(frozen=True)
class Until:
    """When training ends: after ``steps``, or where there are none after ``minutes``.

    ``pause``, on the clock of ``time.monotonic``, interrupts it, to be resumed by another run.
    """

    minutes: float
    steps: int | None = None
    pause: float = math.inf

    def paused(self, trainer: Trainer) -> bool:
        (now,) = together.agree(time.monotonic(), device=trainer.device)
        return now >= self.pause

    def share(self, trainer: Trainer) -> float:
        """How much of it is over, 0 to 1."""
        done, all_ = trainer.seconds / 60, self.minutes
        if self.steps is not None:
            done, all_ = trainer.step, self.steps
        return done / all_ if all_ > 0 else 1.0


class Log:
    """Losses by kind, to the console, to ``log.jsonl`` and to TensorBoard's ``folder``."""

    def __init__(self, path: Path, console: Console, tokens: int = 0) -> None:
        self.path, self.console = path, console
        self.board = Board(path.parent.parent / "tensorboard" / path.parent.name)
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
        self.record(row, trainer.step)
        self.sums.zero_()
        self.counts.zero_()
        self.since, self.tokens = now, trainer.tokens

    def record(self, row: dict[str, Any], step: int = 0) -> None:
        self.board.add(step, row)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        text = ", ".join(f"{k} {v}" for k, v in row.items() if k != "examples")
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)
        for example in row.get("examples", ()):
            self.console.print(f"    {example}", highlight=False, markup=False, soft_wrap=True)


def run(
    trainer: Trainer,
    until: Until,
    work: Path,
    tokenizer: Path,
    corpus: Corpus,
    world: dialogues.Dialogues,
    log: Log,
) -> None:
    """Train until the end, saving and measuring on the way."""
    questions = heldout_questions(corpus, world)
    vocabulary = trainer.streams.vocabulary
    due = dict.fromkeys(("save", "measure", "log"), time.monotonic())
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=log.console, disable=not together.first()) as progress:
        task = progress.add_task("lm", total=1.0)
        while (share := until.share(trainer)) < 1 and not until.paused(trainer):
            log.add(*trainer.train_step(share))
            progress.update(task, completed=share, description=f"step {trainer.step}")
            if not together.first():
                continue
            now = time.monotonic()
            if now - due["log"] > LOG_SECONDS:
                log.write(trainer)
                due["log"] = now
            if now - due["save"] > SAVE_SECONDS:
                trainer.save(work / "state.pt")
                due["save"] = now
            if now - due["measure"] > MEASURE_SECONDS:
                trainer.write(tokenizer, work / "snapshot")
                log.record(measure(work / "snapshot", vocabulary, questions, world), trainer.step)
                due["measure"] = time.monotonic()
    if together.first():
        trainer.save(work / "state.pt")


def main(
    work: Annotated[Path, typer.Option(help="Directory with corpus and units.")] = Path("work"),
    out: Annotated[Path, typer.Option(help="Folder of the model; its tokenizer must be there.")] = (
        DEFAULT_OUT
    ),
    minutes: Annotated[
        float, typer.Option(help="Minutes of training, resumed ones included.")
    ] = 100,
    steps: Annotated[
        int | None, typer.Option(help="Train so many steps instead, however long that takes.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="state.pt of an earlier run to begin with.")
    ] = None,
    mix: Annotated[str, typer.Option(help="Shares of turns to change: dialog=0.4,asr=0.2")] = "",
    hidden: Annotated[int, typer.Option(help="Width; 64 for each head.")] = Settings.hidden,
    layers: Annotated[int, typer.Option(help="Layers.")] = Settings.layers,
    rows: Annotated[int, typer.Option(help="Sequences of 512 tokens a step.")] = Settings.rows,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = Settings.rate,
    noise: Annotated[float, typer.Option(help="Highest rate of replaced units.")] = Settings.noise,
    seed: Annotated[int, typer.Option(help="Seed of weights and streams.")] = 0,
    measured: Annotated[
        int, typer.Option(help="Held-out requests of each kind to answer at the end.")
    ] = FINALLY_MEASURED,
    margin: Annotated[
        float | None, typer.Option(help="Fail if held-out loss is not so far below chance, nats.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train nano's language model; resumes where an earlier run stopped."""
    torch.set_num_threads(threads)
    settings = sized(hidden, layers, rows, rate=rate, noise=noise, seed=seed, mix=parse_mix(mix))
    world, until = dialogues.load(corpus_seed(work)), Until(minutes, steps)
    vocabulary, place = Vocabulary(out / "tokenizer.model"), together.join(device)
    trainer, corpora = train(settings, vocabulary, work, until, out, world, weights, place)
    if together.first():
        trainer.write(out, out)
        questions = heldout_questions(corpora["heldout"], world, measured)
        final = measure(out, vocabulary, questions, world)
        final["nats"] = against_chance(trainer, corpora, world)
        Log(work / "lm" / "log.jsonl", Console()).record(final, trainer.step)
        _report(work / "reports" / "lm.json", final, trainer)
        if margin is not None:
            require(final["nats"]["all"]["gain"], margin)
    together.leave()


def sized(hidden: int, layers: int, rows: int, **others: Any) -> Settings:
    """Settings for a size: 64 wide heads, the proportions of the default size in all else."""
    if hidden % 64 or layers < 2:
        raise UserError(f"lm: hidden {hidden}, layers {layers}: expected a multiple of 64, and 2")
    return Settings(
        hidden, layers, hidden // 64, hidden * 5 // 2, rows=rows,
        middle=layers // 2, late=max(layers // 2, layers * 3 // 4), **others,
    )  # fmt: skip


def against_chance(
    trainer: Trainer, corpora: Mapping[str, Corpus], world: dialogues.Dialogues
) -> dict[str, dict[str, float]]:
    """Losses on held-out turns beside guessing's (chance.py), in nats a token, by kind."""
    vocabulary = trainer.streams.vocabulary
    drawn = {
        split: chance.turns(
            Streams(corpus, vocabulary, chance.MIX, noise=0.0, examples=world.split(split)), steps
        )
        for (split, corpus), steps in zip(
            corpora.items(), (chance.TRAINED, chance.JUDGED_BY), strict=True
        )
    }
    gains = chance.compare(trainer.losses, drawn["train"], drawn["heldout"], len(vocabulary))
    return {
        name: {"loss": round(g.loss, 3), "chance": round(g.chance, 3), "gain": round(g.gain, 3)}
        for name, g in gains.items()
    }


def require(gain: float, margin: float) -> None:
    """Raises UserError for a model that is not ``margin`` nats a token better than guessing."""
    if gain < margin:
        raise UserError(
            f"lm: held-out turns cost {gain:.2f} nats a token less than guessing, expected at "
            f"least {margin}: train longer, or look into the log"
        )


def _report(path: Path, final: Mapping[str, Any], trainer: Trainer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"steps": trainer.step, "minutes": round(trainer.seconds / 60, 2), **final}
    path.write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def train(
    settings: Settings,
    vocabulary: Vocabulary,
    work: Path,
    until: Until,
    tokenizer: Path,
    world: dialogues.Dialogues,
    weights: Path | None = None,
    device: torch.device | None = None,
    make: Callable[..., Trainer] = Trainer,
    name: str = "lm",
) -> tuple[Trainer, dict[str, Corpus]]:
    """Train, or what is left of it, with state and log in {work}/{name}.

    Args:
        tokenizer: folder of the files that a snapshot of the model needs beside its weights.
        world: the domain: what may be said and answered besides what was recorded.
        weights: state of another run to begin with; its optimiser and clock are not taken over.
        make: makes the trainer of settings, vocabulary, streams and device.

    Returns:
        The trainer, and the corpus by split.
    """
    folder = work / name
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
    trainer = make(settings, vocabulary, streams, device)
    if (folder / "state.pt").is_file():
        trainer.resume(folder / "state.pt")
    elif weights is not None:
        trainer.begin_with(weights)
    log = Log(folder / "log.jsonl", Console(quiet=not together.first()), trainer.tokens)
    if together.first():
        log.record({"pid": os.getpid(), "from_step": trainer.step, **asdict(settings)})
    run(trainer, until, folder, tokenizer, corpora["heldout"], world, log)
    return trainer, corpora


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
