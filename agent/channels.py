"""Bounded channels between stages, and the turns that make what flows in them stale.

A channel has a capacity and a policy for when it is full; no queue here is unbounded and no drop
is silent. Every item carries the turn it belongs to. Cancelling a turn is one integer going up:
whoever meets an item of a past turn, channel or stage, drops it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Generic, TypeVar

T = TypeVar("T")


class Policy(Enum):
    """What a full channel does with one more item."""

    BLOCK = "block"
    DROP_OLDEST = "drop oldest"
    DROP_NEWEST = "drop newest"


class ChannelClosed(Exception):
    """The channel was closed: nothing more goes in, and nothing more is in it."""


class Turns:
    """Which turns are still alive. One object is shared by all channels and stages of a session.

    Attributes:
        alive_from: turns before this one are past.
    """

    def __init__(self) -> None:
        self._next = 1
        self.alive_from = 0

    def begin(self) -> int:
        """The number of a new turn."""
        turn = self._next
        self._next += 1
        return turn

    def cancel(self, turn: int) -> None:
        """Let go of ``turn`` and all before it."""
        self.alive_from = max(self.alive_from, turn + 1)

    def stale(self, turn: int) -> bool:
        """Whether ``turn`` has been cancelled."""
        return turn < self.alive_from


@dataclass
class Counters:
    """What happened in one channel."""

    capacity: int
    policy: str
    put: int = 0
    taken: int = 0
    dropped: int = 0
    stale: int = 0
    skipped: int = 0
    high_water: int = 0

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self)


class Channel(Generic[T]):
    """A bounded first-in, first-out channel for the tasks of one event loop.

    ``turns`` may be shared; without it nothing ever goes stale.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        policy: Policy = Policy.BLOCK,
        turns: Turns | None = None,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"channel {name!r}: capacity {capacity}, expected at least 1")
        self.name = name
        self.counters = Counters(capacity, policy.value)
        self._policy = policy
        self._turns = turns or Turns()
        self._items: deque[tuple[int, T]] = deque()
        self._waiting: list[asyncio.Future[None]] = []
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T, turn: int = 0) -> bool:
        """Add ``item``; wait for room if the policy is to block.

        Returns:
            whether it went in: not if its turn is past or if it was the newest and dropped.

        Raises:
            ChannelClosed: the channel is closed, or was while waiting.
        """
        while True:
            if self._closed:
                raise ChannelClosed(self.name)
            if self._turns.stale(turn):
                self.counters.stale += 1
                return False
            if len(self._items) < self.counters.capacity or self._make_room():
                break
            if self._policy is Policy.DROP_NEWEST:
                self.counters.dropped += 1
                return False
            await self._change()
        self._add(item, turn)
        return True

    def offer(self, item: T, turn: int = 0) -> bool:
        """Add ``item`` if there is room at once; whether it went in. For what may be missed."""
        full = len(self._items) >= self.counters.capacity
        if full or self._closed or self._turns.stale(turn):
            self.counters.skipped += 1
            return False
        self._add(item, turn)
        return True

    async def get(self) -> T:
        """The oldest item whose turn is alive; waits for one.

        Raises:
            ChannelClosed: the channel is closed and empty.
        """
        while True:
            while self._items:
                turn, item = self._items.popleft()
                self.wake()
                if not self._turns.stale(turn):
                    self.counters.taken += 1
                    return item
                self.counters.stale += 1
            if self._closed:
                raise ChannelClosed(self.name)
            await self._change()

    def close(self) -> None:
        """Let nothing more in; what is inside can still be taken. Wakes everybody who waits."""
        self._closed = True
        self.wake()

    def wake(self) -> None:
        """Let those who wait look again, for instance after a turn was cancelled."""
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)

    async def _change(self) -> None:
        """Wait until something has changed."""
        change = asyncio.get_running_loop().create_future()
        self._waiting.append(change)
        await change

    def _add(self, item: T, turn: int) -> None:
        self._items.append((turn, item))
        self.counters.put += 1
        self.counters.high_water = max(self.counters.high_water, len(self._items))
        self.wake()

    def __aiter__(self) -> AsyncIterator[T]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[T]:
        while True:
            try:
                item = await self.get()
            except ChannelClosed:
                return
            yield item

    def _make_room(self) -> bool:
        """Drop what is stale, or the oldest if that is the policy; whether there is room now."""
        alive = [(turn, item) for turn, item in self._items if not self._turns.stale(turn)]
        self.counters.stale += len(self._items) - len(alive)
        self._items = deque(alive)
        if len(self._items) >= self.counters.capacity and self._policy is Policy.DROP_OLDEST:
            self._items.popleft()
            self.counters.dropped += 1
        return len(self._items) < self.counters.capacity
