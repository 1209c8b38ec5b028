"""Hours of a bad world for the MQTT service: ``python -m bench.soak --minutes 60``.

A real Mosquitto, the real service in a process of its own with models that are played
(:mod:`bench.played`), and devices that know nothing but the protocol. Meanwhile

- the broker is killed and started again every 20 s;
- sound passes a proxy that loses 5 %, doubles 5 % and delays each packet by up to 200 ms;
- every 150 s the service's own connections become half-open: nothing passes, nothing ends;
- the devices' clocks run up to 1 % fast or slow; one device never reads what it subscribed to;
- every 5 minutes 200 devices connect at once; one sends what makes no sense, all the time;
- at the end the service gets SIGTERM while 20 devices are being answered.

Claims: every turn that the service has begun ends, as far as devices can know it; every typed
request that the broker took for somebody who listens is answered; memory stays within 50 MB of
its start; every device comes back by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import aiomqtt
import numpy as np
import typer
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.mqtt_waits import stop
from bench.memory import resident_mb_of
from bench.raw_mqtt import connect, publish, subscribe
from bench.report import RESULTS, about, save
from tests.faults import Proxy
from tests.mosquitto import Mosquitto

PACKET = 640  # samples: 40 ms
SKEWS = (1.0, 1.01, 0.99, 1.002)
"""How fast each device's clock runs."""
KILL_EVERY, FREEZE_EVERY, CROWD_EVERY = 20.0, 150.0, 300.0
CROWD = 200
LAST = 20
"""Devices that are being answered when the service is ended."""
ENVIRONMENT = {**os.environ, "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
TYPED = "a typed request"
SETTLED = 60.0  # s after which memory is what the start is taken to be
ROOM = 50  # MB
# What a session needs to outlive its broker: kept on disk, and that soon.
PERSISTENT = """allow_anonymous true
persistence true
persistence_location {folder}/
autosave_on_changes true
autosave_interval 1
max_queued_messages 10000
"""


@dataclass
class Tally:
    """What one device saw."""

    begun: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    last_turn: float = 0.0
    longest_gap: float = 0.0
    session: str = ""

    def turn_ended(self, turn: int) -> None:
        self.ended.add(turn)
        self.counts["turns"] += 1
        self._alive()

    def _alive(self) -> None:
        now = time.monotonic()
        if self.last_turn:
            self.longest_gap = max(self.longest_gap, now - self.last_turn)
        self.last_turn = now

    def in_session(self, session: str) -> None:
        """Turns are numbered within a session; what is open when it goes will not end."""
        if session != self.session:
            self.counts["sessions"] += 1
            self.counts["lost with their session"] += len(self.begun - self.ended)
            self.session, self.begun, self.ended = session, set(), set()


class Device:
    """A robot that speaks a tone, waits for the reply, and speaks again; sometimes it types."""

    def __init__(self, name: str, port: int, skew: float = 1.0, mute: bool = False) -> None:
        self.name, self._port, self._skew, self._mute = name, port, skew, mute
        self.tally = Tally()
        self._over = asyncio.Event()
        self._sequence = self._clock = 0

    async def run(self) -> None:
        """For ever, over as many connections as it takes."""
        while True:
            with contextlib.suppress(aiomqtt.MqttError, OSError):
                await self._connection()
            self.tally.counts["connections lost"] += 1
            await asyncio.sleep(0.2)

    async def _connection(self) -> None:
        kept = Properties(PacketTypes.CONNECT)
        kept.SessionExpiryInterval = 3600
        async with aiomqtt.Client(
            "127.0.0.1", self._port, identifier=f"soak-{self.name}", timeout=5, keepalive=5,
            protocol=aiomqtt.ProtocolVersion.V5, clean_start=False, properties=kept,
        ) as client:  # fmt: skip
            for topic, qos in (("state", 1), ("event", 1), ("text/out", 1), ("audio/out", 0)):
                await client.subscribe(f"spirit/{self.name}/{topic}", qos)
            both = [asyncio.create_task(self._read(client))]
            both += [asyncio.create_task(self._talk(client))]
            try:
                done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)

    async def _read(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            what = message.topic.value.split("/", 2)[2]
            if what == "audio/out":
                self.tally.counts["packets of replies"] += 1
                continue
            said = _json(message)
            if what == "state":
                self.tally.in_session(said["session"])
            elif what == "event":
                self._event(said)

    def _event(self, said: dict[str, Any]) -> None:
        kind, tally = said["type"], self.tally
        tally.counts[kind] += 1
        if kind == "turn-started":
            tally.begun.add(said["turn"])
        elif kind == "heard":
            tally.counts["typed requests begun"] += said["text"] == TYPED
        elif kind == "turn-ended":
            tally.turn_ended(said["turn"])
            self._over.set()

    async def _talk(self, client: aiomqtt.Client) -> None:
        chance = random.Random(self.name)
        while True:
            self._over.clear()
            if self._mute or chance.random() < 0.2:
                await client.publish(f"spirit/{self.name}/text/in", TYPED, qos=1)
                self.tally.counts["typed requests taken"] += 1
            else:
                await self._speak(client)
            quiet = asyncio.create_task(self._say(client, 10.0, 0.0))
            over = asyncio.create_task(self._over.wait())
            try:
                await asyncio.wait({quiet, over}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                quiet.cancel()
                over.cancel()
                failed, _ = await asyncio.gather(quiet, over, return_exceptions=True)
            if isinstance(failed, Exception):
                raise failed

    async def _speak(self, client: aiomqtt.Client) -> None:
        self.tally.counts["spoken requests"] += 1
        await self._say(client, 1.0, 0.3)

    async def _say(self, client: aiomqtt.Client, seconds: float, level: float) -> None:
        """A tone, at the pace of this device's own clock."""
        due = time.monotonic()
        for _ in range(int(seconds * 16_000 / PACKET)):
            head = struct.pack("<BBHIIi", 1, 0, 16_000, self._sequence, self._clock, 0)
            wave = np.full(PACKET, level * 32767, "<i2")
            await client.publish(f"spirit/{self.name}/audio/in", head + wave.tobytes())
            self._sequence += 1
            self._clock += PACKET
            due += PACKET / 16_000 * self._skew
            await asyncio.sleep(max(0.0, due - time.monotonic()))


class Soak:
    """Everything that goes on at once.

    Args:
        folder: for the broker's files.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._log = folder / "service.log"
        self._broker = Mosquitto(folder, PERSISTENT.format(folder=folder))
        self.counts: Counter[str] = Counter()
        self.memory: list[tuple[float, float]] = []  # s since the start, MB
        self.devices: list[Device] = []
        self.failures: list[str] = []
        self.drained = -1.0  # s from SIGTERM to the end of the service

    async def run(self) -> None:
        """All of it; afterwards the attributes say how it went."""
        await asyncio.to_thread(self._broker.start)
        bad = Proxy(self._broker.port, loss=0.05, doubled=0.05, jitter=0.2)
        with bad, Proxy(self._broker.port) as trunk:
            command = [sys.executable, "-m", "bench.played"]
            command += ["--mqtt", f"mqtt://127.0.0.1:{trunk.port}"]
            for setting in ("mqtt.max_sessions=32", "mqtt.idle_seconds=15"):
                command += ["--set", setting]
            with self._log.open("w") as log:
                self._service = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT
                )
            try:
                assert self._service.stdout is not None
                await asyncio.to_thread(self._service.stdout.readline)
                await self._meanwhile(bad, trunk)
                await self._terminate()
            finally:
                self._service.kill()
                self._service.wait()
                self._broker.kill()
                said = self._log.read_text(errors="replace")
                if self.failures:
                    sys.stderr.write(said[-4000:])
                self.counts |= Counter({f"packets {k}": v for k, v in bad.counts.items()})

    async def _meanwhile(self, bad: Proxy, trunk: Proxy) -> None:
        names = [f"robot-{n}" for n in range(len(SKEWS))]
        self.devices = [Device(n, bad.port, s) for n, s in zip(names, SKEWS, strict=True)]
        self.began = time.monotonic()
        work: list[Awaitable[None]] = [device.run() for device in self.devices]
        work += [self._every(KILL_EVERY, self._kill), self._every(5.0, self._look)]
        work += [self._every(FREEZE_EVERY, lambda: self._freeze(trunk))]
        work += [self._every(CROWD_EVERY, self._crowd), self._nonsense(), self._deaf()]
        tasks = [asyncio.ensure_future(each) for each in work]
        done, _ = await asyncio.wait(
            tasks, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED
        )
        await stop(*tasks)
        self.failures += [repr(task.exception()) for task in done]

    async def _every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            await work()

    async def _kill(self) -> None:
        if self._service.poll() is not None:
            raise RuntimeError(f"the service ended with {self._service.returncode}")
        await asyncio.to_thread(self._broker.kill)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(self._broker.start)
        self.counts["broker killed"] += 1

    async def _freeze(self, trunk: Proxy) -> None:
        self.counts["connections half-open"] += await asyncio.to_thread(trunk.freeze)

    async def _look(self) -> None:
        megabytes = resident_mb_of(self._service.pid)
        self.memory.append((round(time.monotonic() - self.began, 1), round(megabytes, 1)))

    async def _crowd(self) -> None:
        """200 devices connect at once; each types something, and is served or told busy."""

        async def one(n: int) -> str:
            try:
                return await asyncio.wait_for(self._newcomer(f"crowd-{n}"), 15)
            except (aiomqtt.MqttError, OSError, asyncio.TimeoutError):
                return "crowd without an answer"

        self.counts.update(await asyncio.gather(*(one(n) for n in range(CROWD))))

    async def _newcomer(self, name: str) -> str:
        async with self._plain(name) as client:
            await client.subscribe(f"spirit/{name}/+", 1)
            await client.publish(f"spirit/{name}/text/in", "hello", qos=1)
            async for message in client.messages:
                if message.topic.value.endswith("/event"):
                    if _json(message)["type"] == "busy":
                        return "crowd told busy"
                elif message.topic.value.endswith("/state"):
                    return "crowd served"
        return "crowd without an answer"

    async def _nonsense(self) -> None:
        """Random bytes and broken JSON, on every topic that a device may use."""
        chance = random.Random(0)
        topics = ("audio/in", "text/in", "command", "played", "audio/in/more", "nothing")
        while True:
            with contextlib.suppress(aiomqtt.MqttError, OSError):
                async with self._plain("nonsense") as client:
                    while True:
                        for topic in topics:
                            junk = chance.randbytes(chance.randrange(200))
                            await client.publish(f"spirit/bad/{topic}", junk)
                            self.counts["senseless payloads"] += 1
                        await asyncio.sleep(0.2)
            await asyncio.sleep(0.5)

    async def _deaf(self) -> None:
        """Asks for replies and never reads what it subscribed to."""
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self._broker.port, limit=1
                )
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(connect("deaf") + subscribe("spirit/deaf/#"))
                while not writer.is_closing():
                    writer.write(publish("spirit/deaf/text/in", b"a long story"))
                    writer.write(b"\xc0\x00")  # a ping, so that the broker lets it be
                    await writer.drain()
                    self.counts["requests of the deaf"] += 1
                    await asyncio.sleep(2.0)
            await asyncio.sleep(0.5)

    @contextlib.asynccontextmanager
    async def _plain(self, name: str) -> AsyncIterator[aiomqtt.Client]:
        async with aiomqtt.Client(
            "127.0.0.1", self._broker.port, identifier=name, timeout=10,
            protocol=aiomqtt.ProtocolVersion.V5,
        ) as client:  # fmt: skip
            yield client

    async def _terminate(self) -> None:
        """SIGTERM during a reply: it says offline and is gone within 2 s."""
        try:
            await asyncio.wait_for(self._last_words(), 60)
        except (asyncio.TimeoutError, subprocess.TimeoutExpired, aiomqtt.MqttError) as error:
            self.failures.append(f"SIGTERM: {error!r}")

    async def _last_words(self) -> None:
        names = {f"last-{n}" for n in range(LAST)}
        answering: set[str] = set()
        offline: set[str] = set()
        async with self._plain("watcher") as client:
            for topic in ("state", "event"):
                await client.subscribe(f"spirit/+/{topic}", 1)
            for name in names:
                await client.publish(f"spirit/{name}/text/in", TYPED, qos=1)
            async for message in client.messages:
                name, said = message.topic.value.split("/")[1], _json(message)
                if name not in names:
                    continue
                if said.get("type") in ("busy", "turn-ended"):
                    await client.publish(f"spirit/{name}/text/in", TYPED, qos=1)
                elif said.get("state") == "answering":
                    answering.add(name)
                elif said.get("state") == "offline":
                    offline.add(name)
                if answering == names and self.drained < 0:
                    self.drained = await self._drain()
                if offline == names:
                    return

    async def _drain(self) -> float:
        """Seconds from SIGTERM to the end of the process."""
        self._service.send_signal(signal.SIGTERM)
        began = time.monotonic()
        try:
            await asyncio.to_thread(self._service.wait, 30)
        except subprocess.TimeoutExpired:
            self._service.send_signal(signal.SIGABRT)  # it says where it is
            raise
        return time.monotonic() - began


def _json(message: aiomqtt.Message) -> dict[str, Any]:
    assert isinstance(message.payload, bytes)
    said: dict[str, Any] = json.loads(message.payload)
    return said


def report(soak: Soak, minutes: float) -> dict[str, Any]:
    """What came of it, and whether the claims hold."""
    tallies = [device.tally for device in soak.devices]
    total: Counter[str] = Counter()
    for tally in tallies:
        total.update(tally.counts)
    settled = [m for t, m in soak.memory if t >= min(SETTLED, 30 * minutes)] or [0.0]
    open_turns = sum(len(t.begun - t.ended) for t in tallies)
    now = time.monotonic()
    alive = sum(now - t.last_turn < 60 for t in tallies)
    return {
        **about("soak", ["aiomqtt", "paho-mqtt"]),
        "minutes": minutes,
        "devices": dict(total),
        "world": dict(soak.counts),
        "turns still open at the end": open_turns,
        "longest_gap_s": [round(t.longest_gap, 1) for t in tallies],
        "alive_at_the_end": alive,
        "memory_mb": {"start": settled[0], "most": max(settled), "end": settled[-1]},
        "drained_s": round(soak.drained, 2),
        "failures": soak.failures,
        "claims": {
            "the service did not end": not soak.failures,
            "every device came back": alive == len(tallies),
            "memory within 50 MB of its start": max(settled) - settled[0] <= ROOM,
            "no turn was lost with its session": not total["lost with their session"],
            "offline within 2 s of SIGTERM": 0 <= soak.drained <= 2,
        },
        "memory": soak.memory[:: max(1, len(soak.memory) // 60)],
    }


def main(
    minutes: Annotated[float, typer.Option(help="How long.")] = 60.0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")] = RESULTS,
) -> None:
    """Wear the service out, and say how it went."""
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), minutes)
        asyncio.run(soak.run())
    said = report(soak, minutes)
    path = save("soak", said, out)
    for claim, holds in said["claims"].items():
        typer.echo(f"{'yes' if holds else 'NO ':3} {claim}")
    typer.echo(f"{path}: {said['devices'].get('turns', 0)} turns")
    raise typer.Exit(int(not all(said["claims"].values())))


if __name__ == "__main__":
    typer.run(main)
