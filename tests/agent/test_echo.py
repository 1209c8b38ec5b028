"""The canceller takes out what is played, and leaves what is said."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from agent.echo import FRAME, EchoCanceller, make_canceller
from agent.errors import UserError
from stages import SAMPLE_RATE


def noise(seconds: float, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.1 * random.standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def level(wave: np.ndarray) -> float:
    return float(20 * np.log10(np.std(wave) + 1e-9))


def delayed(wave: np.ndarray, samples: int) -> np.ndarray:
    return np.concatenate((np.zeros(samples, np.float32), wave))[: len(wave)]


@pytest.mark.parametrize("delay_ms", [20, 50, 120])
def test_an_echo_is_gone_after_seconds_whatever_its_delay(delay_ms: int) -> None:
    pytest.importorskip("livekit")
    played = noise(4, 0)
    captured = 0.5 * delayed(played, delay_ms * SAMPLE_RATE // 1000)
    cleaned = EchoCanceller(20).process(captured, played)
    second = slice(-SAMPLE_RATE, None)
    assert level(cleaned[second]) < level(captured[second]) - 30


def test_without_an_echo_what_is_said_stays() -> None:
    pytest.importorskip("livekit")
    said = noise(2, 1)
    cleaned = EchoCanceller().process(said, np.zeros_like(said))
    assert level(cleaned[SAMPLE_RATE:]) == pytest.approx(level(said), abs=2)


def test_the_canceller_takes_whole_frames_of_both() -> None:
    pytest.importorskip("livekit")
    canceller = EchoCanceller()
    for captured, played in ((FRAME - 1, FRAME - 1), (FRAME, 2 * FRAME)):
        with pytest.raises(ValueError, match=f"multiple of {FRAME}"):
            canceller.process(np.zeros(captured, np.float32), np.zeros(played, np.float32))


def test_a_missing_library_matters_only_if_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "livekit", None)
    assert make_canceller("off") is None
    assert make_canceller("auto") is None
    with pytest.raises(UserError, match=r"spiritlm-agent\[aec\]"):
        make_canceller("on")
