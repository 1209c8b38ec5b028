"""What travels over MQTT: topics, audio packets, and the messages of a device (docs/mqtt.md).

Everything a device sends is checked here; what is not as it should be is a :class:`BadMessage`,
whose text goes back to the device.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from agent.events import ActionChosen, Event, Heard, Interrupted, TurnEnded, TurnStarted
from agent.schema import DEVICE_NAME, MqttConfig

RATES = (8_000, 16_000, 24_000, 32_000, 44_100, 48_000)
"""Hz that a device's microphone may have."""

HEADER = struct.Struct("<BBHIIi")
"""Version, flags, rate in Hz, sequence number, sample clock, turn: 16 bytes, little-endian."""

VERSION = 1
FIRST, LAST, STOP = 1, 2, 4
"""Flags: a stream begins; it is complete; what is held of it must not be played."""

FROM_DEVICE = ("audio/in", "text/in", "command", "played")
TO_DEVICE = ("state", "audio/out", "text/out", "event", "metrics")


class BadMessage(ValueError):
    """A payload that cannot be understood, and what was expected instead."""


@dataclass(frozen=True, eq=False)
class Packet:
    """Audio: float32 ``[n]`` in [-1, 1] at ``rate`` Hz.

    ``sequence`` counts packets and ``clock`` samples at ``rate``, both since the stream began and
    modulo 2**32.
    """

    sequence: int
    clock: int
    samples: np.ndarray
    rate: int = 16_000
    turn: int = 0
    flags: int = 0

    def encode(self) -> bytes:
        """The payload: header, then 16-bit little-endian samples."""
        head = HEADER.pack(
            VERSION, self.flags, self.rate, self.sequence % 2**32, self.clock % 2**32, self.turn
        )
        pcm = np.rint(np.clip(self.samples, -1.0, 1.0) * 32767).astype("<i2")
        return head + pcm.tobytes()

    @classmethod
    def decode(cls, payload: bytes) -> Packet:
        """Read a payload.

        Raises:
            BadMessage: it is too short, of another version or rate, or half a sample long.
        """
        if len(payload) < HEADER.size:
            raise BadMessage(
                f"{len(payload)} bytes of audio: expected a header of {HEADER.size} bytes, then "
                "16-bit samples"
            )
        version, flags, rate, sequence, clock, turn = HEADER.unpack_from(payload)
        if version != VERSION:
            raise BadMessage(f"header version {version}: expected {VERSION}")
        if rate not in RATES:
            raise BadMessage(f"rate {rate} Hz: expected one of {', '.join(map(str, RATES))}")
        if (len(payload) - HEADER.size) % 2:
            raise BadMessage("half a sample at the end: expected 16-bit samples")
        pcm = np.frombuffer(payload, "<i2", offset=HEADER.size)
        return cls(sequence, clock, pcm.astype(np.float32) / 32768, rate, turn, flags)


class Message(BaseModel):
    """JSON from a device. Unknown keys are refused, numbers are numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Played(Message):
    """The device's own playhead: ``samples`` of the reply to ``turn``, at 16 kHz, were heard."""

    turn: int = Field(ge=-(2**31), lt=2**31)
    samples: int = Field(ge=0, lt=2**32)


class Simple(Message):
    """Stop the reply; or forget the conversation."""

    do: Literal["interrupt", "reset"]


class Switch(Message):
    """Hear nothing: muted by the user; or gated while motors run."""

    do: Literal["mute", "gate"]
    on: bool


class Say(Message):
    """Speak these words."""

    do: Literal["say"]
    text: str


Scalar = bool | int | float | Annotated[str, Field(max_length=128)] | None


class Set(Message):
    """Change settings of the session, by the keys of the configuration."""

    do: Literal["set"]
    settings: dict[Annotated[str, Field(max_length=64)], Scalar] = Field(
        min_length=1, max_length=32
    )


Command = Simple | Switch | Say | Set
_COMMAND: TypeAdapter[Command] = TypeAdapter(Annotated[Command, Field(discriminator="do")])


@dataclass(frozen=True)
class Ask:
    """A typed request."""

    text: str


Item = Packet | Played | Simple | Switch | Say | Set | Ask


def topic(config: MqttConfig, device: str, name: str) -> str:
    """The full topic of one of a device's."""
    return f"{config.base}/{device}/{name}"


def split(config: MqttConfig, full: str) -> tuple[str, str] | None:
    """The device and the rest of a topic that a device publishes to; ``None`` for any other."""
    base, _, rest = full.partition(f"{config.base}/")
    device, _, name = rest.partition("/")
    if base or name not in FROM_DEVICE or not DEVICE_NAME.fullmatch(device):
        return None
    return device, name


def parse(config: MqttConfig, name: str, payload: bytes) -> Item:
    """What a device says on its topic ``name``.

    Raises:
        BadMessage: naming what is wrong and what was expected.
    """
    if len(payload) > config.max_packet_bytes:
        raise BadMessage(
            f"{len(payload)} bytes: at most {config.max_packet_bytes} are taken; send less at once"
        )
    if name == "audio/in":
        return Packet.decode(payload)
    if name == "text/in":
        return Ask(_text(payload, config.max_text))
    try:
        if name == "played":
            return Played.model_validate_json(payload)
        command = _COMMAND.validate_json(payload)
    except ValidationError as error:
        raise BadMessage(explain(error)) from None
    if isinstance(command, Say):
        _text(command.text.encode("utf-8", "replace"), config.max_text)
    return command


def _text(payload: bytes, longest: int) -> str:
    try:
        text = payload.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadMessage("not UTF-8: expected plain text") from None
    if not text or len(text) > longest:
        raise BadMessage(f"{len(text)} characters: expected 1 to {longest}")
    if not text.isprintable():
        raise BadMessage("a control character: expected plain text on one line")
    return text


def explain(error: ValidationError) -> str:
    """What is wrong with a message, in a line."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}"[:200] if where else str(first["msg"])[:200]


def as_json(message: dict[str, Any]) -> bytes:
    """A payload of JSON, in UTF-8."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def describe(event: Event) -> dict[str, Any] | None:
    """What is told of ``event`` on the topic ``event``; ``None`` for what goes elsewhere."""
    if isinstance(event, TurnStarted):
        return {"type": "turn-started", "turn": event.turn, "sample": event.sample}
    if isinstance(event, Heard):
        return {"type": "heard", "turn": event.turn, "text": event.text}
    if isinstance(event, ActionChosen):
        return {"type": "action", "turn": event.turn, "action": event.action}
    if isinstance(event, Interrupted):
        return {
            "type": "interrupted",
            "turn": event.turn,
            "heard": event.heard,
            "reason": event.reason,
        }
    if isinstance(event, TurnEnded):
        return {"type": "turn-ended", "turn": event.turn, "how": event.trace.ended}
    return None
