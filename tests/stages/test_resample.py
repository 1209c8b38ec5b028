"""Resampling and channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.resample import resample, to_mono


def test_conformance_resample(kit: Path) -> None:
    expected = np.load(kit / "expected" / "resample.npz")
    assert expected.files
    for name in expected.files:
        audio, rate = soundfile.read(kit / "audio" / f"{name}.wav", dtype="float32")
        got = resample(to_mono(audio), rate)
        assert got.shape == expected[name].shape and got.dtype == np.float32
        np.testing.assert_allclose(got, expected[name], rtol=0, atol=1e-5)


@settings(deadline=None)
@given(
    rate=st.sampled_from([8000, 11025, 22050, 24000, 44100, 48000, 96000, 15999]),
    length=st.integers(0, 500),
)
def test_length_and_channels(rate: int, length: int) -> None:
    noise = np.random.default_rng(length).standard_normal((length, 3)).astype(np.float32)
    got = resample(noise, rate)
    assert got.shape == (-(-length * 16000 // rate), 3)
    np.testing.assert_allclose(got[:, 1], resample(noise[:, 1], rate), atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 16001])
def test_a_tone_stays_where_it_is(rate: int) -> None:
    def tone(at: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(at) / at).astype(np.float32)

    got = resample(tone(rate), rate)
    middle = slice(1000, -1000)
    np.testing.assert_allclose(got[middle], tone(16000)[middle], atol=1e-2)


def test_long_input_is_computed_in_blocks_without_seams() -> None:
    noise = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    whole = resample(noise, 24000)
    part = resample(noise[90_000:], 24000)  # 90,000 samples are a whole number of periods
    np.testing.assert_allclose(whole[60_100:], part[100:], atol=1e-6)


def test_the_same_rate_is_a_copy() -> None:
    wave = np.ones(5, np.float32)
    got = resample(wave, 16000)
    got[0] = 0
    assert wave[0] == 1


@pytest.mark.parametrize("rate", [0, -8000, 0.5])
def test_no_rate(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        resample(np.zeros(3), rate)  # type: ignore[arg-type]


def test_to_mono() -> None:
    stereo = np.array([[0.0, 1.0], [0.5, -0.5]], np.float32)
    np.testing.assert_array_equal(to_mono(stereo), np.float32([0.5, 0]))
    np.testing.assert_array_equal(to_mono(stereo, 1), np.float32([1, -0.5]))
    np.testing.assert_array_equal(to_mono(stereo[:, 0], 0), stereo[:, 0])
    with pytest.raises(ValueError, match="channels 0 to 1"):
        to_mono(stereo, 2)
    with pytest.raises(ValueError, match="shape"):
        to_mono(stereo[None])
