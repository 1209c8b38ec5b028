"""Graphs give the units and waveforms of the networks they were exported from, at any length."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.torch import save_file

from agent.graphs import cache_dir, exporter, graphs
from stages.checkpoint import Layout, find_layout, load_state
from stages.phonetic import PhoneticEncoder
from stages.pitch import PitchEncoder
from stages.resample import resample, to_mono
from stages.runtime import OnnxGraph
from stages.style import StyleEncoder
from stages.vocoder import Frames, Vocoder

pytestmark = pytest.mark.slow

UNEXPORTED_LENGTHS = (1280, 1601, 16_001, 47_777, 100_003)  # samples
Graphs = dict[str, OnnxGraph]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def expressive(kit: Path) -> Layout:
    return find_layout(kit / "checkpoints", version="expressive")


@pytest.fixture(scope="module")
def made(expressive: Layout, folder: Path) -> Graphs:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIRITLM_CACHE_DIR", str(folder))
        return graphs(expressive, device="cpu", threads=1)


@pytest.fixture(scope="module")
def clips(kit: Path) -> dict[str, np.ndarray]:
    waves = {}
    for path in sorted((kit / "audio").glob("*.wav")):
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        waves[path.stem] = resample(to_mono(wave), rate)
    noise = np.random.default_rng(0)
    for n in UNEXPORTED_LENGTHS:
        tone = np.sin(2 * np.pi * 140 * np.arange(n) / 16_000)
        waves[f"{n} samples"] = (0.3 * tone + 0.02 * noise.standard_normal(n)).astype(np.float32)
    return {name: wave for name, wave in waves.items() if len(wave) >= 1280}


def test_phonetic_units_are_identical(
    expressive: Layout, made: Graphs, clips: dict[str, np.ndarray]
) -> None:
    network = PhoneticEncoder.load(expressive)
    graph = PhoneticEncoder.load(expressive, graph=made["phonetic"])
    for name, wave in clips.items():
        np.testing.assert_allclose(
            graph.features(wave), network.features(wave), atol=1e-4, err_msg=name
        )
        np.testing.assert_array_equal(graph.units(wave), network.units(wave), err_msg=name)


def test_pitch_units_are_identical(
    expressive: Layout, made: Graphs, clips: dict[str, np.ndarray]
) -> None:
    network = PitchEncoder.load(expressive)
    graph = PitchEncoder.load(expressive, f0_graph=made["f0"], code_graph=made["pitch"])
    for name, wave in clips.items():
        want = network.units(wave, allow_unvoiced=True)
        np.testing.assert_array_equal(graph.units(wave, allow_unvoiced=True), want, err_msg=name)


def test_style_units_are_identical(
    expressive: Layout, made: Graphs, clips: dict[str, np.ndarray]
) -> None:
    network = StyleEncoder.load(expressive)
    graph = StyleEncoder.load(expressive, graph=made["style"])
    for name, wave in clips.items():
        np.testing.assert_array_equal(graph.units(wave), network.units(wave), err_msg=name)


def test_a_style_encoder_in_safetensors_form_gives_the_same_graph(
    expressive: Layout,
    made: Graphs,
    clips: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPIRITLM_CACHE_DIR", str(tmp_path / "cache"))
    layout = replace(expressive, root=tmp_path)
    layout.style.mkdir(parents=True)
    shutil.copy(expressive.style / "config.json", layout.style)
    state = load_state(expressive.style / "pytorch_model.bin")
    save_file({k: v.clone() for k, v in state.items()}, layout.style / "model.safetensors")
    graph = StyleEncoder.load(layout, graph=graphs(layout, ["style"], device="cpu")["style"])
    known = StyleEncoder.load(expressive, graph=made["style"])
    for name, wave in list(clips.items())[:3]:
        np.testing.assert_array_equal(graph.logits(wave), known.logits(wave), err_msg=name)


@pytest.mark.parametrize("version", ["base", "expressive"])
def test_waveforms_and_durations_agree(
    kit: Path, folder: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIRITLM_CACHE_DIR", str(folder))
    layout = find_layout(kit / "checkpoints", version=version)
    made = graphs(layout, ["vocoder", "durations"], device="cpu", threads=1)
    network = Vocoder.load(layout)
    graph = Vocoder.load(layout, graph=made["vocoder"], duration_graph=made["durations"])
    rng = np.random.default_rng(1)
    shape = network.config
    for length in (1, 2, 7, 29, 63):
        code = rng.integers(0, shape.units, length)
        pitch = rng.integers(0, shape.pitches, length) if shape.pitches else None
        style = rng.integers(0, shape.style_tokens, length) if shape.style_tokens else None
        frames = Frames(code, pitch, style)
        want = network.generate(frames, speaker=0, style_id=0)
        np.testing.assert_allclose(graph.generate(frames, speaker=0, style_id=0), want, atol=1e-4)
        for left, right in ((0, 3), (20, 20), (5, 0)):
            if left + right < length:
                want = network.generate(frames, 0, 0, left, right)
                found = graph.generate(frames, 0, 0, left, right)
                np.testing.assert_allclose(found, want, atol=1e-4)
        np.testing.assert_array_equal(graph.durations(code), network.durations(code))


def test_no_graph_holds_layer_drop_or_branches(made: Graphs) -> None:
    export = exporter()
    for name, graph in made.items():
        found = export.FORBIDDEN_OPS & set(export.operations(graph.path))
        assert not found, f"{name} holds {found}"


def test_graphs_are_made_once_and_again_for_other_weights(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIRITLM_CACHE_DIR", str(tmp_path))
    told: list[str] = []

    def progress(name: str, done: int, count: int) -> None:
        told.append(name)

    base = find_layout(kit / "checkpoints", version="base")
    graphs(base, ["durations"], progress=progress)
    assert told == ["durations", ""]
    graphs(base, ["durations"], progress=progress)
    assert told == ["durations", ""], "the second time it comes from the cache"
    other = find_layout(kit / "checkpoints", version="expressive")
    graphs(other, ["durations"], progress=progress)
    assert len(list((cache_dir() / "onnx").glob("*.onnx"))) == 2
