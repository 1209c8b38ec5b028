"""What is kept of a conversation on the broker, so that another service can go on with it.

``{base}/{device}/snapshot``, retained, JSON. It holds what the language model remembers, turn by
turn as token ids, which are text and units alike. Whoever may write there could have written
anything, so all of it is checked: the form here, the tokens where they are used
(:meth:`agent.reply.Dialogue.restore`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from agent.mqtt_wire import BadMessage, Message, Scalar, as_json, explain

_Token = Annotated[int, Field(ge=0, lt=2**20)]


class Snapshot(Message):
    """A conversation between two turns.

    Attributes:
        model: what the tokens belong to; those of another model mean something else.
        turn: number of the latest turn.
        turns: what is remembered of each turn, as token ids; the oldest first.
        off: why nothing is heard: "mute", "gate".
        settings: what the device has set.
    """

    version: Literal[1] = 1
    model: str = Field(max_length=128)
    turn: int = Field(ge=0, lt=2**31)
    turns: list[Annotated[list[_Token], Field(min_length=1, max_length=16_384)]] = Field(
        max_length=4096
    )
    off: list[Literal["mute", "gate"]] = Field(default=[], max_length=2)
    settings: dict[Annotated[str, Field(max_length=64)], Scalar] = Field(default={}, max_length=32)

    def encode(self, most: int) -> bytes:
        """The payload, of at most ``most`` bytes: the oldest turns are left out."""
        document: dict[str, Any] = self.model_dump()
        payload = as_json(document)
        while len(payload) > most and document["turns"]:
            document["turns"] = document["turns"][1:]
            payload = as_json(document)
        return payload if len(payload) <= most else b""

    @classmethod
    def decode(cls, payload: bytes, most: int) -> Snapshot:
        """Read a payload.

        Raises:
            BadMessage: it is too long, or no snapshot.
        """
        if len(payload) > most:
            raise BadMessage(f"a snapshot of {len(payload)} bytes: expected at most {most}")
        try:
            return cls.model_validate_json(payload)
        except ValidationError as error:
            raise BadMessage(f"no snapshot: {explain(error)}") from None
