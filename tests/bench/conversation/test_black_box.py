"""An agent measured from outside: programs of one file that answer, or do not, in known ways."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from agent.errors import UserError
from bench.conversation.black_box import Row, measure_process
from bench.conversation.recordings import Request
from bench.conversation.sound import Listener
from stages import SAMPLE_RATE

pytestmark = pytest.mark.realtime
AGENT = Path(__file__).with_name("scripted_agent.py")
LATE = 3000.0  # ms by which a busy machine may be late


def request(seconds: float = 0.5) -> Request:
    """A tone that is equally loud from its first sample to its last."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tone = 0.2 * np.sin(2 * np.pi * 300 * time).astype(np.float32)
    margin = SAMPLE_RATE // 5
    end = margin + len(tone)
    return Request("tone", "", "", np.pad(tone, margin), margin, end)


def measured(*options: str, turns: int = 2, patience: float = 8.0, rate: int = 16_000) -> list[Row]:
    command = shlex.join([sys.executable, str(AGENT), *options])
    return asyncio.run(measure_process(command, [request()] * turns, rate, patience=patience))


def test_the_answer_is_timed_from_the_true_end_of_speech() -> None:
    rows = measured("--after", "300")

    assert [row["outcome"] for row in rows] == ["answered", "answered"]
    assert [row["early"] for row in rows] == [0, 0]
    for row in rows:
        # it decides in whole chunks of 20 ms, of which the end of speech lies in one
        assert 280 <= row["ms"]["end_to_sound"] < 300 + LATE


def test_an_answer_of_any_rate_is_understood() -> None:
    rows = measured("--rate", "24000", rate=24_000, turns=1)

    assert rows[0]["outcome"] == "answered"


def test_who_answers_before_the_end_of_speech_is_told_apart() -> None:
    rows = measured("--at-once", "--after", "60", turns=1, patience=0.5)

    assert rows[0]["early"] == 1
    assert rows[0]["outcome"] == "silent"


def test_who_never_answers_is_waited_for_no_longer_than_asked() -> None:
    rows = measured("--deaf", turns=1, patience=0.3)

    assert [row["outcome"] for row in rows] == ["silent"]
    assert all("ms" not in row for row in rows)


def test_who_dies_in_mid_conversation_leaves_what_was_measured() -> None:
    rows = measured("--die-after", "4.0", turns=9, patience=2.0)

    assert rows[0]["outcome"] == "answered"
    assert rows[-1]["outcome"] == "died" and len(rows) < 9
    assert rows[-1]["ended"] == "it ended with exit code 1: the model has run away"


def test_who_dies_before_any_answer_is_an_error_with_its_last_words() -> None:
    with pytest.raises(UserError, match="exit code 1: the model has run away"):
        measured("--die-after", "0.1")


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"'no-such-agent --fast'.*cannot be started"):
        asyncio.run(measure_process("no-such-agent --fast", [request()]))


def test_sound_is_found_to_the_sample_and_short_pauses_belong_to_it() -> None:
    listener = Listener()
    block = np.zeros(SAMPLE_RATE, np.float32)
    block[1600:3200] = 0.1  # from 0.1 s to 0.2 s
    block[4800:8000] = 0.1  # after a pause of 0.1 s, to 0.5 s
    listener.block(block, 10.0)
    listener.block(block, 12.0)

    found = [(round(s.begin, 4), round(s.end, 4)) for s in listener.stretches]
    assert found == [(10.1, 10.5), (12.1, 12.5)]
    assert listener.first_after(10.2) == pytest.approx(12.1)
    assert listener.first_after(10.2, before=12.0) is None
    assert listener.silent_after(10.3) == pytest.approx(10.5)
