"""A service inside the test, with models that are played, on a real broker."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import numpy as np
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

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "mqtt.md"
TOLD = ("state", "event", "metrics")
PATIENCE = 60.0  # seconds after which a test gives up; nothing here is judged by time

pytestmark = [pytest.mark.broker, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running(tmp_path_factory.mktemp("broker")) as found:
        yield found


@asynccontextmanager
async def serving(
    broker: Mosquitto | Proxy, *settings: str, models: Models | None = None, user: str | None = None
) -> AsyncIterator[Service]:
    config = load_config("nano", settings)
    address = Broker("127.0.0.1", broker.port, None, user, user)
    service = Service(address, models or played(config, 3), config)
    work = asyncio.create_task(service.run())
    await asyncio.wait_for(service.connected(), PATIENCE)
    try:
        yield service
    finally:
        await stop(work)


class Robot:
    """A device that types; what it is told about each topic."""

    def __init__(self, client: aiomqtt.Client, name: str, base: str) -> None:
        self.client, self._place = client, f"{base}/{name}"
        self.log: list[dict[str, Any]] = []
        self.seen: set[str] = set()  # topics

    async def ask(self, text: str = "hello") -> None:
        await self.client.publish(f"{self._place}/text/in", text, qos=1)

    async def until(self, **wanted: Any) -> dict[str, Any]:
        """The first message that says so."""

        async def look() -> dict[str, Any]:
            async for message in self.client.messages:
                self.seen.add(message.topic.value)
                if message.topic.value.removeprefix(f"{self._place}/") not in TOLD:
                    continue
                said: dict[str, Any] = json.loads(message.payload or b"{}")  # type: ignore[arg-type]
                self.log.append(said)
                if wanted.items() <= said.items():
                    return said
            raise AssertionError

        try:
            return await asyncio.wait_for(look(), PATIENCE)
        except asyncio.TimeoutError:
            raise AssertionError(f"{wanted} is not among {self.log[-30:]}") from None


@asynccontextmanager
async def robot(
    broker: Mosquitto, name: str, base: str = "spirit", user: str | None = None
) -> AsyncIterator[Robot]:
    async with aiomqtt.Client(
        "127.0.0.1", broker.port, username=user, password=user, protocol=aiomqtt.ProtocolVersion.V5
    ) as client:
        for topic in TOLD:
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
                await one.ask("hello again")
                await one.until(type="turn-ended", turn=2)
                await one.ask("and again")
                await one.until(type="turn-ended", turn=3)
                assert (first.room(), second.room()) == (4, 3)
        return one.log

    with Proxy(broker.port) as trunk:
        log = asyncio.run(converse(trunk))
    for kind in ("turn-started", "heard", "turn-ended"):
        assert [said["turn"] for said in log if said.get("type") == kind] == [1, 2, 3]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Mosquitto]:
    """Set up as docs/mqtt.md says, for the users ``agent``, ``one`` and ``two``."""
    rules = re.findall(r"```\n# acl.*?\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "acl").write_text(rules[0])
    for user in ("agent", "one", "two"):
        made = ["-c"] if user == "agent" else []
        command = ["mosquitto_passwd", *made, "-b", str(tmp_path / "passwords"), user, user]
        subprocess.run(command, check=True, capture_output=True)
    lines = f"allow_anonymous false\npassword_file {tmp_path}/passwords\nacl_file {tmp_path}/acl"
    with running(tmp_path, lines) as found:
        yield found


def test_under_the_documented_acl_a_device_of_a_pool_reads_and_commands_only_its_own(
    guarded: Mosquitto,
) -> None:
    shared = ("mqtt.shared=true", "mqtt.group=services-5e1d")

    async def meddle(two: aiomqtt.Client, services: list[str]) -> None:
        """Everything that a device might try against another, and against the services."""
        for pattern in ("spirit/#", "$share/spirit-agents/spirit/+/text/in"):
            await two.subscribe(pattern, 1)
        stop_it, mine = json.dumps({"do": "interrupt"}), {"agent": "0" * 12, "settled": True}
        for service in services:
            await two.publish(f"spirit/agents/{service}", b"", 1, retain=True)
            await two.publish(f"spirit/agents/{service}/one/command", stop_it, 1)
        await two.publish("spirit/agents/" + "0" * 12, json.dumps({"room": 9}), 1, retain=True)
        await two.publish("spirit/one/owner", json.dumps(mine), 1, retain=True)
        await two.publish("spirit/one/snapshot", b"{}", 1, retain=True)
        await two.publish("spirit/one/command", stop_it, 1)

    async def converse() -> Robot:
        async with (
            serving(guarded, *shared, user="agent") as first,
            serving(guarded, *shared, user="agent") as second,
            robot(guarded, "one", user="one") as one,
            robot(guarded, "two", user="two") as two,
        ):
            assert first._pool is not None and second._pool is not None
            for turn in range(1, 6):
                await meddle(two.client, [first._pool.me, second._pool.me])
                await one.ask(f"hello {turn}")
                await one.until(type="turn-ended", turn=turn, how="complete")
            await two.ask()
            await two.until(type="turn-ended", turn=1)
            assert first.room() + second.room() == 6
        return two

    two = asyncio.run(converse())
    assert {said["turn"] for said in two.log if said.get("type") == "turn-started"} == {1}
    assert all(topic.startswith("spirit/two/") for topic in two.seen)


def test_a_command_that_was_retained_is_not_obeyed(broker: Mosquitto) -> None:
    async def converse() -> Robot:
        async with robot(broker, "robot", "retained") as one:
            command = json.dumps({"do": "set", "settings": {"reply.max_seconds": 1}})
            await one.client.publish("retained/robot/command", command, 1, retain=True)
            async with serving(broker, "mqtt.base=retained"):
                await one.ask()
                await one.until(type="turn-ended")
        return one

    assert not [said for said in asyncio.run(converse()).log if said.get("type") == "set"]


def test_while_motors_run_nothing_is_heard(broker: Mosquitto) -> None:
    def second(number: int, level: float) -> list[bytes]:
        """20 ms at a time, as docs/mqtt.md says."""
        wave = np.full(320, level * 32767, "<i2").tobytes()
        numbers = range(50 * number, 50 * (number + 1))
        return [struct.pack("<BBHIIi", 1, 0, 16_000, n, 320 * n, 0) + wave for n in numbers]

    async def converse(gate: bool) -> list[str]:
        base = f"gate-{gate}"
        async with (
            serving(broker, f"mqtt.base={base}"),
            robot(broker, "robot", base) as one,
        ):
            command = json.dumps({"do": "gate", "on": gate})
            await one.client.publish(f"{base}/robot/command", command, 1)
            await one.until(state="listening")
            for packet in (*second(0, 0.5), *second(1, 0.0)):
                await one.client.publish(f"{base}/robot/audio/in", packet)
            if not gate:
                await one.until(type="turn-ended")
            await one.ask("typed")
            await one.until(type="heard", text="typed")
        return [said["text"] for said in one.log if said.get("type") == "heard"]

    assert asyncio.run(converse(gate=False)) == ["a tone", "typed"]
    assert asyncio.run(converse(gate=True)) == ["typed"]
