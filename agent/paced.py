"""A loudspeaker without a sound card: what is to be played goes to a function, block by block.

So a reply can leave through a pipe (``python -m agent talk --stdio``) or be measured, by the same
:class:`agent.loudspeaker.Loudspeaker` that plays it on a device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from agent.loudspeaker import Loudspeaker
from agent.ring import Samples
from stages import SAMPLE_RATE


class PacedOutput:
    """Plays ``speaker`` at the clock's pace: a context manager with a thread of its own.

    Args:
        write: called with each block (float32 ``[n]`` at 16 kHz, zeros where nothing is played)
            and the seconds of ``clock`` at which it leaves. What it raises ends the playing.
        block_ms: length of a block.

    Attributes:
        failed: what ``write`` raised.
    """

    def __init__(
        self,
        speaker: Loudspeaker,
        write: Callable[[Samples, float], None],
        block_ms: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._speaker = speaker
        self._write = write
        self._block = block_ms * SAMPLE_RATE // 1000
        self._clock = clock
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._play, name="spirit-paced", daemon=True)
        self.failed: Exception | None = None

    def __enter__(self) -> PacedOutput:
        self._speaker.attach(SAMPLE_RATE, self._clock)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        self._speaker.detach()

    def _play(self) -> None:
        start, played = self._clock(), 0
        while True:
            due = start + played / SAMPLE_RATE
            if self._over.wait(max(0.0, due - self._clock())):
                return
            block = np.zeros(self._block, np.float32)
            self._speaker.fill(block, due)
            try:
                self._write(block, due)
            except Exception as error:
                self.failed = error
                return
            played += self._block
