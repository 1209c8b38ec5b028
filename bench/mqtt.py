"""What the network path adds to the latency: ``python -m bench.mqtt``.

The same requests go to the same sessions, once handed over inside one process and once as packets
through a broker on this machine and back. The models are played and take no time, so that what is
measured is everything else. Latency is from the last loud packet of a request to the first sound of
its reply, the hangover included; *added* is the difference of the percentiles of both ways.
"""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from agent.config import Config, load_config
from agent.events import TurnEnded
from agent.playback import Clocked
from agent.session import Session
from bench.played import PlayedModels
from bench.raw_mqtt import RawClient, publish
from bench.report import RESULTS, about, save
from stages import SAMPLE_RATE
from tests.mosquitto import Mosquitto

CHUNK = 320  # samples: 20 ms
TONE = 30  # chunks of a request
PAUSE = 15  # chunks between a reply's end and the next request
UNITS = 10  # of a reply, 40 ms each
DEVICES = (1, 5, 10, 20, 40)
SETTINGS = ("turns.adapt=false", "mqtt.max_sessions=64")
TARGET = 15.0  # ms added at 20 devices, p95
# Without it the broker's kernel holds small packets back for up to 40 ms (Nagle's algorithm).
BROKER = "allow_anonymous true\nset_tcp_nodelay true"


class Requests:
    """A tone, silence until it is answered, a pause: at the pace of the clock, until ``until``.

    Attributes:
        took: seconds from each request's end to the first sound of its reply.
        unanswered: requests for which the time ended first.
    """

    def __init__(self, start: float, until: float) -> None:
        self._due, self._until = start, until
        self._asked: float | None = None
        self._over = asyncio.Event()
        self.took: list[float] = []
        self.unanswered = 0

    def sounded(self) -> None:
        """Sound of a reply has come."""
        if self._asked is not None:
            self.took.append(time.perf_counter() - self._asked)
            self._asked = None

    def over(self) -> None:
        """The turn has ended."""
        self._over.set()

    async def chunks(self) -> AsyncIterator[np.ndarray]:
        """float32 at 16 kHz."""
        loud, quiet = np.full(CHUNK, 0.3, np.float32), np.zeros(CHUNK, np.float32)
        while time.perf_counter() < self._until:
            self._over.clear()
            for n in range(TONE):
                await self._pace()
                if n == TONE - 1:
                    self._asked = time.perf_counter()
                yield loud
            while not self._over.is_set() and time.perf_counter() < self._until:
                await self._pace()
                yield quiet
            for _ in range(PAUSE):
                await self._pace()
                yield quiet
        self.unanswered = int(self._asked is not None)

    async def _pace(self) -> None:
        self._due += CHUNK / SAMPLE_RATE
        await asyncio.sleep(max(0.0, self._due - time.perf_counter()))


class Noted(Clocked):
    """Plays to nobody, and tells when sound comes."""

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self._requests = requests

    def play(self, samples: np.ndarray) -> None:
        self._requests.sounded()
        super().play(samples)


async def local(models: PlayedModels, config: Config, requests: Requests) -> None:
    """One session in this process."""
    async with Session(models.beside(), config) as session:  # type: ignore[arg-type]
        events = session.converse(requests.chunks(), Noted(requests))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, TurnEnded):
                    requests.over()


async def remote(port: int, name: str, requests: Requests) -> None:
    """One device at the broker."""
    base = f"spirit/{name}"

    def arrived(topic: str, payload: bytes) -> None:
        if topic.endswith("audio/out"):
            requests.sounded()
        elif b'"turn-ended"' in payload:
            requests.over()

    client = await RawClient.open(port, name, [f"{base}/audio/out", f"{base}/event"], arrived)
    sequence = 0
    async for chunk in requests.chunks():
        head = struct.pack("<BBHIIi", 1, 0, SAMPLE_RATE, sequence, sequence * CHUNK, 0)
        pcm = (chunk * 32767).astype("<i2").tobytes()
        client.write(publish(f"{base}/audio/in", head + pcm))
        sequence += 1
    client.close()


async def measure(count: int, seconds: float, port: int | None, config: Config) -> list[Requests]:
    """So many devices at once: at a broker, or without one in this process."""
    start = time.perf_counter() + 0.5
    # Nothing keeps devices in step: neither their packets nor their requests begin together.
    phases = np.random.default_rng(count).uniform(0.0, 1.0, count)
    every = [Requests(start + phase, start + seconds) for phase in phases]
    if port is None:
        models = PlayedModels(config, UNITS)
        await asyncio.gather(*(local(models, config, each) for each in every))
    else:
        names = (f"n{count}-{n}" for n in range(count))
        await asyncio.gather(*(remote(port, n, r) for n, r in zip(names, every, strict=True)))
    return every


def summary(every: list[Requests]) -> dict[str, float | int]:
    """Percentiles in ms; each device's first reply, for which its session began, is left out."""
    took = [1e3 * t for each in every for t in each.took[1:]]
    p50, p95 = np.percentile(took, [50, 95]) if took else (float("nan"),) * 2
    return {
        "replies": len(took),
        "unanswered": sum(each.unanswered for each in every),
        "p50_ms": round(float(p50), 1),
        "p95_ms": round(float(p95), 1),
    }


def rows(seconds: float, devices: list[int]) -> list[dict[str, Any]]:
    """Both ways for each number of devices, right after each other."""
    config = load_config("nano", SETTINGS)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        broker = Mosquitto(Path(folder), BROKER)
        broker.start()
        settings = [word for each in SETTINGS for word in ("--set", each)]
        command = [sys.executable, "-m", "bench.played", "--units", str(UNITS), *settings]
        command += ["--set", "mqtt.idle_seconds=2", "--mqtt", f"mqtt://127.0.0.1:{broker.port}"]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert service.stdout is not None
            service.stdout.readline()
            for count in devices:
                alone = summary(asyncio.run(measure(count, seconds, None, config)))
                through = summary(asyncio.run(measure(count, seconds, broker.port, config)))
                added = {k: round(through[k] - alone[k], 1) for k in ("p50_ms", "p95_ms")}
                row = {"devices": count, "local": alone, "mqtt": through, "added": added}
                found.append(row)
                typer.echo(markdown([row]).splitlines()[-1])
        finally:
            service.kill()
            service.wait()
            broker.kill()
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "| devices | replies | local p50 / p95, ms | through MQTT p50 / p95, ms | added p50 / p95, ms |",  # noqa: E501
        "|---|---|---|---|---|",
    ]
    for row in found:
        cells = [f"{row[k]['p50_ms']} / {row[k]['p95_ms']}" for k in ("local", "mqtt", "added")]
        lines.append(f"| {row['devices']} | {row['mqtt']['replies']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(
    seconds: Annotated[float, typer.Option(help="For each number of devices and way.")] = 30.0,
    devices: Annotated[list[int] | None, typer.Option(help="How many; repeatable.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")] = RESULTS,
) -> None:
    """Measure both ways side by side."""
    head = about("mqtt", ["aiomqtt", "paho-mqtt"])
    found = rows(seconds, devices or list(DEVICES))
    head["load_average_after"] = round(float(Path("/proc/loadavg").read_text().split()[0]), 2)
    path = save("mqtt", {**head, "seconds": seconds, "target_ms": TARGET, "rows": found}, out)
    text = f"""# Latency added by MQTT, {head["date"]}

`{head["command"]}` on {head["machine"]}; load average {head["load_average"]} before and
{head["load_average_after"]} after. Models are played.

{markdown(found)}
"""
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    typer.echo(str(path))


if __name__ == "__main__":
    typer.run(main)
