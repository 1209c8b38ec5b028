"""The hangover follows the speaker within its bounds, and the verdict for one silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.endpointing import FINISHED, GROWTH, UNFINISHED, Endpointing
from agent.schema import TurnsConfig

MS = 16
PROBABILITY = st.floats(0, 1)
SILENCE = st.integers(0, 60_000)
# A turn: its pauses, what is said of each silence, and whether it was ended too early once.
TURN = st.tuples(st.lists(st.tuples(SILENCE, st.none() | PROBABILITY), max_size=4), st.booleans())
TURNS = st.lists(TURN, max_size=30)


def endpointing(start_ms: int = 600, adapt: bool = True) -> Endpointing:
    turns = TurnsConfig(adapt=adapt, min_hangover_ms=300, max_hangover_ms=1500)
    return Endpointing(turns, start_ms)


def speak(
    to: Endpointing,
    pauses_ms: list[int],
    times: int = 1,
    look: Callable[[int], None] = lambda hangover: None,
) -> None:
    """Turns with these pauses; a pause longer than the hangover cuts the turn, as it would."""
    for _ in range(times):
        for pause in pauses_ms:
            to.silence()
            look(to.hangover)
            if pause * MS >= to.hangover:
                to.ended()
                to.overrun(pause * MS)
            else:
                to.resumed(pause * MS)
        to.silence()
        look(to.hangover)
        to.ended()


def play(to: Endpointing, turns: list[tuple[list[tuple[int, float | None]], bool]]) -> list[int]:
    """Any history at all; returns every hangover on the way."""
    seen = [to.hangover]
    for pauses, overrun in turns:
        for silence, verdict in pauses:
            to.silence()
            if verdict is not None:
                to.judged(verdict)
            seen.append(to.hangover)
            to.resumed(silence)
            seen.append(to.hangover)
        to.ended()
        if overrun:
            to.overrun(30_000)
        seen.append(to.hangover)
    return seen


@given(TURNS, st.integers(0, 5000))
def test_the_hangover_stays_within_its_bounds_whatever_happens(turns: list, start: int) -> None:
    seen = play(endpointing(start), turns)
    assert all(300 * MS <= hangover <= 1500 * MS for hangover in seen)


@given(TURNS, st.integers(0, 5000))
def test_without_adaptation_and_verdicts_it_is_exactly_the_one_set(turns: list, start: int) -> None:
    unjudged = [([(silence, None) for silence, _ in pauses], cut) for pauses, cut in turns]
    assert set(play(endpointing(start, adapt=False), unjudged)) == {start * MS}


@given(TURNS, PROBABILITY, PROBABILITY, st.booleans(), st.integers(0, 5000))
def test_the_likelier_the_end_the_shorter_the_wait(
    turns: list, one: float, other: float, adapt: bool, start: int
) -> None:
    hangovers = []
    for verdict in sorted((one, other)):
        judged = endpointing(start, adapt)
        play(judged, turns)
        judged.silence()
        judged.judged(verdict)
        hangovers.append(judged.hangover)
    assert hangovers[0] >= hangovers[1]


@given(TURNS, SILENCE, SILENCE)
def test_a_longer_pause_never_makes_the_hangover_shorter(turns: list, one: int, other: int) -> None:
    hangovers = []
    for silence in sorted((one, other)):
        heard = endpointing()
        play(heard, turns)
        before = heard.hangover
        heard.silence()
        heard.resumed(silence)
        hangovers.append(heard.hangover)
        assert heard.hangover >= min(before, hangovers[0])
    assert hangovers[0] <= hangovers[1]


def test_it_becomes_short_for_somebody_who_does_not_pause() -> None:
    speaker = endpointing(800)
    seen: list[int] = []
    speak(speaker, [], times=40, look=seen.append)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 800 * MS
    assert seen[-1] < 320 * MS


def test_it_becomes_long_for_somebody_who_pauses_long() -> None:
    speaker = endpointing(400)
    speak(speaker, [900], times=8)
    seen: list[int] = []
    speak(speaker, [900], times=20, look=seen.append)
    assert all(900 * MS < hangover <= 1100 * MS for hangover in seen)


def test_it_grows_at_once_when_a_turn_was_cut() -> None:
    speaker = endpointing(600)
    speaker.silence()
    speaker.ended()
    speaker.overrun(650 * MS)
    speaker.silence()
    assert speaker.hangover == 850 * MS


def test_it_grows_at_once_when_a_turn_was_nearly_cut() -> None:
    speaker = endpointing(600)
    speaker.silence()
    speaker.resumed(590 * MS)
    assert speaker.hangover == 790 * MS


def test_it_shrinks_slowly() -> None:
    speaker = endpointing(1000)
    speak(speaker, [], times=2)
    speaker.silence()
    assert speaker.hangover > 850 * MS


def test_one_long_interruption_is_soon_forgotten() -> None:
    speaker = endpointing(600)
    speak(speaker, [400], times=20)
    usual = speaker.hangover
    speak(speaker, [4000])
    assert speaker.hangover <= usual * GROWTH
    speak(speaker, [400], times=10)
    assert speaker.hangover < usual * 1.2


def test_a_turn_that_went_on_is_one_turn_with_a_pause() -> None:
    """An early end must not be booked as a turn without pauses, which would shorten the wait."""
    cut, whole = endpointing(), endpointing()
    for _ in range(5):
        for speaker in (cut, whole):
            speaker.silence()
        cut.ended()
        cut.overrun(500 * MS)
        whole.resumed(500 * MS)
        speak(cut, [])
        speak(whole, [])
        assert cut.hangover == whole.hangover


@pytest.mark.parametrize(
    ("verdict", "expected_ms"),
    [
        (1.0, 300),
        (FINISHED, 300),
        ((FINISHED + UNFINISHED) / 2, 600),
        (UNFINISHED, 1500),
        (0.0, 1500),
    ],
)
@pytest.mark.parametrize("adapt", [False, True])
def test_a_verdict_holds_for_the_present_silence(
    verdict: float, expected_ms: int, adapt: bool
) -> None:
    speaker = endpointing(600, adapt)
    speaker.silence()
    speaker.judged(verdict)
    assert speaker.hangover == expected_ms * MS
    speaker.resumed(100 * MS)
    assert speaker.hangover == 600 * MS
    speaker.silence()
    assert speaker.hangover == 600 * MS


def test_a_verdict_that_comes_too_late_changes_nothing() -> None:
    speaker = endpointing()
    speaker.silence()
    speaker.resumed(100 * MS)
    speaker.judged(0.0)
    assert speaker.hangover == 600 * MS


@pytest.mark.parametrize("nonsense", [-0.1, 1.1, float("nan")])
def test_a_verdict_is_a_probability(nonsense: float) -> None:
    speaker = endpointing()
    speaker.silence()
    with pytest.raises(ValueError, match="expected a probability"):
        speaker.judged(nonsense)
