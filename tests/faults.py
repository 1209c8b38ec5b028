"""A bad network between MQTT and its broker: a proxy that knows enough of the protocol to harm it.

Sound is lost, doubled and delayed (and so comes in another order); everything else passes. Frozen,
a connection stays open and nothing goes through it any more: half-open TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator
from types import TracebackType

_PUBLISH = 3
_HELD = 1 << 20  # bytes that wait for a slow reader before nothing more is read for it


class Proxy:
    """Stands before a broker on 127.0.0.1; runs in a thread of its own. A context manager.

    Args:
        target: the broker's port.
        loss, doubled: share of QoS 0 messages, 0 to 1.
        jitter: each QoS 0 message is late by up to so many seconds, all of them equally likely.

    Attributes:
        port: where clients connect to.
        counts: messages ``passed``, ``lost``, ``doubled``; ``connections``.
    """

    def __init__(
        self, target: int, loss: float = 0.0, doubled: float = 0.0, jitter: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self._target, self._loss, self._doubled, self._jitter = target, loss, doubled, jitter
        self._chance = random.Random(seed)
        self._frozen: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self.counts: Counter[str] = Counter()
        self.port = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def freeze(self) -> int:
        """Of the connections that are open, not a byte passes any more, nor that they ended; new
        ones are as before. How many there were."""

        async def freeze() -> int:
            self._frozen |= self._open
            return len(self._open)

        return self._do(freeze())

    def _do(self, work):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _end(self) -> None:
        self._server.close()
        for task in tuple(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.counts["connections"] += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._join(reader, writer, task)
            if task in self._frozen:  # the other side is not to learn of it
                await asyncio.Event().wait()
        finally:
            self._open.discard(task)
            self._frozen.discard(task)
            writer.transport.abort()

    async def _join(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ) -> None:  # fmt: skip
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        ways = [
            asyncio.create_task(self._pass(reader, back, task)),
            asyncio.create_task(self._pass(there, writer, task)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            back.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        task: asyncio.Task[None],
    ) -> None:  # fmt: skip
        writer.transport.set_write_buffer_limits(_HELD)
        async for head, body in _packets(reader):
            if task in self._frozen:
                continue
            packet = head + body
            if head[0] >> 4 != _PUBLISH or head[0] & 0b110:
                writer.write(packet)
            else:
                self._harm(writer, packet)
            await writer.drain()

    def _harm(self, writer: asyncio.StreamWriter, packet: bytes) -> None:
        if self._chance.random() < self._loss:
            self.counts["lost"] += 1
            return
        twice = self._chance.random() < self._doubled
        self.counts["doubled"] += twice
        self.counts["passed"] += 1
        for _ in range(1 + twice):
            if self._jitter:
                late = self._chance.uniform(0.0, self._jitter)
                self._loop.call_later(late, _write, writer, packet)
            else:
                writer.write(packet)


def _write(writer: asyncio.StreamWriter, packet: bytes) -> None:
    if not writer.is_closing():
        writer.write(packet)


async def _packets(reader: asyncio.StreamReader) -> AsyncIterator[tuple[bytes, bytes]]:
    """MQTT's packets: the fixed header (type and flags, then the length in 1 to 4 bytes), the rest
    (MQTT 5, 2.1)."""
    while True:
        head = await reader.readexactly(1)
        length = shift = 0
        while True:
            digit = await reader.readexactly(1)
            head += digit
            length |= (digit[0] & 127) << shift
            shift += 7
            if digit[0] < 128:
                break
        yield head, await reader.readexactly(length)
