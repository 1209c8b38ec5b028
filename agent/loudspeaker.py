"""Playing replies: what the loudspeaker's callback plays, and how far it has come.

Two voices take turns, one for each reply, so that one may fade away while the next begins.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np
import soxr

from agent.ring import JitterTarget, Ring, Samples
from stages import SAMPLE_RATE

CAPACITY_SECONDS = 120.0  # of one reply that are not yet played
FADE_SECONDS = 0.02
DUCKED = 10 ** (-12 / 20)
_STAMPS = 1024  # blocks on their way to the loudspeaker, of which times are kept


class Voice:
    """One reply at the device's rate. The callback calls :meth:`mix_into`, all else is others'."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._ring = Ring(math.ceil(CAPACITY_SECONDS * rate))
        self._fall = fade(round(FADE_SECONDS * rate))
        self._scratch = np.zeros(round(rate), np.float32)
        self.reset()

    def reset(self) -> None:
        """A new reply. The callback must not be playing this voice."""
        self._ring.reset()
        # soxr aligns its output with its input, so that sample k is sample k * 16000 / rate
        self._resampler = soxr.ResampleStream(SAMPLE_RATE, self.rate, 1, dtype="float32")
        self._stamps: deque[tuple[float, int, int]] = deque(maxlen=_STAMPS)
        self.started = self.finished = self.stopping = False
        self.given = 0  # samples at 16 kHz handed over
        self.underruns = 0
        self._from = self._to = 1.0  # gains
        self._at = len(self._fall)  # how far the way from one to the other is gone

    @property
    def waiting(self) -> int:
        """Samples at the device's rate."""
        return len(self._ring)

    @property
    def spent(self) -> bool:
        """Nothing more will come out of it."""
        if self.stopping:
            return self._at >= len(self._fall) or not (self.started or self.finished)
        return self.finished and not len(self._ring)

    def room(self) -> int:
        """How many samples at 16 kHz it can still take."""
        free = self._ring.capacity - len(self._ring)
        return max(0, int(free * SAMPLE_RATE / self.rate) - SAMPLE_RATE // 10)

    def add(self, samples: Samples, last: bool = False) -> None:
        """More of the reply, or its end."""
        self.given += len(samples)
        self._ring.write(self._resampler.resample_chunk(samples, last=last))
        self.finished = self.finished or last

    def turn_to(self, gain: float) -> None:
        """Become louder or softer, within 20 ms."""
        self._from, self._to, self._at = self._gain(), gain, 0

    def stop(self) -> None:
        """Fade away within 20 ms."""
        self.turn_to(0.0)
        self.stopping = True

    def mix_into(self, out: Samples, dac: float) -> bool:
        """Add the next samples to ``out``, which leaves the device at ``dac``. Full or not."""
        if not (self.started or self.finished) or self.spent:
            return True
        scratch = self._scratch[: len(out)]
        position = self._ring.read
        count = self._ring.read_into(scratch)
        if not self.stopping:
            self._stamps.append((dac, position, count))
        steps = self._fall[self._at : self._at + count]
        turning = len(steps)
        if turning:
            scratch[:turning] *= self._to + (self._from - self._to) * steps
            self._at += turning
        if self._to != 1.0:
            scratch[turning:count] *= self._to
        out[:count] += scratch[:count]
        return count == len(out)

    def heard(self, now: float) -> int:
        """Samples of the reply at 16 kHz that have left the loudspeaker by ``now``."""
        position = 0
        for dac, start, count in reversed(list(self._stamps)):
            if dac <= now:
                position = start + min(count, int((now - dac) * self.rate))
                break
        return min(self.given, int(position * SAMPLE_RATE / self.rate))

    def left(self, now: float) -> bool:
        """All that it played has left the loudspeaker."""
        if not self._stamps:
            return True
        dac, _, count = self._stamps[-1]
        return now >= dac + count / self.rate

    def _gain(self) -> float:
        if self._at >= len(self._fall):
            return self._to
        return float(self._to + (self._from - self._to) * self._fall[self._at])


class Loudspeaker:
    """A :class:`agent.playback.Playback` on a device. It holds :data:`CAPACITY_SECONDS` of a reply.

    ``clock`` gives the seconds that the times of :meth:`fill` are in.
    """

    def __init__(self, target: JitterTarget) -> None:
        self.target = target
        self.refused = 0  # samples at 16 kHz that came while there was no device
        self.underruns = 0
        self._voices: tuple[Voice, Voice] | None = None
        self._clock: Callable[[], float] = float
        self._current: Voice | None = None
        self._fading: Voice | None = None
        self._heard = 0
        self._finished = True
        self._gain = 1.0

    # The device's side.

    def attach(self, rate: float, clock: Callable[[], float]) -> None:
        """A device is there, at ``rate`` Hz."""
        if self._voices is None or self._voices[0].rate != rate:
            self._voices = (Voice(rate), Voice(rate))
        self._clock = clock

    def detach(self) -> None:
        """The device went away, and with it the rest of the reply; :attr:`heard` stands still."""
        self._heard = self.heard
        self._current = self._fading = None
        self._clock = float
        self._voices = None

    def fill(self, out: Samples, dac: float) -> None:
        """Called back by the device: ``out`` (zeros, mono) leaves the loudspeaker at ``dac`` s."""
        fading, current = self._fading, self._current
        if fading is not None:
            fading.mix_into(out, dac)
        if current is not None and not current.mix_into(out, dac) and not current.finished:
            current.started = False
            current.underruns += 1

    # The conversation's side.

    def begin(self) -> None:
        """A new reply: :attr:`heard` counts from 0 again. What was playing fades away."""
        self.stop()
        self._heard, self._finished = 0, False
        if self._voices is None:
            return
        one, other = self._voices
        voice = one if self._fading is other else other
        voice.reset()
        voice.turn_to(self._gain)
        self._current = voice

    def play(self, samples: np.ndarray) -> None:
        """More of the reply; dropped and counted while there is no device.

        Raises:
            ValueError: more than :data:`CAPACITY_SECONDS` would wait.
        """
        voice = self._current
        if voice is None:
            self.refused += len(samples)
            return
        if len(samples) > voice.room():
            raise ValueError(
                f"{len(samples)} samples are more than the loudspeaker takes now "
                f"({voice.room()}): at most {CAPACITY_SECONDS:.0f} s may wait to be played"
            )
        voice.add(np.asarray(samples, np.float32))
        self._start(voice)

    def finish(self) -> None:
        """The reply is complete: what there is of it is to be played, however little."""
        self._finished = True
        if self._current is not None and not self._current.finished:
            self._current.add(np.zeros(0, np.float32), last=True)
            self._start(self._current)

    def stop(self) -> int:
        """Fade away within 20 ms, drop the rest, and return :attr:`heard`."""
        self._heard, self._finished = self.heard, True
        voice = self._current
        if voice is not None:
            self._settle(voice)
            self.target.played(self._heard / SAMPLE_RATE)
            self._current = None
            voice.stop()
            self._fading = voice
        return self._heard

    def duck(self, on: bool) -> None:
        """Play 12 dB softer, or as loud as before."""
        self._gain = DUCKED if on else 1.0
        if self._current is not None:
            self._current.turn_to(self._gain)

    @property
    def heard(self) -> int:
        """Samples of the reply that have left the loudspeaker, the device's own delay included."""
        if self._current is not None:
            self._heard = max(self._heard, self._current.heard(self._clock()))
        return self._heard

    @property
    def done(self) -> bool:
        """The reply was finished and has been heard to its end, or there is none."""
        voice = self._current
        if voice is None:
            return self._finished
        return voice.spent and voice.left(self._clock())

    @property
    def busy(self) -> bool:
        """Something is to be played."""
        return self._current is not None and not self.done

    def _start(self, voice: Voice) -> None:
        self._settle(voice)
        ready = voice.waiting >= self.target.seconds * voice.rate
        voice.started = voice.started or voice.finished or ready

    def _settle(self, voice: Voice) -> None:
        """Learn from how it went since."""
        if voice.underruns:
            self.underruns += voice.underruns
            voice.underruns = 0
            self.target.underrun()


def fade(length: int) -> Samples:
    """A raised cosine from 1 to 0."""
    phase = (np.arange(length, dtype=np.float32) + 1) / max(1, length)
    return (0.5 + 0.5 * np.cos(np.pi * phase)).astype(np.float32)
