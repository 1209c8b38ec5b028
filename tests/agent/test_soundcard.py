"""The sound card, on a virtual one: what is said arrives, what is played is heard, losses heal."""

from __future__ import annotations

import asyncio
import functools
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import pytest
from pulse import VirtualCard

from agent.errors import UserError
from agent.events import DeviceChanged
from agent.schema import SoundConfig
from agent.soundcard import Block, SoundCard
from stages import SAMPLE_RATE

pytestmark = [pytest.mark.slow, pytest.mark.realtime]
T = TypeVar("T")
P = ParamSpec("P")


def live(test: Callable[P, Coroutine[None, None, None]]) -> Callable[P, None]:
    """Runs a test on an event loop."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def hum(seconds: float) -> np.ndarray:
    """Noise between 300 and 3000 Hz, unlike itself at every other lag; RMS 0.1."""
    count = round(seconds * SAMPLE_RATE)
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(count))
    frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    spectrum[(frequency < 300) | (frequency > 3000)] = 0
    wave = np.fft.irfft(spectrum, count)
    return (0.1 * wave / wave.std()).astype(np.float32)


def tone(seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.2 * np.sin(2 * np.pi * 500 * time)).astype(np.float32)


def find(part: np.ndarray, whole: np.ndarray) -> tuple[int, float, float]:
    """Where ``part`` is in ``whole``, how much alike they are, and how much louder it is there."""
    size = 1 << (len(part) + len(whole)).bit_length()
    lags = np.fft.irfft(np.fft.rfft(whole, size) * np.fft.rfft(part, size).conj(), size)
    at = int(lags[: len(whole) - len(part) + 1].argmax())
    there = whole[at : at + len(part)]
    return at, float(np.corrcoef(there, part)[0, 1]), float(there.std() / part.std())


@asynccontextmanager
async def opened(**settings: object) -> AsyncIterator[tuple[SoundCard, asyncio.Queue]]:
    told: asyncio.Queue[DeviceChanged] = asyncio.Queue()
    chosen = SoundConfig.model_validate({"echo": "off", "stall_seconds": 0.5, **settings})
    async with SoundCard(chosen, told.put_nowait) as card:
        yield card, told


async def soon(what: Awaitable[T]) -> T:
    return await asyncio.wait_for(what, 30)


async def collect(card: SoundCard, seconds: float) -> list[Block]:
    found: list[Block] = []
    async for block in card.blocks():
        found.append(block)
        if sum(len(b.samples) for b in found) >= seconds * SAMPLE_RATE:
            break
    return found


async def record(recorder: subprocess.Popen[bytes], seconds: float) -> np.ndarray:
    assert recorder.stdout is not None
    count = 4 * round(seconds * SAMPLE_RATE)
    return np.frombuffer(await soon(asyncio.to_thread(recorder.stdout.read, count)), np.float32)


def loud(wave: np.ndarray) -> np.ndarray:
    """Where a tone sounds: its first and one past its last sample, above a tenth of its peak."""
    found = np.flatnonzero(np.abs(wave) > 0.02)
    assert len(found), "nothing was heard"
    return wave[found[0] : found[-1] + 1]


@live
async def test_what_is_said_arrives_as_blocks(pulse: VirtualCard) -> None:
    said = hum(1.0)
    async with opened(block_ms=20) as (card, _):
        speaking = pulse.say(said, SAMPLE_RATE)
        blocks = await soon(collect(card, 3.0))
        speaking.join()
        assert card.counters.overruns == 0
    for block in blocks:
        assert len(block.samples) == len(block.raw) == len(block.played) == 320
        assert block.samples.dtype == np.float32
    _, alike, gain = find(said, np.concatenate([block.samples for block in blocks]))
    assert alike > 0.95 and gain == pytest.approx(1, abs=0.1)


@live
async def test_what_is_played_is_heard_and_known_to_be_played(pulse: VirtualCard) -> None:
    reply = hum(1.0)
    async with opened() as (card, _):
        with pulse.listening(SAMPLE_RATE) as recorder:
            await asyncio.gather(record(recorder, 0.5), soon(collect(card, 0.5)))
            card.playback.begin()
            card.playback.play(reply)
            card.playback.finish()
            blocks, heard = await asyncio.gather(soon(collect(card, 2.0)), record(recorder, 2.0))
            assert card.playback.done and card.playback.heard == len(reply)
    _, alike, gain = find(reply, heard)
    assert alike > 0.95 and gain == pytest.approx(1, abs=0.1)
    _, alike, gain = find(reply, np.concatenate([block.played for block in blocks]))
    assert alike > 0.95 and gain == pytest.approx(1, abs=0.1)


@live
async def test_a_stopped_reply_falls_silent_just_after_what_was_heard(pulse: VirtualCard) -> None:
    async with opened() as (card, _):
        with pulse.listening(SAMPLE_RATE) as recorder:
            await record(recorder, 0.05)
            card.playback.begin()
            card.playback.play(tone(20.0))
            await soon(collect(card, 1.0))
            heard = card.playback.stop()
            recorded = await record(recorder, 2.0)
    sounded = len(loud(recorded))
    # What left the loudspeaker after the decision: the device's own delay and the fade.
    assert 0 <= sounded - heard <= 0.06 * SAMPLE_RATE


@live
async def test_a_ducked_reply_is_12_db_softer(pulse: VirtualCard) -> None:
    async with opened() as (card, _):
        with pulse.listening(SAMPLE_RATE) as recorder:
            await record(recorder, 0.05)
            card.playback.begin()
            card.playback.play(tone(2.0))
            card.playback.finish()
            await soon(collect(card, 1.0))
            card.playback.duck(True)
            sounded = loud(await record(recorder, 2.5))
    before, after = sounded[:8_000].std(), sounded[-8_000:].std()
    assert 20 * np.log10(after / before) == pytest.approx(-12, abs=1)


@pytest.mark.parametrize("direction, device", [("input", "mic"), ("output", "speaker")])
@live
async def test_an_unplugged_device_is_told_and_reopened(
    pulse: VirtualCard, direction: str, device: str
) -> None:
    async with opened() as (card, told):
        await soon(collect(card, 0.2))
        if direction == "output":
            card.playback.begin()
            card.playback.play(tone(20.0))
            await soon(collect(card, 0.5))
        pulse.unplug(device)
        lost = await soon(told.get())
        assert (lost.direction, lost.present) == (direction, False)
        assert "is lost" in lost.message
        heard = card.playback.heard
        card.playback.play(tone(200.0))
        pulse.plug(device)
        back = await soon(told.get())
        assert (back.direction, back.present) == (direction, True)
        assert card.playback.heard == heard
        said, reply = hum(1.0), hum(1.0)
        with pulse.listening(SAMPLE_RATE) as recorder:
            await record(recorder, 0.05)
            speaking = pulse.say(said, SAMPLE_RATE)
            card.playback.begin()
            card.playback.play(reply)
            card.playback.finish()
            blocks, sounded = await asyncio.gather(soon(collect(card, 3.0)), record(recorder, 2.5))
            speaking.join()
        assert find(said, np.concatenate([block.raw for block in blocks]))[1] > 0.9
        assert find(reply, sounded)[1] > 0.9
        assert card.counters.reopened == 1


@live
async def test_a_microphone_that_delivers_nothing_is_reopened(pulse: VirtualCard) -> None:
    async with opened() as (card, told):
        await soon(collect(card, 0.2))
        pulse.pactl("mic", "suspend-sink", "mic", "1")
        lost = await soon(told.get())
        assert (lost.direction, lost.present) == ("input", False)
        pulse.pactl("mic", "suspend-sink", "mic", "0")
        while not (await soon(told.get())).present:
            pass  # it may have been tried, in vain, before it delivered
        await soon(collect(card, 0.5))


@live
async def test_closing_ends_the_blocks(pulse: VirtualCard) -> None:
    async with opened() as (card, _):
        blocks = card.blocks()
        await soon(anext(blocks))
    assert len([block async for block in blocks]) <= 1


@live
async def test_the_echo_is_cancelled_where_that_is_asked_for(pulse: VirtualCard) -> None:
    pytest.importorskip("livekit")
    async with opened(echo="on") as (card, _):
        assert card.cancelling
        await soon(collect(card, 0.2))


@live
async def test_an_unknown_device_is_named(pulse: VirtualCard) -> None:
    with pytest.raises(UserError, match="no microphone 'nowhere'"):
        async with opened(input="nowhere"):
            pass
