"""Pitch: what the kit does not show, and bad checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages.checkpoint import CheckpointError, Layout, load_state
from stages.fcpe import LogMel, find_weights, load_fcpe, slaney_mel_filters
from stages.pitch import PitchEncoder, UnvoicedError
from stages.vqvae import build_vqvae, load_vqvae

STACK = {
    "input_emb_width": 2,
    "output_emb_width": 12,
    "levels": 1,
    "downs_t": [3],
    "strides_t": [2],
    "width": 8,
    "depth": 2,
    "m_conv": 0.5,
    "dilation_growth_rate": 2,
}
CONFIG = {
    "sampling_rate": 16000,
    "code_hop_size": 160,
    "encoder_params": STACK,
    "vq_params": {"l_bins": 7, "emb_width": 12, "mu": 0.99, "levels": 1},
    "decoder_params": STACK,
}


@pytest.fixture(scope="module")
def encoder() -> PitchEncoder:
    torch.manual_seed(0)
    vqvae = build_vqvae(CONFIG, "test").eval().requires_grad_(False)
    vqvae.codebook.copy_(torch.randn(7, 12))
    return PitchEncoder(*load_fcpe(), vqvae, hop=160)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Layout:
    """A pitch quantizer of sizes of its own on disk."""
    layout = Layout(tmp_path, tmp_path / "lm", "expressive")
    layout.pitch.mkdir(parents=True)
    (layout.pitch / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    torch.save({"model": build_vqvae(CONFIG, "test").state_dict()}, layout.pitch / "model.pt")
    return layout


def vowel(hertz: float, seconds: float = 1.0) -> np.ndarray:
    """A buzz with a falling spectrum, which FCPE takes for a voice."""
    t = np.arange(int(seconds * 16000)) / 16000
    return sum(0.3 / k * np.sin(2 * np.pi * k * hertz * t) for k in range(1, 20)).astype(np.float32)


@pytest.mark.parametrize("hertz", [90.0, 140.0, 220.0, 330.0])
def test_f0_of_a_known_tone(encoder: PitchEncoder, hertz: float) -> None:
    f0, vuv = encoder.f0(vowel(hertz))
    middle = slice(20, -20)
    assert vuv[middle].all()
    np.testing.assert_allclose(f0[middle], hertz, rtol=0.01)


def test_unvoiced_frames_are_bridged(encoder: PitchEncoder) -> None:
    wave = np.concatenate([vowel(120, 0.6), np.zeros(6400, np.float32), vowel(180, 0.6)])
    f0, vuv = encoder.f0(wave)
    gap = np.flatnonzero(vuv == 0)
    assert len(gap) > 10
    assert (f0[gap] > 100).all() and (f0[gap] < 200).all()
    assert (np.diff(f0[gap]) >= -1).all()


def test_mean_is_that_of_voiced_frames() -> None:
    f0 = np.array([100, 110, 200, 0], np.float32)
    vuv = np.array([1, 1, 0, 0], np.float32)
    out = PitchEncoder.remove_mean(f0, vuv)
    np.testing.assert_array_equal(out, np.array([[-5, 5, 95, 0], vuv], np.float32))
    np.testing.assert_array_equal(PitchEncoder.remove_mean(f0, vuv, 100)[0], [0, 10, 100, 0])


def test_unvoiced_sound_is_refused_or_flat(encoder: PitchEncoder) -> None:
    silence = np.zeros(8000, np.float32)
    with pytest.raises(UnvoicedError, match=r"no voiced frame in 0\.50 s"):
        encoder.units(silence)
    f0, vuv = encoder.f0(silence, allow_unvoiced=True)
    assert len(f0) == len(vuv) == 51 and not f0.any() and not vuv.any()
    assert len(encoder.units(silence, allow_unvoiced=True)) == 51 // 8


@pytest.mark.parametrize("samples", [1280, 1281, 1599, 1600, 16001, 31999])
def test_lengths(encoder: PitchEncoder, samples: int) -> None:
    wave = vowel(150, 2)[:samples]
    assert len(encoder.raw_f0(wave)[0]) == samples // 160 + 1
    assert len(encoder.units(wave, allow_unvoiced=True)) == (samples // 160 + 1) // 8


def test_short_waves_are_padded_with_zeros() -> None:
    mel = LogMel(16000, 128, 1024, 1024, 160, 0, 8000)
    assert mel(torch.ones(300)).shape == (2, 128)


def test_mel_filters_have_equal_area() -> None:
    filters = slaney_mel_filters(16000, 4096, 40, 0, 8000)
    area = filters.sum(1) * 16000 / 4096
    np.testing.assert_allclose(area[10:], 1, rtol=0.02)


def test_sizes_come_from_the_config(checkpoint: Layout) -> None:
    pitch = PitchEncoder.load(checkpoint)
    assert (pitch.hop, pitch.code_hop, len(pitch.vqvae.codebook)) == (160, 1280, 7)
    assert len(pitch.units(vowel(150))) == 12
    decoded = pitch.vqvae.decode(torch.tensor([[0, 6, 3]]))
    assert decoded.shape == (1, 2, 24)


def test_graphs_replace_the_networks(encoder: PitchEncoder) -> None:
    calls: list[tuple[int, ...]] = []

    def f0_graph(mel: np.ndarray) -> list[np.ndarray]:
        calls.append(mel.shape)
        return [x.numpy() for x in encoder.fcpe(torch.from_numpy(mel))]

    def code_graph(x: np.ndarray) -> list[np.ndarray]:
        calls.append(x.shape)
        return [encoder.vqvae(torch.from_numpy(x)).numpy()]

    other = PitchEncoder(
        encoder.mel, encoder.fcpe, encoder.vqvae, hop=160, f0_graph=f0_graph, code_graph=code_graph
    )
    wave = vowel(200)
    np.testing.assert_array_equal(other.units(wave), encoder.units(wave))
    assert calls == [(1, 101, 128), (1, 2, 101)]


def test_for_f0_alone_it_needs_no_codes(encoder: PitchEncoder) -> None:
    alone = PitchEncoder(encoder.mel, encoder.fcpe, None)
    assert len(alone.f0(vowel(200))[0]) == 201
    with pytest.raises(ValueError, match="F0 alone"):
        alone.units(vowel(200))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("encoder_params.levels", 2, "only one level"),
        ("encoder_params.downs_t", [1, 2], "expected one count"),
        ("encoder_params.width", "x", "is a str, expected int"),
        ("encoder_params.width", 9, "has shape"),
        ("vq_params.emb_width", 5, "puts out 12"),
        ("vq_params.l_bins", 9, "has shape"),
        ("sampling_rate", 24000, "only 16000 is known"),
        ("decoder_params", None, "is missing"),
    ],
)
def test_bad_configs_name_file_and_key(
    checkpoint: Layout, key: str, value: object, message: str
) -> None:
    path = checkpoint.pitch / "config.yaml"
    config = yaml.safe_load(path.read_text())
    *parents, last = key.split(".")
    part = config
    for name in parents:
        part = part[name]
    if value is None:
        del part[last]
    else:
        part[last] = value
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=message) as error:
        PitchEncoder.load(checkpoint)
    assert str(checkpoint.pitch) in str(error.value)


def test_missing_key_and_file(checkpoint: Layout) -> None:
    path = checkpoint.pitch / "model.pt"
    state = torch.load(path, weights_only=True)["model"]
    gone = "decoder.out.bias"
    torch.save({"model": {k: v for k, v in state.items() if k != gone}}, path)
    with pytest.raises(CheckpointError, match=f"'{gone}' missing"):
        load_vqvae(checkpoint.pitch)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_vqvae(checkpoint.pitch)


def test_half_precision_is_taken_as_it_is(checkpoint: Layout) -> None:
    path = checkpoint.pitch / "model.pt"
    state = torch.load(path, weights_only=True)["model"]
    torch.save({"model": {k: v.half() for k, v in state.items()}}, path)
    model, _ = load_vqvae(checkpoint.pitch)
    assert all(p.dtype is torch.float32 for p in model.state_dict().values())


def test_without_the_weights_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps torchfcpe==0\.0\.4"):
        find_weights()


def test_damaged_weights(tmp_path: Path) -> None:
    path = tmp_path / "fcpe.pt"
    state = load_state(find_weights())
    del state["model"]["net.encoder_layers.2.norm.bias"]
    del state["model"]["net.encoder_layers.2.conformer.net.0.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"net\.encoder_layers\.2\.conformer\.net\.0\.bias"):
        load_fcpe(path)
