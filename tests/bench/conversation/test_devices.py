"""Somebody at the other end of a virtual sound card answers, or does not, and is measured."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from pulse import VirtualCard

from agent.errors import UserError
from bench.conversation.black_box import Row
from bench.conversation.devices import measure_devices
from bench.conversation.recordings import Request
from stages import SAMPLE_RATE

pytestmark = pytest.mark.realtime
TONE = 0.2 * np.sin(np.arange(SAMPLE_RATE // 2) * 2 * np.pi * 300 / SAMPLE_RATE).astype(np.float32)
MARGIN = SAMPLE_RATE // 5
REQUEST = Request("tone", "", "", np.pad(TONE, MARGIN), MARGIN, MARGIN + len(TONE))
AFTER = 0.3  # seconds of silence after which it answers


def answer_one(card: VirtualCard, heard: threading.Event) -> None:
    """Hear a request to its end, then say the tone back."""
    block = SAMPLE_RATE // 50
    with card.listening(SAMPLE_RATE) as recorder:
        assert recorder.stdout is not None
        loud = quiet = 0
        while quiet * 0.02 < AFTER and (data := recorder.stdout.read(4 * block)):
            sound = np.abs(np.frombuffer(data, "<f4")).max() > 0.1
            heard.set()
            loud += sound
            quiet = 0 if sound or not loud else quiet + 1
    card.say(TONE, SAMPLE_RATE).join()


def measured(patience: float) -> list[Row]:
    return asyncio.run(measure_devices("test_speaker", "test_mic", [REQUEST], patience=patience))


def test_an_answer_is_timed_between_the_two_devices(pulse: VirtualCard) -> None:
    heard = threading.Event()
    answering = threading.Thread(target=answer_one, args=(pulse, heard))
    answering.start()
    assert heard.wait(30)
    (row,) = measured(patience=20)
    answering.join()

    assert row["outcome"] == "answered"
    assert row["early"] == 0
    # the sound systems' buffers are not part of it, but may be misjudged by a block or two
    assert row["ms"]["end_to_sound"] > 1000 * AFTER - 60


def test_where_nobody_answers_there_is_silence(pulse: VirtualCard) -> None:
    (row,) = measured(patience=0.5)

    assert row["outcome"] == "silent"


def test_a_device_that_is_not_there_is_named(pulse: VirtualCard) -> None:
    with pytest.raises(UserError, match="no loudspeaker 'no such'"):
        asyncio.run(measure_devices("no such", "test_mic", [REQUEST]))
