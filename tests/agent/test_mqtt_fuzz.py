"""What makes no sense is refused, whatever it is; nobody else notices."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import aiomqtt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mosquitto import running

from agent.config import load_config
from agent.mqtt_jitter import JitterBuffer
from agent.mqtt_wire import FROM_DEVICE, RATES, BadMessage, Packet, parse
from agent.schema import MqttConfig
from bench.fuzz import ROOM, fuzz, nonsense

CONFIG = MqttConfig()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.sampled_from(FROM_DEVICE), st.binary(max_size=2000))
def test_any_bytes_are_understood_or_refused_in_a_sentence(name: str, payload: bytes) -> None:
    try:
        parse(CONFIG, name, payload)
    except BadMessage as error:
        assert 0 < len(str(error)) <= 300


@given(st.sampled_from(("command", "played")), JSON)
def test_any_json_is_understood_or_refused_in_a_sentence(name: str, message: object) -> None:
    try:
        parse(CONFIG, name, json.dumps(message).encode("utf-8", "surrogatepass"))
    except BadMessage as error:
        assert 0 < len(str(error)) <= 300


@pytest.mark.parametrize("deep", [b"[", b'{"do":', b"9"])
def test_endless_nesting_is_refused(deep: bytes) -> None:
    with pytest.raises(BadMessage):
        parse(CONFIG, "command", deep * (CONFIG.max_packet_bytes // len(deep)))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**32 - 1) | st.integers(0, 300), st.integers(0, 2**32 - 1),
            st.integers(0, 7), st.sampled_from(RATES), st.integers(0, 400),
        ),
        max_size=60,
    )
)  # fmt: skip
def test_any_packets_in_any_order_give_little_more_sound_than_they_hold(
    packets: list[tuple[int, int, int, int, int]],
) -> None:
    buffer = JitterBuffer(0.2)
    out = given = 0
    for sequence, clock, flags, rate, length in packets:
        given += length
        wave = np.zeros(length, np.float32)
        out += sum(map(len, buffer.push(Packet(sequence, clock, wave, rate, 0, flags))))
    out += sum(map(len, buffer.flush()))
    assert out <= given + max(RATES) * len(packets)  # a second of silence for each gap at most
    assert out - buffer.counters.concealed <= given


def test_the_nonsense_reaches_every_topic_in_every_form() -> None:
    chance = random.Random(0)
    seen: Counter[str] = Counter()
    for _ in range(4000):
        topic, payload = nonsense(chance)
        name = topic.partition("/")[2]
        if name in FROM_DEVICE:
            try:
                parse(CONFIG, name, payload)
                seen[f"{name} understood"] += 1
            except BadMessage:
                seen[f"{name} refused"] += 1
    assert {f"{name} {how}" for name in FROM_DEVICE for how in ("understood", "refused")} <= set(
        seen
    )


@pytest.mark.slow
@pytest.mark.broker
def test_twenty_thousand_senseless_payloads_disturb_nobody(tmp_path: Path) -> None:
    """Straight into the service, while another device converses through a real broker."""
    with running(tmp_path) as broker:
        came = asyncio.run(fuzz(broker.port, 3750))
    assert all(came.topics[name] >= 3750 for name in FROM_DEVICE)
    assert came.refused > 5000
    assert came.turns > 1
    assert came.errors == 0
    assert came.served <= 4
    assert came.memory[1] - came.memory[0] <= ROOM


@pytest.mark.slow
@pytest.mark.broker
def test_a_thousand_of_them_through_a_broker_end_nothing(tmp_path: Path) -> None:
    base = load_config("nano").mqtt.base

    async def publish(port: int) -> None:
        chance = random.Random(1)
        async with aiomqtt.Client("127.0.0.1", port) as client:
            for _ in range(1000):
                topic, payload = nonsense(chance)
                if not {"+", "\u0000"} & set(topic):  # a client may not publish there
                    await client.publish(f"{base}/{topic}", payload, qos=1)

    async def both(port: int) -> int:
        fuzzing = asyncio.create_task(fuzz(port, 20))
        await publish(port)
        return (await fuzzing).turns

    with running(tmp_path) as broker:
        assert asyncio.run(both(broker.port)) > 1
