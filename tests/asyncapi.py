"""docs/asyncapi.yaml as a judge of payloads."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import yaml

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "asyncapi.yaml"


@functools.cache
def document() -> dict[str, Any]:
    """What is written there."""
    read: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8"))
    return read


@functools.cache
def _judge(name: str) -> jsonschema.Draft7Validator:
    channels = (c for c in document()["channels"].values())
    (channel,) = (c for c in channels if c["address"] == f"spirit/{{device}}/{name}")
    (message,) = channel["messages"]
    reference = channel["messages"][message]["$ref"].rsplit("/", 1)[1]
    payload = document()["components"]["messages"][reference]["payload"]
    return jsonschema.Draft7Validator(payload)


def check(name: str, payload: bytes) -> None:
    """A payload of JSON on the topic ``name`` of a device is as the document says.

    Raises:
        jsonschema.ValidationError: it is not.
    """
    _judge(name).validate(json.loads(payload))
