"""What a conversation tells those who embed it: the command line, MQTT, a Python program."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.telemetry import TurnTrace
from stages.vocoder_stream import UnitSpan


@dataclass(frozen=True)
class TurnStarted:
    """Somebody has begun to speak, at ``sample`` of the session's clock."""

    turn: int
    sample: int


@dataclass(frozen=True)
class Heard:
    """The words understood, where the model writes them down before it answers."""

    turn: int
    text: str


@dataclass(frozen=True)
class ActionChosen:
    """What the reply does besides speaking, as the schema of ``reply.actions`` describes it.

    Told before the first word, once the reply is certain: not while it is prepared on suspicion.
    """

    turn: int
    action: dict[str, Any]

    @property
    def text(self) -> str:
        """The action as JSON, for people to read."""
        return json.dumps(self.action, ensure_ascii=False)


@dataclass(frozen=True)
class ReplyText:
    """More words of the reply; those of one turn join to its text."""

    turn: int
    text: str


@dataclass(frozen=True, eq=False)
class ReplyAudio:
    """More sound of the reply: float32 ``[n]`` at 16 kHz.

    ``first_sample`` is the chunk's place in the reply; ``units`` says which unit of the reply is
    spoken in which samples.
    """

    turn: int
    samples: np.ndarray
    first_sample: int
    units: tuple[UnitSpan, ...]


@dataclass(frozen=True)
class RequestUnits:
    """Of the request's units told so far keep the first ``keep``, then append ``units``.

    Units are written as in a prompt: ``"[Hu12]"``, ``"[Pi3]"``, ``"[St0]"``.
    """

    turn: int
    keep: int
    units: tuple[str, ...]


@dataclass(frozen=True)
class Spoken:
    """More words of the reply have left the loudspeaker; those of one turn join to what was heard.

    ``heard`` is the heard position: samples of the reply at 16 kHz.
    """

    turn: int
    text: str
    heard: int


@dataclass(frozen=True)
class Interrupted:
    """The reply was broken off at ``heard`` samples (16 kHz); the model remembers no more of it."""

    turn: int
    heard: int
    reason: str


@dataclass(frozen=True)
class StateChanged:
    """The conversation is now ``state``: listening, hearing, maybe-finished or answering."""

    state: str
    reason: str
    sample: int


@dataclass(frozen=True)
class Level:
    """How loud the microphone is (dBFS, RMS; some 20 times a second), and whether it is speech."""

    dbfs: float
    voiced: bool


@dataclass(frozen=True)
class DeviceChanged:
    """A sound device went away (``present`` false) or came back; ``message`` is for the user."""

    direction: str  # "input" or "output"
    present: bool
    message: str


@dataclass(frozen=True)
class TurnEnded:
    """The reply is complete, or was let go of."""

    turn: int
    trace: TurnTrace


Event = (
    TurnStarted
    | Heard
    | RequestUnits
    | ActionChosen
    | ReplyText
    | ReplyAudio
    | Spoken
    | Interrupted
    | StateChanged
    | Level
    | DeviceChanged
    | TurnEnded
)
