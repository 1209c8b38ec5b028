"""Where a reply is played, as the conversation sees it: one reply at a time, and a real playhead.

The sound card (:mod:`agent.soundcard`) implements it, a device at the other end of a network does,
and so does :class:`Immediate`, for files.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


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
