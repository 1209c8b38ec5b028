"""smart-turn: its features are Whisper's, and it tells a finished sentence from a hesitation."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from recipes.voices import speak
from stages import SAMPLE_RATE, turn_end
from stages.checkpoint import CheckpointError
from stages.turn_end import WINDOW, TurnEndDetector, features, find_weights


@pytest.fixture(scope="module")
def detector() -> TurnEndDetector:
    try:
        return TurnEndDetector.load()
    except CheckpointError as error:
        pytest.skip(str(error))


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1e-3, round(seconds * SAMPLE_RATE)).astype(np.float32)


def until(text: str, word: str) -> np.ndarray:
    """``text`` up to the end of ``word``, and 0.2 s of silence."""
    speech = speak(text, "heart")
    assert speech.words is not None
    end = round(next(e for w, _, e in speech.words if w == word) * SAMPLE_RATE)
    said = speech.wave[:end].copy()
    said[-480:] *= np.linspace(1, 0, 480, dtype=np.float32)
    return np.concatenate((said, noise(0.2)))


@pytest.mark.parametrize("seconds", [0.05, 2.0, 8.0, 11.3])
def test_features_are_whispers_of_the_last_eight_seconds(seconds: float) -> None:
    from transformers import WhisperFeatureExtractor

    wave = noise(seconds) * np.linspace(0.1, 30, round(seconds * SAMPLE_RATE), dtype=np.float32)
    padded = np.pad(wave, (max(0, WINDOW - len(wave)), 0))[-WINDOW:]
    whisper = WhisperFeatureExtractor(chunk_length=8)
    expected = whisper(
        padded, sampling_rate=SAMPLE_RATE, return_tensors="np", do_normalize=True
    ).input_features[0]
    ours = features(wave)
    assert ours.dtype == np.float32
    assert ours.shape == expected.shape == (80, 800)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_no_audio_has_features_too() -> None:
    assert np.isfinite(features(np.zeros(0, np.float32))).all()


@pytest.mark.parametrize("text", ["What is the capital of France?", "Please turn the light off."])
def test_a_whole_sentence_sounds_finished(detector: TurnEndDetector, text: str) -> None:
    wave = np.concatenate((speak(text, "heart").wave, noise(0.2)))
    assert detector.probability(wave) > 0.9


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Could you please, um, tell me the number after seventeen?", "um"),
        ("Turn on the, uh, light in the kitchen.", "uh"),
        ("How much is, two times seven?", "is"),
        ("Find my umbrella, and, bring it to me.", "and"),
    ],
)
def test_a_hesitation_does_not(detector: TurnEndDetector, text: str, word: str) -> None:
    assert detector.probability(until(text, word)) < 0.1


def test_it_keeps_no_state(detector: TurnEndDetector) -> None:
    wave = speak("What is the capital of France?", "heart").wave
    first = detector.probability(wave)
    detector.probability(noise(3))
    assert detector.probability(wave) == first


def test_only_the_last_eight_seconds_count(detector: TurnEndDetector) -> None:
    wave = noise(9) * 50
    assert detector.probability(wave) == detector.probability(wave[-WINDOW:])


def test_a_missing_package_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps pipecat-ai.*\[turn\]"):
        TurnEndDetector.load()


def test_a_damaged_file_is_named_with_its_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    damaged = tmp_path / turn_end.WEIGHTS
    damaged.write_bytes(b"not a graph")
    monkeypatch.setattr(turn_end, "find_weights", lambda: damaged)
    with pytest.raises(CheckpointError, match=r"smart-turn.*--force-reinstall"):
        TurnEndDetector.load()


def test_the_package_that_carries_the_model_is_not_imported(detector: TurnEndDetector) -> None:
    assert find_weights().is_file()
    assert "pipecat" not in sys.modules
