"""A connection to the broker that comes back by itself."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiomqtt
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.errors import UserError
from agent.schema import MqttConfig

log = logging.getLogger(__name__)

_KEEPALIVE = 10  # s; a dead connection is noticed after one and a half of it
_TIMEOUT = 5.0  # s for the broker to answer
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0  # s between attempts to connect
_OUTBOX = 512  # messages
_REFUSED = {
    4: "bad credentials",
    5: "not authorised",
    134: "bad credentials",
    135: "not authorised",
}


@dataclass(frozen=True)
class Broker:
    """Where the broker is, and who we are to it. The password is never shown."""

    host: str
    port: int
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, config: MqttConfig) -> Broker:
        """``mqtt://host[:port]`` or ``mqtts://host[:port]``.

        Raises:
            UserError: it is something else, holds a password, or the credentials cannot be read.
        """
        expected = "expected mqtt://host[:port], or mqtts:// for TLS"
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise UserError(f"--mqtt: not an address; {expected}") from None
        if "@" in parts.netloc:
            raise UserError(
                "--mqtt: credentials do not belong on the command line, where everybody can read "
                "them; set SPIRIT_MQTT_USER and SPIRIT_MQTT_PASSWORD, or mqtt.credentials=FILE"
            )
        if parts.scheme not in ("mqtt", "mqtts") or not host or parts.path not in ("", "/"):
            raise UserError(f"--mqtt {url}: {expected}")
        user, password = _credentials(config)
        tls = parts.scheme == "mqtts"
        return cls(host, port or (8883 if tls else 1883), tls, user, password)


def _credentials(config: MqttConfig) -> tuple[str | None, str | None]:
    if config.credentials is None:
        return os.environ.get("SPIRIT_MQTT_USER"), os.environ.get("SPIRIT_MQTT_PASSWORD")
    path = Path(config.credentials).expanduser()
    try:
        line = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} (mqtt.credentials): cannot be read ({error})") from None
    user, found, password = line.partition(":")
    if not found or "\n" in line:
        raise UserError(f"{path} (mqtt.credentials): expected one line, user:password")
    return user, password


@dataclass(frozen=True)
class Outgoing:
    """A message to be published."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False


class Link:
    """One connection: publishes what it is given, hands on what arrives, and reconnects for ever.

    What has QoS 1 waits for a connection; sound is of no use later and is dropped and counted.

    Args:
        name: client identifier.
        will: published by the broker if this connection is lost.
        hello: what is published whenever a connection was made.
        arrived: called with the topic and the payload of each message; must not raise or wait.

    Attributes:
        connected: set while there is a connection.
        dropped: messages that were not sent.
        connections: made so far.
    """

    def __init__(
        self,
        broker: Broker,
        name: str,
        will: Outgoing | None = None,
        hello: Callable[[], Sequence[Outgoing]] = tuple,
        subscriptions: Sequence[tuple[str, int]] = (),
        arrived: Callable[[str, bytes], None] = lambda topic, payload: None,
    ) -> None:
        self._broker, self._name, self._will = broker, name, will
        self._hello, self._subscriptions, self._arrived = hello, subscriptions, arrived
        self._outbox: deque[Outgoing] = deque()
        self._more, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self.connected = asyncio.Event()
        self.dropped = 0
        self.connections = 0

    def send(self, message: Outgoing) -> None:
        """Publish, as soon as what is before it has been; never waits."""
        if not message.qos and not self.connected.is_set():
            self.dropped += 1
            return
        if len(self._outbox) >= _OUTBOX:
            sound = next((m for m in self._outbox if not m.qos), self._outbox[0])
            self._outbox.remove(sound)
            self.dropped += 1
        self._outbox.append(message)
        self._empty.clear()
        self._more.set()

    async def sent(self) -> None:
        """Wait until all that was given has been published."""
        await self._empty.wait()

    async def run(self) -> None:
        """Keep the connection, until cancelled.

        Raises:
            UserError: the broker refuses us; trying again would not help.
        """
        delay = _FIRST_DELAY
        while True:
            before = self.connections
            try:
                await self._connection()
            except aiomqtt.MqttError as error:
                self._look_at(error)
                log.warning("%s: no broker at %s:%d (%s)", self._name, self._broker.host,
                            self._broker.port, error)  # fmt: skip
            delay = _FIRST_DELAY if self.connections > before else min(2 * delay, _LONGEST_DELAY)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    def _look_at(self, error: aiomqtt.MqttError) -> None:
        """Give up where the very first connection is refused for who we are."""
        if self.connections or not isinstance(error, aiomqtt.MqttCodeError):
            return
        code = error.rc if isinstance(error.rc, int | None) else error.rc.value
        if code in _REFUSED:
            raise UserError(
                f"the broker at {self._broker.host}:{self._broker.port} refuses us "
                f"({_REFUSED[code]}): check SPIRIT_MQTT_USER and SPIRIT_MQTT_PASSWORD, or the file "
                "in mqtt.credentials"
            ) from None

    async def _connection(self) -> None:
        broker, will = self._broker, self._will
        async with aiomqtt.Client(
            broker.host,
            broker.port,
            username=broker.user,
            password=broker.password,
            identifier=self._name,
            protocol=aiomqtt.ProtocolVersion.V5,
            will=None if will is None else aiomqtt.Will(**vars(will)),
            timeout=_TIMEOUT,
            keepalive=_KEEPALIVE,
            clean_start=True,
            max_queued_incoming_messages=1024,
            tls_context=ssl.create_default_context() if broker.tls else None,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        ) as client:
            for pattern, qos in self._subscriptions:
                # What was retained before we came is not meant for us: a command is for now.
                options = SubscribeOptions(qos=qos, retainHandling=2)
                await client.subscribe(pattern, options=options)
            for message in self._hello():
                await _publish(client, message)
            self.connections += 1
            self.connected.set()
            await self._both(client)

    async def _both(self, client: aiomqtt.Client) -> None:
        """Send and receive until either fails."""
        tasks = [asyncio.create_task(self._pump(client)), asyncio.create_task(self._read(client))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self.connected.clear()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            payload = message.payload if isinstance(message.payload, bytes) else b""
            self._arrived(message.topic.value, payload)

    async def _pump(self, client: aiomqtt.Client) -> None:
        while True:
            while self._outbox:
                message = self._outbox.popleft()
                try:
                    await _publish(client, message)
                except BaseException:
                    if message.qos:
                        self._outbox.appendleft(message)
                    raise
            self._empty.set()
            self._more.clear()
            await self._more.wait()


async def _publish(client: aiomqtt.Client, message: Outgoing) -> None:
    await client.publish(message.topic, message.payload, message.qos, message.retain)
