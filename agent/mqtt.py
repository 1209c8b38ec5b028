"""``python -m agent serve --mqtt mqtt://host``: devices converse over MQTT (docs/mqtt.md).

::

    {base}/{device}/audio/in, text/in, command, played ─► Service ─► Device ─► Session
    {base}/{device}/state, audio/out, text/out, event, metrics ◄─────── its own connection

What devices send arrives through one connection. Each device that is served has a second one, which
speaks for it: its last will says ``offline`` for that device alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.commands import ConfigName, Debug, Overrides, mendable, stderr
from agent.config import Config, load_config

if TYPE_CHECKING:
    from agent.models import Models
    from agent.mqtt_device import Device
    from agent.mqtt_link import Broker, Link
    from agent.mqtt_pool import Pool

log = logging.getLogger(__name__)

_LEAVE, _LAST_WORD, _CLOSE = 1.4, 0.2, 0.3  # s for each part of the end: 2 s in all
_REMEMBERED = 1024  # devices that are not served, for telling them so at most once a second


@mendable
def serve(
    mqtt: Annotated[
        str, typer.Option("--mqtt", metavar="URL", help="mqtt://host[:port], or mqtts:// (TLS).")
    ],
    config: ConfigName = "nano",
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Serve robots and other devices over MQTT 5.

    The broker's user and password come from SPIRIT_MQTT_USER and SPIRIT_MQTT_PASSWORD, or from a
    file (--set mqtt.credentials=FILE). docs/mqtt.md describes the topics.

    Examples: serve --mqtt mqtt://localhost · serve --mqtt mqtts://broker --set mqtt.max_sessions=8
    """
    settings = load_config(config, overrides or ())
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING)
    try:
        from agent.mqtt_link import Broker
    except ModuleNotFoundError as error:
        if error.name not in ("aiomqtt", "paho"):
            raise
        from agent.errors import UserError

        raise UserError(
            "MQTT needs a package that is not here: pip install 'spiritlm-agent[mqtt]'"
        ) from None
    broker = Broker.parse(mqtt, settings.mqtt)
    from agent.models import Models
    from agent.show import loading

    with loading(stderr(), f"loading {config}", False) as progress:
        # All devices' and one that stays free: the models' own.
        models = Models.load(settings, progress, streams=settings.mqtt.max_sessions + 1)
    service = Service(broker, models, settings)

    def serving() -> None:
        _say(f"serving {service.pattern} at {service.address}; Ctrl-C ends")

    asyncio.run(until_told(service, serving))


async def until_told(service: Service, serving: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, which end the process.

    Args:
        serving: called once devices can be heard.

    Raises:
        UserError: the broker refuses us.
    """
    work = asyncio.create_task(service.run())
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, work.cancel)
    ready = asyncio.create_task(service.connected())
    await asyncio.wait({work, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if service.is_connected:
        serving()
    try:
        await work
    except asyncio.CancelledError:
        _say("offline")
    # All has been said. To wait for threads in mid-computation and to take an interpreter with
    # models in it apart would be seconds more on a busy machine.
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(0)


def _say(line: str) -> None:
    """For whoever reads; a log on a full disk is no reason to stop serving."""
    with contextlib.suppress(OSError):
        typer.echo(line, err=True)


class Service:
    """Many devices of one broker.

    Attributes:
        refused: payloads that could not be understood, of all devices.
        unknown: messages on topics that are none.
    """

    def __init__(self, broker: Broker, models: Models, config: Config) -> None:
        self._broker, self._models, self._config = broker, models, config
        self._devices: dict[str, Device] = {}
        self._most = config.mqtt.max_sessions
        self._ending = False
        self._pool: Pool | None = None
        self._link = self._pooled() if config.mqtt.shared else self._alone()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._told: OrderedDict[str, float] = OrderedDict()
        self.refused = self.unknown = 0

    def _alone(self) -> Link:
        """What comes while we are away waits for us at the broker, under a name that stays."""
        from agent.mqtt_link import Link, Subscription
        from agent.mqtt_wire import FROM_DEVICE

        base, away = self._config.mqtt.base, self._config.mqtt.away_seconds
        wanted = [Subscription(f"{base}/+/{n}", int("audio" not in n)) for n in FROM_DEVICE]
        name = base.replace("/", ".") if away else uuid.uuid4().hex[:12]
        return Link(self._broker, f"spirit-agent-{name}", None, tuple, wanted, self._arrived, away)

    def _pooled(self) -> Link:
        """Any of several services may get a message; see :mod:`agent.mqtt_pool`."""
        from agent.mqtt_link import Link, Outgoing
        from agent.mqtt_pool import Pool

        def send(message: Outgoing) -> None:
            self._link.send(message)

        def hello() -> list[Outgoing]:
            if self._link.connections:
                pool.reconnected()
            return pool.hello()

        def later(seconds: float, todo: Callable[[], None]) -> None:
            asyncio.get_running_loop().call_later(seconds, todo)

        def away() -> bool:
            return not self.is_connected

        me = uuid.uuid4().hex[:12]
        self._pool = pool = Pool(self._config.mqtt, me, send, self, later, away)
        wanted = pool.subscriptions()
        return Link(self._broker, f"spirit-agent-{me}", pool.will, hello, wanted, self._arrived)

    @property
    def pattern(self) -> str:
        """The topics served."""
        return f"{self._config.mqtt.base}/+/#"

    @property
    def address(self) -> str:
        """The broker's, and where devices are shared, our own name."""
        me = "" if self._pool is None else f" as {self._pool.me}"
        return f"{self._broker.host}:{self._broker.port}{me}"

    @property
    def is_connected(self) -> bool:
        return self._link.connected.is_set()

    async def connected(self) -> None:
        """Wait until devices can be heard."""
        await self._link.connected.wait()

    async def run(self) -> None:
        """Serve until cancelled; says ``offline`` for every device before it ends, within 2 s.

        Raises:
            UserError: the broker refuses us.
        """
        from agent.mqtt_waits import stop

        link = asyncio.create_task(self._link.run())
        try:
            await asyncio.shield(link)
        finally:
            self._ending = True
            if self._pool is None:
                link.cancel()  # what comes from now on waits at the broker for the next service
            devices = list(self._devices.values())
            await _all_within(_LEAVE, [device.leave("offline") for device in devices])
            if self._pool is not None:
                self._link.send(self._pool.will)  # the others take our devices now
                await self._link.sent(_LAST_WORD)
            await _all_within(_CLOSE, [stop(link, *self._tasks.values())])

    def _arrived(self, full: str, payload: bytes) -> None:
        from agent.mqtt_wire import BadMessage, split

        if self._pool is not None:
            try:
                self._pool.arrived(full, payload)
            except BadMessage:
                self.unknown += 1
        elif (place := split(self._config.mqtt, full)) is not None:
            self._given(*place, payload)
        else:
            self.unknown += 1

    def _given(self, name: str, what: str, payload: bytes) -> None:
        from agent.mqtt_wire import BadMessage, parse

        device = self._devices.get(name)
        if device is not None and not device.may(len(payload)):
            return
        try:
            item = parse(self._config.mqtt, what, payload)
        except BadMessage as error:
            self.refused += 1
            if device is not None:
                device.refuse(what, str(error))
            else:
                self._tell(name, {"type": "error", "topic": what, "message": str(error)})
            return
        if device is None and what != "played" and self._pool is None:
            device = self._welcome(name)
        if device is not None:
            device.handle(item)

    def _welcome(self, name: str) -> Device | None:
        """A place for a device, if there is one."""
        from agent.mqtt_device import Device, Pooled
        from stages.lm_batch import StreamsTakenError

        if self.room() <= 0:
            self.busy(name)
            return None
        pool, pooled = self._pool, None
        if pool is not None:
            pooled = Pooled(
                functools.partial(self._given, name),
                functools.partial(pool.settle, name),
                functools.partial(pool.confirm, name),
                functools.partial(pool.pass_on, name),
            )
        try:
            device = Device(name, self._broker, self._models, self._config, pooled)
        except StreamsTakenError:  # the model was loaded for fewer conversations
            self._most = len(self._devices)
            self.busy(name)
            return None
        self._devices[name] = device
        if pool is not None:
            pool.room_changed()
        self._tasks[name] = task = asyncio.create_task(device.run(), name=name)
        task.add_done_callback(lambda done: self._gone(name, done))
        return device

    # What the pool decides about.

    def room(self) -> int:
        """For how many devices more."""
        return 0 if self._ending else self._most - len(self._devices)

    def start(self, device: str) -> None:
        """Serve a device of the pool."""
        if self._welcome(device) is None and self._pool is not None:
            self._pool.release(device)

    def stop(self, device: str) -> None:
        """Another service of the pool has the device."""
        if device in self._tasks:
            self._tasks[device].cancel()

    def take(self, device: str, name: str, payload: bytes) -> None:
        """A message of a device that is ours came through the pool."""
        found = self._devices.get(device)
        if found is not None and found.wants(name, payload):
            self._given(device, name, payload)

    def busy(self, device: str) -> None:
        """Tell a device that there is no room for it."""
        message = f"{self._most} devices are being served: try again later"
        self._tell(device, {"type": "busy", "message": message})

    def _gone(self, name: str, task: asyncio.Task[None]) -> None:
        del self._devices[name], self._tasks[name]
        if self._pool is not None and not self._ending:
            self._pool.release(name)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: %s", name, task.exception())

    def _tell(self, name: str, message: dict[str, str]) -> None:
        """Tell a device something that concerns its messages: once a second, or we would be made
        to flood the broker."""
        from agent.mqtt_link import Outgoing
        from agent.mqtt_wire import as_json, topic

        now = asyncio.get_running_loop().time()
        if now - self._told.get(name, -1.0) < 1.0:
            return
        self._told[name] = now
        self._told.move_to_end(name)
        while len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
        self._link.send(Outgoing(topic(self._config.mqtt, name, "event"), as_json(message), 1))


async def _all_within(seconds: float, work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; what is not done by then is let go of."""
    tasks = [asyncio.create_task(each) for each in work]
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(error, Exception):
                log.error("at the end", exc_info=error)
