"""This machine as a robot's body: the client against a real broker and the real service."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from mosquitto import Mosquitto, running
from typer.testing import CliRunner

from agent import mqtt_client
from agent.cli import app
from agent.config import load_config
from agent.mqtt_client import FilePlayback, RemoteAgent, Reply
from agent.mqtt_link import Broker
from agent.mqtt_wire import FIRST, LAST, STOP, Packet
from agent.playback import Immediate
from bench.played import SAID, UNIT

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds after which a test gives up; nothing here is judged by time
UNITS = 30
REPLY = UNITS * UNIT  # samples


class Heard(Immediate):
    """Keeps what is played."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.waves: list[np.ndarray] = []

    def begin(self) -> None:
        self.log.append("begin")
        super().begin()

    def play(self, samples: np.ndarray) -> None:
        self.waves.append(samples)
        super().play(samples)

    def finish(self) -> None:
        self.log.append("finish")

    def stop(self) -> int:
        self.log.append("stop")
        return super().stop()


def packet(clock: int, flags: int = 0, turn: int = 1, value: float = 0.5) -> Packet:
    return Packet(clock // 640, clock, np.full(640, value, np.float32), turn=turn, flags=flags)


def test_what_is_lost_becomes_silence_and_what_comes_twice_or_late_is_dropped() -> None:
    heard = Heard()
    reply = Reply(heard)
    for each in (packet(0, FIRST), packet(1280), packet(1280), packet(640), packet(1920, LAST)):
        reply.take(each)
    wave = np.concatenate(heard.waves)
    assert len(wave) == 2560
    assert np.flatnonzero(wave == 0).tolist() == list(range(640, 1280))
    assert heard.log == ["begin", "finish"]
    assert reply.lost == 640


def test_the_playhead_is_on_the_replys_own_clock_even_if_one_joins_late() -> None:
    reply = Reply(Heard())
    assert reply.playhead is None
    reply.take(packet(6400, turn=3))
    assert reply.playhead == (3, 7040)


def test_a_stop_ends_the_reply_and_what_follows_of_it_begins_nothing_by_itself() -> None:
    heard = Heard()
    reply = Reply(heard)
    reply.take(packet(0, FIRST))
    reply.take(Packet(1, 640, np.zeros(0, np.float32), turn=1, flags=STOP))
    assert heard.log == ["begin", "stop"]
    assert reply.playhead is None
    reply.take(packet(0, FIRST, turn=2))
    assert heard.log[-1] == "begin"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with running(tmp_path_factory.mktemp("broker")) as found:
        yield found


@pytest.fixture(scope="module")
def address(broker: Mosquitto) -> Iterator[str]:
    """Of a broker at which models that are played are served."""
    url = f"mqtt://127.0.0.1:{broker.port}"
    command = [sys.executable, "-m", "bench.played", "--mqtt", url, "--units", str(UNITS)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "serving\n"
    yield url
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "q.wav"
    soundfile.write(path, np.r_[np.zeros(4000), np.full(16_000, 0.3), np.zeros(1600)], 16_000)
    return path


def client(
    *arguments: str, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent", "mqtt-client", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE, check=False,
        preexec_fn=before,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.broker
def test_a_recording_is_answered_into_a_file(address: str, question: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.wav"
    done = client(
        address, "--device", "files", "--input", str(question), "--output", str(out), "--plain"
    )
    assert done.returncode == 0, done.stderr
    assert f"says: {SAID}\n" in done.stdout
    assert "state: answering\n" in done.stdout
    wave, rate = soundfile.read(out)
    assert (len(wave), rate) == (REPLY, 16_000)


@pytest.mark.slow
@pytest.mark.broker
def test_a_reply_that_the_disk_has_no_room_for_is_said_to_be_so(
    address: str, question: Path, tmp_path: Path
) -> None:
    def limit() -> None:
        """The kernel refuses to let any file grow further, as a full disk does."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = client(
        address, "--device", "full", "--input", str(question),
        "--output", str(tmp_path / "a.wav"), before=limit,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is the disk full?" in done.stderr
    assert f"says: {SAID}\n" in done.stdout


class Body:
    """A client inside the test, and what it was told."""

    def __init__(self, address: str, name: str) -> None:
        config = load_config("nano")
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.changed = asyncio.Event()
        self.playback = FilePlayback(None)
        broker = Broker.parse(address, config.mqtt)
        self.agent = RemoteAgent(broker, config, name, self.playback, self._tell)

    def _tell(self, name: str, said: dict[str, Any]) -> None:
        self.told.append((name, said))
        self.changed.set()

    async def until(self, wanted: Callable[[str, dict[str, Any]], bool]) -> dict[str, Any]:
        async def look() -> dict[str, Any]:
            while True:
                while self.told:
                    name, said = self.told.pop(0)
                    if wanted(name, said):
                        return said
                self.changed.clear()
                await self.changed.wait()

        return await asyncio.wait_for(look(), PATIENCE)

    async def event(self, kind: str) -> dict[str, Any]:
        return await self.until(lambda name, said: name == "event" and said["type"] == kind)

    async def speak(self, seconds: float = 0.8) -> None:
        for n in range(int(50 * (seconds + 1.0))):
            level = 0.3 if n < 50 * seconds else 0.0
            self.agent.hear(np.full(320, level, np.float32))
            await asyncio.sleep(0.02)


@asynccontextmanager
async def body(address: str, name: str) -> AsyncIterator[Body]:
    made = Body(address, name)
    running = asyncio.create_task(made.agent.run())
    await asyncio.wait_for(made.agent.link.connected.wait(), PATIENCE)
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.slow
@pytest.mark.broker
def test_a_conversation_goes_on_over_a_broker_that_dies(broker: Mosquitto, address: str) -> None:
    async def converse() -> None:
        async with body(address, "patient") as made:
            await made.speak()
            assert (await made.event("turn-ended"))["turn"] == 1
            broker.kill()
            broker.start()
            await made.until(lambda name, said: name == "state" and said["state"] == "listening")
            await made.speak()
            assert (await made.event("turn-ended"))["turn"] == 2

    asyncio.run(converse())


@pytest.mark.slow
@pytest.mark.broker
def test_an_interruption_is_reckoned_by_the_clients_own_playhead(address: str) -> None:
    async def converse() -> None:
        async with body(address, "exact") as made:
            speaking = asyncio.create_task(made.speak())
            await made.until(lambda name, said: name == "text/out")
            made.agent.command({"do": "interrupt"})
            told = await made.event("interrupted")
            await speaking
            assert 0 < told["heard"] <= REPLY

    asyncio.run(converse())


@pytest.mark.slow
def test_where_nobody_serves_that_is_said_in_one_sentence(
    broker: Mosquitto, question: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_client, "_PATIENCE", 0.5)
    url = f"mqtt://127.0.0.1:{broker.port}"
    given = ["mqtt-client", url, "--input", str(question), "--set", "mqtt.base=nobody"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2
    assert "nobody answers: is `python -m agent serve` running" in done.output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["mqtt://me:secret@host"], "do not belong on the command line"),
        (["mqtt://host", "--device", "a/b"], "expected 1 to 64 letters"),
        (["mqtt://host", "--output", "a.wav"], "give --input a recording"),
        (["mqtt://host", "--input", "nowhere.wav"], "nowhere.wav"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], why: str) -> None:
    done = CliRunner().invoke(app, ["mqtt-client", *arguments])
    assert done.exit_code == 2
    assert why in done.output
    assert "secret" not in done.output.replace("SPIRIT", "")
