"""The recipe of the pitch and style tokenizers on a corpus of a few synthetic sounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from recipes import f0, pitch_vq, style_classifier, tokenizers
from stages.checkpoint import Layout
from stages.pitch import PitchEncoder
from stages.style import StyleEncoder, load_style_network
from stages.vqvae import build_vqvae, load_vqvae

PLAN = pitch_vq.Plan(steps=60, warmup=20, batch=4, crop=128, save_every=30)


def contours(count: int = 12) -> list[np.ndarray]:
    """Inputs of the VQ-VAE: slow waves of F0 in Hz, voiced three quarters of the time."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        t = np.arange(int(rng.integers(100, 400)))
        f0 = 40 * np.sin(t / rng.uniform(10, 40) + rng.uniform(0, 6))
        out.append(np.stack([f0, (t // 30) % 4 != 0]).astype(np.float32))
    return out


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A corpus of eight buzzing sounds; every style is there, the last recording is held out."""
    (tmp_path / "corpus" / "wav").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    t = np.arange(48000) / 16000
    for i in range(8):
        hertz = 110 + 15 * i
        wave = sum(0.2 / k * np.sin(2 * np.pi * k * hertz * t) for k in range(1, 15))
        path = tmp_path / "corpus" / "wav" / f"r{i}.wav"
        soundfile.write(path, wave, 16000, subtype="PCM_16")
        rows.append(
            {
                "id": f"r{i}",
                "voice": "heart" if i % 2 else "other",
                "style": i % 5,
                "split": "heldout" if i == 7 else "train",
                "wav": f"wav/r{i}.wav",
                "samples": len(wave),
                "phones": [["a", 0.1 * k, 0.1 * k + 0.1] for k in range(30)] if i else None,
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "corpus" / "manifest.jsonl").write_text(lines)
    return tmp_path


def test_vq_training_learns_and_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    data = contours()
    model, settings = pitch_vq.train(data, PLAN, tmp_path / "a", seed=3)
    interrupted = tmp_path / "b"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pitch_vq, "track", lambda steps, description: steps[:45])
        pitch_vq.train(data, PLAN, interrupted, seed=3)
    assert torch.load(interrupted, weights_only=True)["step"] == 30
    resumed, _ = pitch_vq.train(data, PLAN, interrupted, seed=3)
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    pitch_vq.save(model, settings, tmp_path / "out")
    stored, _ = load_vqvae(tmp_path / "out")
    scores = pitch_vq.evaluate(stored, data, [x + np.array([[200], [0]]) for x in data])
    assert scores["f0_error_hz_mean"] < 25  # saying the mean all the time: 25 Hz
    assert scores["codes_used"] > 8


def test_taking_hertz_only_changes_the_scale() -> None:
    torch.manual_seed(0)
    model = build_vqvae(pitch_vq.config(), "test").eval().requires_grad_(False)
    model.codebook.copy_(torch.randn(model.codebook.shape))
    x = torch.randn(1, 2, 64)
    codes = model(x)
    decoded = model.decode(codes)
    pitch_vq.take_hertz(model)
    x[:, 0] *= pitch_vq.SCALE
    torch.testing.assert_close(model(x), codes)
    decoded[:, 0] *= pitch_vq.SCALE
    torch.testing.assert_close(model.decode(codes), decoded, rtol=1e-4, atol=1e-3)


def test_f0_is_computed_once(work: Path) -> None:
    rows = f0.rows(work)
    assert [row["voice"] for row in rows] == ["heart"] * 4 + ["other"] * 4
    f0.extract(work, rows[:2], processes=1)
    found = f0.load_f0(work, rows[0])
    assert found.shape == (2, 48000 // 80 + 1)
    hertz = 110 + 15 * int(rows[0]["id"][1:])
    assert abs(float(np.median(found[0])) - hertz) < 3
    before = f0.f0_path(work, rows[0]).stat().st_mtime_ns
    f0.extract(work, rows[:2], processes=1)
    assert f0.f0_path(work, rows[0]).stat().st_mtime_ns == before


def test_units_are_added_where_they_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "units" / "pitch.jsonl"
    asked: list[str] = []

    def units(row: dict[str, Any]) -> np.ndarray:
        asked.append(row["id"])
        return np.array([1, 2])

    rows = [{"id": name} for name in "abc"]
    tokenizers.extract_units(path, rows[:2], "pi", units)
    path.write_text(path.read_text() + '{"id": "c", "pi"')  # a run cut off in the middle
    tokenizers.extract_units(path, rows, "pi", units)
    assert asked == ["a", "b", "c"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"id": name, "pi": [1, 2]} for name in "abc"]


def test_speaking_rate_is_that_of_the_phones() -> None:
    spoken = [["a", 0.5 + 0.05 * k, 0.55 + 0.05 * k] for k in range(40)]
    row = {"phones": [["sil", 0, 0.5], *spoken]}
    rate = style_classifier.speaking_rate(row, np.array([8000, 16000, 30000]))
    np.testing.assert_allclose(rate, 20 / 10 - 1, rtol=1e-6)
    assert np.isnan(style_classifier.speaking_rate({"phones": None}, np.array([1]))).all()


def test_style_training_resumes_and_its_folder_is_official(work: Path) -> None:
    rows = f0.rows(work)
    f0.extract(work, rows, processes=1)
    plan = style_classifier.Plan(steps=4, batch=2, save_every=2)
    state = work / "tokenizers" / "style.state"
    network = style_classifier.train(work, rows[:7], plan, state, seed=1)
    other = work / "tokenizers" / "other.state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style_classifier, "track", lambda steps, description: steps[:3])
        style_classifier.train(work, rows[:7], plan, other, seed=1)
    resumed = style_classifier.train(work, rows[:7], plan, other, seed=1)
    for a, b in zip(network.state_dict().values(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    folder = Layout(work, work, "expressive").style
    style_classifier.save(network, folder)
    assert (folder / "pytorch_model.bin").stat().st_size < 900_000
    encoder = StyleEncoder(load_style_network(folder))
    wave = f0.read_wave(work, rows[0])
    exact = StyleEncoder(network)
    np.testing.assert_allclose(encoder.logits(wave), exact.logits(wave), atol=0.05)
    scores = style_classifier.evaluate(encoder, work, rows[7:])
    assert scores["recordings"] == 1 and set(scores["accuracy_by_recording_by_voice"]) == {"other"}


def test_the_style_folder_opens_in_transformers(work: Path) -> None:
    """Anybody can load it with the class that its config names."""
    from transformers import Wav2Vec2ForSequenceClassification

    torch.manual_seed(0)
    network = style_classifier.Trainee().network.eval().requires_grad_(False)
    style_classifier.save(network, work / "style")
    theirs = Wav2Vec2ForSequenceClassification.from_pretrained(work / "style").float().eval()
    ours = load_style_network(work / "style")
    wave = torch.randn(1, 15000)  # 46 frames: one second's block, which is their mean over all
    with torch.inference_mode():
        torch.testing.assert_close(theirs(wave).logits, ours(wave)[:, 0], rtol=0, atol=1e-4)


def test_input_is_what_the_encoder_makes_of_it(work: Path) -> None:
    rows = f0.rows(work)[:1]
    f0.extract(work, rows, processes=1)
    (x,) = pitch_vq.inputs(work, rows)
    np.testing.assert_array_equal(x, PitchEncoder.remove_mean(*f0.load_f0(work, rows[0])))
