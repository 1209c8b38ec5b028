"""What devices send is understood, or refused with a reason; lost packets become silence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.mqtt_audio import RemotePlayback
from agent.mqtt_jitter import JitterBuffer
from agent.mqtt_limits import Bucket
from agent.mqtt_wire import (
    FIRST,
    FROM_DEVICE,
    HEADER,
    LAST,
    STOP,
    Ask,
    BadMessage,
    Packet,
    Played,
    Say,
    Set,
    Simple,
    Switch,
    parse,
    split,
)
from agent.schema import MqttConfig

CONFIG = MqttConfig()
SIZE = 320


def stream(count: int, start: int = 0) -> list[Packet]:
    """Packets of a ramp, which tells every sample apart."""
    ramp = np.arange(1, count * SIZE + 1, dtype=np.float32)
    return [
        Packet((start + i) % 2**32, i * SIZE, ramp[i * SIZE : (i + 1) * SIZE]) for i in range(count)
    ]


def heard(buffer: JitterBuffer, packets: list[Packet]) -> np.ndarray:
    waves = [wave for packet in packets for wave in buffer.push(packet)] + buffer.flush()
    return np.concatenate(waves) if waves else np.zeros(0, np.float32)


def test_the_header_has_sixteen_bytes_and_says_what_the_documentation_says() -> None:
    payload = Packet(7, 4480, np.array([0.5, -1.0], np.float32), 16_000, -3, LAST).encode()
    assert HEADER.size == 16
    assert payload == bytes.fromhex("01 02 803e 07000000 80110000 fdffffff 0040 0180")
    again = Packet.decode(payload)
    assert (again.sequence, again.clock, again.rate, again.turn) == (7, 4480, 16_000, -3)
    assert again.flags == LAST
    assert np.allclose(again.samples, [0.5, -1.0], atol=1e-4)


def test_commands_are_read() -> None:
    assert parse(CONFIG, "command", b'{"do":"interrupt"}') == Simple(do="interrupt")
    assert parse(CONFIG, "command", b'{"do":"reset"}') == Simple(do="reset")
    assert parse(CONFIG, "command", b'{"do":"gate","on":true}') == Switch(do="gate", on=True)
    assert parse(CONFIG, "command", b'{"do":"say","text":"hello"}') == Say(do="say", text="hello")
    set_ = b'{"do":"set","settings":{"vocoder.speaker":1,"reply.mode":"any"}}'
    settings = {"vocoder.speaker": 1, "reply.mode": "any"}
    assert parse(CONFIG, "command", set_) == Set(do="set", settings=settings)
    assert parse(CONFIG, "played", b'{"turn":2,"samples":640}') == Played(turn=2, samples=640)
    assert parse(CONFIG, "text/in", "à quelle heure ?".encode()) == Ask("à quelle heure ?")


@pytest.mark.parametrize(
    ("topic", "payload", "why"),
    [
        ("audio/in", b"", "expected a header of 16 bytes"),
        ("audio/in", bytes(16), "header version 0"),
        ("audio/in", HEADER.pack(1, 0, 12_345, 0, 0, 0), "rate 12345 Hz"),
        ("audio/in", HEADER.pack(1, 0, 16_000, 0, 0, 0) + b"x", "half a sample"),
        ("audio/in", bytes(20_000), "20000 bytes: at most 16384"),
        ("text/in", b"\xff\xfe", "not UTF-8"),
        ("text/in", b" ", "expected 1 to 400"),
        ("text/in", b"a\x00b", "control character"),
        ("command", b"{", "EOF"),
        ("command", b'{"do":"explode"}', "do"),
        ("command", b'{"do":"mute","on":1}', "valid boolean"),
        ("command", b"[" * 16_000, "recursion limit exceeded"),
        ("command", b'{"do":"set","settings":{}}', "settings"),
        ("command", b'{"do":"set","settings":{"a":[1]}}', "settings"),
        ("played", b'{"turn":1,"samples":-5}', "samples"),
        ("played", b'{"turn":1}', "samples"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_a_reason(
    topic: str, payload: bytes, why: str
) -> None:
    with pytest.raises(BadMessage, match=why):
        parse(CONFIG, topic, payload)


@given(st.sampled_from(FROM_DEVICE), st.binary(max_size=400))
def test_no_payload_does_anything_but_be_read_or_refused(topic: str, payload: bytes) -> None:
    try:
        parse(CONFIG, topic, payload)
    except BadMessage as error:
        assert str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
)


@given(st.sampled_from(("command", "played")), JSON)
def test_no_json_does_anything_but_be_read_or_refused(topic: str, value: object) -> None:
    try:
        parse(CONFIG, topic, json.dumps(value).encode())
    except BadMessage as error:
        assert str(error)


@pytest.mark.parametrize(
    ("topic", "place"),
    [
        ("spirit/robot-1/audio/in", ("robot-1", "audio/in")),
        ("spirit/robot-1/audio/out", None),
        ("spirit/robot/1/audio/in", None),
        ("spirit/rob\x7fot/command", None),
        ("spirit/é/command", None),
        (f"spirit/{'x' * 65}/command", None),
        ("other/spirit/robot/command", None),
        ("spirit/robot", None),
        ("spirit//command", None),
    ],
)
def test_only_topics_of_devices_are_served(topic: str, place: tuple[str, str] | None) -> None:
    assert split(CONFIG, topic) == place


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_packets_in_order_pass_at_once(start: int, count: int) -> None:
    buffer = JitterBuffer(0.2)
    for packet in stream(count, start):
        assert [wave is packet.samples for wave in buffer.push(packet)] == [True]
    assert buffer.counters.lost == buffer.counters.duplicated == 0


@given(st.permutations(range(4)), st.integers(0, 2**32 - 1), st.sets(st.integers(0, 7)))
def test_what_is_reordered_or_doubled_is_put_right(
    order: list[int], start: int, doubled: set[int]
) -> None:
    packets = stream(8, start)
    sent = [packets[0], *(packets[1 + i] for i in order), *packets[5:]]
    sent = [p for i, p in enumerate(sent) for _ in range(1 + (i in doubled))]
    buffer = JitterBuffer(0.2)
    out = heard(buffer, sent)
    assert np.array_equal(out, np.arange(1, 8 * SIZE + 1))
    assert buffer.counters.duplicated == len(doubled)
    assert buffer.counters.lost == 0


@given(st.sets(st.integers(1, 28), max_size=15), st.integers(0, 2**32 - 1))
def test_what_is_lost_becomes_silence_of_the_same_length_and_is_counted(
    lost: set[int], start: int
) -> None:
    packets = stream(30, start)
    buffer = JitterBuffer(0.2)
    out = heard(buffer, [p for i, p in enumerate(packets) if i not in lost])
    expected = np.arange(1, 30 * SIZE + 1, dtype=np.float32).reshape(30, SIZE)
    expected[sorted(lost)] = 0
    assert np.array_equal(out, expected.ravel())
    assert buffer.counters.lost == len(lost)
    assert buffer.counters.concealed == len(lost) * SIZE


def test_the_depth_grows_where_packets_come_late_and_shrinks_in_calm() -> None:
    buffer = JitterBuffer(0.2)
    packets = stream(1600)
    first = buffer.depth
    for packet in [*packets[:1], *packets[2:12]]:  # the second one is not waited for any longer
        buffer.push(packet)
    assert buffer.push(packets[1]) == []
    assert buffer.counters.late == 1
    assert (grown := buffer.depth) > first
    for packet in packets[12:]:
        buffer.push(packet)
    assert buffer.depth < grown


def test_a_device_that_begins_anew_is_heard_at_once() -> None:
    buffer = JitterBuffer(0.2)
    heard(buffer, stream(10, start=5000))
    again = [Packet(p.sequence, p.clock, p.samples, flags=FIRST if not i else 0)
             for i, p in enumerate(stream(10, start=4990))]  # fmt: skip
    assert len(heard(buffer, again)) == 10 * SIZE
    assert buffer.counters.restarts == 1


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=300))
def test_no_sequence_of_numbers_makes_it_hold_much_or_invent_much(
    numbers: list[tuple[int, int]],
) -> None:
    buffer = JitterBuffer(0.2)
    total = 0
    for sequence, clock in numbers:
        out = buffer.push(Packet(sequence, clock, np.ones(SIZE, np.float32)))
        assert sum(map(len, out)) <= 70 * (16_000 + SIZE)
        total += sum(map(len, out))
    assert len(buffer._held) <= 65


class Wire:
    """What was sent, and a clock moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.packets: list[Packet] = []

    def playback(self) -> RemotePlayback:
        return RemotePlayback(self.packets.append, lambda on: None, 0.4, lambda: self.now)


def reply(playback: RemotePlayback, turn: int, samples: int) -> None:
    """Hand over a reply and send all of it that may be sent by now."""
    playback.begin()
    playback.play(np.ones(samples, np.float32))
    playback.feed(turn, np.ones(samples, np.float32))
    playback.finish()
    due(playback)


def due(playback: RemotePlayback) -> None:
    while playback._ready() and playback._sent - playback.heard <= playback._lead:
        playback._next()


def test_a_reply_is_sent_a_little_ahead_of_its_playhead() -> None:
    wire = Wire()
    playback = wire.playback()
    reply(playback, 3, 16_000)
    assert sum(len(p.samples) for p in wire.packets) == 6400 + 640
    assert wire.packets[0].flags == FIRST
    wire.now += 0.5
    due(playback)
    assert playback.heard == 7040  # no further than what had been sent by then
    wire.now += 2.0
    due(playback)
    wire.now += 2.0
    due(playback)
    assert wire.packets[-1].flags == LAST
    assert sum(len(p.samples) for p in wire.packets) == 16_000
    assert [p.sequence for p in wire.packets] == list(range(len(wire.packets)))
    assert {p.turn for p in wire.packets} == {3}


def test_the_word_of_the_device_is_the_playhead() -> None:
    wire = Wire()
    playback = wire.playback()
    reply(playback, 1, 16_000)
    wire.now += 0.3
    assert playback.played(1, 1600)
    assert playback.heard == 1600
    wire.now += 1.0
    assert playback.heard == 1600
    assert not playback.played(1, 16_001)
    assert playback.played(7, 99_999)  # of another turn: of no interest
    assert playback.stop() == 1600
    assert wire.packets[-1].flags == STOP
    assert playback.done


def test_a_device_that_falls_silent_about_its_playhead_does_not_stop_the_clock() -> None:
    wire = Wire()
    playback = wire.playback()
    reply(playback, 1, 3200)
    playback.played(1, 0)
    wire.now += 2.5
    assert playback.heard > 0
    assert playback.done or playback.heard < 3200


def test_a_ducked_reply_is_sent_softer_and_comes_back_without_a_jump() -> None:
    wire = Wire()
    asked: list[bool] = []
    playback = RemotePlayback(wire.packets.append, asked.append, 10.0, lambda: wire.now)
    playback.begin()
    playback.play(np.ones(6400, np.float32))
    playback.feed(1, np.ones(6400, np.float32))
    for ducked in (False, True, True, False):
        playback.duck(ducked)
        playback._next()
    loud, falling, soft, rising = (packet.samples for packet in wire.packets)
    assert np.all(loud == 1)
    assert falling[0] == 1
    assert np.allclose(soft, falling[-1])
    assert 0.1 < soft[0] < 0.5
    assert rising[0] == soft[-1]
    assert rising[-1] == 1
    assert asked == [True, False]


@given(st.floats(1, 1000), st.lists(st.tuples(st.floats(0, 3), st.floats(0, 50)), max_size=50))
def test_no_more_passes_than_the_rate_and_twice_as_much_at_once(
    rate: float, wanted: list[tuple[float, float]]
) -> None:
    now = [0.0]
    bucket = Bucket(rate, lambda: now[0])
    passed = 0.0
    for pause, amount in wanted:
        now[0] += pause
        passed += amount if bucket.take(amount) else 0.0
        assert passed <= 2 * rate + now[0] * rate + 1e-6
