"""What lies between a device's callback and the rest: rings, clocks, and how much is kept ready.

A callback runs in the sound system's thread and must neither wait nor allocate. Each ring has one
writer and one reader, and each of its two counters is moved by one of them only; so no lock.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]


class Ring:
    """At most ``capacity`` float32 samples, first in, first out; one thread writes, one reads."""

    def __init__(self, capacity: int) -> None:
        self._data = np.zeros(capacity, np.float32)
        self.written = 0
        self.read = 0
        self.dropped = 0  # samples that found no room

    @property
    def capacity(self) -> int:
        """Samples it can hold."""
        return len(self._data)

    def __len__(self) -> int:
        """Samples waiting."""
        return self.written - self.read

    def write(self, samples: Samples) -> int:
        """Append what there is room for; what is not is dropped and counted. Returns how much."""
        count = min(len(samples), self.capacity - len(self))
        self.dropped += len(samples) - count
        at = self.written % self.capacity
        first = min(count, self.capacity - at)
        self._data[at : at + first] = samples[:first]
        self._data[: count - first] = samples[first:count]
        self.written += count
        return count

    def read_into(self, out: Samples) -> int:
        """Move samples to the beginning of ``out``; returns how many there were."""
        count = min(len(out), len(self))
        at = self.read % self.capacity
        first = min(count, self.capacity - at)
        out[:first] = self._data[at : at + first]
        out[first:count] = self._data[: count - first]
        self.read += count
        return count

    def take(self, count: int) -> Samples:
        """The next ``count`` samples, or as many as there are."""
        out = np.empty(min(count, len(self)), np.float32)
        return out[: self.read_into(out)]

    def skip(self, count: int) -> None:
        """Forget the oldest ``count`` samples (the reader's)."""
        self.read += min(count, len(self))

    def reset(self) -> None:
        """Empty and count from 0 again; only while neither writer nor reader is at work."""
        self.written = self.read = 0


class SampleTimes:
    """When each sample of a device passed the air, from the noisy times of its blocks.

    A block's time jitters by the sound system's period; samples do not. So a straight line follows
    the blocks slowly, and jumps only if it is ``jump`` seconds off: the device has stumbled.
    """

    def __init__(self, rate: float, jump: float = 0.03, follow: float = 0.05) -> None:
        self._rate, self._jump, self._follow = rate, jump, follow
        self._zero: float | None = None  # time of sample 0, s
        self._blocks = 0

    def see(self, sample: int, time: float) -> None:
        """Sample number ``sample`` passed at ``time`` (seconds of the device's clock)."""
        zero = time - sample / self._rate
        off = 0.0 if self._zero is None else zero - self._zero
        if self._zero is None or abs(off) > self._jump:
            self._zero, self._blocks = zero, 1
        else:
            self._blocks += 1
            self._zero += max(self._follow, 1 / self._blocks) * off  # at first the mean of all

    def sample(self, time: float) -> int:
        """The sample that passes at ``time``."""
        return 0 if self._zero is None else round((time - self._zero) * self._rate)

    def time(self, sample: int) -> float:
        """When ``sample`` passes, s."""
        return (self._zero or 0.0) + sample / self._rate


class JitterTarget:
    """How many seconds of sound are kept ready before a reply starts.

    It doubles with every underrun, up to ``most``, and halves its distance to ``least`` with every
    ``calm`` seconds that played without one.
    """

    def __init__(self, least: float, most: float, calm: float = 30.0) -> None:
        self._least, self._most, self._calm = least, max(least, most), calm
        self._played = 0.0
        self.seconds = least

    def underrun(self) -> None:
        """There was nothing to play in the middle of a reply."""
        self._played = 0.0
        self.seconds = min(self._most, max(2 * self.seconds, 0.01))

    def played(self, seconds: float) -> None:
        """So much played smoothly."""
        self._played += seconds
        while self._played >= self._calm:
            self._played -= self._calm
            self.seconds = self._least + (self.seconds - self._least) / 2
