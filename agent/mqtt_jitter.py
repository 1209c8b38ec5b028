"""Audio packets from a network, put in order: what is late is waited for, what is lost is silence.

A packet in its place passes at once. Only where one is missing are the next held back, up to a
depth that grows when packets prove merely late, and shrinks again while all is well.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass

import numpy as np

from agent.mqtt_wire import FIRST, Packet

_MOST_HELD = 64  # packets
_LEAST_DEPTH = 0.04  # s
_CALM = 500  # packets in order after which the depth shrinks
_RESTART = 1024  # packets; who jumps so far has begun anew
_LONGEST_GAP = 1.0  # s of silence put in for what is lost


@dataclass
class Loss:
    """What became of the packets; ``concealed`` is in samples at the stream's rate."""

    received: int = 0
    lost: int = 0
    late: int = 0
    duplicated: int = 0
    reordered: int = 0
    concealed: int = 0
    restarts: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class JitterBuffer:
    """Puts packets in order.

    Args:
        most: seconds of audio held back at most.

    Attributes:
        counters: of the stream so far, restarts included.
        depth: seconds of audio held back at present where a packet is missing.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._held: dict[int, Packet] = {}
        self._given_up: deque[int] = deque(maxlen=256)
        self._next: int | None = None
        self._clock = 0  # that the next packet should have
        self._calm = 0
        self._last = 0  # samples of the last packet
        self.depth = min(most, 2 * _LEAST_DEPTH)
        self.counters = Loss()

    def push(self, packet: Packet) -> list[np.ndarray]:
        """Take a packet; return the sound that is ready, float32 at the packet's rate."""
        out: list[np.ndarray] = []
        self.counters.received += 1
        ahead = 0 if self._next is None else _distance(self._next, packet.sequence)
        if self._next is None or abs(ahead) > _RESTART or (packet.flags & FIRST and ahead):
            out += self._restart(packet)
            ahead = 0
        if ahead < 0 or packet.sequence in self._held:
            self._too_late(packet.sequence)
            return out
        self._held[packet.sequence] = packet
        self.counters.reordered += int(any(_distance(packet.sequence, s) > 0 for s in self._held))
        out += self._release()
        while self._held and (self._seconds() > self.depth or len(self._held) > _MOST_HELD):
            out += self._give_up()
        self._settle(bool(self._held))
        return out

    def flush(self) -> list[np.ndarray]:
        """Wait no longer for what is missing."""
        out: list[np.ndarray] = []
        while self._held:
            out += self._give_up()
        return out

    def _restart(self, packet: Packet) -> list[np.ndarray]:
        out = self.flush()
        self.counters.restarts += int(self._next is not None)
        self._given_up.clear()
        self._next, self._clock = packet.sequence, packet.clock
        return out

    def _too_late(self, sequence: int) -> None:
        if sequence in self._given_up:
            self._given_up.remove(sequence)
            self.counters.late += 1
            self.depth, self._calm = min(self._most, 2 * self.depth), 0
        else:
            self.counters.duplicated += 1

    def _settle(self, waiting: bool) -> None:
        self._calm = 0 if waiting else self._calm + 1
        if self._calm >= _CALM:
            self.depth, self._calm = max(min(self._most, _LEAST_DEPTH), self.depth / 2), 0

    def _release(self) -> list[np.ndarray]:
        """The packets that are in their place."""
        out = []
        while self._next in self._held:
            packet = self._held.pop(self._next)
            out.append(packet.samples)
            self._next = (self._next + 1) % 2**32
            self._clock = packet.clock + len(packet.samples)
            self._last = len(packet.samples)
        return out

    def _give_up(self) -> list[np.ndarray]:
        """Silence for what is missing before the first packet held, and what follows."""
        assert self._next is not None
        first = min(self._held, key=lambda s: _distance(self._next or 0, s))
        missing = _distance(self._next, first)
        packet = self._held[first]
        gap = _distance(self._clock % 2**32, packet.clock)
        if gap < 0 or gap > 2 * missing * max(self._last, 1):  # the clock makes no sense
            gap = missing * self._last
        gap = min(gap, int(_LONGEST_GAP * packet.rate))
        self._given_up.extend(
            (self._next + i) % 2**32 for i in range(max(0, missing - 256), missing)
        )
        self.counters.lost += missing
        self.counters.concealed += gap
        self._next = first
        return [np.zeros(gap, np.float32), *self._release()]

    def _seconds(self) -> float:
        return sum(len(p.samples) / p.rate for p in self._held.values())


def _distance(start: int, end: int) -> int:
    """How far ``end`` is ahead of ``start``, modulo 2**32."""
    return (end - start + 2**31) % 2**32 - 2**31
