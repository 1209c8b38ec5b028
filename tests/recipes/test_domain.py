"""The grammar: what it generates, how it is split, and how replies are judged."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes import domain, grammar

WORLD = domain.build()


def request(intent: str, **slots: str) -> domain.Request:
    wanted = slots.items()
    return next(r for r in WORLD.requests if r.intent == intent and wanted <= set(r.slots))


def test_the_domain_has_the_planned_size() -> None:
    splits = [r.split for r in WORLD.requests]
    assert 2500 <= splits.count("train") <= 4200
    assert splits.count("heldout") >= 500
    assert 500 <= len(WORLD.replies) <= 900
    assert len({r.intent for r in WORLD.requests}) >= 90


def test_no_request_is_in_both_splits() -> None:
    train = {r.transcript for r in WORLD.requests if r.split == "train"}
    heldout = {r.transcript for r in WORLD.requests if r.split == "heldout"}
    assert not train & heldout
    assert len(train) + len(heldout) == len(WORLD.requests)


def plain(text: str) -> str:
    """A transcript without the courtesies that any phrasing may get."""
    text = re.sub(
        r"^((hey )?nano|okay|excuse me|((can|could) you )?please|(can|could) you) ", "", text
    )
    return re.sub(r" (nano|please)$", "", text)


def test_heldout_phrasings_never_occur_in_training_whatever_their_slots() -> None:
    tables, intents = grammar.parse_grammar(domain.GRAMMAR.read_text(encoding="utf-8"))
    vocabulary = grammar.common_words(intents)

    def readings(patterns: list[str]) -> set[str]:
        names = grammar.slot_names(patterns)
        values = itertools.product(*(tables[name] for name in names))
        filled = (
            grammar.fill(text, dict(zip(names, some, strict=True)), tables)
            for some in values
            for pattern in patterns
            for text in grammar.expand_choices(pattern)
        )
        return {plain(domain.transcript(text)) for text in filled}

    for intent in intents:
        rng = random.Random(f"0 {intent.name}")
        train, heldout = grammar.split_phrasings(intent, vocabulary, rng)
        assert len(heldout) >= 1 and not set(train) & set(heldout)
        seen = {
            plain(r.transcript)
            for r in WORLD.requests
            if r.intent == intent.name and r.split == "train"
        }
        assert not seen & (readings(heldout) - readings(train)), intent.name


def test_every_intent_has_requests_in_both_splits() -> None:
    for split in ("train", "heldout"):
        assert {r.intent for r in WORLD.requests if r.split == split} == {
            r.intent for r in WORLD.requests
        }


def test_the_same_seed_gives_the_same_domain_and_another_one_another() -> None:
    assert domain.build(0).requests == WORLD.requests
    assert domain.build(1).requests != WORLD.requests


def test_texts_and_transcripts_have_only_what_can_be_said() -> None:
    book = [text for part in domain.book() for text in part]
    for text in [*(r.text for r in WORLD.requests), *WORLD.replies, *book]:
        assert re.fullmatch(r"[A-Za-z',.!? ]+", text), text
        assert re.fullmatch(r"[a-z']+( [a-z']+)*", domain.transcript(text)), text
        assert text[0].isupper() and text[-1] in ".!?"


def test_replies_are_short_and_follow_from_the_request() -> None:
    for reply in WORLD.replies:
        assert 1 <= len(domain.transcript(reply).split()) <= 12, reply
    by_key: dict[tuple[str, object], tuple[str, ...]] = {}
    for r in WORLD.requests:
        assert by_key.setdefault((r.intent, r.slots), r.replies) == r.replies


def test_replies_do_not_depend_on_the_phrasing() -> None:
    some = request("plus", plus="one plus two")
    assert WORLD.right_replies(some.text.upper()) == {"One plus two is three."}
    with pytest.raises(KeyError):
        WORLD.right_replies("what is the airspeed of a swallow")


def test_book_sentences_are_many_and_split() -> None:
    train, heldout = domain.book()
    assert len(train) >= 600 and len(heldout) == domain.BOOK_HELDOUT
    assert not set(train) & set(heldout)


@pytest.mark.parametrize(
    ("intent", "slots", "heard"),
    [
        ("go_room", {"room": "kitchen"}, "Okay, I am going to the kitchen."),
        ("go_room", {"room": "kitchen"}, "Okay I'm going to the kitchen"),
        ("go_room", {"room": "kitchen"}, "OK, I am going to the kitten."),
        ("plus", {"plus": "one plus two"}, "1 + 2 is 3."),
        ("plus", {"plus": "ten plus ten"}, "10 plus 10 is 20"),
        ("month_days", {"month": "July"}, "July has 31 days."),
        ("greet", {}, "Hi there! How can I help you?"),
        ("greet", {}, "Hello! It's lovely to hear you."),
    ],
)
def test_is_right_accepts(intent: str, slots: dict[str, str], heard: str) -> None:
    assert WORLD.is_right(intent, slots, heard)


@pytest.mark.parametrize(
    ("intent", "slots", "heard"),
    [
        ("go_room", {"room": "kitchen"}, "Okay, I am going to the bedroom."),
        ("go_room", {"room": "kitchen"}, "Okay, I am going to the"),
        ("go_room", {"room": "kitchen"}, ""),
        ("go_room", {"room": "kitchen"}, "The kitchen light is on."),
        ("plus", {"plus": "one plus two"}, "One plus two is four."),
        ("plus", {"plus": "one plus two"}, "One plus three is four."),
        ("month_days", {"month": "July"}, "June has thirty days."),
        ("month_days", {"month": "July"}, "July has thirty days."),
        ("greet", {}, "Goodbye! I will miss you."),
        ("turn", {"turn": "left"}, "Okay, I am moving left."),
        ("unknown", {}, "the the the the the the"),
    ],
)
def test_is_right_rejects(intent: str, slots: dict[str, str], heard: str) -> None:
    assert not WORLD.is_right(intent, slots, heard)


def test_every_reply_is_right_for_itself_and_for_no_other_slot() -> None:
    for r in WORLD.requests[::7]:
        for reply in r.replies:
            assert WORLD.is_right(r.intent, dict(r.slots), reply)
    rooms = [r for r in WORLD.requests if r.intent == "go_room"]
    for one in rooms[::12]:
        for other in rooms[::11]:
            right = WORLD.is_right(one.intent, dict(one.slots), other.replies[0])
            assert right == (one.slots == other.slots)


@given(st.integers(0, 999_999))
def test_numbers_in_words_are_plain_words(number: int) -> None:
    words = grammar.number_words(number)
    assert re.fullmatch(r"[a-z]+( [a-z]+)*", words)
    assert domain.transcript(str(number)) == words
    assert domain.transcript(f"{number:,}") == words


def test_number_words() -> None:
    assert grammar.number_words(0) == "zero"
    assert grammar.number_words(121) == "one hundred twenty one"
    assert grammar.number_words(40_017) == "forty thousand seventeen"
    with pytest.raises(ValueError, match="1000000"):
        grammar.number_words(1_000_000)


@given(st.text())
def test_transcripts_are_stable(text: str) -> None:
    once = domain.transcript(text)
    assert domain.transcript(once) == once
    assert re.fullmatch(r"[a-z' ]*", once)


def test_choices_and_slots() -> None:
    assert grammar.expand_choices("go (now|)") == ["go now", "go"]
    assert grammar.expand_choices("is it (hot|cold) (now|)?") == [
        "is it hot now?", "is it hot?", "is it cold now?", "is it cold?",
    ]  # fmt: skip
    tables = {"thing": {"apple": {"color": "red"}}}
    assert (
        grammar.fill("a {thing} is {thing.color}", {"thing": "apple"}, tables) == "an apple is red"
    )


def test_courtesies_fit_the_form_of_the_request() -> None:
    assert "can you go home?" in grammar.courtesies("go home", True)
    assert "what time is it nano?" in grammar.courtesies("what time is it?", True)
    for text in ("what time is it?", "I am tired", "the baby is asleep"):
        assert not any("please" in form for form in grammar.courtesies(text, True))
    assert grammar.courtesies("hey nano", True) == []


def test_a_broken_grammar_is_named() -> None:
    with pytest.raises(ValueError, match="line 2"):
        grammar.parse_grammar("== hello\nnonsense\n")
    with pytest.raises(ValueError, match="colour"):
        grammar.parse_grammar("== hello colour=3\n")
