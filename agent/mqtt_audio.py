"""A device's microphone and loudspeaker, as a conversation sees them across the network."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import numpy as np
import soxr

from agent.loudspeaker import DUCKED
from agent.mqtt_jitter import JitterBuffer
from agent.mqtt_waits import within
from agent.mqtt_wire import FIRST, LAST, STOP, Packet
from stages import SAMPLE_RATE

_HELD = 5 * SAMPLE_RATE  # samples that the conversation has not taken yet
_GAP = 0.2  # s without a packet after which the device counts as silent
_LONGEST_SILENCE = 4.0  # s that are put in then: longer than any hangover
_PACKET = SAMPLE_RATE // 25  # samples sent at a time
_TRUSTED = 2.0  # s for which the device's word on its playhead is the last one


class RemoteMicrophone:
    """Packets in, the sound of a conversation out: float32 chunks at 16 kHz.

    A device that stops sending, on purpose or because its network did, falls silent: its utterance
    then ends as any other does.

    Attributes:
        jitter: the packets put in order, and what became of them.
        deaf: hear nothing: what arrives is replaced by silence.
        dropped: samples (16 kHz) that came faster than the conversation takes them.
    """

    def __init__(self, most_jitter: float) -> None:
        self.jitter = JitterBuffer(most_jitter)
        self.deaf = False
        self.dropped = 0
        self._waves: deque[np.ndarray] = deque()
        self._held = 0  # samples in them
        self._more = asyncio.Event()
        self._rate = SAMPLE_RATE
        self._resampler: soxr.ResampleStream | None = None

    def push(self, packet: Packet) -> None:
        """Take a packet; never waits."""
        if packet.rate != self._rate:
            self._take(self.jitter.flush())
            self._rate = packet.rate
            self._resampler = (
                None
                if packet.rate == SAMPLE_RATE
                else soxr.ResampleStream(packet.rate, SAMPLE_RATE, 1, "float32", "HQ")
            )
        self._take(self.jitter.push(packet))

    def _take(self, waves: list[np.ndarray]) -> None:
        for wave in waves:
            if self.deaf:
                wave = np.zeros_like(wave)
            if self._resampler is not None:
                wave = self._resampler.resample_chunk(wave)
            self._waves.append(np.asarray(wave, np.float32))
            self._held += len(wave)
        while self._held > _HELD:
            self.dropped += len(self._next())
        if self._waves:  # a packet that is held back is no sound yet, nor is it silence
            self._more.set()

    def _next(self) -> np.ndarray:
        wave = self._waves.popleft()
        self._held -= len(wave)
        return wave

    async def chunks(self) -> AsyncIterator[np.ndarray]:
        """The sound, for ever."""
        filled = _LONGEST_SILENCE
        yield np.zeros(_PACKET, np.float32)  # so that the conversation begins without a packet, too
        while True:
            if self._waves:
                filled = 0.0
                yield self._next()
            elif not await self._wait() and filled < _LONGEST_SILENCE:
                filled += _GAP
                self._take(self.jitter.flush())
                yield np.zeros(int(_GAP * SAMPLE_RATE), np.float32)

    async def _wait(self) -> bool:
        """Whether there is more sound within the time after which a device counts as silent.

        Without a task for each packet, of which a fleet sends thousands a second.
        """
        self._more.clear()
        timer = asyncio.get_running_loop().call_later(_GAP, self._more.set)
        try:
            await self._more.wait()
        finally:
            timer.cancel()
        return bool(self._waves)


class RemotePlayback:
    """Sends a reply at the pace at which it is played, and knows how much was heard.

    The playhead is the device's own word on the topic ``played``; without it, the time since the
    sound was sent. It implements :class:`agent.playback.Playback`; the sound itself comes with its
    turn, through :meth:`feed`.

    Args:
        send: publishes a packet.
        duck: asks the device to play softly, or as loud as before.
        lead: seconds of sound sent ahead of the playhead at most.
    """

    def __init__(
        self,
        send: Callable[[Packet], None],
        duck: Callable[[bool], None],
        lead: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._send, self._duck, self._clock = send, duck, clock
        self._lead = int(lead * SAMPLE_RATE)
        self._sequence = 0
        self._turn = 0
        self._gain = self._wanted = 1.0
        self._changed = asyncio.Event()
        self._clear(finished=True)

    def _clear(self, finished: bool) -> None:
        self._pending: deque[np.ndarray] = deque()
        self._queued = self._fed = self._sent = 0
        self._finished, self._closed = finished, finished
        self._position, self._at = 0.0, self._clock()
        self._told: float | None = None
        self._changed.set()

    # As the conversation sees it.

    def begin(self) -> None:
        self.stop()
        self._gain = self._wanted
        self._clear(finished=False)

    def play(self, samples: np.ndarray) -> None:
        self._queued += len(samples)

    def finish(self) -> None:
        self._finished = True
        self._changed.set()

    def stop(self) -> int:
        heard = self.heard
        if self._sent and not self.done:
            self._emit(np.zeros(0, np.float32), STOP)
        self._clear(finished=True)
        return heard

    def duck(self, on: bool) -> None:
        """What is sent from now on is softer; and so should be what the device still holds."""
        wanted = DUCKED if on else 1.0
        if wanted != self._wanted:
            self._wanted = wanted
            self._duck(on)

    @property
    def heard(self) -> int:
        now = self._clock()
        trusted = self._told is not None and now - self._told < _TRUSTED
        if not trusted:
            passed = (now - self._at) * SAMPLE_RATE
            self._position = min(float(self._sent), self._position + passed)
        self._at = now
        return int(self._position)

    @property
    def done(self) -> bool:
        return self._finished and self.heard >= self._queued

    # As the network sees it.

    def feed(self, turn: int, samples: np.ndarray) -> None:
        """More of the reply to ``turn``, which :meth:`play` has been told of."""
        self._turn = turn
        self._fed += len(samples)
        self._pending.append(samples)
        self._changed.set()

    def played(self, turn: int, samples: int) -> bool:
        """The device's word on its playhead; whether it can be."""
        if turn != self._turn or not self._sent:
            return True  # of a reply that is over: too late to matter
        if samples > self._sent:
            return False
        now = self._clock()
        self._position, self._at, self._told = float(samples), now, now
        self._changed.set()
        return True

    async def run(self) -> None:
        """Send what there is when it is due, until cancelled."""
        while True:
            early = self._sent - self.heard - self._lead
            if not self._ready():
                await self._change(None)
            elif early > 0:
                await self._change(early / SAMPLE_RATE)
            else:
                self._next()

    def _ready(self) -> bool:
        whole = self._finished and self._fed >= self._queued
        return bool(self._pending) or (whole and not self._closed)

    async def _change(self, seconds: float | None) -> None:
        self._changed.clear()
        if seconds is None:
            await self._changed.wait()
        else:
            await within(max(0.005, seconds), self._changed)

    def _next(self) -> None:
        samples = np.zeros(0, np.float32)
        if self._pending:
            wave = self._pending.popleft()
            samples, rest = wave[:_PACKET], wave[_PACKET:]
            if len(rest):
                self._pending.appendleft(rest)
        last = self._finished and not self._pending and self._fed >= self._queued
        self._emit(samples, (LAST if last else 0) | (0 if self._sent else FIRST))
        self._closed = last
        self._changed.set()

    def _emit(self, samples: np.ndarray, flags: int) -> None:
        self.heard  # noqa: B018  the playhead stands at the end of what was sent until now
        if len(samples) and (self._gain != 1.0 or self._wanted != 1.0):
            steps = np.linspace(self._gain, self._wanted, len(samples), dtype=np.float32)
            samples, self._gain = samples * steps, self._wanted
        packet = Packet(self._sequence, self._sent, samples, SAMPLE_RATE, self._turn, flags)
        self._sequence += 1
        self._sent += len(samples)
        self._send(packet)
