"""Properties of units, strings and prompts."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.prompt import Modality, build_prompt, parse_speech_and_text
from stages.units import (
    HOPS,
    HUBERT,
    KINDS,
    PITCH,
    RANDOM_STYLES,
    RATES,
    STYLE,
    Interleaver,
    UnitFrame,
    Units,
    interleave,
    string_to_units,
    units_to_string,
)


def stream(kind: str, most: int) -> st.SearchStrategy[list[int]]:
    # Few different units, so that repeats are common.
    return st.lists(st.integers(0, 3), max_size=most)


UNITS = st.builds(Units, stream(HUBERT, 80), stream(PITCH, 45), stream(STYLE, 5))
BASE = st.builds(Units, stream(HUBERT, 80))


def brute_force(units: Units) -> list[tuple[str, int]]:
    """The rule, written down once more as plainly as possible."""
    rows = []
    for order, kind in enumerate(KINDS):
        units_of_kind = units.streams().get(kind, [])
        for i, index in enumerate(units_of_kind):
            if kind == STYLE or i == 0 or units_of_kind[i - 1] != index:
                rows.append((i / RATES[kind], order, i, kind, index))
    return [(kind, index) for *_, kind, index in sorted(rows)]


@given(UNITS | BASE)
def test_interleave_sorts_by_time_then_kind(units: Units) -> None:
    frames = interleave(units)
    assert [(f.kind, f.index) for f in frames] == brute_force(units)
    assert all(f.final and f.sample % HOPS[f.kind] == 0 for f in frames)


@given(UNITS, st.lists(st.tuples(*[st.floats(0, 1, allow_subnormal=False)] * 3), max_size=5))
def test_interleaving_in_any_chunking_is_interleaving_the_whole(
    units: Units, shares: list[tuple[float, float, float]]
) -> None:
    """``shares``: how much of what is left of each stream comes with each push."""
    whole = interleave(units)
    interleaver = Interleaver()
    left = Units(units.hubert, units.pitch, units.style)
    out: list[UnitFrame] = []
    for share in [*shares, (1.0, 1.0, 1.0)]:
        taken, rest = [], []
        for part, stream in zip(share, (left.hubert, left.pitch, left.style), strict=True):
            assert stream is not None
            count = round(part * len(stream))
            taken.append(stream[:count])
            rest.append(stream[count:])
        left = Units(*rest)
        out += interleaver.push(Units(*taken))
        assert out == whole[: len(out)]
        # The rest as a guess that turns out right: what is already out, then the provisional tail.
        tail = interleaver.tail(left)
        assert [(f.unit, f.sample) for f in out + tail] == [(f.unit, f.sample) for f in whole]
        assert not any(f.final for f in tail)
    out += interleaver.flush()
    assert out == whole
    # After a flush it starts anew.
    assert interleaver.push(units) + interleaver.flush() == whole


@given(UNITS)
def test_frames_come_as_soon_as_nothing_earlier_can_come(units: Units) -> None:
    interleaver = Interleaver()
    out = interleaver.push(units)
    horizon = min((len(s) / RATES[k], KINDS.index(k)) for k, s in units.streams().items())
    due = [
        f for f in interleave(units)
        if (f.sample // HOPS[f.kind] / RATES[f.kind], KINDS.index(f.kind)) < horizon
    ]  # fmt: skip
    assert out == due


def test_a_missing_style_holds_back_its_second() -> None:
    interleaver = Interleaver()
    assert interleaver.push(Units([1, 2, 3], [4, 5], [])) == []
    assert interleaver.push(Units([], [], [7]))[:3] == [
        UnitFrame("St", 7, 0),
        UnitFrame("Pi", 4, 0),
        UnitFrame("Hu", 1, 0),
    ]


def test_unknown_kinds_and_missing_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="kinds"):
        Interleaver(["Xx"])
    with pytest.raises(ValueError, match="no Pi stream"):
        units_to_string(Units([1]), has_pitch=True)


@given(UNITS)
def test_reading_a_string_back_gives_its_phonetic_units(units: Units) -> None:
    string = units_to_string(units)
    back = string_to_units(string)
    deduplicated = [i for n, i in enumerate(units.hubert) if n == 0 or units.hubert[n - 1] != i]
    assert back.hubert == deduplicated
    assert all(s is None or len(s) == len(back.hubert) for s in (back.pitch, back.style))
    assert (back.pitch is not None) == bool(units.pitch)
    assert (back.style is not None) == bool(units.style)


def test_the_style_is_drawn_only_with_a_source_of_chance() -> None:
    assert string_to_units("[Pi1][Hu2]").style is None
    drawn = {string_to_units("[Pi1][Hu2]", rng=random.Random(s)).style[0] for s in range(50)}  # type: ignore[index]
    assert drawn == set(RANDOM_STYLES)
    assert string_to_units("[Hu2]", rng=random.Random(0)).style is None


@pytest.mark.parametrize(
    ("string", "hubert"),
    [
        ("[Hu12]abc[Hu13]", [12, 13]),
        ("[Hu12", []),
        ("[Hu1][H", [1]),
        ("[[Hu1]]", [1]),
        ("[Hu1x][Hu2]", [2]),
        ("[Hu]", []),
        ("[Hu1]\n[Hu2] ", [1, 2]),
    ],
)
def test_what_is_no_whole_token_is_skipped(string: str, hubert: list[int]) -> None:
    assert string_to_units(string).hubert == hubert


@given(st.text())
def test_any_text_can_be_read(string: str) -> None:
    string_to_units(string)
    pieces = parse_speech_and_text(string)
    kinds = [modality for modality, _ in pieces]
    assert all(a is not b for a, b in pairwise(kinds))


PARTS = st.lists(
    st.tuples(st.just("text"), st.text("ab c.", min_size=1))
    | st.tuples(st.just("speech"), BASE.filter(lambda u: bool(u.hubert)).map(units_to_string))
)


@given(PARTS)
def test_a_prompt_can_be_taken_apart_again(parts: list[tuple[str, str]]) -> None:
    joined: list[tuple[Modality, str]] = []
    for name, content in parts:
        modality = Modality(name)
        if joined and joined[-1][0] is modality:
            joined[-1] = (modality, joined[-1][1] + content)
        else:
            joined.append((modality, content))
    assert parse_speech_and_text(build_prompt(parts)) == joined


def test_units_add_and_convert() -> None:
    a, b = Units([1], [2], [3]), Units([4, 5], None, [6])
    assert a + b == Units([1, 4, 5], [2], [3, 6])
    assert Units([1]) + Units([2]) == Units([1, 2])
    assert Units.from_strings((a + b).to_strings()) == a + b
    assert Units([]).to_strings() == {"hubert": ""}
