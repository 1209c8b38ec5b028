"""A connection to the broker that comes back by itself."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.errors import UserError
from agent.mqtt_waits import stop, within
from agent.schema import MqttConfig

log = logging.getLogger(__name__)

_KEEPALIVE = 10  # s; a dead connection is noticed after one and a half of it
_TIMEOUT = 5.0  # s for the broker to answer
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0  # s between attempts to connect
_OUTBOX = 512  # messages
_SHORT, _SUSPICIOUS = 2.0, 4  # s; so many connections in a row that last no longer are odd
_TAKEN_OVER = 142  # not every broker says so
_RIVAL = (
    "the connection is lost again and again, as it is where another service has the same topics: "
    "give it another mqtt.base, or both of them mqtt.shared=true"
)
_REFUSED = {
    134: "bad credentials",
    135: "not authorised",
}


@dataclass(frozen=True)
class Broker:
    """Where the broker is, and who we are to it. The password is never shown."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, config: MqttConfig) -> Broker:
        """``mqtt://host[:port]`` or ``mqtts://host[:port]``.

        Raises:
            UserError: it is something else, holds a password, or the credentials or certificates
                cannot be read.
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
        tls = _tls(config) if parts.scheme == "mqtts" else None
        if tls is None and (config.ca or config.certificate):
            raise UserError(f"--mqtt {url}: mqtt.ca and mqtt.certificate are for mqtts://")
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


def _tls(config: MqttConfig) -> ssl.SSLContext:
    """Verifies the broker, its name included; shows our own certificate if there is one."""
    try:
        context = ssl.create_default_context(cafile=_file("ca", config.ca))
    except ssl.SSLError as error:
        raise UserError(f"{config.ca} (mqtt.ca): no certificates in PEM ({error.reason})") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    certificate, key = _file("certificate", config.certificate), _file("key", config.key)
    if certificate is None:
        if key is not None:
            raise UserError(f"{key} (mqtt.key): a key without mqtt.certificate")
        return context
    password = os.environ.get("SPIRIT_MQTT_KEY_PASSWORD", "")  # never asked for at a terminal
    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        raise UserError(
            f"{certificate} (mqtt.certificate), {key or 'the same file'} (mqtt.key): not a "
            f"certificate and its key in PEM, or SPIRIT_MQTT_KEY_PASSWORD is wrong ({error.reason})"
        ) from None
    return context


def _file(name: str, value: str | None) -> Path | None:
    if value is None:
        return None
    path = Path(value).expanduser()
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise UserError(f"{path} (mqtt.{name}): cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Subscription:
    """Topics that are wanted; ``retained``: also what the broker holds of them already."""

    pattern: str
    qos: int = 1
    retained: bool = False


@dataclass(frozen=True)
class Outgoing:
    """A message to be published; the broker throws it away after ``expiry`` seconds, if not 0."""

    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    expiry: int = 0


class Link:
    """One connection: publishes what it is given, hands on what arrives, and reconnects for ever.

    What has QoS 1 waits for a connection; sound is of no use later and is dropped and counted.

    Args:
        name: client identifier.
        will: published by the broker if this connection is lost.
        hello: asked, whenever a connection was made, for what is to be published once what the
            broker holds of ``subscriptions`` has come.
        arrived: called with the topic and the payload of each message; must not raise or wait.
        away: seconds for which the broker keeps the subscriptions, and what comes with QoS 1, while
            we are away; ``name`` must then be the same again. With 0 a connection begins anew.

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
        subscriptions: Sequence[Subscription] = (),
        arrived: Callable[[str, bytes], None] = lambda topic, payload: None,
        away: int = 0,
    ) -> None:
        self._broker, self._name, self._will, self._away = broker, name, will, away
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

    async def sent(self, seconds: float) -> bool:
        """Wait, so long at most, until all that was given has been published; whether it has."""
        return await within(seconds, self._empty)

    async def run(self) -> None:
        """Keep the connection, until cancelled.

        Raises:
            UserError: the broker refuses us; trying again would not help.
        """
        delay, short = _FIRST_DELAY, 0
        while True:
            before, began = self.connections, time.monotonic()
            try:
                await self._connection()
            except aiomqtt.MqttError as error:
                _raise_if_cancelled()
                self._look_at(error)
                log.warning("%s: no broker at %s:%d (%s)", self._name, self._broker.host,
                            self._broker.port, error)  # fmt: skip
            lasted = self.connections > before and time.monotonic() - began > _SHORT
            short = 0 if lasted else short + (self.connections > before)
            if short == _SUSPICIOUS:
                log.error("%s: %s", self._name, _RIVAL)
            delay = _FIRST_DELAY if lasted else min(2 * delay, _LONGEST_DELAY)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    def _look_at(self, error: aiomqtt.MqttError) -> None:
        """Give up where the very first connection is refused for who we are, or who they are."""
        code = _code(error)
        if code == _TAKEN_OVER:
            raise UserError(f"{self._name}: {_RIVAL}") from None
        if self.connections:
            return
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ssl.SSLError):
            raise UserError(
                f"the broker at {self._broker.host}:{self._broker.port} and we do not trust each "
                f"other ({getattr(cause, 'verify_message', '') or cause.reason}): check mqtt.ca, "
                "the name in --mqtt, mqtt.certificate and mqtt.key"
            ) from None
        if code in _REFUSED:
            raise UserError(
                f"the broker at {self._broker.host}:{self._broker.port} refuses us "
                f"({_REFUSED[code]}): check SPIRIT_MQTT_USER and SPIRIT_MQTT_PASSWORD, or the file "
                "in mqtt.credentials"
            ) from None

    async def _connection(self) -> None:
        broker, last = self._broker, self._will
        will = None
        if last is not None:
            will = aiomqtt.Will(last.topic, last.payload, last.qos, last.retain)
        async with aiomqtt.Client(
            broker.host,
            broker.port,
            username=broker.user,
            password=broker.password,
            identifier=self._name,
            protocol=aiomqtt.ProtocolVersion.V5,
            will=will,
            timeout=_TIMEOUT,
            keepalive=_KEEPALIVE,
            clean_start=not self._away,
            properties=self._properties(),
            queue_type=cast(Any, lambda maxsize: _Straight(self._arrived)),
            tls_context=broker.tls,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        ) as client:
            hello = self._hello()
            for each in self._subscriptions:
                # A command that was retained before we came is not meant for us: it is for now.
                handling = 0 if each.retained else 2
                options = SubscribeOptions(qos=each.qos, retainHandling=handling)
                await client.subscribe(each.pattern, options=options)
            for message in hello:
                await _publish(client, message)
            _raise_if_cancelled()
            self.connections += 1
            self.connected.set()
            await self._both(client)

    def _properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._away
        return properties

    async def _both(self, client: aiomqtt.Client) -> None:
        """Send and receive until either fails."""
        tasks = [asyncio.create_task(self._pump(client)), asyncio.create_task(self._read(client))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self.connected.clear()
            await stop(*tasks)

    async def _read(self, client: aiomqtt.Client) -> None:
        async for _ in client.messages:  # none comes here; it ends with the connection
            pass

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
                _raise_if_cancelled()
            self._empty.set()
            self._more.clear()
            await self._more.wait()


class _Straight(asyncio.Queue[aiomqtt.Message]):
    """Hands on at once what aiomqtt would put into a queue.

    That queue is unbounded, or else discards what the broker has been told was taken. Without one,
    what there is no time for yet stays with the broker.
    """

    def __init__(self, arrived: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._hand_on = arrived

    def put_nowait(self, message: aiomqtt.Message) -> None:
        payload = message.payload if isinstance(message.payload, bytes) else b""
        try:
            self._hand_on(message.topic.value, payload)
        except Exception:  # to paho it would be a broken connection, and the message come again
            log.exception("%s: %d bytes", message.topic.value, len(payload))


def _code(error: BaseException | None) -> int | None:
    """The reason the broker gave."""
    if not isinstance(error, aiomqtt.MqttCodeError):
        return None if error is None else _code(error.__cause__)
    return error.rc if isinstance(error.rc, int | None) else int(error.rc.value)


async def _publish(client: aiomqtt.Client, message: Outgoing) -> None:
    properties = None
    if message.expiry:
        properties = Properties(PacketTypes.PUBLISH)
        properties.MessageExpiryInterval = message.expiry
    await client.publish(message.topic, message.payload, message.qos, message.retain, properties)


def _raise_if_cancelled() -> None:
    """What aiomqtt makes of a cancellation may be an error of its own, or nothing (see
    :mod:`agent.mqtt_waits`): without this the connection would go on, or be made again."""
    task = asyncio.current_task()
    # Python 3.10 does not tell; there :func:`agent.mqtt_waits.stop` cancels once more.
    if task is not None and getattr(task, "cancelling", int)():
        raise asyncio.CancelledError
