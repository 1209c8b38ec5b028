"""What a dialogue writes into the token stream, and what it reads out of it."""

from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest

from agent.config import ReplyConfig
from agent.reply import Action, Dialogue, HeardText, Piece, SaidText, SaidUnit
from stages.checkpoint import find_layout
from stages.constrained import JsonGrammar
from stages.lm import Sampling
from stages.text import Tokenizer
from stages.units import UnitFrame


class ScriptedModel:
    """A language model that says what it was told to, and checks that it is allowed to."""

    def __init__(self, script: Sequence[int], capacity: int = 4096) -> None:
        self.script = list(script)
        self.capacity = capacity
        self.ids: list[int] = []
        self.fed = 0

    @property
    def length(self) -> int:
        return len(self.ids)

    def append(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self.fed += len(ids)

    def rewind(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.ids[length:]

    def reset(self) -> None:
        self.ids.clear()

    def decode(self, sampling: Sampling, mask: Sequence[bool]) -> int:
        token = self.script.pop(0)
        assert mask[token], f"token {token} was said but is not allowed here"
        self.ids.append(token)
        return token


@pytest.fixture(scope="module")
def tokenizer(kit: Path) -> Tokenizer:
    return Tokenizer.load(find_layout(kit / "checkpoints", version="expressive"))


def dialogue(
    tokenizer: Tokenizer, script: Sequence[int], **settings: object
) -> tuple[Dialogue, ScriptedModel]:
    model = ScriptedModel(script)
    config = ReplyConfig.model_validate(settings)
    made = Dialogue(model, tokenizer, config, Sampling(), Sampling())  # type: ignore[arg-type]
    return made, model


def frames(*indices: int) -> list[UnitFrame]:
    return [UnitFrame("Hu", index, 640 * n) for n, index in enumerate(indices)]


def said(talk: Dialogue) -> list[Piece]:
    return [piece for piece in talk.reply() if piece is not None]


def opening(tokenizer: Tokenizer) -> list[int]:
    """How a prompt of speech begins."""
    return tokenizer.encode("[Speech]")


def test_a_turn_is_request_transcript_reply_and_its_sound(tokenizer: Tokenizer) -> None:
    words = tokenizer.encode("[Text]hello | Hi you.", bos=False)[2:]
    units = [tokenizer.unit_id("Hu", 7), tokenizer.unit_id("Hu", 8)]
    script = [*words, tokenizer.speech_tag, *units, tokenizer.eos]
    talk, model = dialogue(tokenizer, script)
    talk.begin()
    talk.hear(0, frames(1, 2))
    pieces = said(talk)
    assert [p for p in pieces if isinstance(p, HeardText)] == [HeardText("hello")]
    assert "".join(p.text for p in pieces if isinstance(p, SaidText)) == "Hi you."
    assert [p.unit.index for p in pieces if isinstance(p, SaidUnit)] == [7, 8]
    talk.end()
    request = [tokenizer.unit_id("Hu", i) for i in (1, 2)]
    assert model.ids == [
        *opening(tokenizer), *request, tokenizer.text_tag, *words,
        tokenizer.speech_tag, *units, tokenizer.eos,
    ]  # fmt: skip


def test_provisional_units_are_replaced_from_where_they_differ(tokenizer: Tokenizer) -> None:
    talk, model = dialogue(tokenizer, [])
    talk.begin()
    talk.hear(0, frames(1, 2, 3, 4))
    fed = model.fed
    talk.hear(1, frames(2, 3, 9))
    assert model.ids[len(opening(tokenizer)) :] == [
        tokenizer.unit_id("Hu", i) for i in (1, 2, 3, 9)
    ]
    assert model.fed == fed + 1, "what is in the cache already is not fed again"
    assert talk.counts["rewound_tokens"] == 1


def test_a_reply_let_go_of_early_still_closes_its_turn(tokenizer: Tokenizer) -> None:
    talk, model = dialogue(tokenizer, [tokenizer.speech_tag, tokenizer.unit_id("Hu", 3)] * 9)
    talk.begin()
    talk.hear(0, frames(1))
    steps = talk.reply()
    while not isinstance(next(steps), SaidUnit):
        pass
    steps.close()
    talk.end(1)
    assert model.ids[-2:] == [tokenizer.unit_id("Hu", 3), tokenizer.eos]


@pytest.mark.parametrize("whole", [True, False])
def test_of_a_reply_that_was_cut_only_the_beginning_is_remembered(
    tokenizer: Tokenizer, whole: bool
) -> None:
    units = [tokenizer.unit_id("Hu", i) for i in (3, 4, 5, 6)]
    talk, model = dialogue(tokenizer, [*units, tokenizer.eos], mode="speech")
    talk.begin()
    steps = talk.reply()
    for _ in range(4 if whole else 2):
        next(steps)
    steps.close()
    talk.end(2)
    assert model.ids == [*opening(tokenizer), *units[:2], tokenizer.eos]
    talk.end(1)
    assert model.ids == [*opening(tokenizer), *units[:2], tokenizer.eos], "a turn ends once"


def planned(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """A request, and what a model says to it: transcript with reply, and units."""
    request = [tokenizer.unit_id("Hu", i) for i in (1, 2)]
    words = tokenizer.encode("[Text]hello | One two three.", bos=False)[2:]
    return request, words, [tokenizer.unit_id("Hu", i) for i in (7, 8, 9)]


@pytest.mark.parametrize(
    ("heard", "units", "words"),
    [(0, 0, "hello |"), (4, 1, "hello | One"), (8, 2, "hello | One two")],
)
def test_words_that_nobody_heard_are_not_remembered_either(
    tokenizer: Tokenizer, heard: int, units: int, words: str
) -> None:
    request, text, said_units = planned(tokenizer)
    talk, model = dialogue(tokenizer, [*text, tokenizer.speech_tag, *said_units, tokenizer.eos])
    talk.begin()
    talk.hear(0, frames(1, 2))
    spoken = "".join(p.text for p in said(talk) if isinstance(p, SaidText))
    assert spoken == "One two three."
    talk.end(units, characters=heard)
    remembered = tokenizer.encode(f"[Text]{words}", bos=False)[2:]
    assert model.ids == [
        *opening(tokenizer), *request, tokenizer.text_tag, *remembered,
        tokenizer.speech_tag, *said_units[:units], tokenizer.eos,
    ]  # fmt: skip


def test_a_request_that_goes_on_takes_back_the_reply_that_was_begun(tokenizer: Tokenizer) -> None:
    _, text, said_units = planned(tokenizer)
    script = [*text, tokenizer.speech_tag, said_units[0], tokenizer.eos]
    talk, model = dialogue(tokenizer, script * 2)
    talk.begin()
    talk.hear(0, frames(1, 2))
    said(talk)
    talk.hear(2, frames(3))
    assert model.ids == [*opening(tokenizer), *(tokenizer.unit_id("Hu", i) for i in (1, 2, 3))]
    assert talk.counts["wasted_tokens"] == len(text) + 1
    assert [p for p in said(talk) if isinstance(p, HeardText)] == [HeardText("hello")]


def test_a_reply_can_be_tried_again_with_nothing_new(tokenizer: Tokenizer) -> None:
    units = [tokenizer.unit_id("Hu", i) for i in (3, 4)]
    talk, model = dialogue(tokenizer, [*units, tokenizer.eos] * 2, mode="speech")
    talk.begin()
    talk.hear(0, frames(1))
    said(talk)
    said(talk)
    talk.end()
    assert model.ids == [
        *opening(tokenizer), tokenizer.unit_id("Hu", 1), *units, tokenizer.eos
    ]  # fmt: skip


def test_a_request_too_long_for_the_cache_loses_its_end_and_not_the_session(
    tokenizer: Tokenizer,
) -> None:
    model = ScriptedModel([], capacity=20)
    talk = Dialogue(model, tokenizer, ReplyConfig(), Sampling(), Sampling())  # type: ignore[arg-type]
    talk.begin()
    talk.hear(0, frames(*range(100)))
    assert model.length == 20
    assert said(talk) == []
    talk.end()
    talk.begin()


def test_examples_come_first_and_are_never_forgotten(tokenizer: Tokenizer) -> None:
    units = [tokenizer.unit_id("Hu", i % 400) for i in range(60)]
    model = ScriptedModel([*units, tokenizer.eos] * 20)
    config = ReplyConfig(mode="speech", context_tokens=200)
    examples = "[Text]User: [Speech][Hu1][Hu2][Text] Agent: Hello."
    talk = Dialogue(model, tokenizer, config, Sampling(), Sampling(), examples=examples)  # type: ignore[arg-type]
    for turn in range(20):
        talk.begin()
        talk.hear(0, frames(turn))
        said(talk)
        talk.end()
        assert model.ids[: len(talk.prefix)] == tokenizer.encode(examples)
        assert model.length <= 200


def test_tags_mark_who_speaks_and_stop_the_model_from_speaking_for_the_user(
    tokenizer: Tokenizer,
) -> None:
    unit = tokenizer.unit_id("Hu", 5)
    says = tokenizer.encode("[Text]Hi. User: and", bos=False)[2:]
    talk, model = dialogue(
        tokenizer, says, mode="any", user_tag="User: ", agent_tag=" Agent: ", stop_text="User:"
    )
    talk.begin()
    talk.hear(0, frames(5))
    text = "".join(p.text for p in said(talk) if isinstance(p, SaidText))
    talk.end()
    assert "User" not in text or not text.endswith("and")
    whole = tokenizer.decode(model.ids, skip_special_tokens=False)
    assert whole.count("User:") == 1, whole
    assert model.ids.index(unit) > model.ids.index(tokenizer.speech_tag)
    assert tokenizer.eos not in model.ids, "the next tag ends the turn"


def test_a_turn_that_is_never_answered_leaves_nothing_behind(tokenizer: Tokenizer) -> None:
    talk, model = dialogue(tokenizer, [])
    talk.begin()
    talk.hear(0, frames(1, 2))
    talk.begin()
    assert model.ids == opening(tokenizer)


def test_a_model_that_never_ends_its_text_is_made_to_speak(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode("[Text]so", bos=False)[-1]
    script = [word] * 5 + [tokenizer.eos]
    talk, model = dialogue(tokenizer, script, max_text_tokens=5)
    talk.begin()
    pieces = said(talk)
    assert "".join(p.text for p in pieces if isinstance(p, SaidText)) == "so" * 5
    talk.end()
    assert model.ids[-2:] == [tokenizer.speech_tag, tokenizer.eos]


@pytest.mark.parametrize("period", [1, 3, 16])
def test_a_model_caught_in_a_loop_is_stopped(tokenizer: Tokenizer, period: int) -> None:
    loop = [tokenizer.unit_id("Hu", i) for i in range(period)] * 1000
    talk, _ = dialogue(tokenizer, loop, mode="speech")
    talk.begin()
    assert len(said(talk)) < 100


def test_units_without_a_sound_are_never_sampled(tokenizer: Tokenizer) -> None:
    blank = tokenizer.unit_id("Hu", 500)
    model = ScriptedModel([blank])
    config = ReplyConfig(mode="speech")
    talk = Dialogue(model, tokenizer, config, Sampling(), Sampling(), [blank])  # type: ignore[arg-type]
    talk.begin()
    with pytest.raises(AssertionError, match="not allowed"):
        said(talk)


@pytest.mark.parametrize("heard", [None, 20])
def test_a_long_conversation_keeps_its_latest_turns(
    tokenizer: Tokenizer, heard: int | None
) -> None:
    units = [tokenizer.unit_id("Hu", i % 400) for i in range(60)]
    talk, model = dialogue(
        tokenizer, [*units, tokenizer.eos] * 20, mode="speech", context_tokens=200
    )
    start = opening(tokenizer)
    closed = [*units[:heard], tokenizer.eos]
    for turn in range(20):
        talk.begin()
        talk.hear(0, frames(turn))
        said(talk)
        talk.end(heard)
        assert model.ids[: len(start)] == start
        assert model.length <= 200
        last = [tokenizer.speech_tag, tokenizer.unit_id("Hu", turn), *closed]
        assert model.ids[-len(last) :] == last, "the latest turn is whole, as far as it was heard"
    assert model.ids.count(tokenizer.eos) >= 1


STOP_OR_TURN = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"action": {"const": "stop"}},
            "required": ["action"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "action": {"const": "turn"},
                "degrees": {"type": "integer", "minimum": 0, "maximum": 360},
            },
            "required": ["action", "degrees"],
            "additionalProperties": False,
        },
    ]
}


class Stubborn(ScriptedModel):
    """Says the next thing of its script that is allowed, or else the first token that is."""

    closing: frozenset[int]  # tokens with a closing brace

    def append(self, ids: Sequence[int]) -> None:
        super().append(ids)
        if self.closing & set(ids):  # what it wished to write itself has been written
            done = next((n for n, i in enumerate(self.script) if i in self.closing), -1)
            del self.script[: done + 1]

    def decode(self, sampling: Sampling, mask: Sequence[bool]) -> int:
        allowed = [i for i in self.script if mask[i]]
        token = allowed[0] if allowed else next(i for i, ok in enumerate(mask) if ok)
        if allowed:
            del self.script[: self.script.index(token) + 1]
        self.ids.append(token)
        return token


def acting(tokenizer: Tokenizer, text: str) -> tuple[Dialogue, ScriptedModel]:
    """A dialogue whose model wants to write ``text``, then say one unit."""
    words = tokenizer.encode(f"[Text]{text}", bos=False)[2:]
    sound = [tokenizer.speech_tag, tokenizer.unit_id("Hu", 7), tokenizer.eos]
    model = Stubborn([*words, *sound])
    pieces = enumerate(tokenizer.pieces(range(tokenizer.size)))
    model.closing = frozenset(i for i, p in pieces if "}" in p or p == "<0x7D>")
    grammar = JsonGrammar(tokenizer, STOP_OR_TURN)
    sampling = Sampling(greedy=True)
    talk = Dialogue(model, tokenizer, ReplyConfig(), sampling, sampling, actions=grammar)  # type: ignore[arg-type]
    talk.begin()
    talk.hear(0, frames(1))
    return talk, model


def test_a_reply_may_begin_with_an_action(tokenizer: Tokenizer) -> None:
    talk, model = acting(tokenizer, 'left | {"action":"turn","degrees":40} Turning.')
    pieces = said(talk)
    assert [p.value for p in pieces if isinstance(p, Action)] == [{"action": "turn", "degrees": 40}]
    assert [type(p) for p in pieces[:2]] == [HeardText, Action]
    assert "".join(p.text for p in pieces if isinstance(p, SaidText)) == "Turning."
    assert '{"action":"turn","degrees":40} Turning.' in tokenizer.decode(model.ids)


@pytest.mark.parametrize("wish", ['{"action":"fly"}', "{ action = stop }", '{"degrees":9}', "{"])
def test_whatever_the_model_wants_an_action_follows_its_schema(
    tokenizer: Tokenizer, wish: str
) -> None:
    talk, _ = acting(tokenizer, f"go | {wish} Off.")
    (action,) = (p.value for p in said(talk) if isinstance(p, Action))
    jsonschema.validate(action, STOP_OR_TURN)


def test_a_brace_later_in_the_reply_is_text(tokenizer: Tokenizer) -> None:
    talk, _ = acting(tokenizer, 'x | A brace: {"action":"stop"}')
    pieces = said(talk)
    assert not [p for p in pieces if isinstance(p, Action)]
    assert "".join(p.text for p in pieces if isinstance(p, SaidText)).endswith('{"action":"stop"}')


def test_what_was_done_is_remembered_even_if_not_a_word_was_heard(tokenizer: Tokenizer) -> None:
    talk, model = acting(tokenizer, 'halt | {"action":"stop"} I stand still.')
    said(talk)
    talk.end(units=0, characters=0)
    remembered = tokenizer.decode(model.ids)
    assert '{"action":"stop"}' in remembered
    assert "stand" not in remembered


def test_an_action_for_which_there_is_no_room_is_left_out(tokenizer: Tokenizer) -> None:
    talk, model = acting(tokenizer, 'halt | {"action":"stop"} I stand still.')
    model.capacity = model.length + len(tokenizer.encode("[Text]halt |")) + 5
    assert not [p for p in said(talk) if isinstance(p, Action)]
    assert model.length <= model.capacity


def test_a_schema_that_is_none_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="schema"):
        JsonGrammar(tokenizer, {"type": "rubbish"})


def test_a_typed_request_stands_where_its_transcript_would(tokenizer: Tokenizer) -> None:
    words = tokenizer.encode("[Text]hello | Hi you.", bos=False)[2:]
    asked = tokenizer.encode("[Text]hello |", bos=False)[2:]
    unit = tokenizer.unit_id("Hu", 7)
    script = [*words[len(asked) :], tokenizer.speech_tag, unit, tokenizer.eos]
    talk, model = dialogue(tokenizer, script)
    talk.read("hello")
    pieces = said(talk)
    assert "".join(p.text for p in pieces if isinstance(p, SaidText)) == "Hi you."
    assert not [p for p in pieces if isinstance(p, HeardText)]
    talk.end()
    begin = opening(tokenizer)[:-1]
    assert model.ids == [*begin, tokenizer.text_tag, *words, *script[-3:]]


def test_given_words_are_remembered_as_far_as_they_were_heard(tokenizer: Tokenizer) -> None:
    units = [tokenizer.unit_id("Hu", i) for i in (7, 8, 9)]
    talk, model = dialogue(tokenizer, [*units, tokenizer.eos])
    talk.say("one two three")
    assert [p for p in said(talk) if isinstance(p, SaidText)] == [SaidText("one two three")]
    talk.end(units=1, characters=len("one two"))
    kept = tokenizer.encode("[Text]one two", bos=False)[1:]
    begin = opening(tokenizer)[:-1]
    assert model.ids == [*begin, *kept, tokenizer.speech_tag, units[0], tokenizer.eos]
