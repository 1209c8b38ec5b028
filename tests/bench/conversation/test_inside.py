"""How the figures of a turn follow from what was said, decided and played."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from agent.telemetry import TurnTrace
from bench.conversation.cli import requests_of
from bench.conversation.inside import Conversation, _Turn
from bench.conversation.recordings import Request
from bench.conversation.sound import Listener, matched
from bench.conversation.speaker import Said
from stages import SAMPLE_RATE

S = SAMPLE_RATE


@dataclass
class Ended:
    """A turn whose speech ended there."""

    speech: tuple[int, int]


def request(name: str, begin: int = S // 5, end: int = 2 * S) -> Request:
    return Request(name, "", "", np.zeros(end + S // 5, np.float32), begin, end)


def trace(turn: int, end: int, ended: str = "complete", **marks: float) -> TurnTrace:
    found = TurnTrace(turn, speech=(end - S, end), marks=marks, reply_samples=S, ended=ended)
    found.counts = {"speculations": 2, "refuted": 1}
    return found


def listener(*stretches: tuple[float, float]) -> Listener:
    found = Listener()
    for begin, end in stretches:
        found.block(np.full(round((end - begin) * S), 0.5, np.float32), begin)
    return found


def conversation(**more: Any) -> Conversation:
    """Two requests of 2 s; the reply to the first is interrupted by the second."""
    said = [Said(0, 2 * S, 102.0, False), Said(3 * S, 5 * S, 105.0, True)]
    first = trace(
        1, 2 * S, "barge-in", endpoint=102.6, first_token=102.5, first_sample=102.7, last_sample=103
    )
    second = trace(2, 5 * S, endpoint=105.6, first_sample=105.6, last_sample=105.9)
    turns = [_Turn(first, [5.0, 6.0], 1, 700.0), _Turn(second, [5.0], 3, 701.0)]
    sound = listener((102.9, 103.52), (105.8, 106.5))
    requests = [request("a"), request("b")]
    return Conversation(requests, said, turns, sound, [103.5], 100.0, **more)


def test_every_figure_counts_from_the_true_end_of_speech() -> None:
    row = conversation().rows()[0]
    assert row["outcome"] == "answered"
    assert row["ms"]["end_to_endpoint"] == pytest.approx(600)
    assert row["ms"]["endpoint_to_token"] == pytest.approx(-100), "prepared before the endpoint"
    assert row["ms"]["endpoint_to_sample"] == pytest.approx(100)
    assert row["ms"]["end_to_sample"] == pytest.approx(700)
    assert row["ms"]["end_to_sound"] == pytest.approx(900)
    assert row["at_seconds"] == 2.0


def test_a_barge_in_is_timed_from_its_decision_and_from_its_first_word() -> None:
    first, second = conversation().rows()
    assert first["ms"]["barge_in_to_silence"] == pytest.approx(20)
    assert first["ms"]["speech_to_silence"] == pytest.approx(1e3 * (103.52 - 103.2))
    assert second["barge_in"] and "barge_in_to_silence" not in second["ms"]


def test_counts_of_the_whole_run_are_told_for_each_turn() -> None:
    rows = conversation().rows()
    assert [row["glitches"] for row in rows] == [1, 2]
    assert [row["memory_mb"] for row in rows] == [700.0, 701.0]
    assert rows[0]["speculations"] == 2 and rows[0]["refuted"] == 1
    assert rows[0]["real_time_factor"] == pytest.approx(0.4)


def test_a_reply_without_a_sound_does_not_get_the_next_ones() -> None:
    held = conversation()
    held.listener = listener((105.8, 106.5))
    first, second = held.rows()
    assert "end_to_sound" not in first["ms"]
    assert second["ms"]["end_to_sound"] == pytest.approx(800)


def test_a_turn_that_was_let_go_of_before_its_endpoint_is_silent() -> None:
    held = conversation()
    held.turns[0].trace.marks.clear()
    assert held.rows()[0]["outcome"] == "silent"


def test_a_request_nobody_took_is_lost() -> None:
    held = conversation()
    held.turns = held.turns[:1]
    assert [row["outcome"] for row in held.rows()] == ["answered", "lost"]


def test_a_turn_that_ends_within_a_request_was_a_false_endpoint() -> None:
    turns = [Ended((0, S)), Ended((S, 2 * S)), Ended((4 * S, 5 * S + 100))]
    assert matched([0, 3 * S], [2 * S, 5 * S], turns) == [(1, 1), (0, 2)]


def test_where_speech_ended_is_taken_with_a_grain_of_salt() -> None:
    early, late = Ended((0, 2 * S - 3000)), Ended((0, 2 * S + 3000))
    assert matched([0], [2 * S], [early]) == matched([0], [2 * S], [late]) == [(0, 0)]


def plan(**more: Any) -> dict[str, Any]:
    return {"turns": 30, "barge_in_every": 0, "seed": 0, **more}


def test_requests_come_in_an_order_that_the_seed_decides() -> None:
    recordings = [request(str(n)) for n in range(12)]
    order = [r.name for r, _ in requests_of(plan(), recordings)]
    assert order == [r.name for r, _ in requests_of(plan(), recordings)]
    assert order != [r.name for r, _ in requests_of(plan(seed=1), recordings)]
    assert set(order[:12]) == set(order[12:24]) == {r.name for r in recordings}


@pytest.mark.parametrize(("every", "over"), [(0, []), (1, [1, 2, 3, 4, 5]), (3, [2, 5])])
def test_every_so_many_requests_interrupt(every: int, over: list[int]) -> None:
    some = requests_of(plan(turns=6, barge_in_every=every), [request("a")])
    assert [n for n, (_, interrupts) in enumerate(some) if interrupts] == over
