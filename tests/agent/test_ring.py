"""Rings lose nothing unnoticed, sample times are smooth, and the jitter target adapts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.ring import JitterTarget, Ring, SampleTimes


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40))
def test_a_ring_gives_back_in_order_what_it_took(moves: list[tuple[int, int]]) -> None:
    ring, taken, given_back, offered = Ring(10), [], [], 0
    for write, read in moves:
        samples = np.arange(offered, offered + write, dtype=np.float32)
        offered += write
        taken.extend(samples[: ring.write(samples)])
        given_back.extend(ring.take(read))
        assert 0 <= len(ring) <= ring.capacity
    given_back.extend(ring.take(ring.capacity))
    assert given_back == taken
    assert len(taken) + ring.dropped == offered


def test_a_full_ring_counts_what_it_drops() -> None:
    ring = Ring(4)
    assert ring.write(np.ones(6, np.float32)) == 4
    assert ring.dropped == 2


def test_an_empty_ring_leaves_the_rest_of_the_buffer_alone() -> None:
    ring, out = Ring(4), np.full(3, 7, np.float32)
    ring.write(np.ones(1, np.float32))
    assert ring.read_into(out) == 1
    assert out.tolist() == [1, 7, 7]


def test_sample_times_do_not_jitter_with_the_blocks() -> None:
    times, random = SampleTimes(16_000), np.random.default_rng(0)
    for block in range(500):
        times.see(160 * block, 5.0 + 0.01 * block + random.normal(0, 0.002))
    assert times.time(80_000) == pytest.approx(10.0, abs=0.002)
    assert times.sample(10.0) == pytest.approx(80_000, abs=32)


def test_sample_times_follow_a_device_that_stumbled() -> None:
    times = SampleTimes(16_000)
    times.see(0, 1.0)
    times.see(160, 2.01)
    assert times.time(160) == pytest.approx(2.01)


def test_the_jitter_target_doubles_with_each_underrun_up_to_its_limit() -> None:
    target, seen = JitterTarget(0.04, 0.3), []
    for _ in range(4):
        target.underrun()
        seen.append(target.seconds)
    assert seen == pytest.approx([0.08, 0.16, 0.3, 0.3])


def test_the_jitter_target_shrinks_slowly_while_it_plays_smoothly() -> None:
    target = JitterTarget(0.04, 0.3, calm=30)
    target.underrun()
    target.played(29)
    assert target.seconds == pytest.approx(0.08)
    target.played(1)
    assert target.seconds == pytest.approx(0.06)
    target.played(3000)
    assert target.seconds == pytest.approx(0.04)


def test_an_underrun_starts_the_wait_anew() -> None:
    target = JitterTarget(0.04, 0.3, calm=30)
    target.underrun()
    target.played(29)
    target.underrun()
    target.played(29)
    assert target.seconds == pytest.approx(0.16)


def test_a_target_of_nothing_grows_too() -> None:
    target = JitterTarget(0.0, 0.3)
    target.underrun()
    assert target.seconds > 0
