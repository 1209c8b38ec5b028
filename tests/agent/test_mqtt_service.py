"""A service inside the test, with models that are played, on a real broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiomqtt
import pytest
from faults import Proxy
from mosquitto import Mosquitto, running

import agent.mqtt_link
from agent.config import load_config
from agent.models import Models
from agent.mqtt import Service
from agent.mqtt_link import Broker
from agent.mqtt_waits import stop
from bench.played import PlayedModel, PlayedModels, played
from stages.lm_batch import StreamsTakenError

PATIENCE = 60.0  # seconds after which a test gives up; nothing here is judged by time

pytestmark = [pytest.mark.broker, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running(tmp_path_factory.mktemp("broker")) as found:
        yield found


@asynccontextmanager
async def serving(
    broker: Mosquitto | Proxy, *settings: str, models: Models | None = None
) -> AsyncIterator[Service]:
    config = load_config("nano", settings)
    service = Service(Broker("127.0.0.1", broker.port), models or played(config, 3), config)
    work = asyncio.create_task(service.run())
    await asyncio.wait_for(service.connected(), PATIENCE)
    try:
        yield service
    finally:
        await stop(work)


class Robot:
    """A device that types; what it is told about each topic."""

    def __init__(self, client: aiomqtt.Client, name: str, base: str) -> None:
        self._client, self._place = client, f"{base}/{name}"
        self.log: list[dict[str, Any]] = []

    async def ask(self, text: str = "hello") -> None:
        await self._client.publish(f"{self._place}/text/in", text, qos=1)

    async def until(self, **wanted: Any) -> dict[str, Any]:
        """The first message that says so."""

        async def look() -> dict[str, Any]:
            async for message in self._client.messages:
                said: dict[str, Any] = json.loads(message.payload or b"{}")  # type: ignore[arg-type]
                self.log.append(said)
                if wanted.items() <= said.items():
                    return said
            raise AssertionError

        return await asyncio.wait_for(look(), PATIENCE)


@asynccontextmanager
async def robot(broker: Mosquitto, name: str, base: str = "spirit") -> AsyncIterator[Robot]:
    async with aiomqtt.Client("127.0.0.1", broker.port) as client:
        for topic in ("state", "event", "metrics"):
            await client.subscribe(f"{base}/{name}/{topic}", 1)
        yield Robot(client, name, base)


class Streams(PlayedModels):
    """Models that were loaded for so many streams."""

    free = 1

    def beside(self) -> PlayedModels:
        if not Streams.free:
            raise StreamsTakenError("all 1 streams are in use")
        Streams.free -= 1
        return super().beside()


def test_a_device_for_which_the_model_has_no_stream_is_told_busy_until_there_is_one(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_back(model: PlayedModel) -> None:
        Streams.free += 1

    monkeypatch.setattr(PlayedModel, "close", give_back)
    settings = ("mqtt.base=streams", "mqtt.max_sessions=4", "mqtt.idle_seconds=1")
    models: Any = Streams(load_config("nano", settings), 3)

    async def converse() -> None:
        async with (
            serving(broker, *settings, models=models) as service,
            robot(broker, "one", "streams") as one,
            robot(broker, "two", "streams") as two,
        ):
            await one.ask()
            await one.until(state="answering")
            await two.ask()
            told = await two.until(type="busy")
            assert told["message"] == "1 devices are being served: try again later"
            assert service.room() == 0
            await one.until(state="idle")
            while not service.room():
                await asyncio.sleep(0.01)
            await two.ask()
            await two.until(type="turn-ended", how="complete")

    asyncio.run(converse())


def test_a_conversation_that_nobody_goes_on_with_is_not_kept_for_ever(broker: Mosquitto) -> None:
    async def kept() -> list[int]:
        """The seconds that are left to what is retained, of the state and of the snapshot."""
        left = []
        async with aiomqtt.Client(
            "127.0.0.1", broker.port, protocol=aiomqtt.ProtocolVersion.V5
        ) as client:
            for topic in ("snapshot", "state"):  # what is retained of the first comes first
                await client.subscribe(f"kept/robot/{topic}", 1)
            async for message in client.messages:
                if message.topic.matches("+/+/state"):
                    return left
                left.append(message.properties.MessageExpiryInterval)  # type: ignore[union-attr]
        return left

    async def converse() -> None:
        async with robot(broker, "robot", "kept") as one:
            async with serving(broker, "mqtt.base=kept"):
                await one.ask()
                await one.until(type="turn-ended")
                (left,) = await kept()
                assert 0 < left <= 86_400
            async with serving(broker, "mqtt.base=kept", "mqtt.snapshot_seconds=1"):
                await one.ask()
                await one.until(type="turn-ended", turn=2)
        await asyncio.sleep(2.5)  # the broker counts whole seconds, and tells nobody when they pass
        assert await kept() == []

    asyncio.run(converse())


def test_a_service_that_was_cut_off_lets_go_of_a_device_which_hears_every_reply_once(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.mqtt_link, "_KEEPALIVE", 2)
    shared = ("mqtt.base=parted", "mqtt.shared=true")

    async def converse(trunk: Proxy) -> list[dict[str, Any]]:
        async with (
            robot(broker, "robot", "parted") as one,
            serving(trunk, *shared) as first,
        ):
            await one.ask()
            await one.until(type="turn-ended", turn=1)
            async with serving(broker, *shared) as second:
                await asyncio.to_thread(trunk.freeze)
                assert first.room() < second.room()  # it still believes to have the device
                await one.until(type="resumed", turn=1)
                while first.room() < 4 or not first.is_connected:
                    await asyncio.sleep(0.01)
                await one.ask()
                await one.until(type="turn-ended", turn=2)
                await one.ask()
                await one.until(type="turn-ended", turn=3)
                assert (first.room(), second.room()) == (4, 3)
        return one.log

    with Proxy(broker.port) as trunk:
        log = asyncio.run(converse(trunk))
    for kind in ("turn-started", "heard", "turn-ended"):
        assert [said["turn"] for said in log if said.get("type") == kind] == [1, 2, 3]
