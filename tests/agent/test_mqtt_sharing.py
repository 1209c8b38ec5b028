"""Several services share devices: each stays with one, and moves when that one is gone."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mosquitto import Mosquitto, running

from agent.mqtt_link import Outgoing
from agent.mqtt_pool import Copies, Pool
from agent.mqtt_snapshot import Snapshot
from agent.mqtt_wire import BadMessage
from agent.schema import MqttConfig

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
SERVE = "import typer; from agent.mqtt import serve; typer.run(serve)"
CONFIG = MqttConfig()


class Cluster:
    """Services and a broker that brings everything to everybody in one order, when asked to."""

    def __init__(self, *rooms: int) -> None:
        self.later: list[Callable[[], None]] = []
        self.retained: dict[str, Outgoing] = {}
        self.wires: list[tuple[int, Outgoing]] = []
        self.members = [Member(self, n, room) for n, room in enumerate(rooms)]
        for member in self.members:
            for message in member.pool.hello():
                self.publish(message)
        self.settle_down()

    def publish(self, message: Outgoing) -> None:
        if message.retain:
            self.retained[message.topic] = message
        self.wires += [(n, message) for n, m in enumerate(self.members) if m.there]

    def settle_down(self) -> None:
        """Everything that was sent arrives."""
        while self.wires:
            n, message = self.wires.pop(0)
            member = self.members[n]
            mine = not message.topic.startswith("spirit/agents/") or member.wants(message.topic)
            if member.there and mine:
                member.pool.arrived(message.topic, message.payload)

    def device_says(self, member: int, device: str, payload: bytes) -> None:
        """The shared subscription picks one."""
        self.members[member].pool.arrived(f"spirit/{device}/text/in", payload)

    def kill(self, member: int) -> None:
        self.members[member].there = False
        self.publish(self.members[member].pool.will)

    def time_passes(self) -> None:
        due, self.later = self.later, []
        for each in due:
            each()
            self.settle_down()

    def serving(self, device: str) -> list[int]:
        return [n for n, m in enumerate(self.members) if m.there and device in m.devices]


class Member:
    """A service that writes down what it is told to do."""

    def __init__(self, cluster: Cluster, number: int, room: int) -> None:
        self.places, self.there = room, True
        self.devices: dict[str, list[bytes]] = {}
        self.turned_away: list[str] = []
        me = f"{number:012x}"
        self.away = False
        self.pool = Pool(
            CONFIG, me, cluster.publish, self, lambda seconds, todo: cluster.later.append(todo),
            lambda: self.away,
        )  # fmt: skip

    def wants(self, topic: str) -> bool:
        parts = topic.split("/")
        return len(parts) == 3 or parts[2] == self.pool.me

    def room(self) -> int:
        return self.places - len(self.devices)

    def start(self, device: str) -> None:
        self.devices[device] = []
        self.pool.settle(device)

    def stop(self, device: str) -> None:
        del self.devices[device]

    def take(self, device: str, name: str, payload: bytes) -> None:
        self.devices[device].append(payload)

    def busy(self, device: str) -> None:
        self.turned_away.append(device)


def test_two_services_that_hear_of_a_device_at_once_agree_on_one() -> None:
    cluster = Cluster(4, 4, 4)
    for member in (2, 0, 1):  # nobody has heard of anybody's claim yet
        cluster.device_says(member, "robot", b"%d" % member)
    cluster.settle_down()
    assert cluster.serving("robot") == [2]
    assert sorted(cluster.members[2].devices["robot"]) == [b"0", b"1", b"2"]
    assert json.loads(cluster.retained["spirit/robot/owner"].payload)["agent"] == f"{2:012x}"


def test_a_device_stays_where_it_is_whoever_gets_its_messages() -> None:
    cluster = Cluster(4, 4)
    cluster.device_says(0, "robot", b"first")
    cluster.settle_down()
    cluster.device_says(1, "robot", b"second")
    cluster.settle_down()
    assert cluster.serving("robot") == [0]
    assert cluster.members[0].devices["robot"] == [b"first"]  # the second came directly


@given(st.integers(2, 5), st.integers(1, 12), st.data())
def test_the_devices_of_a_service_that_is_gone_are_divided_among_the_others(
    services: int, devices: int, data: st.DataObject
) -> None:
    cluster = Cluster(*[devices] * services)
    names = [f"robot-{n}" for n in range(devices)]
    for name in names:
        cluster.device_says(data.draw(st.integers(0, services - 1)), name, b"hello")
    cluster.settle_down()
    gone = data.draw(st.integers(0, services - 1))
    cluster.kill(gone)
    cluster.settle_down()
    cluster.time_passes()
    for name in names:
        (owner,) = cluster.serving(name)
        assert owner != gone


def test_a_service_without_room_passes_a_device_on_to_one_with_room() -> None:
    cluster = Cluster(1, 1)
    for name in ("one", "two", "three"):
        cluster.device_says(0, name, name.encode())
        cluster.settle_down()
        for member in cluster.members:
            member.pool.room_changed()
        cluster.settle_down()
    assert cluster.serving("one") == [0]
    assert cluster.serving("two") == [1]
    assert cluster.members[1].devices["two"] == [b"two"]
    assert cluster.members[0].turned_away == ["three"]


def test_a_service_that_does_not_come_back_with_the_broker_is_gone() -> None:
    cluster = Cluster(4, 4)
    cluster.device_says(1, "robot", b"hello")
    cluster.settle_down()
    cluster.members[1].there = False  # its last will was lost with the broker
    cluster.members[0].pool.reconnected()
    cluster.time_passes()
    cluster.time_passes()
    assert cluster.serving("robot") == [0]


def parted(services: int, names: list[str]) -> Cluster:
    """The first two services have each of the devices: neither can hear of the other."""
    cluster = Cluster(*[len(names)] * services)
    for name in names:
        cluster.device_says(0, name, b"hello")
    cluster.settle_down()
    cluster.members[0].there = False
    for member in cluster.members[1:]:
        member.pool.arrived(cluster.members[0].pool.will.topic, b"")
    cluster.time_passes()
    for name in names:
        assert name in cluster.members[0].devices
        assert cluster.serving(name) == [1]
    return cluster


def test_a_service_that_was_cut_off_lets_go_of_what_others_have_taken_over() -> None:
    cluster = parted(2, ["robot"])
    first = cluster.members[0]
    first.there = first.away = True
    first.pool.reconnected()
    for message in cluster.retained.values():  # what the broker holds comes before all else
        if message.topic.startswith(("spirit/agents", "spirit/robot")):
            first.pool.arrived(message.topic, message.payload)
    first.away = False
    for message in first.pool.hello():
        cluster.publish(message)
    cluster.settle_down()
    cluster.time_passes()
    assert cluster.serving("robot") == [1]
    cluster.device_says(0, "robot", b"again")  # it comes to the second directly
    cluster.settle_down()
    assert cluster.serving("robot") == [1]


@given(st.integers(1, 6), st.booleans(), st.data())
def test_of_two_services_that_both_have_a_device_when_their_brokers_meet_again_one_goes_on(
    devices: int, swap: bool, data: st.DataObject
) -> None:
    """Each broker tells its own side what the other side holds, in an order of its own."""
    names = [f"robot-{n}" for n in range(devices)]
    cluster = parted(2, names)
    members = cluster.members[::-1] if swap else cluster.members
    for member in members:
        member.there = True
        for message in member.pool.hello():
            cluster.publish(message)
    for name in names:
        for member in members:
            told = json.dumps({"agent": member.pool.me, "settled": True}).encode()
            other = cluster.members[1 - cluster.members.index(member)]
            cluster.wires.append((cluster.members.index(other), Outgoing(
                f"spirit/{name}/owner", told, 1, True)))  # fmt: skip
    cluster.wires = list(data.draw(st.permutations(cluster.wires)))
    cluster.settle_down()
    cluster.time_passes()
    for name in names:
        (owner,) = cluster.serving(name)
        assert {m.pool.owner(name) for m in cluster.members} == {f"{owner:012x}"}


def test_what_was_said_to_a_service_that_lets_go_of_a_device_is_for_the_next() -> None:
    cluster = Cluster(4, 4)
    cluster.device_says(0, "robot", b"first")
    cluster.settle_down()
    first, second = cluster.members
    assert first.pool.pass_on("robot", "text/in", b"second")
    cluster.settle_down()
    del first.devices["robot"]
    first.pool.release("robot")
    cluster.settle_down()
    assert cluster.serving("robot") == [1]
    assert second.devices["robot"] == [b"second"]


TOPICS = ("agents/" + "0" * 12, "agents/" + "1" * 12, "robot/owner", "agents/x", "robot/command")
NEARLY = (b'{"room":1}', b'{"agent":"000000000009","settled":true}', b'{"agent":1,"settled":2}')


@given(st.sampled_from(TOPICS), st.binary(max_size=300) | st.sampled_from(NEARLY))
def test_nothing_that_arrives_is_more_than_taken_or_refused(rest: str, payload: bytes) -> None:
    cluster = Cluster(2)
    try:
        cluster.members[0].pool.arrived(f"spirit/{rest}", payload)
    except BadMessage as error:
        assert str(error)


def test_a_message_that_comes_by_both_ways_is_taken_once() -> None:
    copies = Copies()
    command = ("command", b'{"do":"reset"}')
    assert copies.new(*command, direct=True)
    assert not copies.new(*command, direct=False)
    assert copies.new(*command, direct=False)  # said again; the other copy is still on its way
    assert not copies.new(*command, direct=True)


def test_the_same_words_some_time_later_are_no_copy() -> None:
    now = [0.0]
    copies = Copies(lambda: now[0])
    assert copies.new("text/in", b"hello", direct=False)  # before the device was taken over
    now[0] += 1.0
    assert copies.new("text/in", b"hello", direct=True)
    assert not copies.new("text/in", b"hello", direct=False)


def snapshot(turns: list[list[int]]) -> Snapshot:
    return Snapshot(model="nano 1", turn=len(turns), turns=turns)


@given(st.lists(st.lists(st.integers(0, 2**20 - 1), min_size=1, max_size=60), max_size=30))
def test_a_snapshot_keeps_the_latest_turns_that_fit(turns: list[list[int]]) -> None:
    payload = snapshot(turns).encode(1024)
    assert len(payload) <= 1024
    again = Snapshot.decode(payload, 1024)
    kept = len(again.turns)
    assert again.turns == turns[len(turns) - kept :]
    assert again.turn == len(turns)


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_no_payload_is_taken_for_a_snapshot(payload: bytes) -> None:
    with pytest.raises(BadMessage):
        Snapshot.decode(payload, 1024)


@pytest.mark.parametrize(
    ("key", "value"),
    [("turns", [[-1]]), ("turns", [["1"]]), ("turns", [[]]), ("turn", -1), ("version", 2),
     ("off", ["all"]), ("code", "import os"), ("model", "x" * 200)],
)  # fmt: skip
def test_a_snapshot_with_anything_else_in_it_is_refused(key: str, value: object) -> None:
    document = snapshot([[1, 2]]).model_dump() | {key: value}
    with pytest.raises(BadMessage, match=key):
        Snapshot.decode(json.dumps(document).encode(), 1024)


# Two real processes on a real broker.


class Robot:
    """A device that types."""

    def __init__(self, broker: Mosquitto, name: str) -> None:
        self.place = f"spirit/{name}/"
        self.messages: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.log: list[tuple[str, Any]] = []
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_message = self._arrived
        ready = threading.Event()
        self._client.on_subscribe = lambda *rest: ready.set()
        self._client.connect("127.0.0.1", broker.port)
        self._client.subscribe([(self.place + n, 1) for n in ("state", "event", "owner")])
        self._client.loop_start()
        assert ready.wait(PATIENCE)

    def _arrived(self, client: Any, user: Any, message: Any) -> None:
        name = message.topic.removeprefix(self.place)
        self.messages.put((name, json.loads(message.payload or b"{}")))

    def ask(self, text: str) -> list[Any]:
        """The events of the turn."""
        seen = len(self.log)
        self._client.publish(self.place + "text/in", text, 1)
        self.until(lambda name, said: name == "event" and said["type"] == "turn-ended")
        return [said for name, said in self.log[seen:] if name == "event"]

    def owner(self) -> str:
        return next(s["agent"] for n, s in reversed(self.log) if n == "owner" and s.get("settled"))

    def until(self, wanted: Callable[[str, Any], bool]) -> Any:
        while True:
            try:
                name, said = self.messages.get(timeout=PATIENCE)
            except queue.Empty:
                raise AssertionError(f"not among {self.log[-30:]}") from None
            self.log.append((name, said))
            if wanted(name, said):
                return said

    def leave(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Mosquitto, dict[str, subprocess.Popen[str]]]]:
    """A broker, and two services by their names."""
    with running(tmp_path) as broker:
        command = [sys.executable, "-c", SERVE, "--mqtt", f"mqtt://127.0.0.1:{broker.port}",
                   "--set", "mqtt.shared=true"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        services = [
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        try:
            yield broker, {_name(each): each for each in services}
        finally:
            for each in services:
                each.kill()
                each.communicate()


def _name(service: subprocess.Popen[str]) -> str:
    assert service.stderr is not None
    said: list[str] = []
    for line in service.stderr:
        if line.startswith("serving"):
            return line.partition(" as ")[2].partition(";")[0]
        said.append(line)
    raise AssertionError("".join(said))


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.timeout(300)
def test_killed_with_its_service_a_conversation_goes_on_with_the_other(
    pair: tuple[Mosquitto, dict[str, subprocess.Popen[str]]],
) -> None:
    broker, services = pair
    robot = Robot(broker, "robot")
    robot.ask("my name is robin")
    first = robot.owner()
    events = robot.ask("what is two plus three")
    assert events[-1] == {"type": "turn-ended", "turn": 2, "how": "complete"}
    assert robot.owner() == first
    services[first].send_signal(signal.SIGKILL)
    robot.until(lambda name, said: name == "state" and said["state"] == "offline")
    resumed = robot.until(lambda name, said: name == "event" and said["type"] == "resumed")
    assert resumed == {"type": "resumed", "turn": 2, "turns": 2}
    robot.until(lambda name, said: name == "state" and said["state"] == "listening")
    assert robot.owner() != first
    events = robot.ask("what is two plus three")
    assert events[-1] == {"type": "turn-ended", "turn": 3, "how": "complete"}
    robot.leave()
