"""The vocoder's recipe: alignment of units and samples, losses, durations, a run of seconds."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from recipes import vocoder as recipe
from recipes.vocoder_adversary import Adversary
from recipes.vocoder_data import HOP, Crops, attach, load_recordings, run_starts
from recipes.vocoder_durations import run_lengths, train_durations
from recipes.vocoder_loss import FrameMel, SpectralLoss
from recipes.vocoder_model import FOLDER, config_of, parse_kernels
from stages.hifigan import UnitHiFiGAN, VocoderConfig
from stages.units import Units, string_to_units, units_to_string
from stages.vocoder import Vocoder


def fake_corpus(work: Path, count: int = 6, seed: int = 0) -> Path:
    """Recordings whose pitch is their unit: a tone per run of units, of 4 kinds, plus noise."""
    random = np.random.default_rng(seed)
    (work / "corpus" / "wav").mkdir(parents=True)
    (work / "units").mkdir()
    manifest, units, pitch = [], [], []
    for i in range(count):
        code = np.repeat(random.integers(0, 4, 40), random.integers(1, 4, 40))
        hertz = np.repeat(200.0 * (1 + code), HOP)
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(hertz) / 16000)
        wave = np.r_[wave, np.zeros(300)] + 0.001 * random.standard_normal(len(wave) + 300)
        soundfile.write(work / "corpus" / "wav" / f"{i}.wav", wave, 16000, subtype="PCM_16")
        manifest.append(
            {"id": str(i), "transcript": "la", "role": "book", "voice": "heart", "style": 1,
             "split": "train", "wav": f"wav/{i}.wav", "samples": len(wave)}
        )  # fmt: skip
        units.append({"id": str(i), "hu": code.tolist()})
        pitch.append({"id": str(i), "pi": (np.arange(len(code) // 2) % 7).tolist()})
    for path, rows in (
        ("corpus/manifest", manifest), ("units/units", units), ("units/pitch", pitch),
    ):  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{path}.jsonl").write_text(text)
    return work


@pytest.mark.parametrize("seed", range(5))
def test_attachment_is_the_round_trip_through_the_token_string(seed: int) -> None:
    random = np.random.default_rng(seed)
    length = int(random.integers(30, 400))
    code = np.repeat(random.integers(0, 200, length), random.integers(1, 6, length))[:length]
    pitch = random.integers(0, 64, max(1, length // 2))
    style = random.integers(0, 5, -(-length // 25))
    back = string_to_units(units_to_string(Units(code.tolist(), pitch.tolist(), style.tolist())))
    starts = run_starts(code)
    assert code[starts].tolist() == back.hubert
    assert attach(code, pitch, "pi")[starts].tolist() == back.pitch
    assert attach(code, style, "st")[starts].tolist() == back.style


def test_recordings_keep_units_and_samples_together(tmp_path: Path) -> None:
    recordings = load_recordings(fake_corpus(tmp_path), "heart", "train")
    assert all(len(r.wave) == HOP * len(r.code) for r in recordings)
    assert {int(s) for r in recordings for s in r.style} == {1}, "the manifest's style stands in"
    crops = Crops(recordings)
    at = crops.positions(50, 5)
    code, _, _, inside = crops.units(at, 5, 2)
    assert inside[:, 2:-2].all()
    assert not inside.all(), "some crops touch an edge, beyond which there is nothing"
    waves = crops.waves(at, 5).reshape(50, 5, HOP)
    peaks = np.abs(np.fft.rfft(waves * np.hanning(HOP), axis=-1)).argmax(-1) * 25
    assert np.abs(peaks - 200 * (1 + code[:, 2:-2])).max() <= 50


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run 'python -m recipes corpus'"):
        load_recordings(tmp_path, "heart", "train")


def test_losses_are_least_for_the_target() -> None:
    random = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(2, 6400, generator=random)
    other = 0.1 * torch.randn(2, 6400, generator=random)
    loss = SpectralLoss()
    assert loss(wave, wave).item() == pytest.approx(0, abs=1e-4)
    assert loss(0.9 * wave, wave).item() < loss(other, wave).item()
    assert FrameMel()(wave).shape == (2, 80, 50)


def test_frame_mel_is_centred_on_its_samples() -> None:
    wave = torch.zeros(1, 128 * 21)
    wave[0, 128 * 10 + 64] = 1.0
    assert FrameMel()(wave)[0].sum(0).argmax() == 10


def test_durations_are_learnt_and_calibrated(tmp_path: Path) -> None:
    recordings = load_recordings(fake_corpus(tmp_path), "heart", "train")
    torch.manual_seed(0)
    generator = UnitHiFiGAN(VocoderConfig.parse(config_of((3,)), "test"))
    before = generator.dict.weight.clone()
    first = train_durations(generator, recordings, steps=5)
    assert train_durations(generator, recordings, steps=150) < first
    torch.testing.assert_close(generator.dict.weight, before)
    vocoder = Vocoder(generator)
    true = sum(len(r.code) for r in recordings)
    spoken = sum(int(vocoder.durations(run_lengths(r)[0]).sum()) for r in recordings)
    assert spoken == pytest.approx(true, rel=0.1)


def test_training_ships_a_checkpoint_that_speaks_and_resumes(tmp_path: Path) -> None:
    work, ship = fake_corpus(tmp_path / "work"), tmp_path / "ship"
    options = {"work": work, "mel_minutes": 0.03, "unit_minutes": 0.03, "ship": ship}
    options |= {"duration_steps": 20, "evaluate": 0, "sharpen_minutes": 0.02}
    recipe.main(**options, minutes=0.03)
    vocoder = Vocoder.load(ship)
    assert (ship / "generator.pt").stat().st_size < 3.5e6
    assert vocoder.config.default_speaker == 0
    wave = vocoder.decode("[St1][Pi2][Hu0][Hu1][Pi3][Hu2][Hu199][Hu499]")
    assert wave.size % HOP == 0 and np.isfinite(wave).all()
    state = torch.load(work / "vocoder" / "state.pt", weights_only=True)
    recipe.main(**options, minutes=0.05)
    more = torch.load(work / "vocoder" / "state.pt", weights_only=True)
    assert more["steps"]["joint"] > state["steps"]["joint"]
    assert more["steps"]["mel"] == state["steps"]["mel"]
    assert state["steps"]["sharpen"] > 0 and (work / "vocoder" / "adversary.pt").is_file()
    assert (work / "vocoder" / "train.log").read_text().count("resumed") == 1


def test_full_kernels_are_trained_and_still_small(tmp_path: Path) -> None:
    work = fake_corpus(tmp_path / "work", count=2)
    minutes = {"mel_minutes": 0.002, "unit_minutes": 0.002, "sharpen_minutes": 0.0}
    recipe.main(work=work, minutes=0.002, kernels="3,7,11", duration_steps=2, evaluate=0, **minutes)
    made = work / "vocoder" / FOLDER
    assert Vocoder.load(made).config.resblock_kernels == (3, 7, 11)
    assert (made / "generator.pt").stat().st_size < 16 * 2**20
    with pytest.raises(recipe.UserError, match="another configuration"):
        recipe.main(work=work, kernels="3")


@pytest.mark.parametrize(("kernels", "told"), [("3,x", "numbers such as"), ("4", "odd numbers")])
def test_kernels_that_cannot_be_are_named(kernels: str, told: str) -> None:
    with pytest.raises(recipe.UserError, match=told):
        config_of(parse_kernels(kernels))


def test_training_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    work = fake_corpus(tmp_path / "work", count=2)
    recipe.main(work=work, phase="mel", mel_minutes=0.001, threads=threads + 1)
    assert float.fromhex("0x1p-1074") * 1.0 > 0  # denormal numbers count again
    assert torch.get_num_threads() == threads and signal.getsignal(signal.SIGTERM) == handler


def test_judges_learn_to_tell_noise_from_a_tone_and_then_say_what_is_missing() -> None:
    torch.manual_seed(0)
    tone = 0.3 * torch.sin(torch.arange(6400) * 0.1).repeat(2, 1)
    noise = 0.3 * torch.randn(2, 6400)
    adversary = Adversary(width=4, lr=2e-3)
    first = adversary.learn(noise, tone)
    for _ in range(15):
        last = adversary.learn(noise, tone)
    assert last < 0.5 * first
    made = noise.clone().requires_grad_()
    assert adversary.convince(made, tone) > adversary.convince(tone, tone)
    adversary.convince(made, tone).backward()
    assert made.grad is not None and made.grad.abs().sum() > 0
    assert all(p.grad is None or not p.requires_grad for p in adversary.parameters())
