"""A bad world around the service, each fault for itself; ``python -m bench.soak`` has all at once.

The service is the real one in a process of its own, with models that are played; the broker is
Mosquitto; devices know nothing but the protocol.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import resource
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

import aiomqtt
import numpy as np
import pytest
from faults import Proxy
from mosquitto import Mosquitto, running

from agent.mqtt_waits import stop
from agent.recorder import Recorder
from bench.memory import resident_mb_of
from bench.raw_mqtt import connect, publish, subscribe
from bench.soak import Device

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds after which a test gives up; nothing here is judged by time

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(300)]


class World:
    """A broker, and a service that reaches it through a proxy."""

    def __init__(
        self, broker: Mosquitto, trunk: Proxy, sessions: int = 8, log: TextIO | None = None
    ) -> None:
        self.broker, self.trunk, self.port = broker, trunk, broker.port
        command = [sys.executable, "-m", "bench.played"]
        command += ["--mqtt", f"mqtt://127.0.0.1:{trunk.port}", "--set"]
        command += [f"mqtt.max_sessions={sessions}"]
        self.service = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert self.service.stdout is not None
        assert self.service.stdout.readline() == "serving\n"

    def end(self) -> None:
        self.service.kill()
        self.service.wait()
        assert self.service.stdout is not None
        self.service.stdout.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The same for nearly all tests here."""
    with (
        running(tmp_path_factory.mktemp("broker")) as broker,
        Proxy(broker.port) as trunk,
    ):
        made = World(broker, trunk)
        yield made
        made.end()


@asynccontextmanager
async def robot(name: str, port: int, skew: float = 1.0) -> AsyncIterator[Device]:
    device = Device(name, port, skew)
    running = asyncio.create_task(device.run())
    try:
        yield device
    finally:
        await stop(running)


async def turns(device: Device, more: int) -> None:
    """Wait for so many turns more."""
    wanted = device.tally.counts["turns"] + more

    async def wait() -> None:
        while device.tally.counts["turns"] < wanted:
            await asyncio.sleep(0.05)

    try:
        await asyncio.wait_for(wait(), PATIENCE)
    except asyncio.TimeoutError:
        pytest.fail(f"{device.name}: {device.tally}")


def test_sound_that_is_lost_doubled_and_late_by_200_ms_is_conversed_over(
    world: World,
) -> None:
    async def converse(port: int) -> Device:
        async with robot("robot", port, skew=1.01) as device:
            await turns(device, 3)
            return device

    with Proxy(world.port, loss=0.05, doubled=0.05, jitter=0.2) as proxy:
        device = asyncio.run(converse(proxy.port))
    assert proxy.counts["lost"]
    assert proxy.counts["doubled"]
    assert device.tally.counts["error"] == 0
    assert device.tally.counts["sessions"] == 1


def test_a_half_open_connection_of_the_service_is_noticed_and_replaced(
    world: World,
) -> None:
    trunk = world.trunk

    async def converse() -> None:
        async with robot("robot", world.port) as device:
            await turns(device, 1)
            before = trunk.counts["connections"]
            assert await asyncio.to_thread(trunk.freeze) >= 2
            await turns(device, 1)
            assert trunk.counts["connections"] > before

    asyncio.run(converse())


def test_a_half_open_connection_of_a_device_harms_nobody_else(
    world: World,
) -> None:
    async def converse() -> None:
        with Proxy(world.port) as proxy:
            async with robot("robot", proxy.port) as one, robot("other", world.port) as other:
                await turns(one, 1)
                await asyncio.to_thread(proxy.freeze)
                await turns(other, 2)
                await turns(one, 1)  # by a connection of its own accord

    asyncio.run(converse())


def test_a_broker_killed_again_and_again_ends_no_session(
    world: World,
) -> None:
    async def converse() -> None:
        async with robot("robot", world.port) as device:
            await turns(device, 1)
            for _ in range(3):
                await asyncio.to_thread(world.broker.kill)
                await asyncio.to_thread(world.broker.start)
                await turns(device, 1)
            assert device.tally.counts["sessions"] == 1

    asyncio.run(converse())


def test_a_subscriber_that_never_reads_costs_no_memory(
    world: World,
) -> None:
    deaf = socket.socket()
    # So little that the broker, too, soon holds what it cannot get rid of.
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    deaf.connect(("127.0.0.1", world.port))
    deaf.sendall(connect("deaf") + subscribe("spirit/deaf/#"))

    async def ask() -> None:
        while True:
            deaf.sendall(publish("spirit/deaf/text/in", b"tell me a story"))
            await asyncio.sleep(0.05)

    def unread() -> int:
        (count,) = struct.unpack("i", fcntl.ioctl(deaf, termios.FIONREAD, bytes(4)))
        return int(count)

    async def both() -> None:
        async with robot("other", world.port) as device:
            await turns(device, 1)
            before = resident_mb_of(world.service.pid)
            asking = asyncio.create_task(ask())
            await turns(device, 2)
            full = unread()
            await turns(device, 1)
            asking.cancel()
            assert unread() == full > 0  # nothing more went in
            assert resident_mb_of(world.service.pid) - before < 50

    with deaf:
        asyncio.run(both())


def test_two_hundred_at_once_are_served_or_told_that_all_are_busy(
    world: World,
) -> None:
    async def come(name: str) -> str:
        async with aiomqtt.Client("127.0.0.1", world.port, timeout=PATIENCE) as client:
            await client.subscribe(f"spirit/{name}/+", 1)
            await client.publish(f"spirit/{name}/text/in", "hello", qos=1)
            async for message in client.messages:
                said = json.loads(message.payload)  # type: ignore[arg-type]
                if said.get("type") == "busy":
                    return "busy"
                if said.get("state") == "answering":
                    return "served"
        return ""

    async def everybody() -> list[str]:
        every = asyncio.gather(*(come(f"robot-{n}") for n in range(200)))
        return await asyncio.wait_for(every, 2 * PATIENCE)

    outcomes = asyncio.run(everybody())
    assert 1 <= outcomes.count("served") <= 8
    assert outcomes.count("served") + outcomes.count("busy") == 200


def test_sigterm_while_twenty_devices_are_answered_says_offline_to_each_and_ends(
    tmp_path: Path,
) -> None:
    """What they have asked beyond that waits at the broker, for the next service."""
    names = [f"robot-{n}" for n in range(20)]

    async def watch(world: World) -> dict[str, list[str]]:
        said: dict[str, list[str]] = {name: [] for name in names}
        async with aiomqtt.Client("127.0.0.1", world.port) as client:
            await client.subscribe("spirit/+/state", 1)
            await client.subscribe("spirit/+/event", 1)
            for name in names * 4:  # one after the other, so that each is being answered all along
                await client.publish(f"spirit/{name}/text/in", "hello", qos=1)
            told = False
            async for message in client.messages:
                what = json.loads(message.payload)  # type: ignore[arg-type]
                said[message.topic.value.split("/")[1]].append(what.get("state") or what["type"])
                if not told and all("answering" in each for each in said.values()):
                    world.service.send_signal(signal.SIGTERM)
                    told = True
                if all(each[-1:] == ["offline"] for each in said.values()):
                    return said
        return said

    async def wait_for(requests: int, port: int) -> None:
        """Be the next service."""
        async with aiomqtt.Client(
            "127.0.0.1", port, identifier="spirit-agent-spirit", clean_start=False,
            protocol=aiomqtt.ProtocolVersion.V5,
        ) as client:  # fmt: skip
            for _ in range(requests):
                message = await anext(client.messages)
                assert message.topic.matches("spirit/+/text/in")

    with (
        running(tmp_path) as broker, Proxy(broker.port) as trunk,
        Path("/dev/full").open("w") as log,  # as on a full disk, every word of it fails
    ):  # fmt: skip
        world = World(broker, trunk, len(names), log)
        try:
            said = asyncio.run(asyncio.wait_for(watch(world), PATIENCE))
            assert world.service.wait(PATIENCE) == 0
        finally:
            world.end()
        left = 4 * len(names) - sum(each.count("turn-started") for each in said.values())
        asyncio.run(asyncio.wait_for(wait_for(left, broker.port), PATIENCE))
    for each in said.values():
        assert each.count("turn-started") == each.count("turn-ended") >= 1
        assert each.count("offline") == 1  # said, and no last will after it


def test_a_full_disk_ends_the_recording_and_nothing_else(tmp_path: Path) -> None:
    """The kernel refuses to let any file grow further, as a full disk does."""
    told: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    recorder = Recorder(tmp_path, {}, told.append)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        for _ in range(100):
            recorder.audio(np.zeros(1600, np.float32), np.zeros(1600, np.float32))
        recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert told
    (kept,) = tmp_path.glob("*/recording.*")
    assert 0 < kept.stat().st_size <= 100_000
