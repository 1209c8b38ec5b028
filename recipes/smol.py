"""``python -m recipes smol``: extend SmolLM2-135M with speech, as the paper extends Llama-2.

What is learnt is an adapter (low-rank changes of every matrix) and the embedding rows of the speech
tokens; only these are shipped, and the base comes from its package. Streams, losses, hints, log and
measuring are those of ``recipes lm``, the corpus and its units those of nano, whose tokenizers and
vocoder it speaks with. Besides, it learns small talk that the base writes itself (smol_talk.py).

Training wants a GPU. ``--pause MINUTES`` ends a run early, and the next one goes on from there;
``--begin FOLDER`` begins with what another run has shipped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes import dialogues, lm, smol_talk, together
from recipes.lm_corpus import Vocabulary
from recipes.lm_data import Streams
from recipes.lm_measure import heldout_questions, measure
from recipes.lm_model import TrainableLlama
from recipes.manifest import corpus_seed
from recipes.smol_base import SMOLLM2, BaseModel
from recipes.smol_model import extended, learnt, write_adapter, write_untrained
from stages.checkpoint import load_state, load_weights
from stages.llama_adapter import ADAPTER

DEFAULT_OUT = Path("checkpoints/smol")
RANK, ALPHA = 16, 32.0
TALKS = 240  # tries of the base to write small talk
TALK_POSITIONS = 512  # tokens of the longest talk
MEASURED = 40  # held-out requests of each kind


@dataclass(frozen=True)
class Settings(lm.Settings):
    """As :class:`recipes.lm.Settings`; the network's shape is the base's."""

    rank: int = RANK
    alpha: float = ALPHA

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence."""
        return 2 * self.length


def settings_for(base: BaseModel, **others: Any) -> Settings:
    """Settings with the shape of ``base``; the heads look into it as far up as into nano."""
    shape = base.config(1)
    layers = shape["num_hidden_layers"]
    return Settings(
        hidden=shape["hidden_size"],
        layers=layers,
        heads=shape["num_attention_heads"],
        intermediate=shape["intermediate_size"],
        middle=max(1, layers // 2),
        late=max(1, layers * 3 // 4),
        **others,
    )


class Trainer(lm.Trainer):
    """Trains the adapter and the new rows of ``base``."""

    settings: Settings

    def __init__(
        self,
        settings: Settings,
        vocabulary: Vocabulary,
        streams: Streams,
        device: torch.device | None = None,
        *,
        base: BaseModel,
        workers: int = 0,
    ) -> None:
        """``workers``: processes that draw batches ahead; the batches are the same with any."""
        self.base, self._workers = base, workers
        self._ahead: Iterator[Sequence[Tensor]] | None = None
        super().__init__(settings, vocabulary, streams, device)

    def _network(self, pieces: int) -> TrainableLlama:
        s = self.settings
        return extended(self.base, s.positions, s.rank, s.alpha)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW, which LoRA is used with; the low-rank factors decay, rows and heads do not."""
        named = list(self.model.named_parameters())
        groups = [
            {
                "params": [p for n, p in named if "lora" in n],
                "weight_decay": self.settings.weight_decay,
            },
            {
                "params": [*(p for n, p in named if "lora" not in n), *self.heads.parameters()],
                "weight_decay": 0.0,
            },
        ]
        return [torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)]

    def _batch(self, number: int, rows: int, length: int) -> Sequence[np.ndarray]:
        if not self._workers:
            return super()._batch(number, rows, length)
        if self._ahead is None:
            drawn = _Batches(self.streams, self.settings, number, together.size())
            loader = DataLoader(
                drawn, batch_size=None, num_workers=self._workers, multiprocessing_context="fork"
            )
            self._ahead = iter(loader)
        return [part.numpy() for part in next(self._ahead)]

    def write(self, tokenizer: Path, out: Path) -> None:
        """Write adapter, configuration and tokenizer."""
        s = self.settings
        adapter = self.base.adapter_settings(s.rank, s.alpha)
        write_adapter(self.base, learnt(self.model), adapter, s.positions, out)

    def begin_with(self, path: Path) -> None:
        """Take over what a folder ships; ``path`` is the folder."""
        state = load_state(path / ADAPTER)
        load_weights(self.model, state, path / ADAPTER)


class _Batches(Dataset[Sequence[Tensor]]):
    """The batches from one number on, for processes that draw them ahead."""

    def __init__(self, streams: Streams, settings: Settings, first: int, stride: int) -> None:
        self.streams, self.settings, self.first, self.stride = streams, settings, first, stride

    def __len__(self) -> int:
        return 2**31  # nobody gets there

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        number = self.first + index * self.stride
        rows, length = self.settings.shape(number // self.stride)
        return [torch.from_numpy(part) for part in self.streams.batch(number, rows, length)]


def with_small_talk(world: dialogues.Dialogues, path: Path) -> dialogues.Dialogues:
    """The domain, and in training what :mod:`recipes.smol_talk` wrote to ``path``."""
    heldout = {example.transcript for example in world.split("heldout")}
    talk = [e for e in smol_talk.examples(path) if e.transcript not in heldout]
    return replace(world, examples=[*talk, *world.examples])


def main(
    work: Annotated[Path, typer.Option(help="Directory with corpus and units.")] = Path("work"),
    out: Annotated[Path, typer.Option(help="Folder of what is shipped.")] = DEFAULT_OUT,
    minutes: Annotated[
        float, typer.Option(help="Minutes of training, resumed ones included.")
    ] = 60,
    steps: Annotated[
        int | None, typer.Option(help="Train so many steps instead, however long that takes.")
    ] = None,
    pause: Annotated[
        float | None, typer.Option(help="Minutes of this run at most; the next one goes on.")
    ] = None,
    begin: Annotated[
        Path | None, typer.Option(help="Folder shipped by an earlier run to begin with.")
    ] = None,
    mix: Annotated[str, typer.Option(help="Shares of turns to change: dialog=0.4,asr=0.2")] = "",
    talks: Annotated[int, typer.Option(help="Tries of the base to write small talk.")] = TALKS,
    rows: Annotated[int, typer.Option(help="Sequences of LENGTH tokens a step.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = Settings.length,
    rank: Annotated[int, typer.Option(help="Of the low-rank changes.")] = RANK,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    noise: Annotated[float, typer.Option(help="Highest rate of replaced units.")] = Settings.noise,
    seed: Annotated[int, typer.Option(help="Seed of rows and streams.")] = 0,
    measured: Annotated[
        int, typer.Option(help="Held-out requests of each kind to answer at the end.")
    ] = MEASURED,
    workers: Annotated[int, typer.Option(help="Processes that draw batches ahead.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train smol's adapter and new rows; resumes where an earlier run stopped."""
    began = time.monotonic()
    torch.set_num_threads(threads)
    place, base = together.join(device), BaseModel(SMOLLM2)
    settings = settings_for(
        base, rows=rows, length=length, rank=rank, alpha=2.0 * rank, rate=rate, noise=noise,
        seed=seed, mix=lm.parse_mix(mix),
    )  # fmt: skip
    folder = work / "smol"
    if together.first():
        write_untrained(base, TALK_POSITIONS, folder / "base")
        smol_talk.write_talk(folder / "talk.jsonl", folder / "base", talks, place)
    together.agree(0.0, device=place)  # wait until the first process has written them
    world = dialogues.load(corpus_seed(work))
    until = lm.Until(minutes, steps, began + 60 * pause if pause is not None else float("inf"))
    trainer, corpora = lm.train(
        settings, Vocabulary(folder / "base" / "tokenizer.json"), work, until, folder / "base",
        with_small_talk(world, folder / "talk.jsonl"), begin, place,
        make=partial(Trainer, base=base, workers=workers), name=folder.name,
    )  # fmt: skip
    if together.first():
        trainer.write(folder / "base", out)
        if until.share(trainer) >= 1 and measured:
            questions = heldout_questions(corpora["heldout"], world, measured)
            final = measure(out, trainer.streams.vocabulary, questions, world)
            lm.Log(folder / "log.jsonl", Console()).record(final, trainer.step)
    together.leave()
