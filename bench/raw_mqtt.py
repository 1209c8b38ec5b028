"""The least of MQTT 3.1.1 that a device needs, as bytes: a load generator must cost little.

A hundred devices of a full client library in one process would measure that library.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable

_CONNECT, _PUBLISH, _SUBSCRIBE = 0x10, 0x30, 0x82
_QOS_1 = 0x02


def connect(name: str) -> bytes:
    """CONNECT with a clean session and no keep-alive."""
    return _packet(_CONNECT, b"\x00\x04MQTT\x04\x02\x00\x00" + _string(name))


def subscribe(pattern: str, qos: int = 1) -> bytes:
    """SUBSCRIBE to one topic filter."""
    return _packet(_SUBSCRIBE, b"\x00\x01" + _string(pattern) + bytes([qos]))


def publish(topic: str, payload: bytes) -> bytes:
    """PUBLISH with QoS 0."""
    return _packet(_PUBLISH, _string(topic) + payload)


class RawClient(asyncio.Protocol):
    """One connection.

    Args:
        arrived: called with topic and payload of each message; what has QoS 1 is acknowledged.
    """

    def __init__(self, arrived: Callable[[str, bytes], None]) -> None:
        self._arrived = arrived
        self._unread = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, port: int, name: str, patterns: list[str], arrived: Callable[[str, bytes], None]
    ) -> RawClient:
        """Connect to a broker on this machine and subscribe; what it answers is not waited for."""
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(lambda: cls(arrived), "127.0.0.1", port)
        client.write(b"".join([connect(name), *map(subscribe, patterns)]))
        return client

    def write(self, packets: bytes) -> None:
        """Send packets as they are."""
        assert self._transport is not None
        self._transport.write(packets)

    def close(self) -> None:
        """End the connection without a good-bye."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while (found := _split(self._unread)) is not None:
            head, start, end = found
            if head & 0xF0 == _PUBLISH:
                self._take(head, bytes(self._unread[start:end]))
            del self._unread[:end]

    def _take(self, head: int, body: bytes) -> None:
        after = 2 + int.from_bytes(body[:2], "big")
        topic = body[2:after].decode()
        if head & _QOS_1:
            self.write(b"\x40\x02" + body[after : after + 2])  # PUBACK
            after += 2
        self._arrived(topic, body[after:])


def _packet(head: int, body: bytes) -> bytes:
    size, left = bytearray(), len(body)
    while True:
        left, low = left >> 7, left & 0x7F
        size.append(low | (0x80 if left else 0))
        if not left:
            return bytes([head]) + bytes(size) + body


def _string(text: str) -> bytes:
    return struct.pack(">H", len(text.encode())) + text.encode()


def _split(data: bytearray) -> tuple[int, int, int] | None:
    """Head, start of the body and end of the first whole packet."""
    size, shift = 0, 0
    for at in range(1, min(len(data), 5)):
        size |= (data[at] & 0x7F) << shift
        shift += 7
        if not data[at] & 0x80:
            end = at + 1 + size
            return (data[0], at + 1, end) if len(data) >= end else None
    return None
