"""nano's ears: the constructed front end, the embedded quantizer, hearing many recordings."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import quantizer
from recipes.front_end import Constants, fit_logarithm, front_end
from recipes.hearing import HUBERT, OUT, QUANTIZER, checkpoint, fit_plan, phone_labels
from recipes.hearing_report import information, unit_distance, without_repeats
from recipes.units import units_done
from recipes.whisper import WhisperEncoder, find_weights, log_mel, mel_filters, read_ctranslate2
from recipes.windows import Listener, cache_stamp, load_listener
from stages.checkpoint import Layout, load_state
from stages.hubert import build_hubert
from stages.phonetic import PhoneticEncoder, Quantizer

ROOT = Path(__file__).parents[2]
NANO = ROOT / "checkpoints" / "nano"


@functools.cache
def teacher() -> WhisperEncoder:
    try:
        return WhisperEncoder.load()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@functools.cache
def listener() -> Listener:
    if not (ROOT / OUT / HUBERT).is_file():
        pytest.skip(f"{ROOT / OUT} holds no {HUBERT}")
    return load_listener(ROOT / OUT / HUBERT, ROOT / OUT / QUANTIZER)


def vowels(samples: int) -> np.ndarray:
    """Something like speech: harmonics of a moving pitch under moving formants, with pauses."""
    t = np.arange(samples) / 16_000
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * t)) / 16_000
    formants = (500 + 250 * np.sin(3 * t), 1500 + 600 * np.cos(5 * t), 2600 + 0 * t)
    wave = np.zeros(samples)
    for harmonic in range(1, 40):
        hz = harmonic * 120
        gain = sum(np.exp(-(((hz - f) / 150) ** 2)) for f in formants)
        wave += gain * np.sin(harmonic * phase)
    noise = np.random.default_rng(0).normal(0, 1e-3, samples)
    return (0.1 * wave * (np.sin(7 * t) > -0.5) + noise).astype(np.float32)


def test_the_file_is_read_as_ctranslate2_reads_it() -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    mel = log_mel(torch.from_numpy(np.pad(vowels(32_000), (0, 448_000))))
    ours = teacher().final(teacher().features(mel)).numpy()
    model = ctranslate2.models.Whisper(
        str(find_weights().parent), device="cpu", compute_type="float32", intra_threads=1
    )
    view = ctranslate2.StorageView.from_array(np.ascontiguousarray(mel.numpy()[None]))
    np.testing.assert_allclose(np.array(model.encode(view))[0], ours, rtol=0, atol=2e-3)


def test_another_file_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\x05\x00\x00\x00rest")
    with pytest.raises(ValueError, match="format 5"):
        read_ctranslate2(path)


def test_mel_filters_are_whispers() -> None:
    extractor = pytest.importorskip("faster_whisper.feature_extractor")
    theirs = extractor.FeatureExtractor(feature_size=80).mel_filters
    np.testing.assert_allclose(mel_filters(), theirs, rtol=0, atol=1e-7)


def test_the_logarithm_is_close() -> None:
    constants = Constants()
    knees, weights, constant = fit_logarithm(constants)
    energy = np.logspace(-6, 2.3, 400)
    bent = torch.nn.functional.gelu(
        torch.from_numpy(constants.sharpness * (1 - energy[:, None] / knees))
    ).numpy()
    error = bent @ weights + constant - (np.log10(energy + constants.floor) + 4) / 4
    assert np.sqrt(np.mean(error**2)) < 0.006 and np.abs(error).max() < 0.03
    assert np.abs(weights).max() < 1  # nothing large cancels


def test_neutral_channels_pin_the_norms() -> None:
    """Every layer's outputs sum to zero, whatever comes in."""
    for layer in front_end(teacher().w, Constants()):
        into = torch.randn(5, layer.weight.shape[1], layer.weight.shape[2], dtype=torch.float64)
        out = torch.einsum("oik,bik->bo", layer.weight, into) + layer.bias
        assert float(out.sum(1).abs().max()) < 1e-6 * float(out.abs().max())


def test_the_front_end_is_whispers_stem() -> None:
    """With positions: up to the first block, the constructed network is Whisper's."""
    constants = Constants()
    hubert = build_hubert(checkpoint(teacher(), constants), Path("nano"))
    wave = torch.from_numpy(vowels(48_000))
    expected = teacher().stem(log_mel(wave, constants.floor))
    model = hubert.model
    with torch.inference_mode():
        padded = torch.nn.functional.pad(wave[None], hubert.padding)
        hidden = model.feature_projection(model.feature_extractor(padded).transpose(1, 2))
        got = (hidden + model.encoder.pos_conv_embed(hidden))[0]
    inner = slice(2, -2)  # at the edges Whisper pads its spectrogram, we pad the wave
    error = (got - expected)[inner]
    assert got.shape == expected.shape
    assert float(error.std()) < 0.03 * float(expected[inner].std())


def test_the_shipped_ears_are_what_the_recipe_makes() -> None:
    listener()
    made, shipped = checkpoint(teacher()), load_state(ROOT / OUT / HUBERT)
    assert made["model_cfg"] == shipped["model_cfg"]
    assert made["model_weight"].keys() == shipped["model_weight"].keys()
    for key, value in made["model_weight"].items():
        stored = shipped["model_weight"][key]
        assert stored.dtype == value.dtype
        torch.testing.assert_close(stored.float(), value.float(), rtol=1e-3, atol=1e-5)


def test_the_shipped_ears_fit_their_budget() -> None:
    listener()
    sizes = [(ROOT / OUT / name).stat().st_size for name in (HUBERT, QUANTIZER)]
    assert sum(sizes) <= 25e6


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(2, 40), st.integers(0, 10_000))
def test_the_best_class_is_the_nearest_centroid(dims: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    width = 64
    clusters = quantizer.Clusters(
        rng.normal(size=(dims, width)), rng.normal(size=width), rng.normal(size=(count, dims)) * 5
    )
    content = quantizer.embed(clusters, vocabulary=50)
    network = Quantizer(width, width, 51)
    network.load_state_dict(content["model_weight"])
    features = rng.normal(size=(200, width)).astype(np.float32)
    with torch.inference_mode():
        logits = network(torch.from_numpy(features)).numpy()
    squared = ((clusters.project(features)[:, None] - clusters.centroids) ** 2).sum(-1)
    nearest = np.sort(squared, 1)
    clear = nearest[:, 1] - nearest[:, 0] > 1e-3
    np.testing.assert_array_equal(logits.argmax(1)[clear], clusters.codes(features)[clear])
    assert logits[:, count:].max() < logits[:, :count].min()


def test_too_many_dimensions_for_the_quantizer() -> None:
    clusters = quantizer.Clusters(np.zeros((40, 64)), np.zeros(64), np.zeros((2, 40)))
    with pytest.raises(ValueError, match="40 dimensions"):
        quantizer.embed(clusters, vocabulary=50)


def test_classes_follow_phones_and_not_speakers() -> None:
    rng = np.random.default_rng(0)
    phone, speaker = rng.integers(0, 4, 4000), rng.integers(0, 5, 4000)
    features = rng.normal(0, 0.2, (4000, 12))
    features[:, 0] += 2.0 * phone
    features[:, 1] += 30.0 * speaker
    names = np.array(["sil", "a", "b", "c"])[phone]
    clusters = quantizer.fit(features, names, clusters=4, dims=1)
    codes = clusters.codes(features)
    assert information(codes, phone)[1] > 0.98 and information(codes, speaker)[0] < 0.01


def test_many_recordings_are_heard_as_windows_are() -> None:
    encoder = PhoneticEncoder.load(Layout(NANO, NANO / "spiritlm_model", "expressive"))
    for samples in (0, 700, 60_000):
        wave = vowels(samples)
        ours, theirs = listener().features(wave), encoder.features(wave)
        assert ours.shape == theirs.shape == (samples // 640, encoder.width)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.05)
        np.testing.assert_array_equal(listener().classify(ours), encoder.units(wave))


def test_the_fit_is_planned_by_voice_and_repeats_itself() -> None:
    rows = [
        {"id": f"{v}{i}", "voice": v, "split": s, "samples": 32_000, "phones": [["sil", 0.0, 0.5]]}
        for v in ("heart", "slt")
        for s in ("train", "heldout")
        for i in range(400)
    ]
    plan = fit_plan(rows, 3)
    seconds = {v: sum(2 for r, _ in plan if r["voice"] == v) for v in ("heart", "slt")}
    assert seconds == {"heart": 540, "slt": 210}
    assert all(row["split"] == "train" for row, _ in plan)
    assert {cut % 640 for _, cut in plan} != {0} and plan == fit_plan(rows, 3)


def test_a_frame_has_the_phone_at_its_centre() -> None:
    phones = [["a", 0.05, 0.1], ["b", 0.1, 0.2]]
    assert phone_labels(phones, 6).tolist() == ["sil", "a", "b", "b", "b", "sil"]
    assert phone_labels(phones, 2, cut=1280).tolist() == ["b", "b"]


def test_units_resume_and_begin_anew_with_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "units.jsonl"
    assert units_done(path, "one") == set()
    path.write_text(json.dumps({"id": "a", "hu": [1]}) + "\n" + '{"id": "b", "h')
    assert units_done(path, "one") == {"a"}
    assert path.read_text().endswith("\n")
    assert units_done(path, "two") == set() and path.read_text() == ""


def test_measures() -> None:
    assert without_repeats(np.array([1, 1, 2, 1])) == [1, 2, 1]
    assert unit_distance(np.array([1, 1, 2]), np.array([1, 2, 2])) == 0
    assert unit_distance(np.array([1, 2, 3, 4]), np.array([1, 2])) == 0.5
    labels = np.array(["a", "b"] * 50)
    assert information((labels == "a").astype(int), labels) == pytest.approx((1, 1))
    assert information(np.zeros(100, int), labels) == pytest.approx((0, 0.5), abs=1e-9)


def test_a_stamp_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1")
    before = cache_stamp(path)
    path.write_bytes(b"2")
    assert before != cache_stamp(path)
