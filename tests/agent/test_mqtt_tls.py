"""Encrypted connections, certificates on both sides, and what waits at the broker for a service
that is away: on a real Mosquitto."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from mosquitto import Mosquitto, running
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

import agent.mqtt_link
from agent.errors import UserError
from agent.mqtt_link import Broker, Link, Outgoing, Subscription
from agent.mqtt_waits import stop
from agent.schema import MqttConfig

PATIENCE = 30.0

pytestmark = [pytest.mark.broker, pytest.mark.timeout(120)]


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


def authority(folder: Path, name: str) -> None:
    openssl(folder, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key",
            "-out", f"{name}.pem")  # fmt: skip


def certificate(folder: Path, name: str, by: str) -> None:
    openssl(folder, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
    (folder / "names").write_text(f"subjectAltName=DNS:{name}")
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{by}.pem", "-CAkey",
            f"{by}.key", "-CAcreateserial", "-days", "2", "-extfile", "names", "-out",
            f"{name}.pem")  # fmt: skip


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities; of the first, certificates of the broker and of the agent."""
    folder = tmp_path_factory.mktemp("papers")
    for name in ("ours", "theirs"):
        authority(folder, name)
    certificate(folder, "localhost", "ours")
    certificate(folder, "agent", "ours")
    for path in folder.iterdir():
        path.chmod(0o644)  # the broker may run as another user
    return folder


@pytest.fixture
def broker(papers: Path, tmp_path: Path) -> Iterator[Mosquitto]:
    """Only lets in who shows a certificate; its name is the user."""
    lines = (
        f"cafile {papers}/ours.pem\ncertfile {papers}/localhost.pem\nkeyfile {papers}/localhost.key"
        f"\nrequire_certificate true\nuse_identity_as_username true\nacl_file {tmp_path}/acl"
    )
    (tmp_path / "acl").write_text("user agent\ntopic readwrite spirit/#\n")
    with running(tmp_path, lines) as found:
        yield found


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Mosquitto]:
    with running(tmp_path) as found:
        yield found


async def connected(link: Link) -> None:
    """Run ``link`` until it is connected; raises what ends it before."""
    work = asyncio.ensure_future(link.run())
    waiting = asyncio.ensure_future(link.connected.wait())
    done, _ = await asyncio.wait(
        {work, waiting}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED
    )
    assert done, "no connection"
    for task in (work, waiting):
        task.cancel()
    await asyncio.gather(work, waiting, return_exceptions=True)
    if work in done:
        work.result()


def link(port: int, host: str = "localhost", **settings: Any) -> Link:
    return Link(Broker.parse(f"mqtts://{host}:{port}", MqttConfig(**settings)), "spirit-test")


def test_both_sides_show_certificates(broker: Mosquitto, papers: Path) -> None:
    async def converse() -> None:
        arrived: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        settings = MqttConfig(
            ca=str(papers / "ours.pem"),
            certificate=str(papers / "agent.pem"),
            key=str(papers / "agent.key"),
        )
        found = Broker.parse(f"mqtts://localhost:{broker.port}", settings)
        one = Link(found, "spirit-test", None, tuple, [Subscription("spirit/#")],
                   lambda topic, payload: arrived.put_nowait((topic, payload)))  # fmt: skip
        work = asyncio.create_task(one.run())
        one.send(Outgoing("spirit/robot/state", b"{}", 1))
        said = await asyncio.wait_for(arrived.get(), PATIENCE)
        assert said == ("spirit/robot/state", b"{}")  # what the certificate's name may do
        work.cancel()

    asyncio.run(converse())


@pytest.mark.parametrize(
    ("host", "ours"),
    [("localhost", "theirs.pem"), ("localhost", None), ("127.0.0.1", "ours.pem")],
    ids=["another authority", "the system's authorities", "another name"],
)
def test_a_broker_that_is_not_who_it_should_be_is_refused(
    broker: Mosquitto, papers: Path, host: str, ours: str | None
) -> None:
    ca = None if ours is None else str(papers / ours)
    with pytest.raises(UserError, match=r"do not trust each other .*check mqtt\.ca"):
        asyncio.run(connected(link(broker.port, host, ca=ca)))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"ca": "nowhere.pem"}, r"mqtt\.ca\): cannot be read"),
        ({"ca": "ours.key"}, r"mqtt\.ca\): no certificates"),
        ({"certificate": "agent.pem", "key": "localhost.key"}, "not a certificate and its key"),
        ({"key": "agent.key"}, r"a key without mqtt\.certificate"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    papers: Path, settings: dict[str, str], why: str
) -> None:
    config = MqttConfig(**{key: str(papers / name) for key, name in settings.items()})
    with pytest.raises(UserError, match=why):
        Broker.parse("mqtts://localhost", config)


def test_certificates_without_encryption_are_refused(papers: Path) -> None:
    with pytest.raises(UserError, match="are for mqtts://"):
        Broker.parse("mqtt://localhost", MqttConfig(ca=str(papers / "ours.pem")))


class Service:
    """A link under a name that stays, as the service has it."""

    def __init__(self, broker: Mosquitto, away: int = 60) -> None:
        found = Broker.parse(f"mqtt://localhost:{broker.port}", MqttConfig())
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self.link = Link(
            found, "spirit-agent-test", None, tuple, [Subscription("spirit/+/command")],
            lambda topic, payload: self.arrived.put_nowait(payload), away,
        )  # fmt: skip

    async def next(self) -> bytes:
        work = asyncio.create_task(self.link.run())
        try:
            return await asyncio.wait_for(self.arrived.get(), PATIENCE)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


def publish(broker: Mosquitto, *payloads: str, expiry: int | None = None) -> None:
    """Commands with QoS 1, and wait until the broker has them."""
    done: queue.Queue[int] = queue.Queue()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.on_publish = lambda c, u, mid, *rest: done.put(mid)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    properties = Properties(PacketTypes.PUBLISH)
    if expiry is not None:
        properties.MessageExpiryInterval = expiry
    for payload in payloads:
        client.publish("spirit/robot/command", payload, 1, properties=properties)
    for _ in payloads:
        done.get(timeout=PATIENCE)
    client.disconnect()
    client.loop_stop()


def test_a_command_given_while_the_service_is_away_waits_for_it(plain: Mosquitto) -> None:
    asyncio.run(connected(Service(plain).link))
    publish(plain, "first")
    publish(plain, "second", expiry=3600)
    service = Service(plain)

    async def both() -> list[bytes]:
        return [await service.next(), service.arrived.get_nowait()]

    assert asyncio.run(both()) == [b"first", b"second"]


def test_of_what_comes_while_there_is_no_time_for_it_nothing_is_discarded(tmp_path: Path) -> None:
    many = [str(n) for n in range(3000)]

    async def converse(broker: Mosquitto) -> list[bytes]:
        service = Service(broker)
        work = asyncio.create_task(service.link.run())
        await asyncio.wait_for(service.link.connected.wait(), PATIENCE)
        publish(broker, *many)  # the event loop stands still meanwhile
        arrived = [await asyncio.wait_for(service.arrived.get(), PATIENCE) for _ in many]
        work.cancel()
        return arrived

    with running(tmp_path, "allow_anonymous true\nmax_queued_messages 0") as broker:
        assert asyncio.run(converse(broker)) == [each.encode() for each in many]


def test_what_cannot_be_handled_ends_no_connection(plain: Mosquitto) -> None:
    async def converse() -> None:
        service = Service(plain)
        numbers: asyncio.Queue[int] = asyncio.Queue()
        service.link._arrived = lambda topic, payload: numbers.put_nowait(int(payload))
        work = asyncio.create_task(service.link.run())
        await asyncio.wait_for(service.link.connected.wait(), PATIENCE)
        publish(plain, "no number", "2")
        assert await asyncio.wait_for(numbers.get(), PATIENCE) == 2
        assert service.link.connections == 1
        work.cancel()

    asyncio.run(converse())


def test_a_connection_ends_when_it_is_told_to_even_as_a_message_is_acknowledged(
    plain: Mosquitto,
) -> None:
    """The message comes back together with its acknowledgement, and the end together with both."""

    async def converse() -> None:
        service = Service(plain)
        service.link.send(Outgoing("spirit/robot/command", b"{}", 1))
        work = asyncio.create_task(service.link.run())
        await asyncio.wait_for(service.arrived.get(), PATIENCE)
        await asyncio.wait_for(stop(work), PATIENCE)

    for _ in range(10):
        asyncio.run(converse())


def test_a_command_that_has_expired_does_not_come(plain: Mosquitto) -> None:
    asyncio.run(connected(Service(plain).link))
    publish(plain, "stale", expiry=1)
    time.sleep(2.5)  # the broker counts whole seconds, and tells nobody when they are over
    publish(plain, "fresh", expiry=3600)
    assert asyncio.run(Service(plain).next()) == b"fresh"


def test_two_services_of_the_same_name_are_told_why_they_lose_their_connections(
    plain: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mosquitto 2.0 itself gives no reason."""

    async def two() -> None:
        links = [Service(plain).link for _ in range(2)]
        work = [asyncio.create_task(link.run()) for link in links]
        told = asyncio.Event()
        monkeypatch.setattr(agent.mqtt_link.log, "error", lambda *said: told.set())
        await asyncio.wait_for(told.wait(), PATIENCE)
        for task in work:
            task.cancel()

    asyncio.run(two())
