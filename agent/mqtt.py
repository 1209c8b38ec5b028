"""``python -m agent serve --mqtt mqtt://host``: devices converse over MQTT (docs/mqtt.md).

::

    {base}/{device}/audio/in, text/in, command, played ─► Service ─► Device ─► Session
    {base}/{device}/state, audio/out, text/out, event, metrics ◄─────── its own connection

What devices send arrives through one connection. Each device that is served has a second one, which
speaks for it: its last will says ``offline`` for that device alone.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import uuid
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated

import typer

from agent.commands import ConfigName, Debug, Overrides, mendable, stderr
from agent.config import Config, load_config

if TYPE_CHECKING:
    from agent.models import Models
    from agent.mqtt_device import Device
    from agent.mqtt_link import Broker

log = logging.getLogger(__name__)

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
        models = Models.load(settings, progress)
    asyncio.run(_serve(Service(broker, models, settings)))


async def _serve(service: Service) -> None:
    """Until SIGTERM or Ctrl-C."""
    work = asyncio.create_task(service.run())
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, work.cancel)
    ready = asyncio.create_task(service.connected())
    await asyncio.wait({work, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if service.is_connected:
        typer.echo(f"serving {service.pattern} at {service.address}; Ctrl-C ends", err=True)
    try:
        await work
    except asyncio.CancelledError:
        typer.echo("offline", err=True)


class Service:
    """Many devices of one broker.

    Attributes:
        refused: payloads that could not be understood, of all devices.
        unknown: messages on topics that are none.
    """

    def __init__(self, broker: Broker, models: Models, config: Config) -> None:
        from agent.mqtt_link import Link
        from agent.mqtt_wire import FROM_DEVICE

        self._broker, self._models, self._config = broker, models, config
        base = config.mqtt.base
        patterns = [(f"{base}/+/{name}", int("audio" not in name)) for name in FROM_DEVICE]
        name = f"spirit-agent-{uuid.uuid4().hex[:12]}"
        self._link = Link(broker, name, subscriptions=patterns, arrived=self._arrived)
        self._devices: dict[str, Device] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._told: OrderedDict[str, float] = OrderedDict()
        self.refused = self.unknown = 0

    @property
    def pattern(self) -> str:
        """The topics served."""
        return f"{self._config.mqtt.base}/+/#"

    @property
    def address(self) -> str:
        """The broker's."""
        return f"{self._broker.host}:{self._broker.port}"

    @property
    def is_connected(self) -> bool:
        return self._link.connected.is_set()

    async def connected(self) -> None:
        """Wait until devices can be heard."""
        await self._link.connected.wait()

    async def run(self) -> None:
        """Serve until cancelled; says ``offline`` for every device before it ends.

        Raises:
            UserError: the broker refuses us.
        """
        try:
            await self._link.run()
        finally:
            devices = list(self._devices.values())
            await asyncio.gather(*(device.leave("offline") for device in devices))
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _arrived(self, full: str, payload: bytes) -> None:
        from agent.mqtt_wire import BadMessage, parse, split

        place = split(self._config.mqtt, full)
        if place is None:
            self.unknown += 1
            return
        name, what = place
        device = self._devices.get(name)
        try:
            item = parse(self._config.mqtt, what, payload)
        except BadMessage as error:
            self.refused += 1
            if device is not None:
                device.refuse(what, str(error))
            else:
                self._tell(name, {"type": "error", "topic": what, "message": str(error)})
            return
        if device is None and what != "played":
            device = self._welcome(name)
        if device is not None:
            device.handle(item)

    def _welcome(self, name: str) -> Device | None:
        """A place for a device, if there is one."""
        from agent.mqtt_device import Device

        if len(self._devices) >= self._config.mqtt.max_sessions:
            most = self._config.mqtt.max_sessions
            self._tell(name, {"type": "busy", "message": f"{most} devices are being served"})
            return None
        device = Device(name, self._broker, self._models, self._config)
        self._devices[name] = device
        self._tasks[name] = task = asyncio.create_task(device.run(), name=name)
        task.add_done_callback(lambda done: self._gone(name, done))
        return device

    def _gone(self, name: str, task: asyncio.Task[None]) -> None:
        del self._devices[name], self._tasks[name]
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
