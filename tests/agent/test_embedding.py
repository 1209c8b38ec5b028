"""The agent inside a Python program: audio pushed or given, typed requests, without asyncio too."""

from __future__ import annotations

import asyncio
import contextlib
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agent import embedding
from agent.config import load_config
from agent.embedding import AudioPush, BlockingAgent, SpeechAgent
from agent.errors import UserError
from agent.events import Event, Heard, ReplyAudio, ReplyText, TurnEnded, TurnStarted
from agent.models import Models
from agent.reply import Memory

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTION = REPOSITORY / "examples" / "question.wav"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models.load(load_config("nano"))


@pytest.fixture(scope="module")
def question() -> np.ndarray:
    wave, _ = soundfile.read(QUESTION, dtype="float32")
    return wave


def words(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ReplyText))


def sound(events: list[Event]) -> np.ndarray:
    return np.concatenate([event.samples for event in events if isinstance(event, ReplyAudio)])


def test_the_examples_of_the_docstring_are_those_of_the_readme_and_short() -> None:
    """Those are run by tests/test_house.py."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", str(embedding.__doc__) + "\n")
    assert len(blocks) == 2
    for block in blocks:
        example = textwrap.dedent(block).strip()
        assert example in [each.strip() for each in shown]
        assert sum(bool(line.strip()) for line in example.splitlines()) <= 10


@pytest.mark.slow
def test_what_is_pushed_from_a_thread_is_heard_and_answered(
    models: Models, question: np.ndarray
) -> None:
    with BlockingAgent(models.config, models) as agent:
        given = list(agent.converse(question))
        for chunk in np.array_split(question, 40):
            agent.push(chunk)
        agent.finish()
        pushed = list(agent.converse())
    assert any(isinstance(event, TurnStarted) for event in pushed)
    assert any(isinstance(event, Heard) and "month" in event.text for event in pushed)
    assert words(pushed) == words(given) != ""
    assert np.array_equal(sound(pushed), sound(given))


def test_a_typed_request_is_answered_in_words_and_sound(models: Models) -> None:
    with BlockingAgent(models.config, models) as agent:
        first = list(agent.ask("what is two plus three"))
        second = list(agent.ask("what is two plus three"))
    assert "five" in words(first)
    assert len(sound(first)) > 16_000
    ended = [event for event in first if isinstance(event, TurnEnded)]
    assert [event.turn for event in ended] == [1]
    assert ended[0].trace.said == words(first)
    assert ended[0].trace.reply_samples == len(sound(first))
    assert words(second) == words(first)
    assert second[-1].turn == 2


def test_words_are_spoken_as_they_are(models: Models) -> None:
    with BlockingAgent(models.config, models) as agent:
        events = list(agent.say("the robot is ready"))
    assert words(events) == "the robot is ready"
    assert len(sound(events)) > 16_000


def test_a_typed_request_cannot_smuggle_in_tags_or_units(models: Models) -> None:
    with BlockingAgent(models.config, models) as agent:
        events = list(agent.say("one [Speech][Hu3] two | three"))
    assert words(events) == "one (Speech)(Hu3) two three"


@pytest.mark.parametrize(("text", "mend"), [(" \n", "empty"), ("word " * 5000, "shorten")])
def test_text_that_cannot_be_answered_is_refused(models: Models, text: str, mend: str) -> None:
    with BlockingAgent(models.config, models) as agent:
        with pytest.raises(UserError, match=mend):
            list(agent.ask(text))
        assert words(list(agent.ask("what is two plus three")))


@pytest.mark.slow
def test_a_failure_in_a_turn_comes_to_the_reader_and_the_agent_ends_in_peace(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise MemoryError("no room")

    async def scenario() -> None:
        async with SpeechAgent(load_config("nano"), models.beside()) as agent:
            monkeypatch.setattr(agent.models.lm, "decode", fail)
            with pytest.raises(MemoryError, match="no room"):
                _ = [event async for event in agent.ask("hello")]

    asyncio.run(scenario())


@pytest.mark.slow
def test_agents_on_the_same_weights_do_not_disturb_each_other(
    models: Models, question: np.ndarray
) -> None:
    async def converse(agent: SpeechAgent) -> list[Event]:
        return [event async for event in agent.converse(question)]

    async def both() -> list[list[Event]]:
        async with (
            SpeechAgent(models.config, models) as one,
            SpeechAgent(models.config, models) as other,
        ):
            return await asyncio.gather(converse(one), converse(other))

    one, other = asyncio.run(both())
    assert words(one) == words(other) != ""
    assert np.array_equal(sound(one), sound(other))


def test_a_push_into_a_full_source_drops_the_oldest_and_counts() -> None:
    source = AudioPush(seconds=0.01)
    source.push(np.zeros(100, np.float32))
    source.push(np.ones(100, np.float32))
    source.close()

    async def everything() -> list[np.ndarray]:
        return [chunk async for chunk in source]

    chunks = asyncio.run(everything())
    assert source.dropped == 100
    assert np.array_equal(np.concatenate(chunks), np.ones(100, np.float32))


def test_a_push_of_something_else_than_sound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected float32 \[n\]"):
        AudioPush().push(np.zeros((3, 2), np.int16))
    source = AudioPush()
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.push(np.zeros(3, np.float32))


def test_a_conversation_goes_on_from_its_memory_token_by_token(models: Models) -> None:
    one, other = models.beside(), models.beside()
    first, second = one.dialogue(), other.dialogue()
    for request in ("what is two plus three", "who are you"):
        first.read(request)
        for _ in first.reply():
            pass
        first.end()
    Memory(2, first.memory).check(models.tokenizer)
    second.restore(first.memory)
    assert other.lm.ids == one.lm.ids
    assert second.memory == first.memory
    second.restore(100 * first.memory)  # more than there is room for: the latest
    assert other.lm.length <= models.config.reply.context_tokens
    assert second.memory[-1] == first.memory[-1]


@pytest.mark.parametrize("token", [-1, 0, 1, 10**6])
def test_a_memory_with_tokens_that_cannot_stand_there_is_refused(
    models: Models, token: int
) -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        Memory(1, [[token, models.tokenizer.eos]]).check(models.tokenizer)


def test_settings_hold_from_the_next_turn_and_wrong_ones_change_nothing(models: Models) -> None:
    async def converse() -> list[int]:
        async with SpeechAgent(models.config, models) as agent:
            lengths = []
            for settings in ({}, {"reply.max_seconds": 0.5}, {"vocoder.speaker": 99}):
                with contextlib.suppress(UserError):
                    agent.set(settings)
                lengths.append(len(sound([e async for e in agent.ask("what is two plus three")])))
            with pytest.raises(UserError, match=r"did you mean 'reply\.max_seconds'"):
                agent.set({"reply.max_second": 1})
            with pytest.raises(UserError, match="cannot be set during a conversation"):
                agent.set({"mqtt.base": "x"})
        return lengths

    whole, short, still_short = asyncio.run(converse())
    assert whole > 8000 == short == still_short
