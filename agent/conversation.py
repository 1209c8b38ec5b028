"""Who speaks when: the state machine of a conversation.

::

    listening ─► hearing ─► maybe-finished ─► answering ─► listening
        ▲           ▲  ◄───────┘  (went on)       │ │
        │           └─────────────────────────────┘ │  (barge-in, or went on before a sound)
        └───────────────────────────────────────────┘

A request that is typed goes from listening to answering at once.

It decides and does nothing: every input is a method that returns the actions to take, in order.
There is no clock in it and no audio; positions are samples of the session's clock, ``now`` is
seconds of any clock that never goes back. What makes no sense in a state changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from agent.schema import TurnsConfig
from stages import SAMPLE_RATE

log = logging.getLogger(__name__)


class State(str, Enum):
    """What the conversation is doing."""

    LISTENING = "listening"
    HEARING = "hearing"
    MAYBE_FINISHED = "maybe-finished"
    ANSWERING = "answering"


_S = State
_MOVES = frozenset(
    {
        (_S.LISTENING, _S.HEARING),
        (_S.LISTENING, _S.ANSWERING),
        (_S.HEARING, _S.MAYBE_FINISHED),
        (_S.HEARING, _S.ANSWERING),
        (_S.HEARING, _S.LISTENING),
        (_S.MAYBE_FINISHED, _S.HEARING),
        (_S.MAYBE_FINISHED, _S.ANSWERING),
        (_S.MAYBE_FINISHED, _S.LISTENING),
        (_S.ANSWERING, _S.LISTENING),
        (_S.ANSWERING, _S.HEARING),
    }
)


@dataclass(frozen=True)
class Begin:
    """Open ``turn``; with ``over``, the speech kept back since the overlap began is its start."""

    turn: int
    over: bool = False


@dataclass(frozen=True)
class BeginTyped:
    """Open ``turn``; its request is there already, as text."""

    turn: int


@dataclass(frozen=True)
class Prepare:
    """Make a reply to what was heard of ``turn`` so far; let nobody hear it yet."""

    turn: int


@dataclass(frozen=True)
class Discard:
    """The reply in preparation is not wanted: ``turn`` goes on."""

    turn: int


@dataclass(frozen=True)
class Answer:
    """``turn`` is over: let its reply be heard."""

    turn: int


@dataclass(frozen=True)
class Duck:
    """Play the reply softly, or loud again."""

    on: bool


@dataclass(frozen=True)
class Close:
    """The reply of ``turn`` was heard to its end."""

    turn: int


@dataclass(frozen=True)
class Stop:
    """Be silent at once; of the reply of ``turn`` remember what was heard."""

    turn: int
    reason: str


@dataclass(frozen=True)
class Forget:
    """``turn`` ends without a reply."""

    turn: int
    reason: str


@dataclass(frozen=True)
class DropOverlap:
    """The speech kept back was no turn: a cough, or "mm-hmm"."""


Action = (
    Begin | BeginTyped | Prepare | Discard | Answer | Duck | Close | Stop | Forget | DropOverlap
)


@dataclass
class _Overlap:
    """Speech over a reply, of which it is not known yet whether it means to interrupt."""

    since: int
    speaking: bool = True


class TurnTaking:
    """The state of one conversation.

    Args:
        min_speech: samples of speech that had passed when :meth:`started` was told.
        moved: told ``(state, reason, sample)`` at every transition.

    Attributes:
        turn: number of the latest turn; 0 before the first.
        preparing: a reply to the current turn is being made or played.
    """

    def __init__(
        self,
        settings: TurnsConfig,
        min_speech: int = 0,
        moved: Callable[[State, str, int], None] = lambda state, reason, sample: None,
    ) -> None:
        self._settings = settings
        self._enough = max(0, settings.barge_in_ms * SAMPLE_RATE // 1000 - min_speech)
        self._moved = moved
        self._overlap: _Overlap | None = None
        self._heard = 0
        self._typed = False  # the turn's request cannot go on in speech
        self._progress = 0.0
        self._position = 0
        self.state = State.LISTENING
        self.turn = 0
        self.preparing = False

    @property
    def overlapping(self) -> bool:
        """Speech is being kept back: it is over a reply, or began over one."""
        return self._overlap is not None

    # What the voice activity detector says.

    def started(self, sample: int, now: float) -> list[Action]:
        """Speech begins; that is noticed at ``sample``."""
        if self.state is State.LISTENING:
            return self._begin("speech", now)
        if self.state is not State.ANSWERING:
            return []
        if not (self._heard or self._typed):
            self.preparing = False
            self._move(State.HEARING, "went on before a sound of the reply", now)
            return [Discard(self.turn)]
        self._overlap = _Overlap(sample)
        return [Duck(True)]

    def silence(self, now: float) -> list[Action]:
        """The speaker has fallen silent and may have finished."""
        if self.state is State.HEARING:
            self._move(State.MAYBE_FINISHED, "silence", now)
            if self._settings.speculate:
                self.preparing = True
                return [Prepare(self.turn)]
        elif self._overlap:
            self._overlap.speaking = False
            return self._duck(False)
        return []

    def resumed(self, sample: int, now: float) -> list[Action]:
        """The speaker had not finished."""
        if self.state is State.MAYBE_FINISHED:
            discard: list[Action] = [Discard(self.turn)] if self.preparing else []
            self.preparing = False
            self._move(State.HEARING, "went on", now)
            return discard
        if self._overlap and self.state is State.LISTENING:
            return self._begin("went on after the reply", now)
        if self._overlap:
            self._overlap = _Overlap(sample)
            return self._duck(True)
        return []

    def ended(self, now: float) -> list[Action]:
        """The endpoint: the hangover is over, or the utterance has become too long."""
        if self.state in (State.HEARING, State.MAYBE_FINISHED):
            prepare: list[Action] = [] if self.preparing else [Prepare(self.turn)]
            self.preparing = True
            self._heard = 0
            self._move(State.ANSWERING, "endpoint", now)
            return [*prepare, Answer(self.turn)]
        if self._overlap:
            self._overlap = None
            return [*self._duck(False), DropOverlap()]
        return []

    def audio(self, position: int, now: float) -> list[Action]:
        """Audio up to ``position`` was judged, and what it meant has been told."""
        self._position = position
        if self.state in (State.HEARING, State.MAYBE_FINISHED):
            self._progress = now
        speaking = self._overlap is not None and self._overlap.speaking
        if self.state is State.ANSWERING and self._overlap and speaking:
            if position - self._overlap.since >= self._enough:
                return [Stop(self.turn, "barge-in"), *self._begin("barge-in", now)]
        elif self.state is State.LISTENING and speaking:
            return self._begin("speech that began over the reply", now)
        return []

    def typed(self, now: float) -> list[Action]:
        """A request was typed. Nothing comes of it while somebody speaks: try again later."""
        if self.state is not State.LISTENING or self._overlap:
            return []
        self.turn += 1
        self.preparing = self._typed = True
        self._heard = 0
        self._move(State.ANSWERING, "typed", now)
        return [BeginTyped(self.turn), Prepare(self.turn), Answer(self.turn)]

    # What becomes of the reply.

    def working(self, now: float) -> None:
        """The reply is coming along, though nothing of it may have been heard yet."""
        self._progress = max(self._progress, now)

    def played(self, heard: int, done: bool, now: float) -> list[Action]:
        """``heard`` samples of the reply have left the loudspeaker; ``done``: all there are."""
        if self.state is not State.ANSWERING:
            return []
        if heard > self._heard:
            self._heard = heard
            self._progress = now
        if not done:
            return []
        return self._fall_silent(Close(self.turn), "the reply was heard", now)

    # What comes from outside.

    def interrupt(self, reason: str, now: float) -> list[Action]:
        """Let go of the turn."""
        if self.state is State.LISTENING:
            return []
        if self.state is State.ANSWERING:
            return self._fall_silent(Stop(self.turn, reason), reason, now)
        discard: list[Action] = [Discard(self.turn)] if self.preparing else []
        self.preparing = False
        self._move(State.LISTENING, reason, now)
        return [*discard, Forget(self.turn, reason)]

    def microphone_lost(self, now: float) -> list[Action]:
        """No more audio comes; a request that was not finished is forgotten."""
        overlap: list[Action] = [*self._duck(False), DropOverlap()] if self._overlap else []
        self._overlap = None
        if self.state in (State.HEARING, State.MAYBE_FINISHED):
            return [*overlap, *self.interrupt("the microphone went away", now)]
        return overlap

    def loudspeaker_lost(self, now: float) -> list[Action]:
        """Nobody hears the rest of a reply."""
        if self.state is not State.ANSWERING:
            return []
        return self.interrupt("the loudspeaker went away", now)

    def tick(self, now: float) -> list[Action]:
        """The watchdog: no state lasts while nothing moves."""
        if self.state is State.LISTENING or now - self._progress < self._settings.stall_seconds:
            return []
        return self.interrupt(f"nothing moved for {self._settings.stall_seconds:g} s", now)

    # The pieces.

    def _begin(self, reason: str, now: float) -> list[Action]:
        over, self._overlap = self._overlap is not None, None
        self.turn += 1
        self.preparing = self._typed = False
        self._move(State.HEARING, reason, now)
        return [Begin(self.turn, over)]

    def _fall_silent(self, last: Close | Stop, reason: str, now: float) -> list[Action]:
        """From answering to listening; speech that is still going on becomes a turn at once."""
        self.preparing = False
        self._move(State.LISTENING, reason, now)
        actions: list[Action] = [last]
        if self._overlap and self._overlap.speaking:
            actions += self._begin("speech that began over the reply", now)
        return actions

    def _duck(self, on: bool) -> list[Action]:
        return [Duck(on)] if self.state is State.ANSWERING else []

    def _move(self, to: State, reason: str, now: float) -> None:
        if (self.state, to) not in _MOVES:
            raise AssertionError(f"no way from {self.state.value} to {to.value} ({reason})")
        log.debug("turn %d: %s -> %s (%s)", self.turn, self.state.value, to.value, reason)
        self.state = to
        self._progress = now
        self._moved(to, reason, self._position)
