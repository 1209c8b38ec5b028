"""Train nano's Expressive vocoder: unit HiFi-GAN of one voice; on a CPU, in about two hours.

Four phases, because the waveform generator is the bottleneck and its upper part needs no units:

1. ``mel``: the stages above 125 Hz learn mel -> waveform through a linear adapter. Needs recordings
   only, so it can run while the units are still being made.
2. ``units``: embeddings and the stages up to 125 Hz learn units -> (adapted) mel; then the duration
   predictor learns how long each unit lasts. The embeddings stay fixed from here on.
3. ``joint``: everything together on the waveform, with a log-mel head on the 125 Hz stage.
4. ``sharpen``: the same against judges that know real speech, which sharpens the harmonics.

Every phase is limited by minutes, resumes where it stopped and leaves ``{work}/vocoder/state.pt``;
the phases after the first also export a checkpoint in the official layout every few minutes. On
several GPUs: ``torchrun --standalone --nproc-per-node 2 -m recipes vocoder``.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from agent.errors import UserError
from recipes import together
from recipes.board import Board
from recipes.clock import Stopwatch
from recipes.vocoder_adversary import Adversary
from recipes.vocoder_data import Crops, Recording, load_recordings, load_waves
from recipes.vocoder_durations import train_durations
from recipes.vocoder_loss import FrameMel, SpectralLoss
from recipes.vocoder_model import (
    CONTEXT,
    FOLDER,
    PHASES,
    Model,
    config_of,
    parse_kernels,
    write_checkpoint,
)
from recipes.vocoder_report import measure, write_report
from stages.hifigan import UnitHiFiGAN, VocoderConfig

log = logging.getLogger("recipes.vocoder")
SPECTRAL_WEIGHT = 8.0  # of the spectral losses beside the adversary's


@dataclass(frozen=True)
class Settings:
    """What a training run may vary; times in minutes, crops in unit frames of 40 ms.

    ``kernels`` are those of the residual blocks: more of them sound better and cost more.
    """

    minutes: dict[str, float]
    kernels: tuple[int, ...] = (3,)
    batch: int = 4
    frames: int = 16
    unit_batch: int = 32
    unit_frames: int = 32
    lr: float = 1e-3
    sharpen_lr: float = 2e-4
    ema: float = 0.999
    seed: int = 0
    duration_steps: int = 3000
    export_minutes: float = 10.0
    save_minutes: float = 2.0


@dataclass
class Progressed:
    """How far training has come; ``minutes`` and ``steps`` by phase."""

    minutes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    durations: bool = False


class Trainer:
    """Runs the phases; state is saved atomically and resumed from."""

    def __init__(
        self, work: Path, settings: Settings, voice: str = "heart", ship: Path | None = None,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.work, self.settings, self.voice, self.ship = work, settings, voice, ship
        self.folder = work / "vocoder"
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        self.device = device or torch.device("cpu")
        self.config = config_of(settings.kernels)
        self.model = Model(VocoderConfig.parse(self.config, "recipes/vocoder.py")).to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.done = Progressed()
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_phase, self.optimizer_state = "", None
        self.loss, self.mel = SpectralLoss().to(self.device), FrameMel().to(self.device)
        self.board = Board(work / "tensorboard" / "vocoder")
        self.stopped = False
        self._resume()

    # Phases

    def mel_phase(self) -> None:
        """Mel -> waveform on the upper stages; needs recordings only."""
        crops = Crops(load_waves(self.work, self.voice, "train"), self._seed(0))
        log.info("mel -> waveform: %.1f minutes of speech", crops.seconds / 60)
        for step in self._steps("mel", decay=False):
            wave = self._wave(crops, crops.positions(self.settings.batch, self.settings.frames))
            hidden = self.model.adapter(self._normal(self.mel(wave)))
            loss = self.loss(self.model.upper(hidden), wave)
            step(loss)

    def units_phase(self, recordings: list[Recording]) -> None:
        """Units -> mel on the lower stages, then the durations."""
        crops = Crops(recordings, self._seed(1))
        log.info("units -> mel: %.1f minutes of speech", crops.seconds / 60)
        s = self.settings
        for step in self._steps("units", decay=True):
            at = crops.positions(s.unit_batch, s.unit_frames)
            with torch.no_grad():
                mel = self._normal(self.mel(self._wave(crops, at, s.unit_frames)))
                goal = self.model.adapter(mel)
            hidden = self._hidden(crops, at, s.unit_frames)
            scale = goal.std().clamp(min=1e-3)
            loss = F.l1_loss(self.model.head(hidden), mel) + F.l1_loss(hidden, goal) / scale
            step(loss)
        if not self.stopped and not self.done.durations:
            self._fill_unseen(crops)
            with self._averaged():
                train_durations(self.model.generator, recordings, s.seed, s.duration_steps)
            for key, value in self.model.state_dict().items():
                if "dur_predictor" in key:
                    self.average[key].copy_(value)
            self.done.durations = True
            self.save()
            self.export()

    def joint_phase(self, recordings: list[Recording]) -> None:
        """Units -> waveform, everything but the embeddings and durations."""
        crops = Crops(recordings, self._seed(2 + self.done.steps["joint"]))
        s = self.settings
        exported = self.done.minutes["joint"]
        for step in self._steps("joint", decay=True):
            at = crops.positions(s.batch, s.frames)
            wave = self._wave(crops, at)
            hidden = self._hidden(crops, at, s.frames)
            aux = F.l1_loss(self.model.head(hidden), self._normal(self.mel(wave)))
            step(self.loss(self.model.upper(hidden), wave) + aux)
            if self.done.minutes["joint"] - exported >= s.export_minutes:
                exported = self.done.minutes["joint"]
                self.export()
        self.export()

    def sharpen_phase(self, recordings: list[Recording]) -> None:
        """Units -> waveform against an adversary; the spectral losses hold it in place."""
        crops = Crops(recordings, self._seed(3 + self.done.steps["sharpen"]))
        s = self.settings
        torch.manual_seed(s.seed)
        adversary = Adversary().to(self.device)
        path = self.folder / "adversary.pt"
        if path.is_file():
            state = torch.load(path, weights_only=True, map_location="cpu")
            adversary.load_state_dict(state["judges"])
            adversary.optimizer.load_state_dict(state["optimizer"])
        exported = self.done.minutes["sharpen"]
        for step in self._steps("sharpen", decay=True):
            at = crops.positions(s.batch, s.frames)
            wave = self._wave(crops, at)
            made = self.model.upper(self._hidden(crops, at, s.frames))
            adversary.learn(made, wave)
            step(SPECTRAL_WEIGHT * self.loss(made, wave) + adversary.convince(made, wave))
            if self.done.minutes["sharpen"] - exported >= s.export_minutes:
                exported = self.done.minutes["sharpen"]
                _save_adversary(adversary, path)
                self.export()
        _save_adversary(adversary, path)
        self.export()

    # Parts of phases

    def _seed(self, number: int) -> int:
        """Of the crops: another one in each of several processes."""
        return self.settings.seed + number + 1_000_003 * together.rank()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _wave(self, crops: Crops, at: np.ndarray, frames: int | None = None) -> Tensor:
        return self._tensor(crops.waves(at, frames or self.settings.frames))

    def _hidden(self, crops: Crops, at: np.ndarray, frames: int) -> Tensor:
        hidden = self.model.lower(*map(self._tensor, crops.units(at, frames, CONTEXT)))
        edge = CONTEXT * self.model.generator.config.rates[0]
        return hidden[:, :, edge:-edge]

    @staticmethod
    def _normal(mel: Tensor) -> Tensor:
        return (mel + 2.0) / 2.0

    def _steps(self, phase: str, decay: bool) -> Iterator[Callable[[Tensor], None]]:
        """Yield, until the phase's minutes are over, a function that takes one training step."""
        budget = self.settings.minutes[phase]
        parameters = self._start(phase)
        watch, saved, logged = Stopwatch(), time.monotonic(), time.monotonic()
        losses: list[float] = []

        def step(loss: Tensor) -> None:
            assert self.optimizer is not None
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            together.average(parameters)
            nn.utils.clip_grad_norm_(parameters, 5.0)
            self.optimizer.step()
            self._update_average()
            losses.append(float(loss.detach()))

        with Progress(
            TextColumn(f"{phase:>6}"), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(), transient=True, disable=not together.first(),
        ) as bar:  # fmt: skip
            task = bar.add_task(phase, total=budget, loss=math.nan)
            while self.done.minutes[phase] < budget and not self.stopped:
                rate = self._set_rate(phase, decay)
                yield step
                self.done.steps[phase] += 1
                self._count(phase, watch.lap())
                now = time.monotonic()
                if now - logged > 20:
                    speed = len(losses) / (now - logged)
                    self._report(phase, rate, float(np.mean(losses)), speed)
                    bar.update(task, completed=self.done.minutes[phase], loss=np.mean(losses))
                    logged = now
                    losses.clear()
                if now - saved > self.settings.save_minutes * 60:
                    saved = now
                    self.save()
        self.save()

    def _set_rate(self, phase: str, decay: bool) -> float:
        assert self.optimizer is not None
        peak = self.settings.sharpen_lr if phase == "sharpen" else self.settings.lr
        share = self.done.minutes[phase] / self.settings.minutes[phase]
        rate = peak * (0.5 + 0.5 * math.cos(math.pi * share) if decay else 1.0)
        rate = max(rate, 1e-5) * min(1.0, (self.done.steps[phase] + 1) / 200)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _count(self, phase: str, seconds: float) -> None:
        """Several processes go by the time of the first one, and stop together."""
        minutes = self.done.minutes[phase] + seconds / 60
        minutes, stopped = together.agree(minutes, self.stopped, device=self.device)
        self.done.minutes[phase], self.stopped = minutes, bool(stopped)

    def _start(self, phase: str) -> list[nn.Parameter]:
        self.model.requires_grad_(False)
        parameters = [p for part in self.model.parts(phase) for p in part.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            parameters, self.settings.lr, betas=(0.8, 0.99), weight_decay=0.0
        )
        if self.optimizer_phase == phase and self.optimizer_state is not None:
            self.optimizer.load_state_dict(self.optimizer_state)
        self.optimizer_phase, self.optimizer_state = phase, None
        return parameters

    def _report(self, phase: str, rate: float, loss: float, speed: float) -> None:
        if not together.first():
            return
        minutes, steps = self.done.minutes[phase], self.done.steps[phase]
        log.info("%-5s %5.1f min %6d steps lr %.1e loss %.4f %.2f steps/s",
                 phase, minutes, steps, rate, loss, speed)  # fmt: skip
        self.board.add(steps, {"loss": loss, "rate": rate, "minutes": minutes}, phase)
        line = {"phase": phase, "minutes": minutes, "steps": steps, "loss": loss, "lr": rate}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @torch.no_grad()
    def _update_average(self) -> None:
        pairs = [(self.average[k], p) for k, p in self.model.named_parameters() if p.requires_grad]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - self.settings.ema)

    @torch.no_grad()
    def _fill_unseen(self, crops: Crops) -> None:
        """Give codes that no recording had the mean of those that some had, speakers speaker 0."""
        g = self.model.generator
        for table, codes in (
            (g.dict, crops.code), (g.f0_dict, crops.pitch),
            (g.style_dict, crops.style), (g.spkr, np.zeros(1, dtype=np.int64)),
        ):  # fmt: skip
            counts = self._tensor(np.bincount(codes, minlength=len(table.weight)))
            name = next(k for k, m in g.named_modules() if m is table)
            for weight in (table.weight, self.average[f"generator.{name}.weight"]):
                mean = (weight * counts[:, None]).sum(0) / counts.sum()
                weight[counts == 0] = mean.to(weight.dtype)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with its averaged weights."""
        raw = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            raw.update({k: v for k, v in self.model.state_dict().items() if "dur_predictor" in k})
            self.model.load_state_dict(raw)

    # State

    def save(self) -> None:
        """Write everything needed to go on to ``state.pt``, replacing the old one at once."""
        if not together.first():
            return
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "phase": self.optimizer_phase,
            "minutes": self.done.minutes,
            "steps": self.done.steps,
            "durations": self.done.durations,
            "config": json.dumps(self.config),
        }
        part = self.folder / "state.part"
        torch.save(state, part)
        part.replace(self.folder / "state.pt")

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["config"] != json.dumps(self.config):
            raise UserError(f"{path}: made with another configuration; move it away to start anew")
        self.model.load_state_dict(state["model"])
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        self.optimizer_phase, self.optimizer_state = state["phase"], state["optimizer"]
        self.done.minutes |= state["minutes"]
        self.done.steps |= state["steps"]
        self.done.durations = state["durations"]
        log.info("resumed from %s: %s", path, self.done.minutes)

    def export(self) -> None:
        """Write the averaged weights in the official layout, and a snapshot of the generator."""
        if not together.first():
            return
        generator = UnitHiFiGAN(self.model.generator.config)
        prefix = "generator."
        generator.load_state_dict(
            {k.removeprefix(prefix): v for k, v in self.average.items() if k.startswith(prefix)}
        )
        minutes = self.done.minutes["joint"] + self.done.minutes["sharpen"]
        snapshot = self.folder / f"snapshot_{minutes:04.0f}"
        for folder in (self.folder / FOLDER, snapshot, self.ship):
            if folder is not None:
                write_checkpoint(generator, folder, self.config)
        log.info("exported %s", snapshot)


def main(
    work: Annotated[Path, typer.Option(help="Where corpus/ and units/ are.")] = Path("work"),
    phase: Annotated[str, typer.Option(help="mel, units, joint, sharpen or all.")] = "all",
    minutes: Annotated[float, typer.Option(help="Minutes for the joint phase, in all.")] = 55.0,
    sharpen_minutes: Annotated[float, typer.Option(help="Minutes for the sharpen phase.")] = 60.0,
    mel_minutes: Annotated[float, typer.Option(help="Minutes for the mel phase.")] = 20.0,
    unit_minutes: Annotated[float, typer.Option(help="Minutes for the units phase.")] = 6.0,
    voice: Annotated[str, typer.Option(help="Voice of the corpus to speak with.")] = "heart",
    batch: Annotated[int, typer.Option(help="Crops a step in the mel and joint phases.")] = 4,
    kernels: Annotated[
        str, typer.Option(help="Of the residual blocks; 3,7,11 is the full HiFi-GAN.")
    ] = "3",
    seed: Annotated[int, typer.Option(help="Seed of weights and crops.")] = 0,
    ship: Annotated[Path | None, typer.Option(help="Also export to this folder.")] = None,
    duration_steps: Annotated[int, typer.Option(help="Steps of the duration predictor.")] = 3000,
    evaluate: Annotated[int, typer.Option(help="Sentences of each kind to judge at the end.")] = 30,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 1,
) -> None:
    """Train the vocoder of one voice; resumes, and ends when its minutes are spent."""
    budget = {
        "mel": mel_minutes, "units": unit_minutes, "joint": minutes, "sharpen": sharpen_minutes
    }  # fmt: skip
    settings = Settings(
        budget, parse_kernels(kernels), batch, seed=seed, duration_steps=duration_steps
    )
    trainer = Trainer(work, settings, voice, ship, together.join(device))
    if together.first():
        _log_to(trainer.folder / "train.log")
    with _as_a_training(trainer, threads):
        _train(trainer, phase)
        if trainer.stopped:
            raise KeyboardInterrupt
        if evaluate and phase != "mel" and together.first():
            made = trainer.folder / FOLDER
            result = measure(made, work, voice, evaluate, trainer.folder / "spoken")
            result["minutes"] = trainer.done.minutes
            trainer.board.add(sum(trainer.done.steps.values()), result, "speaks")
            log.info("%s: %s", write_report(result, work), result)
    together.leave()


def _train(trainer: Trainer, phase: str) -> None:
    if phase in ("mel", "all"):
        trainer.mel_phase()
    if phase == "mel":
        return
    recordings = load_recordings(trainer.work, trainer.voice, "train")
    if phase in ("units", "all"):
        trainer.units_phase(recordings)
    if phase in ("joint", "all"):
        trainer.joint_phase(recordings)
    if phase in ("sharpen", "all"):
        trainer.sharpen_phase(recordings)


@contextmanager
def _as_a_training(trainer: Trainer, threads: int) -> Iterator[None]:
    """A few threads, denormals taken for zero, SIGTERM saves and ends; as before afterwards.

    Arithmetic on denormals, which weights decaying towards zero become, is many times slower. But
    the flag holds for all of the thread: left on, ``5e-324 > 0`` is false in Python too.
    """
    threads_before = torch.get_num_threads()
    handler_before = signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stopped", True))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads_before)
        signal.signal(signal.SIGTERM, handler_before)


def _save_adversary(adversary: Adversary, path: Path) -> None:
    if not together.first():
        return
    state = {"judges": adversary.state_dict(), "optimizer": adversary.optimizer.state_dict()}
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


if __name__ == "__main__":
    typer.run(main)
