"""The whole domain: what its files say, what is drawn from them, and what stays apart."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import jsonschema
import pytest

from recipes import dialogues, domain, grammar
from recipes.grammar import bare, expand_choices, number_words, transcript

WORLD = dialogues.load(most=60)
TRAIN, HELDOUT = WORLD.split("train"), WORLD.split("heldout")
# Of the transcripts of those requests, sorted, a line each.
DIGEST = "1e703519cb1d95b10a3077d21b608bdff51b029b4005a6dcae4022411cf01045"
NUMBERS = {number_words(n): n for n in range(1000)}


def drawn(intent: str) -> list[dialogues.Example]:
    return [e for e in WORLD.examples if e.intent == intent]


# ------------------------------------------------------------------------------------- the files


def test_every_intent_has_enough_phrasings_to_learn_it_and_to_measure_it() -> None:
    assert len(WORLD.topics) >= 150
    for name, topic in WORLD.topics.items():
        assert len(topic.train) >= (40 if topic.important else 20), name
        assert len(topic.heldout) >= 8, name
        assert topic.replies, name
    for split in ("train", "heldout"):
        assert {e.intent for e in WORLD.split(split)} == WORLD.topics.keys()


def test_no_phrasing_is_held_out_and_trained_on_in_any_intent() -> None:
    def readings(*kinds: str) -> dict[str, str]:
        return {
            bare(transcript(reading)) if "{" not in reading else reading: name
            for name, topic in WORLD.topics.items()
            for kind in kinds
            for pattern in getattr(topic, kind)
            for reading in expand_choices(pattern)
        }

    train, heldout = readings("train"), readings("heldout")
    # Those held out of the first layer may stand there in domain_more.txt: drawing leaves them out.
    shared = train.keys() & heldout.keys() - readings("first").keys()
    assert not {f"{heldout[reading]}: {reading}" for reading in shared}


def test_the_words_are_few_and_can_be_said() -> None:
    for example in WORLD.examples:
        for text in (example.text, *example.replies):
            assert re.fullmatch(r"[A-Za-z',.!? ]+", text), text
            assert text[0].isupper() and text[-1] in ".!?", text
        assert all(len(transcript(r).split()) <= 12 for r in example.replies), example.replies
    assert len(dialogues.words(WORLD)) <= 1400


# -------------------------------------------------------------------------------------- drawing


def test_nothing_held_out_is_said_in_training_whatever_the_courtesies() -> None:
    assert len(HELDOUT) >= 2500 and len(TRAIN) >= 10_000
    assert not {bare(e.transcript) for e in TRAIN} & {bare(e.transcript) for e in HELDOUT}
    keys = [(e.before, e.transcript) for e in WORLD.examples]
    assert len(set(keys)) == len(keys)


def test_held_out_requests_are_worded_anew_out_of_known_words() -> None:
    said: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for example in WORLD.examples:
        if example.added:
            said[example.intent][example.split].append(example.transcript)
    shares = [dialogues.overlap(s["heldout"], s["train"]) for s in said.values()]
    assert sum(shares) / len(shares) < 0.5  # word trigrams that the intent's training has too
    known = set(itertools.chain(*(e.transcript.split() for e in TRAIN)))
    unknown = [w for e in HELDOUT for w in e.transcript.split() if w not in known]
    assert len(unknown) < 0.01 * sum(len(e.transcript.split()) for e in HELDOUT)


def test_the_requests_that_the_first_nano_was_measured_with_are_what_they_were() -> None:
    first = [e for e in HELDOUT if not e.added]
    requests = {r.transcript: r for r in domain.build(0).requests if r.split == "heldout"}
    digest = hashlib.sha256("\n".join(sorted(requests)).encode()).hexdigest()
    assert digest == DIGEST
    assert {e.transcript for e in first} == requests.keys()
    for example in first:
        assert set(requests[example.transcript].replies) <= set(example.replies)


def test_a_request_with_its_past_has_one_meaning() -> None:
    meanings: dict[tuple[object, ...], tuple[str, ...]] = {}
    for e in WORLD.examples:
        if e.added:
            assert meanings.setdefault((e.intent, e.slots), e.replies) == e.replies
            assert e.style == WORLD.topics[e.intent].style


def test_the_same_seed_gives_the_same_examples_and_another_one_others() -> None:
    assert dialogues.load(most=60).examples == WORLD.examples
    others = dialogues.load(seed=1, most=1, files=[])
    assert others.examples != dialogues.load(most=1, files=[]).examples


def test_what_a_later_intent_claims_is_answered_by_it() -> None:
    said = {bare(e.transcript): e for e in HELDOUT if not e.added}
    battery = said["how is your battery"]
    assert battery.replies == ("Let me check my battery.", "Okay, I will charge my battery.")
    assert battery.action == {"action": "battery"}
    assert not any(e.intent == "unknown" and "pizza" in e.text for e in TRAIN)
    assert not any(e.intent == "unknown" and "call" in e.transcript.split()[0] for e in TRAIN)


# ------------------------------------------------------------------------------- truth of replies


def numbers(text: str) -> list[int]:
    """The numbers in a sentence, in order."""
    found: list[int] = []
    words = transcript(text).split()
    while words:
        size = next((n for n in (4, 3, 2, 1) if " ".join(words[:n]) in NUMBERS), 0)
        if size:
            found.append(NUMBERS[" ".join(words[:size])])
        words = words[size or 1 :]
    return found


@pytest.mark.parametrize(
    ("intent", "right"),
    [
        ("plus_big", lambda a, b, c: a + b == c),
        ("minus_big", lambda a, b, c: a - b == c),
        ("times", lambda a, b, c: a * b == c),
        ("divide", lambda a, b, c: b * c == a),
        ("and_times", lambda a, b, c: a * b == c),
        ("and_plus_one", lambda a, b, c: a + b == c),
        ("half", lambda a, b: a == 2 * b),
        ("bigger_number", lambda a, b: a > b),
        ("smaller_number", lambda a, b: a < b),
    ],
)
def test_sums_are_right(intent: str, right: object) -> None:
    assert callable(right)
    for example in drawn(intent):
        assert right(*numbers(example.replies[0])), example
        asked = example.before[0].reply if example.before else example.text
        assert set(numbers(example.replies[0])) & set(numbers(asked)), example


def test_the_clock_goes_round() -> None:
    for example in drawn("clock_later"):
        slots = dict(example.slots)["later"].split()
        now, more = (NUMBERS[word] for word in slots)
        assert numbers(example.replies[0]) == [(now + more - 1) % 12 + 1]


def test_a_word_is_spelled_with_its_letters() -> None:
    for example in [*drawn("spell"), *drawn("and_spell")]:
        word, letters = re.fullmatch(r"(\w+) is spelled ([A-Z ]+)\.", example.replies[0]).groups()  # type: ignore[union-attr]
        assert letters.replace(" ", "") == word.upper()


# ----------------------------------------------------------------------------------- follow-ups


def test_follow_ups_have_one_or_two_turns_before_them_and_no_other_has() -> None:
    for example in WORLD.examples:
        after = WORLD.topics[example.intent].after
        assert len(example.before) >= len(after) if after else not example.before
        assert len(example.before) <= 2
        assert example.turns[-1].request == example.text
    assert sum(bool(t.after) for t in WORLD.topics.values()) >= 30
    assert any(len(e.before) == 2 for e in HELDOUT)


def test_the_turn_before_decides_what_a_follow_up_means() -> None:
    asked = {(e.before[-1].reply, e.replies[0]) for e in drawn("then_day")}
    assert ("After Monday comes Tuesday.", "After Tuesday comes Wednesday.") in asked
    for example in drawn("and_season"):
        assert example.replies[0] != example.before[0].reply
    for example in drawn("say_again"):
        assert example.replies == (example.before[-1].reply,)
    for example in drawn("your_name_is"):
        name = dict(example.slots)["who"]
        assert name in example.before[0].request and name in example.replies[0]
    for example in drawn("and_times"):
        first, second = numbers(example.before[0].reply), numbers(example.replies[0])
        assert first[0] == second[0] and first[1] != second[1]


# -------------------------------------------------------------------------------------- actions


def test_every_action_follows_the_schema() -> None:
    schema = dialogues.action_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    seen = {dialogues.action_text(e.action) for e in WORLD.examples} - {""}
    for text in sorted(seen)[::5]:
        validator.validate(json.loads(text))
    names = {choice["properties"]["action"]["const"] for choice in schema["oneOf"]}
    assert {json.loads(text)["action"] for text in seen} == names


def test_an_action_has_what_was_asked_for() -> None:
    for example in drawn("turn_degrees"):
        [degrees] = numbers(example.text)
        side = "left" if "left" in example.text.lower() else "right"
        assert example.action == {"action": "turn", "direction": side, "degrees": degrees}
    for example in drawn("light_off_again"):
        assert example.before[0].action is not None and example.action is not None
        assert example.action == example.before[0].action | {"state": "off"}
    for example in drawn("do_again"):
        assert example.action == example.before[0].action is not None
    assert all(e.action == {"action": "stop"} for e in drawn("stop"))
    assert all(e.action is None for e in drawn("greet"))


def test_an_action_is_written_without_blanks() -> None:
    action = {"action": "turn", "direction": "left", "degrees": 40}
    assert dialogues.action_text(action) == '{"action":"turn","direction":"left","degrees":40}'
    assert dialogues.action_text(None) == ""


# --------------------------------------------------------------------------- judging and counting


def test_is_right_takes_the_reply_and_no_other() -> None:
    kitchen = next(e for e in drawn("instead_room") if dict(e.slots)["room2"] == "kitchen")
    assert WORLD.is_right(kitchen, "okay I'm going to the kitchen")
    assert not WORLD.is_right(kitchen, "Okay, I am going to the bedroom.")
    for example in HELDOUT[::97]:
        assert WORLD.is_right(example, example.replies[-1])


def test_requests_without_a_past_are_a_domain() -> None:
    assert {r.intent for r in WORLD.domain.requests} == {
        name for name, topic in WORLD.topics.items() if not topic.after
    }
    some = drawn("times")[0]
    assert WORLD.domain.right_replies(some.text) == set(some.replies)


def test_the_table_counts_every_intent() -> None:
    lines = list(dialogues.table(WORLD))
    assert sum(line.split()[0].rstrip("*") in WORLD.topics for line in lines) == len(WORLD.topics)
    assert any(f"{len(WORLD.topics)} intents" in line for line in lines)


def test_overlap_is_the_share_of_word_groups_that_are_known() -> None:
    assert dialogues.overlap(["go home now"], ["go home now"]) == 1
    assert dialogues.overlap(["go home now"], ["come here"]) == 0
    assert dialogues.overlap(["go home now"], ["go home"]) == pytest.approx(1 / 3)


# ---------------------------------------------------------------------------------- the format

TEXT = """
@city: people
Rome: many
Bonn: few

@city: river
Rome: Tiber
Bonn: Rhine

== *about
> and {it}? ; what about {it}?
? how about {it}?

== river polite
< The {city.river} is in {city}.
! {"action": "say", "people": "{city.people}", "steps": {steps#}}
> which river is in {city}? ; {steps} name the river of {city}
? what flows through {city}?

== and_river
^ river
< The {city2.river} is in {city2}.
* about {city2}

== again
^ river
< {reply}
! same
> again
? once more
"""


def read(tmp_path: Path, text: str) -> dialogues.Dialogues:
    path = tmp_path / "some.txt"
    path.write_text(text, encoding="utf-8")
    return dialogues.load(most=20, files=[path])


def test_a_file_gives_tables_lists_actions_and_follow_ups(tmp_path: Path) -> None:
    world = read(tmp_path, TEXT)
    by_intent = {e.intent: e for e in world.examples}
    assert world.topics["and_river"].train == ("and {city2}?", "what about {city2}?")
    assert world.topics["and_river"].heldout == ("how about {city2}?",)
    river, other, again = (by_intent[name] for name in ("river", "and_river", "again"))
    slots = dict(river.slots)
    people = {"Rome": "many", "Bonn": "few"}[slots["city"]]
    steps = NUMBERS[slots["steps"]]
    assert river.action == {"action": "say", "people": people, "steps": steps}
    assert other.before[0].reply != other.replies[0]
    assert again.replies[0] == again.before[0].reply and again.action == again.before[0].action


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("> hello", "line 1.*no == intent"),
        ("== hello loud", "line 1.*'loud'"),
        ("== hello\n% hello", "line 2.*begins with"),
        ("== hello\n* nothing {day}", "line 2.*nothing"),
        ("@city: river, people\nRome: Tiber", "line 2"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"some.txt {named}"):
        read(tmp_path, text)


def test_slots_reach_through_tables_and_become_digits() -> None:
    tables = {"day": {"Monday": {"next": "Tuesday"}, "Tuesday": {"next": "Wednesday"}}}
    slots = {"day": "Monday", "n": "forty five"}
    assert dialogues.put("{day} {day.next.next} {n#}", slots, tables) == "Monday Wednesday 45"
    assert dialogues.table_of("day2") == "day"
    with pytest.raises(KeyError):
        dialogues.put("{day.next.next}", {"day": "Tuesday"}, tables)


# ------------------------------------------------------------------------ courtesies, contractions


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("go home", "could you please go home?"),
        ("what is your name?", "excuse me, what is your name?"),
        ("I am tired", "hey nano, I am tired"),
    ],
)
def test_an_address_fits_the_request_and_is_taken_off_again(text: str, form: str) -> None:
    forms = grammar.addressed(text, True)
    assert form in forms
    assert all(bare(transcript(f)) == bare(transcript(text)) for f in forms)


def test_only_commands_are_asked_for_politely() -> None:
    for text in ("forty degrees left", "I am tired", "battery"):
        assert not any("please" in form for form in grammar.addressed(text, True))
    assert not any("please" in form for form in grammar.addressed("go home", False))
    assert grammar.addressed("hey nano", True) == []


def test_contractions_are_made_where_a_word_follows() -> None:
    assert grammar.contracted("What is it?") == "What's it?"
    assert (
        grammar.contracted("I am sure that is not what it is.") == "I'm sure that's not what it is."
    )
    assert bare("i'm sure that's an apple") == "i am sure that is a apple"
