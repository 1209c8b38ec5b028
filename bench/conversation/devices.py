"""A voice agent at the other end of a loudspeaker and a microphone of this machine.

The loudspeaker plays into the agent's microphone and the microphone hears the agent's loudspeaker:
by cables, through the air, or through virtual devices. Both are timed by the sound system's own
clock, so that its buffers are not counted as the agent's.
"""

from __future__ import annotations

import asyncio
import bisect
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import soxr

from agent.devices import find_device
from agent.ring import Ring, Samples
from agent.streams import InputStream, OutputStream
from bench.conversation.black_box import Row, measure
from bench.conversation.recordings import Request
from bench.conversation.sound import Listener, Pace
from stages import SAMPLE_RATE

_BLOCK_MS = 10
_AHEAD = 0.1  # seconds of sound kept ready for the loudspeaker
_STALL = 2.0  # seconds without a block after which a device is taken for lost
_BLOCKS = 60_000  # blocks of which times are kept: ten minutes


class _Feed:
    """What the loudspeaker plays, and when each sample of it left; ``rate`` in Hz."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.missed = 0  # blocks for which there was not enough
        self._ring = Ring(round(4 * rate))
        self._resample = soxr.ResampleStream(SAMPLE_RATE, rate, 1, dtype="float32")
        self._blocks: deque[tuple[int, float]] = deque(maxlen=_BLOCKS)

    @property
    def dropped(self) -> int:
        """Samples at 16 kHz for which there was no room."""
        return round(self._ring.dropped * SAMPLE_RATE / self.rate)

    def add(self, samples: Samples) -> None:
        """More to play, float32 at 16 kHz."""
        self._ring.write(self._resample.resample_chunk(samples))

    def fill(self, out: Samples, dac: float) -> None:
        """Called back by the device: ``out`` leaves the loudspeaker at ``dac`` s."""
        self._blocks.append((self._ring.read, dac))
        self.missed += self._ring.read_into(out) < len(out)

    def when(self, sample: int) -> float | None:
        """When ``sample`` (16 kHz, of those added) left the loudspeaker, if it has."""
        place = sample * self.rate / SAMPLE_RATE
        blocks = list(self._blocks)
        at = bisect.bisect_right(blocks, (place, float("inf"))) - 1
        if at < 0 or place > self._ring.read:
            return None
        position, dac = blocks[at]
        return dac + (place - position) / self.rate


class Devices:
    """A pair of sound devices as a line (:mod:`bench.conversation.black_box`): enter it first.

    Args:
        output, input: number or part of the name of the loudspeaker and the microphone.

    Raises:
        UserError: on entering: PortAudio is missing, or a device is not there or cannot be opened.
    """

    def __init__(self, output: int | str, input: int | str) -> None:
        self._names = output, input
        self.listener = Listener()
        self._pace = Pace()
        self._heard = 0
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Devices:
        output, input = self._names
        loudspeaker, microphone = find_device("output", output), find_device("input", input)
        loop = asyncio.get_running_loop()
        self._feed = _Feed(loudspeaker.rate)

        def arrived() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._arrived.set)

        # The streams ask of a loudspeaker only that it fills blocks.
        self._output = OutputStream(loudspeaker, _BLOCK_MS, self._feed)  # type: ignore[arg-type]
        try:
            self._input = InputStream(microphone, _BLOCK_MS, arrived)
        except BaseException:
            self._output.close()
            raise
        self._task = asyncio.create_task(self._hear())
        self._output.start()
        self._input.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._input.close)
        await asyncio.to_thread(self._output.close)

    @property
    def dropped(self) -> int:
        return self._feed.dropped

    @property
    def trouble(self) -> str:
        for stream in (self._output, self._input):
            if why := stream.trouble(_STALL):
                return f"{stream.device.name!r}: {why}"
        return ""

    @property
    def now(self) -> float:
        return self._output.clock()

    async def ready(self) -> None:
        self._feed.add(np.zeros(round(_AHEAD * SAMPLE_RATE), np.float32))
        self._lead = round(_AHEAD * SAMPLE_RATE)
        self._pace.resume()

    async def say(self, chunk: np.ndarray) -> None:
        self._feed.add(np.asarray(chunk, np.float32))
        await self._pace(chunk)

    def when(self, sample: int) -> float:
        known = self._feed.when(sample + self._lead)
        # What has not left yet leaves at the soonest now.
        return self.now if known is None else known

    async def _hear(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            samples = self._input.take()
            if len(samples):
                self.listener.block(samples, self._input.captured_at(self._heard))
                self._heard += len(samples)


async def measure_devices(
    output: int | str,
    input: int | str,
    requests: Iterable[Request],
    progress: Callable[[int], None] = lambda count: None,
    patience: float = 15.0,
    seed: int = 0,
) -> list[Row]:
    """:func:`bench.conversation.black_box.measure` of whoever is at the other end of two devices.

    Raises:
        UserError: see :class:`Devices`.
    """
    async with Devices(output, input) as line:
        return await measure(line, requests, progress, patience, seed)
