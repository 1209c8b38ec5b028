"""The two streams of a sound card. Their callbacks move samples between the device and rings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import soxr

from agent.devices import Device, Direction, opening, portaudio
from agent.loudspeaker import Loudspeaker
from agent.ring import Ring, Samples, SampleTimes
from stages import SAMPLE_RATE

_RING_SECONDS = 4.0
_APART = SAMPLE_RATE // 100
_LEAST_LATENCY = 0.02  # seconds asked of the sound system: less stutters on a busy machine


class DeviceStream:
    """An open, running stream of one direction.

    Raises:
        UserError: the device cannot be opened.
    """

    direction: Direction

    def __init__(self, device: Device, block_ms: int) -> None:
        self.device = device
        self.rate = device.rate
        self.channels = min(2, device.channels(self.direction))
        self.stumbles = 0  # overflows or underflows that the sound system reported
        self.called = time.monotonic()
        self._block = round(self.rate * block_ms / 1000)
        self._stream = self._open()
        self.latency = float(self._stream.latency)

    def _open(self) -> Any:
        sd = portaudio()
        kind = sd.RawInputStream if self.direction == "input" else sd.RawOutputStream
        with opening(self.device):
            low = sd.query_devices(self.device.number)[f"default_low_{self.direction}_latency"]
            return kind(
                device=self.device.number,
                channels=self.channels,
                samplerate=self.rate,
                blocksize=self._block,
                latency=max(low, _LEAST_LATENCY),
                dtype="float32",
                callback=self._callback,
            )

    def start(self) -> None:
        """Let it run.

        Raises:
            UserError: the device refuses.
        """
        self.called = time.monotonic()
        try:
            with opening(self.device):
                self._stream.start()
        except BaseException:
            self.close()
            raise

    def trouble(self, stall_seconds: float) -> str:
        """What is wrong with it; empty if nothing is."""
        if not self._stream.active:
            return "it stopped"
        silent = time.monotonic() - self.called
        return f"nothing for {silent:.1f} s" if silent > stall_seconds else ""

    def close(self) -> None:
        """Stop at once, whatever state the device is in."""
        with contextlib.suppress(portaudio().PortAudioError):
            self._stream.abort(ignore_errors=True)
        with contextlib.suppress(portaudio().PortAudioError):
            self._stream.close(ignore_errors=True)

    def _callback(self, data: Any, frames: int, times: Any, status: Any) -> None:
        raise NotImplementedError


class InputStream(DeviceStream):
    """A microphone; ``arrived`` is called in the sound system's thread after each block."""

    direction: Direction = "input"

    def __init__(self, device: Device, block_ms: int, arrived: Callable[[], None]) -> None:
        self._arrived = arrived
        channels = min(2, device.inputs)
        self.ring = Ring(round(_RING_SECONDS * device.rate) * channels)
        self._times = SampleTimes(device.rate)
        self._resample = _resampler(device.rate)
        self._seen = (0, 0.0)
        self._taken = 0  # samples at 16 kHz
        super().__init__(device, block_ms)

    def _callback(self, data: Any, frames: int, times: Any, status: Any) -> None:
        self.called = time.monotonic()
        self.stumbles += bool(status)
        adc = times.inputBufferAdcTime or times.currentTime - self.latency
        self._seen = (self.ring.written // self.channels, adc)
        self.ring.write(np.frombuffer(data, np.float32))
        self._arrived()

    def take(self) -> Samples:
        """What was captured since, mono at 16 kHz. If far behind, only the last of it."""
        self._times.see(*self._seen)
        if len(self.ring) > self.ring.capacity // 2:  # the oldest is dropped, and counted
            behind = len(self.ring) // 2 // self.channels * self.channels
            self.ring.dropped += behind
            self.ring.skip(behind)
            self._taken += round(behind / self.channels * SAMPLE_RATE / self.rate)
        frames = len(self.ring) // self.channels
        captured = self.ring.take(frames * self.channels)
        mono = captured.reshape(-1, self.channels).mean(axis=1, dtype=np.float32)
        return np.nan_to_num(self._resample(mono))

    def captured_at(self, sample: int) -> float:
        """When sample number ``sample`` (16 kHz, of those taken) was in the air, s."""
        return self._times.time(round((sample + self._taken) * self.rate / SAMPLE_RATE))


class OutputStream(DeviceStream):
    """A loudspeaker playing what ``speaker`` fills in, and remembering what it played."""

    direction: Direction = "output"

    def __init__(self, device: Device, block_ms: int, speaker: Loudspeaker) -> None:
        self._speaker = speaker
        self._ring = Ring(round(_RING_SECONDS * device.rate))
        self._mono = np.zeros(round(device.rate), np.float32)
        self._times = SampleTimes(device.rate)
        self._resample = _resampler(device.rate)
        self._seen = (0, 0.0)
        self._past = np.zeros(0, np.float32)
        self._first = 0  # place of the first of them, samples at 16 kHz
        self._next = 0
        super().__init__(device, block_ms)

    @property
    def clock(self) -> Callable[[], float]:
        """Gives the seconds in which the device's blocks are dated."""
        return lambda: float(self._stream.time)

    def _callback(self, data: Any, frames: int, times: Any, status: Any) -> None:
        self.called = time.monotonic()
        self.stumbles += bool(status)
        dac = times.outputBufferDacTime or times.currentTime + self.latency
        mono = self._mono[:frames]
        mono[:] = 0
        self._speaker.fill(mono, dac)
        self._seen = (self._ring.written, dac)
        self._ring.write(mono)
        np.frombuffer(data, np.float32).reshape(frames, self.channels)[:] = mono[:, None]

    def played(self, start: float, count: int, lead: int) -> tuple[Samples, Samples]:
        """``count`` samples at 16 kHz that left the loudspeaker from ``start`` seconds on.

        And as many from ``lead`` samples later on. Calls in a row continue each other seamlessly,
        for a canceller learns from each sample; only where the clocks have come apart by more than
        10 ms is there a jump.
        """
        self._times.see(*self._seen)
        fresh = self._resample(self._ring.take(len(self._ring)))
        self._past = np.concatenate((self._past, fresh))
        surplus = len(self._past) - round(_RING_SECONDS * SAMPLE_RATE)
        if surplus > 0:
            self._past, self._first = self._past[surplus:], self._first + surplus
        begin = round(self._times.sample(start) * SAMPLE_RATE / self.rate)
        if abs(begin - self._next) > _APART:
            self._next = begin
        begin, self._next = self._next, self._next + count
        return self._piece(begin, count), self._piece(begin + lead, count)

    def _piece(self, begin: int, count: int) -> Samples:
        """Of what was played, zeros where that is not known."""
        begin -= self._first
        part = self._past[max(0, begin) : max(0, begin + count)]
        out = np.zeros(count, np.float32)
        at = min(count, max(0, -begin))
        out[at : at + len(part)] = part[: count - at]
        return out


def _resampler(rate: float) -> Callable[[Samples], Samples]:
    """A stream from ``rate`` to 16 kHz; its sample k is sample ``k * rate / 16000``."""
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    return lambda samples: stream.resample_chunk(samples)
