"""Where a reply is played, as the conversation sees it: one reply at a time, and a real playhead.

The sound card (:mod:`agent.soundcard`) implements it, a device at the other end of a network does,
and so do :class:`Immediate`, for files, and :class:`Clocked`, which plays to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from stages import SAMPLE_RATE


class Playback(Protocol):
    """Plays replies: float32 mono at 16 kHz. No method waits for the device."""

    def begin(self) -> None:
        """A new reply: :attr:`heard` counts from 0 again. What was playing is dropped."""

    def play(self, samples: np.ndarray) -> None:
        """More of the reply."""

    def finish(self) -> None:
        """The reply is complete: what there is of it is to be played, however little."""

    def stop(self) -> int:
        """Fall silent within 20 ms, drop the rest, and return :attr:`heard`."""

    def duck(self, on: bool) -> None:
        """Play softly, or as loud as before."""

    @property
    def heard(self) -> int:
        """Samples of the reply that have left the loudspeaker, the device's own delay included."""

    @property
    def done(self) -> bool:
        """The reply was finished and has been heard to its end, or there is none."""


class Immediate:
    """A playback that takes no time: what is handed over counts as heard."""

    def __init__(self) -> None:
        self._heard = 0

    def begin(self) -> None:
        self._heard = 0

    def play(self, samples: np.ndarray) -> None:
        self._heard += len(samples)

    def finish(self) -> None:
        """Nothing is ever waiting."""

    def stop(self) -> int:
        return self._heard

    def duck(self, on: bool) -> None:
        """Nobody listens yet."""

    @property
    def heard(self) -> int:
        return self._heard

    @property
    def done(self) -> bool:
        return True


class Clocked:
    """A playback that takes as long as the sound does, and plays it to nobody.

    Args:
        clock: gives seconds; the playhead follows it.
        latency: seconds from handing over a reply's first sample to its leaving the loudspeaker.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, latency: float = 0.0
    ) -> None:
        self._clock = clock
        self._latency = latency
        self._since: float | None = None
        self._silence()

    def begin(self) -> None:
        self._silence()
        self._finished = False

    def play(self, samples: np.ndarray) -> None:
        if self._since is None:
            self._since = self._clock() + self._latency
        self._queued += len(samples)

    def finish(self) -> None:
        self._finished = True

    def stop(self) -> int:
        heard = self.heard
        self._silence()
        return heard

    def duck(self, on: bool) -> None:
        """Nobody listens."""

    @property
    def heard(self) -> int:
        if self._since is None:
            return 0
        return max(0, min(self._queued, int((self._clock() - self._since) * SAMPLE_RATE)))

    @property
    def done(self) -> bool:
        return self._finished and self.heard >= self._queued

    def _silence(self) -> None:
        self._queued, self._finished, self._since = 0, True, None
