"""The recipes of the language model, on a corpus of a few sentences."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
import typer
from small_corpus import (
    ACTIONS,
    AFTER,
    GO_LEFT,
    HELDOUT,
    REQUESTS,
    write_corpus,
)
from transformers import LlamaConfig, LlamaForCausalLM

from recipes import (
    dialogues,
    domain,
    lm,
    lm_corpus,
    lm_data,
    lm_hints,
    lm_measure,
    lm_words,
    text_tokenizer,
)
from recipes.dialogues import Dialogues, Example, Turn
from recipes.lm_data import DEFAULT_MIX, KINDS, MASKED, REPLY_TEXT, REPLY_UNITS, TRANSCRIPT
from recipes.lm_model import BlockAttention, TrainableLlama
from recipes.lm_voices import PhoneBank
from stages.checkpoint import Layout
from stages.lm import LanguageModel, Sampling
from stages.text import Tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_corpus(tmp_path_factory.mktemp("work"))
    text_tokenizer.main(path, path / "model", text_pieces=70)
    return path


@pytest.fixture(scope="module")
def vocabulary(work: Path) -> lm_corpus.Vocabulary:
    return lm_corpus.Vocabulary(work / "model" / "tokenizer.model")


@pytest.fixture(scope="module")
def corpora(work: Path, vocabulary: lm_corpus.Vocabulary) -> dict[str, lm_corpus.Corpus]:
    return lm_corpus.load_corpus(work, vocabulary, lm_corpus.load_units(work))


EVENLY = dict.fromkeys(DEFAULT_MIX, 1.0)


@pytest.fixture
def streams(
    corpora: dict[str, lm_corpus.Corpus], vocabulary: lm_corpus.Vocabulary
) -> lm_data.Streams:
    return lm_data.Streams(corpora["train"], vocabulary, EVENLY, noise=0.0, revoiced=0.0)


# ------------------------------------------------------------------------------------- tokenizer


def test_the_tokenizer_has_the_official_form(work: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(str(work / "model" / "tokenizer.model"))
    assert [processor.IdToPiece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    speech = text_tokenizer.speech_tokens()
    first = len(processor) - len(speech)
    assert [processor.IdToPiece(first + i) for i in range(len(speech))] == speech
    assert speech[:3] == ["[Text]", "[Speech]", "[Hu0]"] and speech[-1] == "[St99]"
    assert {p.name for p in (work / "model").iterdir()} == {
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }


@pytest.mark.parametrize(
    "text",
    ["[Text]what time is it | It is noon.[Speech][St0][Pi3][Hu7][Hu9]", "a  b\n", "naïve 你"],
)
def test_nothing_is_lost_in_the_tokenizer(work: Path, text: str) -> None:
    tokenizer = Tokenizer.load(work / "model")
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and tokenizer.decode(ids) == text


def test_the_separator_is_one_piece(vocabulary: lm_corpus.Vocabulary) -> None:
    heard = vocabulary.text("what time is it")
    both = vocabulary.text("what time is it | It is noon.")
    assert both[: len(heard)].tolist() == heard.tolist()
    assert vocabulary.processor.IdToPiece(int(both[len(heard)])) == "▁|"


# --------------------------------------------------------------------------------------- streams


def test_a_step_always_gives_the_same_batch(streams: lm_data.Streams) -> None:
    ids, kinds, hints = streams.batch(7, rows=3, length=200)
    assert ids.shape == kinds.shape == (3, 201) and hints.shape == (3, 201, 4)
    again, _, _ = streams.batch(7, rows=3, length=200)
    other, _, _ = streams.batch(8, rows=3, length=200)
    assert np.array_equal(ids, again) and not np.array_equal(ids, other)


def test_every_sequence_is_what_the_tokenizer_makes_of_its_string(
    streams: lm_data.Streams, work: Path
) -> None:
    """So the agent, which encodes strings, meets nothing that was not trained."""
    tokenizer = Tokenizer.load(work / "model")
    for row in streams.batch(3, rows=8, length=300)[0]:
        ids = row.tolist()
        end = ids.index(2) if 2 in ids else len(ids)
        turn = ids[:end]
        assert tokenizer.encode(tokenizer.decode(turn)) == turn


def turn(streams: lm_data.Streams, kind: str, seed: int) -> list[tuple[str, int]]:
    parts = getattr(streams, f"_{kind}")(np.random.default_rng(seed))
    decode = streams.vocabulary.processor.DecodeIds
    return [(decode(part.ids.tolist()), part.kind) for part in parts]


def text_of(parts: list[tuple[str, int]], kind: int) -> str:
    return "".join(text for text, k in parts if k == kind)


@pytest.mark.parametrize("seed", range(10))
def test_a_dialog_has_a_right_reply_in_the_reply_voice_and_style(
    streams: lm_data.Streams, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    request = streams.corpus.requests[rng.integers(len(streams.corpus.requests))]
    parts = turn(streams, "dialog", seed)
    written = "".join(text for text, _ in parts)
    assert written.startswith("[Speech][St0]") and written.count("[Text]") == 1
    plan = text_of(parts, REPLY_TEXT).removesuffix("[Speech]").strip()
    action, answer = dialogues.read_plan(plan)
    assert answer in REQUESTS[request.text] and action == ACTIONS.get(request.text)
    assert text_of(parts, TRANSCRIPT) == f"{request.transcript} |"
    spoken = text_of(parts, REPLY_UNITS)
    wanted = {
        streams.vocabulary.processor.DecodeIds(r.ids.tolist())
        for r in streams.corpus.replies[answer]
        if r.voice == "heart" and r.style == 1
    }
    assert spoken in wanted


@pytest.mark.parametrize("seed", range(8))
def test_an_interrupted_reply_is_a_beginning_of_words_and_sounds(
    streams: lm_data.Streams, seed: int
) -> None:
    parts = turn(streams, "interrupted", seed)
    assert text_of(parts, TRANSCRIPT).endswith("|")
    _, words = dialogues.read_plan(text_of(parts, REPLY_TEXT).strip())
    sounds = text_of(parts, REPLY_UNITS)
    decode = streams.vocabulary.processor.DecodeIds
    assert any(
        reply.startswith(words) and decode(recording.ids.tolist()).startswith(sounds)
        for reply, recordings in streams.corpus.replies.items()
        for recording in recordings
    )
    assert parts[-1] == ("</s>", MASKED) or parts[-1][1] == MASKED


@pytest.fixture(scope="module")
def tokenizer(work: Path) -> Tokenizer:
    return Tokenizer.load(work / "model")


def string(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def followup(
    streams: lm_data.Streams, tokenizer: Tokenizer, live: bool, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A follow-up to a request that does something, as its string."""
    turn_left = Turn("Please go left.", "I go to the left.", 0, GO_LEFT)
    example = Example("and", AFTER, (), ("Hello!",), 0, "train", before=(turn_left,))
    streams._later = lm_data._ByIntent([example])
    monkeypatch.setattr(lm_data, "LIVE", float(live))
    monkeypatch.setattr(lm_data, "SPOKEN_TURNS", 0.0)
    parts = streams._followup(np.random.default_rng(0))
    return string(tokenizer, np.concatenate([part.ids for part in parts]).tolist())


def test_a_typed_follow_up_stands_after_the_turn_it_needs(
    streams: lm_data.Streams, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert followup(streams, tokenizer, False, monkeypatch) == (
        '[Text]please go left | {"action":"turn","direction":"left"} I go to the left.</s>'
        "[Text]and nano | Hello!</s>"
    )


def test_a_live_follow_up_has_the_form_of_a_conversation(
    streams: lm_data.Streams, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last, *_ = followup(streams, tokenizer, True, monkeypatch).split("</s>")
    plan = r'\[Text\]please go left \| \{"action":"turn","direction":"left"\} I go to the left\.'
    units = r"(\[(St|Pi|Hu)\d+\])+"
    assert re.fullmatch(rf"\[Speech\]{units}{plan}\[Speech\]{units}", first)
    assert re.match(rf"\[Speech\]{units}\[Text\]and nano \| Hello!", last)


def test_a_follow_up_is_never_cut_off(
    corpora: dict[str, lm_corpus.Corpus], vocabulary: lm_corpus.Vocabulary
) -> None:
    turns = (Turn("Hello, nano.", "Hello!"), Turn("What time is it?", "It is noon."))
    examples = [
        Example("and", AFTER, (), ("Hi there!",), 0, "train", before=turns),
        Example("x", "Hello, nano.", (), ("Hello!",), 0, "train"),
    ]
    mix = {"followup": 0.7, "chat": 0.3}
    streams = lm_data.Streams(corpora["train"], vocabulary, mix, 0.0, examples=examples)
    whole = 0
    for seed in range(20):
        ids, *_ = streams.sequence(np.random.default_rng(seed), 400)
        text = vocabulary.processor.DecodeIds(ids.tolist())
        begun, ended = text.count("what time is it"), text.count("Hi there!")
        assert begun == ended
        whole += ended
    assert whole > 10


def test_a_follow_up_is_no_request_by_itself(corpora: dict[str, lm_corpus.Corpus]) -> None:
    train = corpora["train"]
    assert [r.text for r in train.later] == [AFTER] and AFTER not in train.answers
    assert AFTER not in {r.text for r in train.requests}
    assert AFTER in {r.text for r in train.recordings}, "but what it says can be heard"


def test_intents_with_many_examples_do_not_drown_the_others() -> None:
    def example(intent: str, number: int) -> Example:
        return Example(intent, f"{intent} {number}", (), ("Yes.",), 0, "train")

    many = [example("many", i) for i in range(400)]
    drawn = lm_data._ByIntent([*many, *(example("few", i) for i in range(4))])
    rng = np.random.default_rng(0)
    few = sum(drawn.pick(rng).intent == "few" for _ in range(2000))
    assert 130 < few < 240  # one in eleven, where they are one in a hundred


def test_no_end_is_learnt_after_a_reply_that_is_not_spoken(streams: lm_data.Streams) -> None:
    end = streams._dialog_text(np.random.default_rng(0))[-1]
    assert end.ids.tolist() == [2] and end.kind == MASKED


@pytest.mark.parametrize("seed", range(10))
def test_interleaving_keeps_every_word_once(streams: lm_data.Streams, seed: int) -> None:
    parts = turn(streams, "interleaved", seed)
    rng = np.random.default_rng(seed)
    recording = streams._with_words[rng.integers(len(streams._with_words))]
    spans = [(tag, text) for (tag, _), (text, _) in zip(parts[::2], parts[1::2], strict=False)]
    assert all(tag in ("[Text]", "[Speech]") for tag, _ in spans)
    assert all(a != b for (a, _), (b, _) in pairwise(spans))
    written = " ".join(text for tag, text in spans if tag == "[Text]").split()
    words = [w.lower() for w, _, _ in recording.words or []]
    assert written == [w for w in words if w in written]


@pytest.mark.parametrize("seed", range(5))
def test_a_collage_is_speech_of_one_voice_with_its_words(
    streams: lm_data.Streams, seed: int
) -> None:
    parts = streams._collage(np.random.default_rng(seed))
    decode = streams.vocabulary.processor.DecodeIds
    words = decode(parts[3].ids.tolist()).split()
    spoken = decode(parts[1].ids.tolist())
    one_voice = [
        {w.lower() for r in recordings for w, _, _ in r.words or []}
        for recordings in streams._by_voice.values()
    ]
    assert any(set(words) <= known for known in one_voice)
    assert spoken.startswith("[St") and spoken.count("[Hu") >= len(words)
    assert decode(parts[4].ids.tolist()).strip() == "|"


GRAMMAR = """
@thing:
ball:
cup:

== find polite=command train=1 held=1
> find the {thing}
> look for the {thing}
> where is the {thing}?
> get me the {thing}
> find me the {thing}
< Here is the {thing}.
"""


def test_more_requests_are_of_training_phrasings_only(tmp_path: Path) -> None:
    grammar = tmp_path / "grammar.txt"
    grammar.write_text(GRAMMAR)
    drawn = domain.build(0, grammar).requests
    further = tmp_path / "more.txt"
    further.write_text(
        "== find\n> where did I put the {thing}? ; get me the {thing}\n> the {thing}"
    )
    more = lm_words.more_requests(0, grammar, further)
    heldout = {r.transcript for r in drawn if r.split == "heldout"}
    assert {r.transcript for r in drawn if r.split == "train"} <= more.keys()
    assert heldout and not heldout & more.keys() and len(more) > len(drawn)
    assert more["find the ball"].replies == ("Here is the ball.",)
    assert {"the cup", "where did i put the ball"} <= more.keys()


@pytest.mark.parametrize("seed", range(5))
def test_composed_speech_has_a_run_for_every_word(streams: lm_data.Streams, seed: int) -> None:
    bank = streams._words
    assert bank.knows("what fox please") and not bank.knows("what elephant")
    spans = bank.speak(np.random.default_rng(seed), "what time fox please", lambda r: r)
    ids = streams._joined(spans).ids
    units = streams.vocabulary.processor.DecodeIds(ids.tolist())
    assert units.startswith("[St") and units.count("[Hu") >= 4


def test_a_whole_recorded_sentence_is_taken_as_it_is(streams: lm_data.Streams) -> None:
    request = next(r for r in streams.corpus.requests if r.text == "Please go left.")
    spans = streams._words.speak(np.random.default_rng(0), request.transcript, lambda r: r)
    same = {tuple(r.ids) for r in streams.corpus.requests if r.text == request.text}
    assert tuple(streams._joined(spans).ids) in same


def test_exchanged_phones_are_units_of_the_same_phones(
    corpora: dict[str, lm_corpus.Corpus], vocabulary: lm_corpus.Vocabulary
) -> None:
    recordings = corpora["train"].recordings
    bank = PhoneBank(recordings, vocabulary)
    said: dict[str, set[int]] = {}
    for recording in recordings:
        for phone, start, stop in recording.phones:
            said.setdefault(phone, set()).update(recording.frames[start:stop].tolist())
    recording, changed = corpora["train"].requests[0], 0
    for seed in range(10):
        other = bank.revoice(np.random.default_rng(seed), recording)
        changed += other.frames.tolist() != recording.frames.tolist()
        assert len(other.frames) == len(recording.frames) and other.words == recording.words
        for phone, start, stop in recording.phones:
            assert set(other.frames[start:stop].tolist()) <= said[phone]
    assert changed > 5


def test_noise_changes_phonetic_units_and_the_style_as_a_whole(
    corpora: dict[str, lm_corpus.Corpus], vocabulary: lm_corpus.Vocabulary
) -> None:
    streams = lm_data.Streams(corpora["train"], vocabulary, noise=0.9)
    speech = streams._joined([(corpora["train"].requests[0], 0, 999)])
    ids = speech.ids

    def pitch(x: np.ndarray) -> list[int]:
        both = np.concatenate((vocabulary.phonetic, vocabulary.style))
        return x[~np.isin(x, both)].tolist()

    changed = 0
    for seed in range(20):
        noisy, hints = streams._disturb(np.random.default_rng(seed), speech)
        assert len(noisy) == len(hints) <= len(ids)
        assert pitch(noisy) == pitch(ids)
        changed += noisy.tolist() != ids.tolist()
        assert len(set(noisy[np.isin(noisy, vocabulary.style)].tolist())) == 1
    assert changed > 15


def test_hints_tell_every_word_at_its_end_and_every_phone(
    streams: lm_data.Streams, vocabulary: lm_corpus.Vocabulary
) -> None:
    for recording in streams._with_words:
        hints = streams._hinter(recording)
        first = hints[:, lm_hints.FIRST]
        told = [vocabulary.processor.IdToPiece(int(i)) for i in first[first > lm_hints.NOTHING]]
        words = [domain.transcript(w) for w, _, _ in recording.words or []]
        assert len(told) == len(words)
        assert all(f"▁{word}".startswith(piece) for word, piece in zip(words, told, strict=True))
        phonetic = np.isin(recording.ids, vocabulary.phonetic)
        assert np.array_equal(hints[:, lm_hints.PHONE] > lm_hints.UNKNOWN, phonetic)
        assert np.array_equal(first > lm_hints.UNKNOWN, phonetic)


def test_hints_are_asked_for_later_and_the_last_word_at_the_end(streams: lm_data.Streams) -> None:
    hints = streams._hinter(streams._with_words[0])
    asked, later = lm_hints.delayed(hints), lm_hints.LATER[lm_hints.FIRST]
    for column in (lm_hints.FIRST, lm_hints.SECOND):
        ends = np.flatnonzero(hints[:, column] > lm_hints.NOTHING)
        moved = np.flatnonzero(asked[:, column] > lm_hints.NOTHING)
        assert moved.tolist() == np.minimum(ends + later, len(hints) - 1).tolist()
    assert np.array_equal(asked[:-1, lm_hints.NOW], hints[1:, lm_hints.NOW])


def test_a_word_cut_out_of_a_recording_keeps_its_end(streams: lm_data.Streams) -> None:
    for seed in range(10):
        parts = streams._collage(np.random.default_rng(seed))
        words = streams.vocabulary.processor.DecodeIds(parts[3].ids.tolist()).split()
        hints = parts[1].hints
        assert hints is not None and (hints[:, lm_hints.FIRST] > 0).sum() == len(words)


def test_heldout_requests_are_never_trained(
    corpora: dict[str, lm_corpus.Corpus], streams: lm_data.Streams
) -> None:
    assert [r.text for r in corpora["heldout"].requests] == [HELDOUT]
    assert HELDOUT not in {r.text for r in streams._any}
    assert HELDOUT not in streams.corpus.answers


# ----------------------------------------------------------------------------------- measuring


class Parrot:
    """A language model that writes what it was told to, whatever it hears."""

    def __init__(self, vocabulary: lm_corpus.Vocabulary, *says: str) -> None:
        self.says = [[*vocabulary.text(text).tolist(), vocabulary.speech_tag] for text in says]
        self.prompt: list[int] = []

    def reset(self) -> None:
        self.prompt, self.rest = [], self.says.pop(0)

    def append(self, ids: list[int]) -> None:
        self.prompt += ids

    def decode(self, sampling: Sampling) -> int:
        return self.rest.pop(0)


WORLD = Dialogues(
    [
        Example("left", HELDOUT, (), ("I go to the left.",), 0, "heldout", False, action=GO_LEFT),
        Example("and", AFTER, (), ("Hello!",), 0, "heldout", before=(Turn("Hi.", "Hi there!"),)),
        Example("time", "What time is it?", (), ("It is noon.",), 0, "train"),
    ],
    {},
)


def test_what_is_measured_is_held_out_spoken_and_typed(
    corpora: dict[str, lm_corpus.Corpus],
) -> None:
    chosen = lm_measure.heldout_questions(corpora["heldout"], WORLD)
    texts = {k: [(q.example.text, q.recording is not None) for q in qs] for k, qs in chosen.items()}
    assert texts == {
        "first": [(HELDOUT, True)],
        "added": [],
        "typed_first": [(HELDOUT, False)],
        "typed_added": [(AFTER, False)],
    }


def measured(
    monkeypatch: pytest.MonkeyPatch,
    vocabulary: lm_corpus.Vocabulary,
    question: lm_measure.Question,
    says: str,
) -> tuple[dict[str, Any], list[int]]:
    parrot = Parrot(vocabulary, says)
    monkeypatch.setattr(LanguageModel, "load", lambda folder: parrot)
    scores = lm_measure.measure(Path(), vocabulary, {"some": [question]}, WORLD)["some"]
    return scores, parrot.prompt


ACT = '{"action":"turn","direction":"left"}'


@pytest.mark.parametrize(
    ("says", "right", "action"),
    [
        (f"{ACT} I go to the left.", 1.0, 1.0),
        ("I go to the left.", 0.0, 0.0),
        (f"{ACT} It is noon.", 0.0, 1.0),
        ('{"action":"turn","direction":"right"} I go to the left.', 0.0, 0.0),
        ('{"action":"turn", I go to the left.', 0.0, 0.0),
    ],
)
def test_an_answer_is_right_in_words_and_action(
    monkeypatch: pytest.MonkeyPatch,
    vocabulary: lm_corpus.Vocabulary,
    corpora: dict[str, lm_corpus.Corpus],
    tokenizer: Tokenizer,
    says: str,
    right: float,
    action: float,
) -> None:
    spoken = lm_measure.heldout_questions(corpora["heldout"], WORLD)["first"][0]
    heard = "could you turn left"
    scores, prompt = measured(monkeypatch, vocabulary, spoken, f"{heard} | {says}")
    assert scores == {"n": 1, "right": right, "action": action, "wer": 0.0}
    assert re.fullmatch(r"<s> \[Speech\](\[\w+\])+\[Text\]", string(tokenizer, prompt))


def test_a_follow_up_is_asked_after_the_turns_before_it(
    monkeypatch: pytest.MonkeyPatch, vocabulary: lm_corpus.Vocabulary, tokenizer: Tokenizer
) -> None:
    question = lm_measure.Question(WORLD.examples[1])
    scores, prompt = measured(monkeypatch, vocabulary, question, " Hello!")
    assert string(tokenizer, prompt) == "<s> [Text]hi | Hi there!</s>[Text]and nano |"
    assert scores == {"n": 1, "right": 1.0}


def test_the_mix_is_checked() -> None:
    assert lm.parse_mix("dialog=0.5, asr=0") == {**DEFAULT_MIX, "dialog": 0.5, "asr": 0.0}
    with pytest.raises(typer.BadParameter, match="known are composed"):
        lm.parse_mix("gossip=1")
    with pytest.raises(typer.BadParameter, match="expected name=number"):
        lm.parse_mix("asr=much")


def test_missing_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the recipes that come before"):
        lm_corpus.load_units(tmp_path)


# ---------------------------------------------------------------------------------- the network


def test_block_attention_equals_torch() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 300, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = BlockAttention.apply(*inputs)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=1.0)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


SMALL = lm.Settings(
    hidden=32,
    layers=2,
    heads=2,
    intermediate=48,
    length=64,
    rows=2,
    long_every=2,
    noise=0.1,
    middle=1,
    late=2,
)


@pytest.fixture
def trainer(vocabulary: lm_corpus.Vocabulary, streams: lm_data.Streams) -> lm.Trainer:
    return lm.Trainer(SMALL, vocabulary, streams)


def test_what_was_trained_is_what_runs(trainer: lm.Trainer, work: Path, tmp_path: Path) -> None:
    for _ in range(2):
        trainer.train_step(0.1)
    lm.write_model(trainer.model, work / "model", tmp_path)
    model = LanguageModel.load(Layout(tmp_path, tmp_path, "expressive"))
    rounded = TrainableLlama(trainer.model.config)
    rounded.load_state_dict({k: v.float() for k, v in trainer.model.official_state().items()})
    ids = trainer.streams.batch(0, 1, 100)[0][0]
    with torch.no_grad():
        expected = rounded(torch.from_numpy(ids)[None])[0]
    model.append(ids.tolist())
    torch.testing.assert_close(model.logits, expected[-1], atol=1e-4, rtol=0)
    assert model.vocab_size % lm.ROW_MULTIPLE == 0
    assert Tokenizer.load(tmp_path).mask("any").sum() == len(trainer.streams.vocabulary)


def test_a_resumed_run_goes_on_as_if_never_stopped(
    trainer: lm.Trainer,
    vocabulary: lm_corpus.Vocabulary,
    streams: lm_data.Streams,
    tmp_path: Path,
) -> None:
    trainer.train_step(0.1)
    trainer.save(tmp_path / "state.pt")
    trainer.train_step(0.2)
    other = lm.Trainer(SMALL, vocabulary, streams)
    other.resume(tmp_path / "state.pt")
    other.train_step(0.2)
    assert other.step == trainer.step and other.tokens == trainer.tokens
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns(trainer: lm.Trainer) -> None:
    def loss(sums: torch.Tensor, counts: torch.Tensor) -> float:
        return float(sums.sum() / counts.sum())

    first = loss(*trainer.train_step(0.1))
    for _ in range(80):
        last = loss(*trainer.train_step(0.1))
    assert last < first - 1


def test_the_rate_warms_up_and_ends_at_zero(trainer: lm.Trainer) -> None:
    rates = [trainer.rate(s) for s in (0.0, 0.01, 0.02, 0.5, 1.0)]
    assert rates[0] < rates[1] < rates[2] > rates[3] > rates[4]
    assert max(rates) <= SMALL.rate and rates[4] == pytest.approx(0.0)


def test_losses_are_told_by_kind(trainer: lm.Trainer) -> None:
    sums, counts = trainer.train_step(0.1)
    assert sums.shape == counts.shape == (len(KINDS),)
    assert counts[MASKED] == 0, "what is masked has no part in the loss"
    told = counts[lm_data.TRANSCRIPT] + counts[lm_data.REPLY_TEXT] + counts[REPLY_UNITS]
    assert told > 0 and bool((sums[counts > 0] > 0).all())


# --------------------------------------------------------------------------- the shipped model


NANO = Path(__file__).parents[2] / "checkpoints" / "nano" / "spiritlm_model" / "spirit-lm-nano"


@pytest.fixture(scope="module")
def nano() -> LanguageModel:
    if not (NANO / "pytorch_model.bin").is_file():
        pytest.skip(f"{NANO} has no weights: run `python -m recipes lm`")
    return LanguageModel.load(NANO)


def test_the_shipped_model_is_a_llama_for_transformers(nano: LanguageModel) -> None:
    reference = LlamaForCausalLM(LlamaConfig(**json.loads((NANO / "config.json").read_text())))
    state = torch.load(NANO / "pytorch_model.bin", weights_only=True)
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    reference.tie_weights()
    ids = torch.randint(3, nano.vocab_size, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids[None]).logits[0, -1]
    nano.reset()
    nano.append(ids.tolist())
    torch.testing.assert_close(nano.logits, expected, atol=1e-3, rtol=0)


def test_the_shipped_model_is_small_and_has_no_wasted_rows(nano: LanguageModel) -> None:
    assert sum(p.stat().st_size for p in NANO.iterdir()) <= 13.5e6
    pieces = lm_corpus.Vocabulary(NANO / "tokenizer.model")
    assert len(pieces) <= nano.vocab_size < len(pieces) + lm.ROW_MULTIPLE


def test_the_shipped_model_answers_a_typed_request_and_speaks(nano: LanguageModel) -> None:
    tokenizer = Tokenizer.load(NANO)
    nano.reset()
    nano.append(tokenizer.encode("[Text]what is your name |"))
    greedy = Sampling(greedy=True)
    spoken = False
    while nano.decode(greedy) != tokenizer.eos:
        spoken = spoken or nano.ids[-1] == tokenizer.speech_tag
        assert nano.length < 400, "the reply does not end"
    reply = tokenizer.decode(nano.ids[2:])
    assert "Nano" in reply.split("[Speech]")[0] and spoken
    assert tokenizer.id_to_unit(nano.ids[-2]) is not None
