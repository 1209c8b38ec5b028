"""The sound card: a microphone as blocks, a loudspeaker as a playback, and a watch over both."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np

from agent.devices import WORDS, Direction, find_device, portaudio, refresh
from agent.echo import EchoCanceller, make_canceller
from agent.errors import UserError
from agent.events import DeviceChanged
from agent.loudspeaker import Loudspeaker
from agent.ring import JitterTarget
from agent.schema import SoundConfig
from agent.streams import InputStream, OutputStream
from stages import SAMPLE_RATE

_FIRST_WAIT, _LAST_WAIT = 0.25, 5.0  # seconds before a lost device is tried again
_PATIENCE = 5.0  # seconds for a driver to close a stream
_WATCH = 0.1  # seconds between looks at the streams
# The canceller gets what is played a little early: no echo may come before its cause, even where a
# sound system is wrong about its latency.
_LEAD = 0.02


@dataclass(frozen=True, eq=False)
class Block:
    """One stretch of the session's sample clock: three float32 mono waves at 16 kHz, equally long.

    Attributes:
        samples: for the VAD: captured, with the echo cancelled.
        raw: as captured.
        played: what left the loudspeaker meanwhile; zeros for silence.
    """

    samples: np.ndarray
    raw: np.ndarray
    played: np.ndarray


@dataclass(frozen=True)
class Counters:
    """What did not go smoothly since the card was opened.

    Attributes:
        overruns: captured samples (of the device) dropped because nobody took them.
        underruns: times a reply had nothing to play in its middle.
        refused: samples (16 kHz) of replies that came while there was no loudspeaker.
        stumbles: overflows and underflows that the sound system reported.
        reopened: times a device was lost and came back.
    """

    overruns: int
    underruns: int
    refused: int
    stumbles: int
    reopened: int


class SoundCard:
    """Opens both devices, watches them and closes them: an async context manager.

    ``tell`` is called on the event loop when a device goes away or comes back.

    Attributes:
        stuck: a driver did not come back from closing a stream.

    Raises:
        UserError: on entering: PortAudio is missing, there is no such device, it cannot be opened,
            or the canceller asked for is not installed.
    """

    def __init__(self, settings: SoundConfig, tell: Callable[[DeviceChanged], None]) -> None:
        self._settings = settings
        self._tell = tell
        least, most = settings.latency_ms / 1000, settings.max_latency_ms / 1000
        self.playback = Loudspeaker(JitterTarget(least, most))
        self._input: InputStream | None = None
        self._output: OutputStream | None = None
        self._canceller: EchoCanceller | None = None
        self._arrived = asyncio.Event()
        self._closed = False
        self._reopened = 0
        self._past_overruns = self._past_stumbles = 0
        self.stuck = False

    async def __aenter__(self) -> SoundCard:
        self._loop = asyncio.get_running_loop()
        self._canceller = make_canceller(self._settings.echo, round(1000 * _LEAD))
        try:
            await self._open("output")
            await self._open("input")
        except BaseException:
            await self._close_all()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="watch sound card")
        self._watcher.add_done_callback(lambda task: self._arrived.set())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._closed = True
        self._arrived.set()
        self._watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watcher
        await self._close_all()

    @property
    def cancelling(self) -> bool:
        """Whether the echo is cancelled."""
        return self._canceller is not None

    @property
    def counters(self) -> Counters:
        """As of now."""
        streams = [s for s in (self._input, self._output) if s is not None]
        return Counters(
            self._past_overruns + (self._input.ring.dropped if self._input else 0),
            self.playback.underruns,
            self.playback.refused,
            self._past_stumbles + sum(stream.stumbles for stream in streams),
            self._reopened,
        )

    async def blocks(self) -> AsyncIterator[Block]:
        """What the microphone hears; ends when the card is closed. None come while it is lost."""
        size = self._settings.block_ms * SAMPLE_RATE // 1000
        stream, rest, position = self._input, np.zeros(0, np.float32), 0
        while not self._closed:
            await self._arrived.wait()
            self._arrived.clear()
            if self._watcher.done() and not self._closed:
                self._watcher.result()  # why nobody watches any more
            if self._input is not stream:
                stream, rest, position = self._input, rest[:0], 0
            if stream is None:
                continue
            rest = np.concatenate((rest, stream.take()))
            while len(rest) >= size and not self._closed:
                yield self._block(stream, rest[:size], position)
                rest, position = rest[size:], position + size

    def _block(self, stream: InputStream, raw: np.ndarray, position: int) -> Block:
        played = early = np.zeros(len(raw), np.float32)
        if self._output is not None:
            start = stream.captured_at(position)
            lead = round(_LEAD * SAMPLE_RATE)
            played, early = self._output.played(start, len(raw), lead)
        clean = raw if self._canceller is None else self._canceller.process(raw, early)
        return Block(clean, raw, played)

    def _wake(self) -> None:
        """Called in the sound system's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._arrived.set)

    # Opening, watching, closing. PortAudio may take its time: not on the event loop.

    async def _open(self, direction: Direction) -> None:
        if direction == "input":
            self._input = await asyncio.to_thread(self._open_input)
        else:
            output = await asyncio.to_thread(self._open_output)
            self._output = output
            self.playback.attach(output.rate, output.clock)

    def _open_input(self) -> InputStream:
        device = find_device("input", self._settings.input)
        stream = InputStream(device, self._settings.block_ms, self._wake)
        stream.start()
        return stream

    def _open_output(self) -> OutputStream:
        device = find_device("output", self._settings.output)
        stream = OutputStream(device, self._settings.block_ms, self.playback)
        stream.start()
        return stream

    async def _watch(self) -> None:
        """Until cancelled: notice what stalls, and reopen it with growing patience."""
        waits: dict[Direction, float] = {"input": _FIRST_WAIT, "output": _FIRST_WAIT}
        due: dict[Direction, float] = {"input": 0.0, "output": 0.0}
        while True:
            await asyncio.sleep(_WATCH)
            for direction in ("input", "output"):
                stream = self._input if direction == "input" else self._output
                if stream is not None and not (
                    trouble := stream.trouble(self._settings.stall_seconds)
                ):
                    continue
                if stream is not None:
                    await self._lose(direction, stream, trouble)
                    waits[direction], due[direction] = _FIRST_WAIT, self._loop.time() + _FIRST_WAIT
                elif self._loop.time() >= due[direction] and not await self._regain(direction):
                    waits[direction] = min(_LAST_WAIT, 2 * waits[direction])
                    due[direction] = self._loop.time() + waits[direction]

    async def _lose(
        self, direction: Direction, stream: InputStream | OutputStream, why: str
    ) -> None:
        self._past_stumbles += stream.stumbles
        if isinstance(stream, InputStream):
            self._past_overruns += stream.ring.dropped
            self._input = None
        else:
            self._output = None
            self.playback.detach()
        message = f"the {WORDS[direction]} {stream.device.name!r} is lost ({why}); trying again"
        self._tell(DeviceChanged(direction, False, message))
        self.stuck |= not await _in_time(stream.close)

    async def _regain(self, direction: Direction) -> bool:
        """Try to open a lost device; whether that worked."""
        try:
            await self._look_again(direction)
            await self._open(direction)
        except UserError:
            return False
        stream = self._input if direction == "input" else self._output
        assert stream is not None
        self._reopened += 1
        message = f"the {WORDS[direction]} {stream.device.name!r} is back"
        self._tell(DeviceChanged(direction, True, message))
        return True

    async def _look_again(self, direction: Direction) -> None:
        """Let PortAudio see what was plugged in, which takes that no stream is open.

        So the other device is closed for that moment, unless a reply is playing on it.
        """
        if direction == "input" and self._output is not None:
            if self.playback.busy:
                return
            output, self._output = self._output, None
            self.playback.detach()
            self._past_stumbles += output.stumbles
            await asyncio.to_thread(_renew, output)
            await self._open("output")
        elif direction == "output" and self._input is not None:
            stream, self._input = self._input, None
            self._past_stumbles += stream.stumbles
            self._past_overruns += stream.ring.dropped
            await asyncio.to_thread(_renew, stream)
            await self._open("input")
        else:
            await asyncio.to_thread(_renew, None)

    async def _close_all(self) -> None:
        streams = [s for s in (self._input, self._output) if s is not None]
        self._input = self._output = None
        self.playback.detach()
        for stream in streams:
            self.stuck |= not await _in_time(stream.close)


async def _in_time(work: Callable[[], None]) -> bool:
    """Do ``work`` in a thread; whether it was done soon. A driver may never come back from closing
    a stream: its thread is left behind then, and nobody waits for it."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        work()
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="spirit-close", daemon=True).start()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(done.wait(), _PATIENCE)
    return done.is_set()


def _renew(stream: InputStream | OutputStream | None) -> None:
    if stream is not None:
        stream.close()
    with contextlib.suppress(portaudio().PortAudioError):  # not even one device
        refresh()
