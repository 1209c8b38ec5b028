"""What makes no sense, a million on each topic, to the real service: ``python -m bench.fuzz``.

The payloads go where those from the broker arrive, on every topic of several devices, faster than
any network would bring them. Meanwhile one device converses, through a real broker, and is to
notice nothing. Models are played (:mod:`bench.played`).
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from agent.config import load_config
from agent.mqtt import Service
from agent.mqtt_link import Broker
from agent.mqtt_waits import stop
from agent.mqtt_wire import FROM_DEVICE, split
from bench.memory import resident_mb
from bench.played import played
from bench.report import RESULTS, about, save
from bench.soak import ROOM, Device
from tests.mosquitto import Mosquitto

NAMES = ("bad-1", "bad-2", "bad-3", "x" * 64, "..", "")
ODD = ("audio", "audio/in/", "state", "command/+", "\u0000")
EDGES = (0, 1, -1, 2**15, 2**16 - 1, 2**31 - 1, -(2**31), 2**32 - 1, 2**63, 10**400)
# The limits on what a device sends would keep nearly all of it from being read.
SETTINGS = (
    "mqtt.max_sessions=4",
    "mqtt.idle_seconds=600",
    "mqtt.max_messages=1e9",
    "mqtt.max_bytes=1e12",
)
BATCH = 100  # payloads between two looks at everything else


def nonsense(chance: random.Random) -> tuple[str, bytes]:
    """A topic below the base, and a payload: noise, or nearly what is expected there."""
    topic = chance.choice(FROM_DEVICE if chance.random() < 0.9 else ODD)
    made = chance.choice((_noise, _packet, _packet, _json, _json, _text))(chance)
    if chance.random() < 0.2 and made:
        at = chance.randrange(len(made))
        made = made[:at] + chance.randbytes(chance.randrange(4)) + made[at + chance.randrange(4) :]
    return f"{chance.choice(NAMES)}/{topic}", made


def _noise(chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice((0, 1, 15, 16, 17, 100, 1000, 20_000)))


def _packet(chance: random.Random) -> bytes:
    """A header with any numbers, and any samples."""
    edge = [n % 2**32 for n in EDGES]
    head = struct.pack(
        "<BBHIII",
        chance.choice((1, 1, 1, 0, 2, 255)), chance.randrange(256),
        chance.choice((16_000, 8_000, 48_000, 44_100, 0, 1, 65_535)),
        chance.choice((*edge, chance.randrange(100))), chance.choice((*edge, 640)),
        chance.choice(edge),
    )  # fmt: skip
    return head + chance.randbytes(chance.choice((0, 1, 2, 640, 641, 16_368)))


def _value(chance: random.Random, depth: int = 0) -> Any:
    simple: list[Any] = [None, True, "", "\ud800", "x" * 500, 1.5, float("nan"), *EDGES]
    if depth < 3 and chance.random() < 0.3:
        inner = [_value(chance, depth + 1) for _ in range(chance.randrange(4))]
        return inner if chance.random() < 0.5 else {str(n): v for n, v in enumerate(inner)}
    return chance.choice(simple)


def _json(chance: random.Random) -> bytes:
    """A command or a playhead, most of it right; or brackets without end."""
    if chance.random() < 0.05:
        return chance.choice((b"[", b'{"do":', b"9")) * 5000
    if chance.random() < 0.4:
        turn, samples = chance.choice((*EDGES, _value(chance))), chance.choice((*EDGES, 640))
        return json.dumps({"turn": turn, "samples": samples}).encode()
    does = ("interrupt", "say", "mute", "gate", "set", "", 1, None)
    message: dict[str, Any] = {"do": chance.choice(does)}
    for key in ("on", "text", "turn", "samples", "other"):
        if chance.random() < 0.4:
            message[key] = _value(chance)
    return json.dumps(message).encode()


def _text(chance: random.Random) -> bytes:
    parts = (
        "hello",
        "[Speech][Hu3]",
        "</s>",
        "\x00",
        "\n",
        "\u202e",
        "\U0001f600",
        " | ",
        "a" * 99,
    )
    return "".join(chance.choices(parts, k=chance.randrange(6))).encode("utf-8", "surrogatepass")


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        topics: payloads on each topic of a device; and on ``others``, which are none.
        turns: that the device which behaves had meanwhile.
        memory: MB, after the first tenth and then on.
    """

    topics: dict[str, int]
    refused: int
    unknown: int
    turns: int
    errors: int
    memory: tuple[float, float]
    served: int
    seconds: float


async def fuzz(
    port: int, payloads: int, seed: int = 0, progress: Callable[[int], None] = lambda done: None
) -> Outcome:
    """Feed a service with nonsense.

    Args:
        payloads: on each topic that devices publish to; more come on topics that are none.
        progress: told how many there have been.

    Raises:
        whatever the service does not stand.
    """
    config = load_config("nano", SETTINGS)
    service = Service(Broker("127.0.0.1", port), played(config, 10), config)
    running = asyncio.create_task(service.run())
    ready = asyncio.create_task(service.connected())
    await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    good = Device("good", port)
    talking = asyncio.create_task(good.run())
    while not good.tally.counts["turns"]:
        await asyncio.sleep(0.1)
        if running.done():
            running.result()
    chance, began, first = random.Random(seed), time.monotonic(), 0.0
    topics = Counter(dict.fromkeys(FROM_DEVICE, 0))
    try:
        while (done := min(topics[name] for name in FROM_DEVICE)) < payloads:
            for _ in range(BATCH):
                topic, payload = nonsense(chance)
                full = f"{config.mqtt.base}/{topic}"
                place = split(config.mqtt, full)
                topics["others" if place is None else place[1]] += 1
                service._arrived(full, payload)
            await asyncio.sleep(0.001)  # what it did to others is to come to light
            if running.done():
                running.result()
            if done >= payloads // 10 and not first:
                gc.collect()
                first = resident_mb()
            progress(topics.total())
        turns = good.tally.counts["turns"]
        while good.tally.counts["turns"] == turns:
            await asyncio.sleep(0.1)
    finally:
        served = len(service._devices)
        await stop(talking, running)
    counts = good.tally.counts
    return Outcome(
        dict(topics), service.refused, service.unknown, counts["turns"], counts["error"],
        (round(first, 1), round(resident_mb(), 1)), served, round(time.monotonic() - began, 1),
    )  # fmt: skip


def main(
    payloads: Annotated[int, typer.Option(help="How many on each topic.")] = 1_000_000,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")] = RESULTS,
) -> None:
    """Feed the service with nonsense, and say how it went."""

    def progress(done: int) -> None:
        if done % 100_000 == 0:
            typer.echo(f"{done} payloads, {resident_mb():.0f} MB", err=True)

    with tempfile.TemporaryDirectory() as folder:
        broker = Mosquitto(Path(folder))
        broker.start()
        try:
            came = asyncio.run(fuzz(broker.port, payloads, seed, progress))
        finally:
            broker.kill()
    claims = {
        "memory within 50 MB of its start": came.memory[1] - came.memory[0] <= ROOM,
        "the other device conversed and saw no error": came.turns > 1 and not came.errors,
    }
    path = save("fuzz", {**about("fuzz", ["aiomqtt"]), **vars(came), "claims": claims}, out)
    typer.echo(f"{came}\n{claims}\n{path}")
    raise typer.Exit(int(not all(claims.values())))


if __name__ == "__main__":
    typer.run(main)
