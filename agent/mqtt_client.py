"""``python -m agent mqtt-client mqtt://host --device kitchen``: this machine is a robot's body.

Its microphone and its loudspeaker, or files, converse with an agent that somebody serves at the
same broker (``python -m agent serve``). Nothing is computed here: no model is loaded.

::

    microphone ─► RemoteAgent.hear ─► audio/in ─► agent
    loudspeaker ◄─ Reply ◄─ audio/out ◄───────────┘   played ─► (the playhead)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from agent.commands import Debug, Overrides, Plain, mendable, stderr
from agent.config import Config, load_config
from agent.errors import UserError
from agent.mqtt_waits import within
from agent.playback import Clocked, Playback
from agent.schema import DEVICE_NAME
from agent.show import printable
from stages import SAMPLE_RATE

if TYPE_CHECKING:
    from agent.audio_files import AudioFileSink
    from agent.events import DeviceChanged
    from agent.mqtt_link import Broker
    from agent.mqtt_wire import Packet

_PACKET = SAMPLE_RATE // 50  # samples sent at a time
_REPORT = 0.1  # s between words on the playhead
_CALM = 2.0  # s of nothing happening after a file: longer than the longest hangover
_PATIENCE = 20.0  # s for an agent to answer at all
_SOUND = (".wav", ".flac", ".ogg")

Tell = Callable[[str, dict[str, Any]], None]


class Reply:
    """Packets of replies, played in their places.

    The samples of a reply are placed by its own clock: what is lost becomes silence, what comes
    twice or too late is dropped, so that the playhead stays right.

    Attributes:
        lost: samples at 16 kHz that became silence.
    """

    def __init__(self, playback: Playback) -> None:
        self._playback = playback
        self._turn: int | None = None
        self._start = self._end = 0  # of what was handed over, on the reply's clock
        self.lost = 0

    def take(self, packet: Packet) -> None:
        """Play a packet, or stop."""
        from agent.mqtt_wire import FIRST, LAST, STOP

        if packet.flags & STOP:
            self._playback.stop()
            self._turn = None
            return
        if packet.flags & FIRST or (packet.turn != self._turn and len(packet.samples)):
            self._turn, self._start, self._end = packet.turn, packet.clock, packet.clock
            self._playback.begin()
        if packet.turn != self._turn:
            return
        missing = packet.clock - self._end
        if missing > 0:
            self.lost += missing
            self._playback.play(np.zeros(missing, np.float32))
        fresh = packet.samples[max(0, -missing) :]
        self._end = max(self._end, packet.clock + len(packet.samples))
        if len(fresh):
            self._playback.play(fresh)
        if packet.flags & LAST:
            self._playback.finish()

    @property
    def playhead(self) -> tuple[int, int] | None:
        """The turn that is playing, and how much of its reply was heard; ``None`` if none is."""
        if self._turn is None:
            return None
        return self._turn, self._start + self._playback.heard

    @property
    def done(self) -> bool:
        """All was heard."""
        return self._playback.done


class RemoteAgent:
    """A device's end of docs/mqtt.md: sound and commands there, replies and events back.

    Args:
        tell: called with a topic (``state``, ``event``, ``text/out``, ``metrics``) and what came
            on it.

    Attributes:
        state: as the agent last said; empty until it has.
        reply: what is being played.
    """

    def __init__(
        self, broker: Broker, config: Config, device: str, playback: Playback, tell: Tell
    ) -> None:
        from agent.mqtt_link import Link, Subscription
        from agent.mqtt_wire import topic

        self._config, self._device, self._tell = config.mqtt, device, tell
        self._playback = playback
        self._topic = lambda name: topic(config.mqtt, device, name)
        wanted = [
            Subscription(self._topic(name), int(name != "audio/out"), retained=name == "state")
            for name in ("state", "event", "text/out", "metrics", "audio/out")
        ]
        name = f"spirit-client-{uuid.uuid4().hex[:12]}"
        self.link = Link(broker, name, subscriptions=wanted, arrived=self._arrived)
        self.reply = Reply(playback)
        self.state = ""
        self._half_duplex = config.turns.half_duplex
        self._rest = np.zeros(0, np.float32)
        self._sequence = self._clock = self._connection = 0
        self._reported: tuple[int, int] | None = None
        self.changed = asyncio.Event()

    async def run(self) -> None:
        """Keep the connection and tell the playhead, until cancelled.

        Raises:
            UserError: the broker refuses us.
        """
        reporting = asyncio.create_task(self._report())
        try:
            await self.link.run()
        finally:
            reporting.cancel()

    def hear(self, samples: np.ndarray) -> None:
        """What the microphone hears: float32 mono at 16 kHz, of any length. Never waits."""
        if self._half_duplex and not self.reply.done:
            samples = np.zeros_like(samples)
        self._rest = np.concatenate((self._rest, samples))
        while len(self._rest) >= _PACKET:
            self._send(self._rest[:_PACKET])
            self._rest = self._rest[_PACKET:]

    def command(self, message: dict[str, Any]) -> None:
        """See docs/mqtt.md: ``{"do": "interrupt"}`` and so on."""
        self._publish("command", message)

    def _send(self, samples: np.ndarray) -> None:
        from agent.mqtt_link import Outgoing
        from agent.mqtt_wire import FIRST, Packet

        fresh = self.link.connections != self._connection and self.link.connected.is_set()
        packet = Packet(self._sequence, self._clock, samples, flags=FIRST if fresh else 0)
        if fresh:
            self._connection = self.link.connections
        self._sequence += 1
        self._clock += len(samples)
        self.link.send(Outgoing(self._topic("audio/in"), packet.encode()))

    def _publish(self, name: str, message: dict[str, Any], qos: int = 1) -> None:
        from agent.mqtt_link import Outgoing
        from agent.mqtt_wire import as_json

        self.link.send(Outgoing(self._topic(name), as_json(message), qos))

    async def _report(self) -> None:
        """The playhead, as long as it moves."""
        while True:
            await asyncio.sleep(_REPORT)
            head = self.reply.playhead
            if head is not None and head != self._reported:
                self._publish("played", {"turn": head[0], "samples": head[1]}, 0)
            self._reported = head

    def _arrived(self, full: str, payload: bytes) -> None:
        from agent.mqtt_wire import BadMessage, Packet

        name = full.removeprefix(self._topic(""))
        try:
            if name == "audio/out":
                self.reply.take(Packet.decode(payload))
                return
            said = json.loads(payload)
            if not isinstance(said, dict):
                raise BadMessage("no JSON object")
        except ValueError as error:  # BadMessage is one
            logging.getLogger(__name__).warning("%s: %s", full, error)
            return
        if name == "state":
            self.state = str(said.get("state"))
        elif name == "event" and said.get("type") == "duck":
            self._playback.duck(said.get("on") is True)
        self.changed.set()
        self._tell(name, said)


class Screen:
    """A line for each thing told: state, words, events."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._words = ""
        self.trouble = ""  # why there may be no reply

    def __call__(self, name: str, said: dict[str, Any]) -> None:
        kind = str(said.get("type"))
        if name == "state":
            self.line("state", str(said.get("state")))
        elif name == "text/out":
            self._words += str(said.get("text"))
        elif name == "event" and kind == "heard":
            self.line("heard", str(said.get("text")) or "(no words)")
        elif name == "event" and kind == "turn-ended":
            words, self._words = self._words.strip(), ""
            how = str(said.get("how"))
            self.line("says", words or "(nothing)")
            if how not in ("complete", "long enough"):
                self.line("ended", how)
        elif name == "event" and kind in ("busy", "error"):
            self.trouble = f"{kind}: {said.get('message')}"
            self.line(kind, str(said.get("message")))
        elif name == "event" and kind not in ("turn-started", "duck"):
            rest = {key: value for key, value in said.items() if key != "type"}
            self.line(kind, json.dumps(rest, ensure_ascii=False) if rest else "")

    def line(self, label: str, text: str) -> None:
        """``text`` is from outside."""
        self._console.out(f"{label}: {printable(text)}", highlight=False)


class FilePlayback(Clocked):
    """Plays into a file, at the pace of the clock: of each reply what was heard of it."""

    def __init__(self, sink: AudioFileSink | None) -> None:
        super().__init__()
        self._sink = sink
        self._wave: list[np.ndarray] = []

    def begin(self) -> None:
        self.close()
        super().begin()

    def play(self, samples: np.ndarray) -> None:
        self._wave.append(samples)
        super().play(samples)

    def stop(self) -> int:
        self.close()
        return super().stop()

    def close(self) -> None:
        """Write what was heard."""
        if self._wave and self._sink is not None:
            self._sink.write(np.concatenate(self._wave)[: self.heard])
        self._wave = []


@mendable
def mqtt_client(
    url: Annotated[str, typer.Argument(metavar="URL", help="mqtt://host[:port], or mqtts://.")],
    device: Annotated[
        str, typer.Option("--device", "-d", help="Its name among all; default: this machine's.")
    ] = "",
    microphone: Annotated[
        str | None,
        typer.Option("--input", "-i", metavar="NAME|NUMBER|FILE", help="Microphone, or a file."),
    ] = None,
    loudspeaker: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="NAME|NUMBER|FILE", help="Loudspeaker, or a file."),
    ] = None,
    half_duplex: Annotated[
        bool,
        typer.Option(help="Send nothing while a reply plays (where its echo is not cancelled)."),
    ] = False,
    overrides: Overrides = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Talk with an agent that is served elsewhere, over MQTT.

    The broker's user and password come from SPIRIT_MQTT_USER and SPIRIT_MQTT_PASSWORD, or from a
    file (--set mqtt.credentials=FILE). With a file as --input it ends after the last reply.

    Examples: mqtt-client mqtt://broker --device kitchen · mqtt-client mqtt://broker --input q.wav
    --output a.wav
    """
    recording, kept = _file(microphone), _file(loudspeaker)
    if kept and not recording:
        raise UserError("--output is a file: give --input a recording as well")
    more = ["turns.half_duplex=true"] if half_duplex else []
    more += [f"sound.input={microphone}"] if microphone is not None and not recording else []
    more += [f"sound.output={loudspeaker}"] if loudspeaker is not None and not kept else []
    settings = load_config("nano", [*(overrides or ()), *more])
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR)
    name = device or re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:64]
    if not DEVICE_NAME.fullmatch(name):
        raise UserError(f"--device {name!r}: expected 1 to 64 letters, digits, '.', '_' or '-'")
    broker = _broker(url, settings)
    screen = Screen(Console(no_color=plain, highlight=False))
    stderr().print(f"{name} at {broker.host}:{broker.port}; Ctrl-C ends")
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        if recording:
            asyncio.run(_converse_files(broker, settings, name, screen, recording, kept))
        else:
            _converse_live(broker, settings, name, screen)


def _file(given: str | None) -> Path | None:
    return Path(given) if given is not None and Path(given).suffix.lower() in _SOUND else None


def _broker(url: str, settings: Config) -> Broker:
    try:
        from agent.mqtt_link import Broker
    except ModuleNotFoundError as error:
        if error.name not in ("aiomqtt", "paho"):
            raise
        raise UserError(
            "MQTT needs a package that is not here: pip install 'spiritlm-agent[mqtt]'"
        ) from None
    return Broker.parse(url, settings.mqtt)


def _converse_live(broker: Broker, settings: Config, name: str, screen: Screen) -> None:
    from agent.soundcard import SoundCard

    def told(change: DeviceChanged) -> None:
        screen.line("device", change.message)

    card = SoundCard(settings.sound, told)

    async def blocks() -> AsyncIterator[np.ndarray]:
        async for block in card.blocks():
            yield block.samples

    async def converse() -> None:
        async with card:
            agent = RemoteAgent(broker, settings, name, card.playback, screen)
            await _both(agent, _stream(agent, blocks()))

    try:
        asyncio.run(converse())
    finally:
        if card.stuck:  # the sound system would be waited for at the end of the program as well
            sys.stdout.flush()
            os._exit(0)


async def _converse_files(
    broker: Broker, settings: Config, name: str, screen: Screen, recording: Path,
    kept: Path | None,
) -> None:  # fmt: skip
    from agent.audio_files import AudioFileSink, AudioFileSource

    source = AudioFileSource(
        recording, "realtime", chunk_samples=_PACKET, max_seconds=settings.audio.max_seconds
    )
    async with AsyncExitStack() as stack:
        sink = AudioFileSink(kept) if kept else None
        if sink is not None:
            stack.callback(sink.close)
        playback = FilePlayback(sink)
        stack.callback(playback.close)
        agent = RemoteAgent(broker, settings, name, playback, screen)
        await _both(agent, _recording(agent, source, screen))
    if sink is not None:
        screen.line("written", f"{sink.path} ({sink.samples / SAMPLE_RATE:.1f} s)")


async def _both(agent: RemoteAgent, talking: Any) -> None:
    """Until the talking ends, or the broker refuses us, or SIGTERM."""
    tasks = [asyncio.ensure_future(talking), asyncio.create_task(agent.run())]
    with contextlib.suppress(NotImplementedError):  # Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, tasks[0].cancel)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        # Again and again: aiomqtt may answer a cancellation with an error of its own, after which
        # the link would connect anew.
        while pending := {task for task in tasks if not task.done()}:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=1.0)


async def _stream(agent: RemoteAgent, sound: AsyncIterator[np.ndarray]) -> None:
    async for samples in sound:
        agent.hear(samples)


async def _recording(agent: RemoteAgent, source: Any, screen: Screen) -> None:
    """A recording, then silence until all replies have been heard.

    Raises:
        UserError: nobody answers, or there is no place.
    """
    try:
        await asyncio.wait_for(_answered(agent), _PATIENCE)
    except asyncio.TimeoutError:
        raise UserError(
            screen.trouble or "nobody answers: is `python -m agent serve` running at this broker?"
        ) from None
    async with aclosing(aiter(source)) as sound:
        await _stream(agent, sound)
    calm, due = 0.0, asyncio.get_running_loop().time()
    while calm < _CALM:
        agent.hear(np.zeros(_PACKET, np.float32))
        quiet = agent.state == "listening" and agent.reply.done and agent.link.connected.is_set()
        calm = calm + _PACKET / SAMPLE_RATE if quiet else 0.0
        due += _PACKET / SAMPLE_RATE
        await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))


async def _answered(agent: RemoteAgent) -> None:
    """Wait until a session is there; a little silence opens it."""
    await agent.link.connected.wait()
    while agent.state not in ("listening", "hearing", "answering"):
        agent.changed.clear()
        agent.hear(np.zeros(_PACKET, np.float32))
        await within(1.0, agent.changed)
