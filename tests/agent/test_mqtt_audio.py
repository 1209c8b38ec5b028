"""A device's microphone as the conversation hears it: order, gaps, silence, too much."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import virtual_time

from agent.mqtt_audio import RemoteMicrophone
from agent.mqtt_wire import Packet

PACKET = 640  # samples: 40 ms


def packet(n: int) -> Packet:
    """The n-th of a stream; its samples say which it is."""
    wave = np.full(PACKET, (n + 1) / 1000, np.float32)
    return Packet(n, n * PACKET, wave, 16_000)


def heard(sent: Sequence[tuple[float, int]], seconds: float, most: float = 0.4) -> list[float]:
    """What a conversation hears: a number for each 40 ms, 0 for silence.

    Args:
        sent: when each packet comes, in seconds, and which it is.
    """

    async def scenario() -> list[np.ndarray]:
        microphone, waves = RemoteMicrophone(most), list[np.ndarray]()

        async def listen() -> None:
            async for wave in microphone.chunks():
                waves.append(wave)

        listening = asyncio.create_task(listen())
        loop = asyncio.get_running_loop()
        for when, n in sent:
            loop.call_at(when, microphone.push, packet(n))
        await asyncio.sleep(seconds)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        return waves

    wave = np.concatenate(virtual_time.run(scenario()))
    return [round(1000 * float(each)) for each in wave[PACKET::PACKET]]  # after the first 40 ms


def test_what_comes_in_time_is_heard_as_it_is() -> None:
    assert heard([(0.04 * n, n) for n in range(10)], 0.5) == list(range(1, 11))


def test_while_a_packet_is_waited_for_no_silence_is_put_in() -> None:
    late = [(0.04 * n + (0.05 if n == 3 else 0), n) for n in range(10)]
    assert heard(sorted(late), 0.5) == list(range(1, 11))


def test_what_is_lost_is_as_much_silence() -> None:
    sent = [(0.04 * n, n) for n in range(10) if n != 3]
    assert heard(sent, 0.5) == [1, 2, 3, 0, 5, 6, 7, 8, 9, 10]


def test_a_device_that_stops_sending_falls_silent_for_longer_than_any_hangover() -> None:
    said = heard([(0.04 * n, n) for n in range(5)], 60.0)
    assert said[:5] == [1, 2, 3, 4, 5]
    assert not any(said[5:]) and len(said[5:]) * 0.04 == 4.0


def test_what_was_held_back_is_heard_when_the_device_falls_silent() -> None:
    said = heard([(0.0, 0), (0.04, 1), (0.08, 3)], 2.0)
    assert [each for each in said if each] == [1, 2, 4]


def test_of_what_comes_faster_than_it_is_taken_the_oldest_is_dropped_and_counted() -> None:
    microphone = RemoteMicrophone(0.4)
    for n in range(200):
        microphone.push(packet(n))

    async def first() -> list[np.ndarray]:
        chunks = microphone.chunks()
        return [await anext(chunks), await anext(chunks)]

    _, oldest = asyncio.run(first())
    assert microphone.dropped == 200 * PACKET - 5 * 16_000
    assert round(1000 * float(oldest[0])) == 200 - 125 + 1
