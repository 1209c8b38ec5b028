"""What a conversation tells those who embed it: the command line, MQTT, a Python program."""

from __future__ import annotations

from dataclasses import dataclass

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
class TurnEnded:
    """The reply is complete, or was let go of."""

    turn: int
    trace: TurnTrace


Event = TurnStarted | Heard | ReplyText | ReplyAudio | TurnEnded
