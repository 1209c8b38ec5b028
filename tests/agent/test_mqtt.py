"""The service against a real Mosquitto, asked by a client that shares no code with it."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncapi
import numpy as np
import paho.mqtt.client as paho
import pytest
import soundfile
import yaml
from mosquitto import Mosquitto, running

from agent.errors import UserError
from agent.mqtt_link import Broker
from agent.mqtt_wire import FROM_DEVICE, TO_DEVICE
from agent.schema import MqttConfig
from recipes.scoring import Recognizer, spoken

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "mqtt.md"
PATIENCE = 60.0  # seconds after which a test gives up; nothing here is judged by time
SERVE = "import typer; from agent.mqtt import serve; typer.run(serve)"
SETTINGS = ("mqtt.max_sessions=2", "sampling.speech.seed=0")

pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(300)]


class Service:
    """``serve`` in a process of its own."""

    def __init__(self, broker: Mosquitto, *settings: str, **environment: str) -> None:
        options = [word for each in (*SETTINGS, *settings) for word in ("--set", each)]
        url = f"mqtt://127.0.0.1:{broker.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "--mqtt", url, *options],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._said = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._said.wait(3 * PATIENCE):  # models are loaded
            raise RuntimeError("".join(self.lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("serving"):
                self._said.set()
        self._said.set()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """The exit code; everything it wrote has been read by then."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


class Robot:
    """A device, written from docs/mqtt.md: plain MQTT, plain ``struct``."""

    def __init__(self, broker: Mosquitto, name: str, user: str = "", password: str = "") -> None:
        self.name = name
        self.messages: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.log: list[tuple[str, Any]] = []
        self.topics: set[str] = set()
        self.flags: list[int] = []
        self.sound: dict[int, list[np.ndarray]] = {}
        self.sequence = self.clock = 0
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        if user:
            self._client.username_pw_set(user, password)
        self._client.on_message = lambda c, u, m: self.messages.put((m.topic, m.payload))
        ready = threading.Event()
        self._client.on_connect = lambda c, *rest: c.subscribe(f"spirit/{name}/#", 1)
        self._client.on_subscribe = lambda *rest: ready.set()
        self._client.connect("127.0.0.1", broker.port)
        self._client.reconnect_delay_set(1, 1)
        self._client.loop_start()
        assert ready.wait(PATIENCE)

    def publish(self, topic: str, payload: bytes | str, qos: int = 1) -> None:
        self.publish_at(f"spirit/{self.name}/{topic}", payload, qos)

    def publish_at(self, full: str, payload: bytes | str, qos: int = 1) -> None:
        self._client.publish(full, payload, qos)

    def subscribe(self, pattern: str) -> None:
        self._client.subscribe(pattern, 1)

    def tell(self, topic: str, message: Any) -> None:
        self._client.publish(f"spirit/{self.name}/{topic}", json.dumps(message), 1)

    def send(self, samples: np.ndarray) -> None:
        head = struct.pack("<BBHIIi", 1, 0, 16000, self.sequence, self.clock, 0)
        pcm = (samples * 32767).astype("<i2").tobytes()
        self._client.publish(f"spirit/{self.name}/audio/in", head + pcm, 0)
        self.sequence += 1
        self.clock += len(samples)

    def speak(self, wave: np.ndarray, quiet: float = 0.4) -> None:
        """At the pace of a microphone, 20 ms at a time."""
        wave = np.concatenate((wave, np.zeros(int(quiet * 16000), np.float32)))
        began = time.monotonic()
        for start in range(0, len(wave), 320):
            time.sleep(max(0.0, began + start / 16000 - time.monotonic()))
            self.send(wave[start : start + 320])

    def until(self, wanted: Callable[[str, Any], bool]) -> Any:
        """Read what comes until it is what is wanted; keeps the sound of replies."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                topic, payload = self.messages.get(timeout=deadline - time.monotonic())
            except (queue.Empty, ValueError):
                raise AssertionError(f"{self.name}: not among {self.log[-30:]}") from None
            self.topics.add(topic)
            name = topic.split("/", 2)[2]
            if name == "audio/out":
                _, flags, _, _, _, turn = struct.unpack_from("<BBHIIi", payload)
                pcm = np.frombuffer(payload, "<i2", offset=16).astype(np.float32) / 32768
                self.sound.setdefault(turn, []).append(pcm)
                self.flags.append(flags)
                said: Any = {"turn": turn, "samples": len(pcm)}
            elif name in ("state", "event", "metrics", "text/out"):
                asyncapi.check(name, payload)
                said = json.loads(payload)
                self.log.append((name, said))
            else:
                continue  # what devices themselves publish
            if wanted(name, said):
                return said

    def event(self, kind: str) -> Any:
        return self.until(lambda name, said: name == "event" and said["type"] == kind)

    def state(self, wanted: str) -> Any:
        return self.until(lambda name, said: name == "state" and said["state"] == wanted)

    def events(self, kind: str) -> list[Any]:
        return [said for name, said in self.log if name == "event" and said["type"] == kind]

    def words(self, turn: int) -> str:
        return "".join(s["text"] for n, s in self.log if n == "text/out" and s["turn"] == turn)

    def reply(self, turn: int) -> np.ndarray:
        return np.concatenate(self.sound[turn])

    def leave(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running(tmp_path_factory.mktemp("broker")) as found:
        yield found


@pytest.fixture(scope="module")
def service(broker: Mosquitto) -> Iterator[Service]:
    found = Service(broker, "mqtt.idle_seconds=4")
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture
def robots(broker: Mosquitto, service: Service) -> Iterator[Callable[[str], Robot]]:
    """Makes devices; afterwards waits until the service has let go of those it served."""
    made: list[Robot] = []

    def make(name: str) -> Robot:
        made.append(Robot(broker, name))
        return made[-1]

    yield make
    for robot in made:
        states = [said["state"] for name, said in robot.log if name == "state"]
        if states and states[-1] != "idle":
            robot.state("idle")
        robot.leave()


@pytest.fixture
def serving() -> Iterator[Callable[..., Service]]:
    """Starts services of a test's own; none outlives it."""
    made: list[Service] = []

    def start(broker: Mosquitto, *settings: str, **environment: str) -> Service:
        made.append(Service(broker, *settings, **environment))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.wait()


@pytest.fixture(scope="module")
def question() -> np.ndarray:
    wave, _ = soundfile.read(REPOSITORY / "examples" / "question.wav", dtype="float32")
    return wave


def test_a_recorded_question_is_answered_and_understood(
    robots: Callable[[str], Robot], question: np.ndarray
) -> None:
    robot = robots("robot-1")
    robot.speak(question)
    ended = robot.event("turn-ended")
    assert ended == {"type": "turn-ended", "turn": 1, "how": "complete"}
    assert robot.events("heard")[0]["text"] == "tell me how many months a year has"
    assert "twelve months" in robot.words(1)
    assert "twelve months" in spoken(Recognizer().hear(robot.reply(1)))
    states = [said["state"] for name, said in robot.log if name == "state"]
    order = [states.index(each) for each in ("listening", "hearing", "answering")]
    assert order == sorted(order)
    metrics = robot.until(lambda name, said: name == "metrics")
    assert metrics["network"]["lost"] == 0


def test_typed_requests_and_words_to_say_are_spoken(robots: Callable[[str], Robot]) -> None:
    robot = robots("typist")
    robot.publish("text/in", "what is two plus three")
    assert robot.event("turn-ended")["turn"] == 1
    assert "five" in robot.words(1)
    robot.tell("command", {"do": "say", "text": "A year has twelve months."})
    assert robot.event("turn-ended") == {"type": "turn-ended", "turn": 2, "how": "complete"}
    assert "twelve months" in spoken(Recognizer().hear(robot.reply(2)))


def test_the_devices_playhead_says_what_was_heard(robots: Callable[[str], Robot]) -> None:
    robot = robots("playhead")
    robot.publish("text/in", "what is two plus three")
    robot.until(lambda name, said: name == "audio/out")
    robot.tell("played", {"turn": 1, "samples": 321})
    robot.tell("command", {"do": "interrupt"})
    told = robot.event("interrupted")
    assert told == {"type": "interrupted", "turn": 1, "heard": 321, "reason": "interrupted"}
    assert robot.flags[-1] & 4  # play nothing more of what you hold
    assert robot.event("turn-ended")["how"] == "interrupted"


def test_a_muted_device_is_not_heard(robots: Callable[[str], Robot], question: np.ndarray) -> None:
    robot = robots("mute")
    robot.tell("command", {"do": "mute", "on": True})
    robot.state("listening")
    robot.speak(question[:32_000])
    robot.state("idle")
    assert not robot.events("turn-started")


def test_settings_change_for_one_session_and_wrong_ones_are_named(
    robots: Callable[[str], Robot],
) -> None:
    robot = robots("set")
    robot.tell("command", {"do": "set", "settings": {"reply.max_second": 1}})
    assert "did you mean 'reply.max_seconds'" in robot.event("error")["message"]
    robot.tell("command", {"do": "set", "settings": {"reply.max_seconds": 0.5}})
    assert robot.event("set")["settings"] == {"reply.max_seconds": 0.5}
    robot.publish("text/in", "what is two plus three")
    assert robot.event("turn-ended")["how"] == "long enough"
    assert len(robot.reply(1)) <= 8000


def test_a_device_that_says_too_much_is_told_so_and_loses_nothing_else(
    robots: Callable[[str], Robot],
) -> None:
    robot = robots("chatty")
    for _ in range(1200):
        robot.send(np.zeros(1, np.float32))
    assert "250 messages" in robot.event("rate-limited")["message"]
    robot.publish("text/in", "what is two plus three")
    while not robot.words(1):  # what was said while it was told to be quiet is lost
        robot.publish("text/in", "what is two plus three")
        robot.until(lambda name, said: name == "text/out" or "type" in said)
    robot.event("turn-ended")
    assert robot.until(lambda name, said: name == "metrics")["network"]["limited"] > 0


def test_two_devices_converse_apart_and_a_third_is_told_that_all_are_busy(
    robots: Callable[[str], Robot], question: np.ndarray
) -> None:
    one, two, three = robots("one"), robots("two"), robots("three")
    speaking = threading.Thread(target=one.speak, args=(question,))
    speaking.start()
    one.event("turn-started")
    two.publish("text/in", "what is two plus three")
    two.event("turn-ended")
    three.publish("text/in", "what is two plus three")
    assert "served" in three.event("busy")["message"]
    one.event("turn-ended")
    speaking.join()
    assert "twelve months" in one.words(1)
    assert "five" in two.words(1)
    assert "plus" not in one.events("heard")[0]["text"]
    assert len(two.events("heard")) == 1


def test_hostile_payloads_are_refused_and_disturb_nobody_else(
    robots: Callable[[str], Robot], question: np.ndarray
) -> None:
    good, bad = robots("good"), robots("bad")
    speaking = threading.Thread(target=good.speak, args=(question,))
    speaking.start()
    good.event("turn-started")
    chance = np.random.default_rng(0)
    for _ in range(250):
        for topic in ("audio/in", "text/in", "command", "played", "state", "audio/out/more"):
            if topic == "state":
                continue  # the device's own; a broker's ACL keeps others out
            bad.publish(topic, chance.bytes(int(chance.integers(0, 300))), qos=0)
    bad.publish("audio/in", bytes(100_000))
    assert bad.event("error")["message"]
    good.event("turn-ended")
    speaking.join()
    assert "twelve months" in good.words(1)
    assert not good.events("error")


def test_a_broker_that_dies_and_returns_ends_no_conversation(
    broker: Mosquitto, service: Service, robots: Callable[[str], Robot], question: np.ndarray
) -> None:
    robot = robots("patient")
    robot.publish("text/in", "what is two plus three")
    session = robot.state("answering")["session"]
    robot.event("turn-ended")
    broker.kill()
    broker.start()
    again = robot.until(lambda name, said: name == "state" and said["state"] != "idle")
    assert again["session"] == session
    robot.speak(question)
    robot.event("turn-ended")
    assert service.process.poll() is None
    assert "twelve months" in robot.words(2)


def test_sigterm_ends_a_reply_and_says_offline(
    broker: Mosquitto, serving: Callable[..., Service]
) -> None:
    ours = serving(broker, "mqtt.base=fleet")
    robot = Robot(broker, "last")
    robot.subscribe("fleet/last/#")
    robot.publish_at("fleet/last/text/in", "what is two plus three")
    robot.until(lambda name, said: name == "audio/out")
    assert ours.end() == 0
    assert robot.event("interrupted")["reason"] == "offline"
    assert robot.event("turn-ended") == {"type": "turn-ended", "turn": 1, "how": "offline"}
    robot.state("offline")
    assert robot.flags[-1] & 4
    robot.leave()
    assert ours.lines[-1] == "offline\n"


def test_a_request_given_while_the_service_is_away_is_answered_by_the_next_which_remembers(
    broker: Mosquitto, serving: Callable[..., Service]
) -> None:
    first = serving(broker, "mqtt.base=later")
    robot = Robot(broker, "patient-2")
    robot.subscribe("later/patient-2/#")
    robot.publish_at("later/patient-2/text/in", "what is two plus three")
    robot.event("turn-ended")
    assert first.end() == 0
    robot.publish_at("later/patient-2/text/in", "what is two plus three")
    serving(broker, "mqtt.base=later")
    assert robot.event("resumed") == {"type": "resumed", "turn": 1, "turns": 1}
    assert robot.event("turn-ended")["turn"] == 2
    assert "five" in robot.words(2)
    robot.leave()


def test_a_service_that_is_killed_is_announced_by_the_broker(
    broker: Mosquitto, serving: Callable[..., Service]
) -> None:
    ours = serving(broker, "mqtt.base=fleet")
    robot = Robot(broker, "widow")
    robot.subscribe("fleet/widow/#")
    robot.publish_at("fleet/widow/text/in", "what is two plus three")
    robot.state("answering")
    ours.process.kill()
    robot.state("offline")
    robot.leave()
    ours.process.wait()


def test_the_robot_of_the_examples_gets_its_reply(
    broker: Mosquitto, service: Service, tmp_path: Path
) -> None:
    out = tmp_path / "reply.wav"
    robot = [sys.executable, "examples/robot.py", "localhost", str(broker.port)]
    assert len((REPOSITORY / robot[1]).read_text(encoding="utf-8").splitlines()) <= 40
    done = subprocess.run(
        [*robot, "examples/question.wav", str(out)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "turn-ended" in done.stdout
    wave, rate = soundfile.read(out, dtype="float32")
    assert rate == 16_000
    assert "twelve months" in spoken(Recognizer().hear(wave))


@pytest.mark.skipif(
    not (shutil.which("mosquitto_sub") and shutil.which("xxd")),
    reason="no mosquitto_sub or xxd: apt-get install mosquitto-clients xxd",
)
def test_the_robot_without_python_gets_its_reply(broker: Mosquitto, service: Service) -> None:
    robot = ["examples/robot.sh", "localhost", str(broker.port), "what is two plus three"]
    done = subprocess.run(robot, cwd=REPOSITORY, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode in (0, 27), done.stderr  # 27: mosquitto_sub's own time has passed
    assert b"turn-ended" in done.stderr
    wave = np.frombuffer(done.stdout, "<i2").astype(np.float32) / 32768
    assert "five" in spoken(Recognizer().hear(wave))


def test_under_the_documented_acl_a_device_reads_and_commands_only_its_own(
    tmp_path: Path, serving: Callable[..., Service]
) -> None:
    """Two users on a broker set up as docs/mqtt.md says."""
    rules = re.findall(r"```\n# acl.*?\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "acl").write_text(rules[0])
    users = {"agent": "a-secret", "one": "first", "two": "second"}
    for user, password in users.items():
        made = ["-c"] if user == "agent" else []
        command = ["mosquitto_passwd", *made, "-b", str(tmp_path / "passwords"), user, password]
        subprocess.run(command, check=True, capture_output=True)
    lines = f"allow_anonymous false\npassword_file {tmp_path}/passwords\nacl_file {tmp_path}/acl"
    with running(tmp_path, lines) as broker:
        secret = {"SPIRIT_MQTT_USER": "agent", "SPIRIT_MQTT_PASSWORD": users["agent"]}
        ours = serving(broker, **secret)
        one, two = Robot(broker, "one", "one", "first"), Robot(broker, "two", "two", "second")
        two.subscribe("spirit/one/#")
        two.subscribe("spirit/#")
        one.publish("text/in", "what is two plus three")
        one.state("answering")
        two.publish_at("spirit/one/command", json.dumps({"do": "interrupt"}))
        two.publish_at("spirit/one/text/in", "who are you")
        one.event("turn-ended")
        two.publish("text/in", "what is two plus three")
        two.event("turn-ended")
        one.publish("text/in", "what is two plus three")
        assert one.event("turn-ended")["turn"] == 2  # two's request to one came to nothing
        assert not one.events("interrupted")
        assert all(topic.startswith("spirit/two/") for topic in two.topics)
        assert ours.end() == 0
        assert "a-secret" not in "".join(ours.lines)


def test_a_refused_password_is_said_in_one_sentence(
    tmp_path: Path, serving: Callable[..., Service]
) -> None:
    with running(tmp_path, "allow_anonymous false") as broker:
        ours = serving(broker, SPIRIT_MQTT_USER="agent", SPIRIT_MQTT_PASSWORD="wrong-secret")
        assert ours.wait() == 2
        assert "refuses us" in ours.lines[-1]
        assert "wrong-secret" not in "".join(ours.lines)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mqtt://user:secret@host", "do not belong on the command line"),
        ("http://host", "expected mqtt://"),
        ("mqtt://host:port", "not an address"),
        ("host", "expected mqtt://"),
    ],
)
def test_an_address_that_cannot_be_is_refused(url: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as error:
        Broker.parse(url, MqttConfig())
    assert "secret" not in str(error.value)


def test_credentials_come_from_the_environment_or_a_file_and_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIRIT_MQTT_USER", "me")
    monkeypatch.setenv("SPIRIT_MQTT_PASSWORD", "secret")
    broker = Broker.parse("mqtts://host", MqttConfig())
    assert (broker.port, broker.user, broker.password) == (8883, "me", "secret")
    assert broker.tls is not None and broker.tls.check_hostname
    assert "secret" not in repr(broker)
    path = tmp_path / "credentials"
    path.write_text("you:se:cret\n")
    broker = Broker.parse("mqtt://host:99", MqttConfig(credentials=str(path)))
    assert (broker.port, broker.user, broker.password) == (99, "you", "se:cret")
    path.write_text("nobody")
    with pytest.raises(UserError, match="expected one line"):
        Broker.parse("mqtt://host", MqttConfig(credentials=str(path)))


def test_every_topic_of_the_code_is_in_the_documents() -> None:
    described = yaml.safe_load((REPOSITORY / "docs" / "asyncapi.yaml").read_text(encoding="utf-8"))
    assert described["asyncapi"].startswith("3.")
    addresses = {channel["address"]: key for key, channel in described["channels"].items()}
    among_services = {
        f"spirit/{name}" for name in ("{device}/snapshot", "{device}/owner", "agents/{agent}")
    }
    assert set(addresses) == among_services | {
        f"spirit/{{device}}/{name}" for name in FROM_DEVICE + TO_DEVICE
    }
    actions = {
        op["channel"]["$ref"].removeprefix("#/channels/"): op["action"]
        for op in described["operations"].values()
    }
    for name in FROM_DEVICE + TO_DEVICE:
        expected = "receive" if name in FROM_DEVICE else "send"
        assert actions[addresses[f"spirit/{{device}}/{name}"]] == expected
        assert f"| `{name}` |" in DOCUMENT.read_text(encoding="utf-8")


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    described = yaml.safe_load((REPOSITORY / "docs" / "asyncapi.yaml").read_text(encoding="utf-8"))
    references = re.findall(r"'\$ref': '#/([^']+)'", repr(described))
    assert len(references) >= 27
    for reference in references:
        place = described
        for part in reference.split("/"):
            place = place[part]
