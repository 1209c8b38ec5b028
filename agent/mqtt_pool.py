"""Several services share the devices of one broker; each device stays with one of them.

What devices publish comes through a shared subscription, to any one service. Who gets a message of
a device that nobody serves claims it: the first claim wins, for the broker brings all claims to
everybody in one order. The winner subscribes to the device's topics for itself, then makes its
ownership known, retained; only from then on do the others let the shared copies pass. Where a
service is gone, the others divide its devices among them at once (docs/mqtt.md).

=================================  ========  =====================================================
``{base}/agents/{agent}``          retained  ``{"room": 3}``: is there, for so many devices more
``{base}/{device}/owner``          settled   ``{"agent": ..., "settled": true}``: serves the device
``{base}/agents/{agent}/{topic}``  never     a message of a device, handed over to who serves it
=================================  ========  =====================================================
"""

from __future__ import annotations

import re
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from pydantic import Field, ValidationError

from agent.mqtt_link import Outgoing, Subscription
from agent.mqtt_wire import FROM_DEVICE, BadMessage, Message, as_json, explain, split
from agent.schema import MqttConfig

_HELD = 64  # messages of a device whose service is not known yet
_WAITING = 1024  # devices of which messages are held
_KNOWN = 100_000  # devices of which the owner is remembered
_GRACE = 8.0  # s in which others come back after the broker did: longer than a link waits
_RESETTLE = 1.0  # s after a reconnection in which we would have learnt that we lost a device
_TOGETHER = 0.5  # s between the two copies of a message that came by both ways
_TURN = 0.5  # s that each service waits for the one before it to take what is free

AGENT = re.compile(r"[0-9a-f]{12}")


class Presence(Message):
    """A service is there."""

    room: int = Field(ge=0, le=1000)


class Owner(Message):
    """Who serves a device, or would like to."""

    agent: str = Field(pattern=r"^[0-9a-f]{12}$")
    settled: bool


class Serving(Protocol):
    """What the pool decides about."""

    def room(self) -> int:
        """For how many devices more."""
        ...

    def start(self, device: str) -> None:
        """Serve it; then call :meth:`Pool.settle`."""
        ...

    def stop(self, device: str) -> None:
        """Serve it no more: another does. Nothing is to be said."""
        ...

    def take(self, device: str, name: str, payload: bytes) -> None:
        """A message of a device that is ours; it may have come to the device directly as well."""
        ...

    def busy(self, device: str) -> None:
        """A device wants to be served, and nobody has room."""
        ...


class Pool:
    """Who serves which device, as one of the services sees it.

    Args:
        me: twelve hexadecimal digits of our own.
        later: calls a function after so many seconds.
        away: whether what arrives now is what the broker held for us while we were not there.
    """

    def __init__(
        self,
        config: MqttConfig,
        me: str,
        send: Callable[[Outgoing], None],
        serving: Serving,
        later: Callable[[float, Callable[[], None]], object],
        away: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, self.me = config, me
        self._send, self._serving, self._later, self._away = send, serving, later, away
        self._alive: dict[str, int] = {}  # the others, and their room
        self._unconfirmed: set[str] = set()
        self._owners: OrderedDict[str, Owner] = OrderedDict()
        self._claimed: set[str] = set()
        self._held: OrderedDict[str, deque[tuple[str, bytes]]] = OrderedDict()

    @property
    def will(self) -> Outgoing:
        """Tells the others that we are gone."""
        return Outgoing(f"{self._config.base}/agents/{self.me}", b"", 1, True)

    def hello(self) -> list[Outgoing]:
        """For the others, at every connection."""
        return [Outgoing(self.will.topic, as_json({"room": self._serving.room()}), 1, True)]

    def subscriptions(self) -> list[Subscription]:
        """What is to be subscribed to."""
        base = self._config.base
        group = f"$share/{self._config.group}"
        shared = (f"{group}/{base}/+/{name}" for name in FROM_DEVICE)
        return [
            Subscription(f"{base}/agents/+", retained=True),
            Subscription(f"{base}/+/owner", retained=True),
            Subscription(f"{base}/agents/{self.me}/#"),
            *(Subscription(pattern, int("audio" not in pattern)) for pattern in shared),
        ]

    def owner(self, device: str) -> str | None:
        """Who serves it, if they are there."""
        found = self._owners.get(device)
        there = found is not None and (found.agent == self.me or found.agent in self._alive)
        return found.agent if found is not None and there else None

    # What arrives.

    def arrived(self, full: str, payload: bytes) -> None:
        """A message of :meth:`subscriptions`.

        Raises:
            BadMessage: nobody of ours can have sent it.
        """
        base = f"{self._config.base}/"
        if not full.startswith(base):
            raise BadMessage("another base")
        first, _, rest = full[len(base) :].partition("/")
        agent, _, handed = rest.partition("/")
        if first == "agents" and AGENT.fullmatch(agent):
            if not handed:
                self._presence(agent, payload)
            elif agent == self.me and (place := split(self._config, base + handed)):
                self._handed(*place, payload)
            return
        if rest == "owner" and split(self._config, f"{base}{first}/command"):
            self._owner(first, payload, self._away())
            return
        place = split(self._config, full)
        if place is None:
            raise BadMessage("no topic of a device")
        self._shared(*place, payload)

    def _shared(self, device: str, name: str, payload: bytes) -> None:
        who = self._owners.get(device) if self.owner(device) else None
        if who is not None and who.settled:
            if who.agent == self.me:
                self._serving.take(device, name, payload)
            return
        if who is None and device not in self._claimed and self._serving.room() <= 0:
            if not self.pass_on(device, name, payload):
                self._serving.busy(device)
            return
        self._hold(device, name, payload)
        if who is None:
            self._claim(device)

    def _handed(self, device: str, name: str, payload: bytes) -> None:
        """Another service gives us a message: because we serve the device, or because we could."""
        if self.owner(device) == self.me:
            self._serving.take(device, name, payload)
        elif self._serving.room() > 0:
            self._hold(device, name, payload)
            self._claim(device)
        else:
            self._serving.busy(device)

    def _presence(self, agent: str, payload: bytes) -> None:
        if agent == self.me:
            return
        if payload:
            self._alive[agent] = _read(Presence, payload).room
            self._unconfirmed.discard(agent)
        else:
            self._gone(agent)

    def _owner(self, device: str, payload: bytes, away: bool) -> None:
        if not payload:
            self._owners.pop(device, None)
            self._claimed.discard(device)
            if device in self._held and self._serving.room() > 0:
                self._claim(device)
            return
        told = _read(Owner, payload)
        if not told.settled and self.owner(device) is not None:
            self._claimed.discard(device)  # somebody was first; they will settle
            return
        mine_before = self._owners.get(device) == Owner(agent=self.me, settled=True)
        if mine_before and not away and self._stays(device, told):
            self.settle(device)
            return
        started = self.owner(device) == self.me
        self._owners[device] = told
        self._owners.move_to_end(device)
        while len(self._owners) > _KNOWN:
            self._owners.popitem(last=False)
        self._claimed.discard(device)
        if told.agent == self.me:
            if not started:
                self._serving.start(device)
            if told.settled and not mine_before:
                for name, held in self._let_go(device):
                    self._serving.take(device, name, held)
            return
        if started:
            self._serving.stop(device)
        if told.settled:
            for name, held in self._let_go(device):
                self._hand_over(told.agent, device, name, held)

    def _stays(self, device: str, told: Owner) -> bool:
        """Whether a device of ours stays with us though another service says that it has it.

        It has, if we were away. If not, brokers that had been parted have found each other, and
        both of us have it: as the other one is told the same of us, the order decides.
        """
        other = told.agent
        if other == self.me or not told.settled:
            return False
        return hash_of(device, self.me) < hash_of(device, other)

    def confirm(self, device: str, payload: bytes) -> None:
        """The owner of a device as the broker held it when the device's connection was made: it is
        read before anything of the device is taken or said."""
        try:
            told = _read(Owner, payload)
        except BadMessage:  # or nobody
            return
        if told.settled and told.agent in self._alive:
            self._owner(device, payload, away=True)

    def _gone(self, agent: str) -> None:
        """A service is no more: its devices go to those who are left, in an order of their own for
        each device, so that nobody gets all of them."""
        self._alive.pop(agent, None)
        self._unconfirmed.discard(agent)
        orphans = [device for device, who in self._owners.items() if who.agent == agent]
        for device in orphans:
            del self._owners[device]
            rank = sum(hash_of(device, other) < hash_of(device, self.me) for other in self._alive)
            self._later(rank * _TURN, lambda device=device: self._adopt(device))  # type: ignore[misc]

    def _adopt(self, device: str) -> None:
        if self.owner(device) is None and self._serving.room() > 0:
            self._claim(device)

    # What we do.

    def settle(self, device: str) -> None:
        """We hear the device directly: let everybody know that it is ours."""
        self._send(self._message(device, settled=True))

    def release(self, device: str) -> None:
        """The device is served no more, by anybody."""
        if self.owner(device) == self.me:
            del self._owners[device]
            self._send(Outgoing(f"{self._config.base}/{device}/owner", b"", 1, True))
        self.room_changed()

    def room_changed(self) -> None:
        """Tell the others for how many devices there is room."""
        for message in self.hello():
            self._send(message)

    def reconnected(self) -> None:
        """The broker may have forgotten what was retained, and others may be gone."""
        self._unconfirmed = set(self._alive)
        self._later(_GRACE, self._expire)
        self._later(_RESETTLE, self._resettle)

    def _expire(self) -> None:
        for agent in list(self._unconfirmed):
            self._gone(agent)

    def _resettle(self) -> None:
        for device, who in self._owners.items():
            if who == Owner(agent=self.me, settled=True):
                self.settle(device)

    def _claim(self, device: str) -> None:
        if device not in self._claimed:
            self._claimed.add(device)
            self._send(self._message(device, settled=False))

    def _message(self, device: str, settled: bool) -> Outgoing:
        payload = as_json({"agent": self.me, "settled": settled})
        return Outgoing(f"{self._config.base}/{device}/owner", payload, 1, settled)

    def _hold(self, device: str, name: str, payload: bytes) -> None:
        held = self._held.setdefault(device, deque(maxlen=_HELD))
        held.append((name, payload))
        while len(self._held) > _WAITING:
            self._held.popitem(last=False)

    def _let_go(self, device: str) -> Iterator[tuple[str, bytes]]:
        yield from self._held.pop(device, ())

    def pass_on(self, device: str, name: str, payload: bytes) -> bool:
        """Give a message to another service that has room; whether there is one."""
        other = max(self._alive, key=lambda agent: self._alive[agent], default=None)
        if other is None or self._alive[other] <= 0:
            return False
        self._hand_over(other, device, name, payload)
        return True

    def _hand_over(self, agent: str, device: str, name: str, payload: bytes) -> None:
        place = f"{self._config.base}/agents/{agent}/{device}/{name}"
        self._send(Outgoing(place, payload, int("audio" not in name)))


class Copies:
    """Tells what is new from what came already by the other way, while a device is taken over:
    for a moment its messages come directly and through the shared subscription.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._single: OrderedDict[tuple[str, bytes, bool], deque[float]] = OrderedDict()

    def new(self, name: str, payload: bytes, direct: bool) -> bool:
        """Whether this message has not been taken yet. Audio is told apart by its numbers.

        What was said before the device was taken over has no second copy: the same words some time
        later are new.
        """
        if name == "audio/in":
            return True
        now = self._clock()
        before = self._single.get((name, payload, not direct), deque())
        while before:
            if now - before.popleft() < _TOGETHER:
                return False
        self._single.setdefault((name, payload, direct), deque(maxlen=_HELD)).append(now)
        while len(self._single) > _HELD:
            self._single.popitem(last=False)
        return True


def hash_of(device: str, agent: str) -> int:
    """The place of a service in the order of those who may take a device."""
    return zlib.crc32(f"{device} {agent}".encode())


def _read(kind: type[Any], payload: bytes) -> Any:
    if len(payload) > 256:
        raise BadMessage(f"{len(payload)} bytes: expected at most 256")
    try:
        return kind.model_validate_json(payload)
    except ValidationError as error:
        raise BadMessage(explain(error)) from None
