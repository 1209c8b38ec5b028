"""A reply starts when enough is ready, fades when stopped, and says how much of it was heard."""

from __future__ import annotations

import numpy as np
import pytest

from agent.loudspeaker import CAPACITY_SECONDS, DUCKED, Loudspeaker
from agent.ring import JitterTarget
from stages import SAMPLE_RATE

BLOCK = 160
LATENCY = 0.03


class Device:
    """Calls a loudspeaker back, block by block, on a clock of its own."""

    def __init__(self, speaker: Loudspeaker, rate: int = SAMPLE_RATE) -> None:
        self.speaker, self.rate, self.now = speaker, rate, 10.0
        speaker.attach(rate, lambda: self.now)

    def play(self, blocks: int = 1) -> np.ndarray:
        """The next blocks of 10 ms."""
        size = self.rate // 100
        out = np.zeros((blocks, size), np.float32)
        for block in out:
            self.speaker.fill(block, self.now + LATENCY)
            self.now += 0.01
        return out.reshape(-1)


@pytest.fixture
def speaker() -> Loudspeaker:
    """Keeps 40 ms ready, and up to 400."""
    return Loudspeaker(JitterTarget(0.04, 0.4))


def ones(seconds: float) -> np.ndarray:
    return np.ones(round(seconds * SAMPLE_RATE), np.float32)


def test_nothing_starts_before_enough_is_ready(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(0.03))
    assert not device.play().any()
    speaker.play(ones(0.02))
    assert device.play().all()


def test_a_short_reply_starts_when_it_is_complete(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(0.01))
    assert not device.play().any()
    speaker.finish()
    assert device.play().all()


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_heard_is_what_has_left_the_loudspeaker(speaker: Loudspeaker, rate: int) -> None:
    device = Device(speaker, rate)
    speaker.begin()
    speaker.play(ones(1.0))
    speaker.finish()
    seen = [speaker.heard]
    for _ in range(120):
        device.play()
        seen.append(speaker.heard)
    expected = [np.clip(10 * k - 30, 0, 1000) * 16 for k in range(121)]
    assert seen == pytest.approx(expected, abs=48)
    assert max(seen) == SAMPLE_RATE and speaker.done


def test_a_reply_is_not_done_while_its_end_is_on_its_way(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(0.05))
    speaker.finish()
    device.play(5)
    assert not speaker.done
    device.play(4)
    assert speaker.done


def test_stopping_fades_within_20_ms_and_freezes_heard(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(1.0))
    device.play(20)
    heard = speaker.stop()
    tail = device.play(4)
    assert heard == pytest.approx(0.17 * SAMPLE_RATE, abs=16)
    assert speaker.heard == heard and speaker.done
    assert (np.diff(tail[:320]) <= 0).all() and tail[160] == pytest.approx(0.5, abs=0.02)
    assert not tail[320:].any()


def test_the_next_reply_starts_while_the_last_fades(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(1.0))
    device.play(5)
    speaker.begin()
    speaker.play(-ones(0.5))
    assert speaker.heard == 0
    assert device.play(3)[-BLOCK:] == pytest.approx(-1.0, abs=1e-6)


def test_ducking_is_12_db_without_a_click(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(1.0))
    device.play(5)
    speaker.duck(True)
    down = device.play(5)
    speaker.duck(False)
    up = device.play(5)
    assert down[-1] == pytest.approx(DUCKED, abs=1e-4) and up[-1] == pytest.approx(1, abs=1e-4)
    assert np.abs(np.diff(np.concatenate((down, up)))).max() < 0.01


def test_an_underrun_is_counted_and_more_is_kept_ready(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(0.045))
    device.play(8)
    speaker.play(ones(0.05))
    assert speaker.underruns == 1 and speaker.target.seconds == pytest.approx(0.08)
    assert not device.play().any()
    speaker.play(ones(0.04))
    assert device.play().all()


def test_the_end_of_a_reply_is_no_underrun(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(0.045))
    speaker.finish()
    device.play(10)
    speaker.begin()
    assert speaker.underruns == 0


def test_a_whole_reply_may_wait_but_not_more_than_the_capacity(speaker: Loudspeaker) -> None:
    Device(speaker)
    speaker.begin()
    speaker.play(ones(CAPACITY_SECONDS - 1))
    with pytest.raises(ValueError, match="at most 120 s"):
        speaker.play(ones(2))


def test_without_a_device_heard_stands_still_and_nothing_piles_up(speaker: Loudspeaker) -> None:
    device = Device(speaker)
    speaker.begin()
    speaker.play(ones(1.0))
    device.play(20)
    heard = speaker.heard
    speaker.detach()
    device.now += 5
    for _ in range(300):
        speaker.play(ones(1.0))
    assert speaker.heard == heard
    assert speaker.refused == 300 * SAMPLE_RATE
    speaker.finish()
    assert speaker.done
