"""docs/asyncapi.yaml is an AsyncAPI 3 document, and says what the service takes and sends."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import asyncapi
import jsonschema
import pytest

from agent.config import SETTABLE
from agent.mqtt_pool import Owner, Presence
from agent.mqtt_snapshot import Snapshot
from agent.mqtt_wire import HEADER, RATES, BadMessage, as_json, parse
from agent.schema import MqttConfig

SCHEMA = Path(__file__).resolve().parents[1] / "data" / "asyncapi-3.0.0.json.gz"
MQTT = Path(__file__).resolve().parents[2] / "docs" / "mqtt.md"


def test_it_is_valid_by_the_schema_of_asyncapi() -> None:
    schema = json.loads(gzip.decompress(SCHEMA.read_bytes()))
    jsonschema.Draft7Validator(schema).validate(asyncapi.document())


@pytest.mark.parametrize(
    "command",
    [
        {"do": "interrupt"},
        {"do": "reset"},
        {"do": "mute", "on": True},
        {"do": "gate", "on": False},
        {"do": "say", "text": "hello"},
        {"do": "set", "settings": {"vocoder.speaker": 1, "sampling.text.greedy": True}},
    ],
    ids=lambda command: command["do"],
)
def test_what_it_calls_a_command_is_taken(command: dict[str, object]) -> None:
    asyncapi.check("command", as_json(command))
    parse(MqttConfig(), "command", as_json(command))


@pytest.mark.parametrize("command", [{"do": "explode"}, {"do": "mute"}, {"do": "set"}, {}])
def test_what_is_refused_is_no_command_there_either(command: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        asyncapi.check("command", as_json(command))
    with pytest.raises(BadMessage):
        parse(MqttConfig(), "command", as_json(command))


def test_what_services_tell_each_other_is_described() -> None:
    asyncapi.check("owner", as_json(Owner(agent="0" * 12, settled=True).model_dump()))
    asyncapi.check("snapshot", Snapshot(model="m", turn=1, turns=[[1]]).encode(512))
    presence = asyncapi.document()["components"]["messages"]["presence"]["payload"]
    jsonschema.Draft7Validator(presence).validate(Presence(room=1).model_dump())


def test_the_header_is_described_whole() -> None:
    said = asyncapi.document()["components"]["messages"]["packet"]["description"]
    sizes = {"uint8": 1, "uint16": 2, "uint32": 4, "int32": 4}
    fields = [line.split(",")[1].split(":")[0].strip() for line in said.split("Byte ")[1:]]
    assert sum(sizes[field] for field in fields) == HEADER.size
    assert all(str(rate) in said for rate in RATES)


def test_every_setting_is_in_the_documentation() -> None:
    text = MQTT.read_text(encoding="utf-8")
    for key in SETTABLE:
        assert key in text or (key.startswith("sampling.") and key.split(".")[2] in text)
