"""One device: its conversation, its typed requests, and the connection that speaks for it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from agent.config import Config
from agent.conversation import State
from agent.embedding import SpeechAgent
from agent.errors import UserError
from agent.events import Event, ReplyAudio, Spoken, StateChanged, TurnEnded
from agent.models import Models
from agent.mqtt_audio import RemoteMicrophone, RemotePlayback
from agent.mqtt_limits import Bucket
from agent.mqtt_link import Broker, Link, Outgoing, Subscription
from agent.mqtt_pool import Copies
from agent.mqtt_snapshot import Snapshot
from agent.mqtt_waits import stop, within
from agent.mqtt_wire import (
    FROM_DEVICE,
    Ask,
    BadMessage,
    Item,
    Packet,
    Played,
    Say,
    Set,
    Simple,
    Switch,
    as_json,
    describe,
    topic,
)
from agent.reply import Memory

log = logging.getLogger(__name__)

_WAITING = 4  # typed requests
_LOSSES = ("lost", "late", "dropped", "unsent")  # told of as they happen
_DRAIN = 0.8  # s for the end of a reply that is broken off
_RECALL = 3.0  # s for what the broker holds of the device
_OVERLAP = 2.0  # s in which its messages may come twice after it was taken over
_INSIST = 0.1  # s before the state is said again, over what another service said
_AGAIN = 1.0  # s before a conversation that failed begins anew
_BUSY = (State.HEARING.value, State.ANSWERING.value)
_STATES = {State.MAYBE_FINISHED.value: State.HEARING.value}


@dataclass(frozen=True)
class Pooled:
    """What a device tells the pool of services that it belongs to.

    Attributes:
        given: what it publishes: name of the topic, payload.
        ready: nothing more of it will be missed.
        confirm: the owner of the device, as the broker holds it.
        pass_on: gives a request that we will not answer any more to another service; whether there
            is one.
    """

    given: Callable[[str, bytes], None]
    ready: Callable[[], None]
    confirm: Callable[[bytes], None]
    pass_on: Callable[[str, bytes], bool]


class Device:
    """Serves one device until it has been silent for long, or is cancelled."""

    def __init__(
        self,
        name: str,
        broker: Broker,
        models: Models,
        config: Config,
        pooled: Pooled | None = None,
    ) -> None:
        """
        Args:
            pooled: where several services share devices; what the device publishes then comes by
                its own connection.
        """
        self.name = name
        self._config, self._pooled = config, pooled
        self._model = f"{models.layout.lm.name} {models.tokenizer.size}"
        self._copies: Copies | None = Copies()
        self._snapshot = b""
        self._known = asyncio.Event()  # what the broker holds of the device has been read
        self._session_id = uuid.uuid4().hex[:12]
        self._state = "idle"
        will = self._state_message("offline")
        self.link = Link(
            broker,
            f"spirit-{name}-{self._session_id}",
            will,
            self._hello,
            self._subscriptions(),
            self._arrived,
        )
        self._microphone = RemoteMicrophone(config.mqtt.jitter_ms / 1000)
        self._playback = RemotePlayback(self._send, self._duck, config.mqtt.lead_ms / 1000)
        self._requests: asyncio.Queue[Ask | Say] = asyncio.Queue(_WAITING)
        self._submitting: asyncio.Future[int] | None = None
        self._leaving = self._left = self._insisting = False
        self._over = 0  # number of the latest turn that has ended
        self._off: dict[Literal["mute", "gate"], bool] = {"mute": False, "gate": False}
        self._agent = SpeechAgent(config, models)
        self._anew, self._talking, self._ended = (asyncio.Event() for _ in range(3))
        self._background: set[asyncio.Future[Any]] = set()
        self._clock = asyncio.get_running_loop().time
        self._complained = self._hushed = -1.0
        self._used = self._clock()
        self._messages = Bucket(config.mqtt.max_messages, self._clock)
        self._bytes = Bucket(config.mqtt.max_bytes, self._clock)
        self.bad = 0  # payloads refused
        self.limited = 0  # messages refused because there were too many
        self._settings: dict[str, Any] = {}
        self._lost: dict[str, int] = {}  # what was told of as dropped

    # What its connection brings.

    def _subscriptions(self) -> list[Subscription]:
        """The state comes last: once it has come, ours or an earlier one, all else is here."""
        wanted = [Subscription(self._topic(n), retained=True) for n in ("snapshot", "state")]
        if self._pooled is not None:
            own = [Subscription(self._topic(n), int("audio" not in n)) for n in FROM_DEVICE]
            wanted = [Subscription(self._topic("owner"), retained=True), *own, *wanted]
        return wanted

    def _arrived(self, full: str, payload: bytes) -> None:
        name = full.removeprefix(self._topic(""))
        if name == "snapshot":
            self._snapshot = payload
        elif name == "state":
            self._seen(payload)
        elif self._pooled is None:
            return
        elif name == "owner":
            if not self.link.connected.is_set():  # later ones come by the pool's own connection
                self._pooled.confirm(payload)
        elif self._copies is None or self._copies.new(name, payload, direct=True):
            self._pooled.given(name, payload)

    def _seen(self, state: bytes) -> None:
        """The state that everybody sees came back to us."""
        if not self._known.is_set():
            self._known.set()
            if self._pooled is not None:
                self._pooled.ready()
            loop = asyncio.get_running_loop()
            loop.call_later(_OVERLAP, setattr, self, "_copies", None)
        elif self._session_id.encode() not in state and not self._insisting:
            # Of a service that had the device before us: its last will, or what it said before it
            # learnt that it has lost the device.
            self._insisting = True
            asyncio.get_running_loop().call_later(_INSIST, self._insist)

    def _insist(self) -> None:
        self._insisting = False
        if not self._left:
            self.link.send(self._state_message(self._state))

    def may(self, size: int) -> bool:
        """Whether a message of ``size`` bytes is within what a device may send; if not, it is
        counted, and the device told."""
        if self._messages.take(1) and self._bytes.take(size):
            return True
        self.limited += 1
        if self._clock() - self._hushed >= 1.0:
            self._hushed = self._clock()
            limits = self._config.mqtt
            most = f"{limits.max_messages:g} messages and {limits.max_bytes:g} bytes a second"
            self.tell({"type": "rate-limited", "message": f"at most {most}", "count": self.limited})
        return False

    def wants(self, name: str, payload: bytes) -> bool:
        """Whether a message that came through the pool has not come directly."""
        return self._copies is not None and self._copies.new(name, payload, direct=False)

    async def _resume(self) -> None:
        """Go on with the conversation that another service, or an earlier one, had."""
        await within(_RECALL, self._known)
        if not self._snapshot:
            return
        try:
            found = Snapshot.decode(self._snapshot, self._config.mqtt.snapshot_bytes)
            if found.model != self._model:
                raise BadMessage(f"it is of the model {found.model!r}, not of {self._model!r}")
            self._agent.restore(Memory(found.turn, found.turns))
            self._over = found.turn
        except (BadMessage, ValueError) as error:
            self.refuse("snapshot", f"the conversation cannot be gone on with: {error}")
            return
        for name in found.off:
            self.handle(Switch(do=name, on=True))
        if found.settings:
            self._set(found.settings)
        self.tell({"type": "resumed", "turn": found.turn, "turns": len(found.turns)})

    def _keep(self) -> None:
        """Let the broker keep what is remembered."""
        memory = self._agent.memory
        turns = [list(turn) for turn in memory.turns]
        off = [name for name, on in self._off.items() if on]
        found = Snapshot(
            model=self._model, turn=memory.turn, turns=turns, off=off, settings=self._settings
        )
        limits = self._config.mqtt
        payload = found.encode(limits.snapshot_bytes)
        topic = self._topic("snapshot")
        self.link.send(Outgoing(topic, payload, 1, True, limits.snapshot_seconds))

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
        elif isinstance(item, Set):
            self._set(item.settings)
        elif isinstance(item, Simple) and item.do == "reset":
            self._reset()
        elif isinstance(item, Simple):
            self._later(self._agent.interrupt())
        else:
            self._ask(item)

    def _set(self, settings: Mapping[str, Any]) -> None:
        try:
            self._agent.set(settings)
        except UserError as error:
            self.refuse("command", str(error))
        else:
            self._settings.update(settings)
            self.tell({"type": "set", "settings": self._settings})

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
        if self._leaving:
            self._give_back(item)
            return
        try:
            self._requests.put_nowait(item)
        except asyncio.QueueFull:
            self.refuse("text/in", f"{_WAITING} requests are waiting: wait for their replies")

    def _give_back(self, item: Ask | Say) -> None:
        """Somebody else is to answer this request."""
        name, payload = "text/in", item.text.encode()
        if isinstance(item, Say):
            name, payload = "command", as_json(item.model_dump())
        if self._pooled is None:  # it waits for the next service
            self._publish(name, payload, 1)
        elif not self._pooled.pass_on(name, payload):
            self.refuse(name, "the session ends before it could be answered: ask again")

    def _reset(self) -> None:
        self._publish("snapshot", b"", 1, True)
        self._anew.set()
        while not self._requests.empty():
            self._requests.get_nowait()

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # What it is told.

    def _topic(self, name: str) -> str:
        return topic(self._config.mqtt, self.name, name)

    def _publish(self, name: str, payload: bytes, qos: int = 0, retain: bool = False) -> None:
        self.link.send(Outgoing(self._topic(name), payload, qos, retain))

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
        if isinstance(event, TurnEnded):
            self._keep()  # first: who is told that a turn has ended may rely on its memory
        message = describe(event)
        if message is not None:
            self.tell(message)
        if isinstance(event, StateChanged):
            self._talking.set()
            self._now(_STATES.get(event.state, event.state))
        elif isinstance(event, ReplyAudio):
            self._playback.feed(event.turn, event.samples)
        elif isinstance(event, Spoken):
            text = {"turn": event.turn, "text": event.text, "heard": event.heard}
            self._publish("text/out", as_json(text), 1)
        elif isinstance(event, TurnEnded):
            self._metrics(event)
            self._over = event.turn
            self._ended.set()

    def _metrics(self, event: TurnEnded) -> None:
        document = {**event.trace.as_dict(), "network": self._network()}
        self._publish("metrics", as_json(document), 1)

    def _network(self) -> dict[str, int]:
        return {
            **self._microphone.jitter.counters.as_dict(),
            "dropped": self._microphone.dropped,
            "unsent": self.link.dropped,
            "refused": self.bad,
            "limited": self.limited,
        }

    async def _watch_losses(self) -> None:
        """Tell what was lost or dropped since the last time, once a second at most."""
        while True:
            await asyncio.sleep(1.0)
            now = {name: self._network()[name] for name in _LOSSES}
            new = {name: n - self._lost.get(name, 0) for name, n in now.items()}
            self._lost = now
            if any(new.values()):
                self.tell({"type": "dropped", **new})

    # Its life.

    async def run(self) -> None:
        """Serve the device; returns when it has been silent for ``mqtt.idle_seconds``.

        Raises:
            UserError: the broker refuses this connection.
        """
        work = (
            self.link.run, self._playback.run, self._converse, self._type, self._watch_losses
        )  # fmt: skip
        tasks = [asyncio.create_task(each()) for each in work]
        idle = asyncio.create_task(self._until_idle())
        try:
            done, _ = await asyncio.wait({*tasks, idle}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
            self._publish("snapshot", b"", 1, True)
            await self.leave("idle")
        finally:
            others = [*tasks[1:], idle, *self._background]
            for task in others:
                task.cancel()
            await asyncio.gather(stop(tasks[0]), *others, return_exceptions=True)
            await self._agent.__aexit__()
            self._agent.models.lm.close()  # its place among the model's streams

    async def leave(self, state: str, seconds: float = 0.6) -> None:
        """End the turn in progress, say that nobody is here any more, and wait until all of it has
        been said. Requests that wait are given back."""
        self._leaving = True
        if self._submitting is not None:
            self._submitting.cancel()
        while not self._requests.empty():
            self._give_back(self._requests.get_nowait())
        await self._agent.interrupt(state)
        if self._over < self._agent.memory.turn:
            self._ended.clear()
            await within(_DRAIN, self._ended)
        self._playback.stop()
        self._now(state)
        self._left = True
        await self.link.sent(seconds)

    async def _until_idle(self) -> None:
        idle = self._config.mqtt.idle_seconds
        while (left := self._used + idle - self._clock()) > 0 or self._state in _BUSY:
            await asyncio.sleep(max(left, 0.1 * idle))  # a reply may go on for longer

    async def _converse(self) -> None:
        """One conversation after another; a fault ends only the one it happens in."""
        await self._resume()
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
                self._over = 0
            if isinstance(error, Exception):
                log.error("%s: the conversation failed", self.name, exc_info=error)
                self.refuse("session", f"the conversation failed and begins anew: {error}")
                await asyncio.sleep(_AGAIN)
            else:
                self.tell({"type": "reset"})

    async def _talk(self) -> None:
        events = self._agent.converse(self._microphone.chunks(), self._playback)
        try:
            async with aclosing(events):
                async for event in events:
                    self._tell(event)
        finally:
            self._talking.clear()

    # Typed requests.

    async def _type(self) -> None:
        """Give typed requests to the conversation, each when nobody speaks."""
        while True:
            item = await self._requests.get()
            await self._talking.wait()
            submit = self._agent.submit(item.text, say=isinstance(item, Say))
            self._submitting = begun = asyncio.ensure_future(submit)
            try:
                await asyncio.wait({begun})
            finally:
                begun.cancel()
            if begun.cancelled():
                self._give_back(item)
            elif isinstance(error := begun.exception(), UserError):
                self.refuse("text/in", str(error))
            elif error is not None:
                raise error
