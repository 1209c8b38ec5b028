"""One device: its conversation, its typed requests, and the connection that speaks for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from contextlib import aclosing
from typing import Any

from agent.config import Config
from agent.conversation import State
from agent.embedding import SpeechAgent
from agent.errors import UserError
from agent.events import Event, Interrupted, ReplyAudio, ReplyText, Spoken, StateChanged, TurnEnded
from agent.models import Models
from agent.mqtt_audio import RemoteMicrophone, RemotePlayback
from agent.mqtt_link import Broker, Link, Outgoing
from agent.mqtt_wire import (
    Ask,
    Item,
    Packet,
    Played,
    Say,
    Simple,
    Switch,
    as_json,
    describe,
    topic,
)

log = logging.getLogger(__name__)

_WAITING = 4  # typed requests
_AGAIN = 1.0  # s before a conversation that failed begins anew
_BUSY = (State.HEARING.value, State.ANSWERING.value)
_STATES = {State.MAYBE_FINISHED.value: State.HEARING.value}


class Device:
    """Serves one device until it has been silent for long, or is cancelled."""

    def __init__(self, name: str, broker: Broker, models: Models, config: Config) -> None:
        self.name = name
        self._config = config
        self._session_id = uuid.uuid4().hex[:12]
        self._state = "idle"
        will = self._state_message("offline")
        self.link = Link(broker, f"spirit-{name}-{self._session_id}", will, self._hello)
        self._microphone = RemoteMicrophone(config.mqtt.jitter_ms / 1000)
        self._playback = RemotePlayback(self._send, self._duck, config.mqtt.lead_ms / 1000)
        self._requests: asyncio.Queue[Ask | Say] = asyncio.Queue(_WAITING)
        self._free = asyncio.Event()  # nobody speaks: neither the user nor the agent
        self._typing = self._cut = False  # a typed reply is being spoken; it was broken off
        self._typed_turn = 0
        self._left = False
        self._off = {"mute": False, "gate": False}
        self._agent = SpeechAgent(config, models)
        self._anew = asyncio.Event()
        self._background: set[asyncio.Future[Any]] = set()
        self._clock = asyncio.get_running_loop().time
        self._complained = -1.0
        self._used = self._clock()
        self.bad = 0  # payloads refused

    # What the device says.

    def handle(self, item: Item) -> None:
        """Do what the device asks; never waits."""
        self._used = self._clock()
        if isinstance(item, Packet):
            self._microphone.push(item)
        elif isinstance(item, Played):
            if not self._playback.played(item.turn, item.samples):
                self.refuse("played", f"{item.samples} samples: not as many have been sent")
        elif isinstance(item, Switch):
            self._off[item.do] = item.on
            self._microphone.deaf = any(self._off.values())
        elif isinstance(item, Simple) and item.do == "reset":
            self._reset()
        elif isinstance(item, Simple):
            self._interrupt()
        else:
            self._ask(item)

    def refuse(self, what: str, why: str) -> None:
        """Count something that cannot be understood, and tell the device: at most once a second,
        or a device could make us flood the broker."""
        self.bad += 1
        if self._clock() - self._complained < 1.0:
            return
        self._complained = self._clock()
        self.tell({"type": "error", "topic": what, "message": why, "count": self.bad})

    def tell(self, message: dict[str, Any]) -> None:
        """Publish on the device's topic ``event``."""
        self._publish("event", as_json(message), 1)

    def _ask(self, item: Ask | Say) -> None:
        try:
            self._requests.put_nowait(item)
        except asyncio.QueueFull:
            self.refuse("text/in", f"{_WAITING} requests are waiting: wait for their replies")

    def _interrupt(self) -> None:
        if self._typing:
            self._stop_typed("interrupted")
        else:
            self._later(self._agent.interrupt())

    def _reset(self) -> None:
        if self._typing:
            self._stop_typed("reset")
        self._free.clear()
        self._anew.set()
        while not self._requests.empty():
            self._requests.get_nowait()

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # What it is told.

    def _publish(self, name: str, payload: bytes, qos: int = 0, retain: bool = False) -> None:
        self.link.send(Outgoing(topic(self._config.mqtt, self.name, name), payload, qos, retain))

    def _send(self, packet: Packet) -> None:
        self._publish("audio/out", packet.encode())

    def _duck(self, on: bool) -> None:
        self.tell({"type": "duck", "on": on})

    def _state_message(self, state: str) -> Outgoing:
        payload = as_json({"state": state, "session": self._session_id})
        return Outgoing(topic(self._config.mqtt, self.name, "state"), payload, 1, True)

    def _hello(self) -> list[Outgoing]:
        return [self._state_message(self._state)]

    def _now(self, state: str) -> None:
        if state != self._state and not self._left:
            self._state = state
            self._used = self._clock()
            self.link.send(self._state_message(state))

    def _tell(self, event: Event) -> None:
        message = describe(event)
        if message is not None:
            self.tell(message)
        if isinstance(event, StateChanged):
            self._moved(event)
        elif isinstance(event, ReplyAudio):
            self._playback.feed(event.turn, event.samples)
        elif isinstance(event, Spoken):
            text = {"turn": event.turn, "text": event.text, "heard": event.heard}
            self._publish("text/out", as_json(text), 1)
        elif isinstance(event, TurnEnded):
            self._metrics(event)

    def _metrics(self, event: TurnEnded) -> None:
        network = self._microphone.jitter.counters.as_dict()
        network |= {
            "dropped": self._microphone.dropped,
            "unsent": self.link.dropped,
            "refused": self.bad,
        }
        self._publish("metrics", as_json({**event.trace.as_dict(), "network": network}), 1)

    def _moved(self, event: StateChanged) -> None:
        listening = event.state == State.LISTENING.value
        if listening:
            self._free.set()
        else:
            self._free.clear()
            if self._typing and not self._cut:
                self._stop_typed("speech")
        if not (listening and self._typing):
            self._now(_STATES.get(event.state, event.state))

    # Its life.

    async def run(self) -> None:
        """Serve the device; returns when it has been silent for ``mqtt.idle_seconds``.

        Raises:
            UserError: the broker refuses this connection.
        """
        work = (self.link.run, self._playback.run, self._converse, self._type)
        tasks = [asyncio.create_task(each()) for each in work]
        idle = asyncio.create_task(self._until_idle())
        try:
            done, _ = await asyncio.wait({*tasks, idle}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
            await self.leave("idle")
        finally:
            for task in (*tasks, idle, *self._background):
                task.cancel()
            await asyncio.gather(*tasks, idle, *self._background, return_exceptions=True)
            await self._agent.__aexit__()

    async def leave(self, state: str, seconds: float = 1.0) -> None:
        """Say that nobody is here any more, and wait until it has been said."""
        self._playback.stop()
        self._now(state)
        self._left = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.link.sent(), seconds)

    async def _until_idle(self) -> None:
        idle = self._config.mqtt.idle_seconds
        while (left := self._used + idle - self._clock()) > 0 or self._state in _BUSY:
            await asyncio.sleep(max(left, 0.1 * idle))  # a reply may go on for longer

    async def _converse(self) -> None:
        """One conversation after another; a fault ends only the one it happens in."""
        while True:
            self._anew.clear()
            talking = asyncio.create_task(self._talk())
            anew = asyncio.create_task(self._anew.wait())
            try:
                await asyncio.wait({talking, anew}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                talking.cancel()
                anew.cancel()
                (error, _) = await asyncio.gather(talking, anew, return_exceptions=True)
            if isinstance(error, Exception):
                log.error("%s: the conversation failed", self.name, exc_info=error)
                self.refuse("session", f"the conversation failed and begins anew: {error}")
                await asyncio.sleep(_AGAIN)
            else:
                self.tell({"type": "reset"})

    async def _talk(self) -> None:
        events = self._agent.converse(self._microphone.chunks(), self._playback)
        async with aclosing(events):
            async for event in events:
                self._tell(event)

    # Typed requests.

    async def _type(self) -> None:
        while True:
            item = await self._requests.get()
            await self._free.wait()
            self._typing, self._cut = True, False
            try:
                await self._speak(item)
            except UserError as error:
                self.refuse("text/in", str(error))
            except Exception as error:
                log.exception("%s: a typed request failed", self.name)
                self.refuse("text/in", f"no reply could be made: {error}")
            finally:
                self._typing = False
                if self._free.is_set():
                    self._now(State.LISTENING.value)

    async def _speak(self, item: Ask | Say) -> None:
        self._now(State.ANSWERING.value)
        self._playback.begin()
        make = self._agent.say if isinstance(item, Say) else self._agent.ask
        ended: TurnEnded | None = None
        async with aclosing(make(item.text)) as events:
            async for event in events:
                if self._cut:
                    return
                self._typed(event)
                ended = event if isinstance(event, TurnEnded) else None
        self._playback.finish()
        await self._playback.silent()
        if ended is not None and not self._cut:
            self._tell(ended)

    def _typed(self, event: Event) -> None:
        self._typed_turn = getattr(event, "turn", 0)
        if isinstance(event, ReplyText):
            self._publish("text/out", as_json({"turn": event.turn, "text": event.text}), 1)
        elif isinstance(event, ReplyAudio):
            self._playback.play(event.samples)
            self._playback.feed(event.turn, event.samples)

    def _stop_typed(self, reason: str) -> None:
        self._cut = True
        turn, heard = self._typed_turn, self._playback.stop()
        self._tell(Interrupted(turn, heard, reason))
        self.tell({"type": "turn-ended", "turn": turn, "how": reason})
