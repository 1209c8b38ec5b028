"""The turns that precede a conversation: text as it stands, recordings as units."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import examples
from agent.config import ExampleConfig, ReplyConfig
from agent.errors import UserError
from stages.checkpoint import Layout, find_layout
from stages.encoder import SpeechTokenizer

TAGS = ReplyConfig(user_tag="\nUser: ", agent_tag="\nAgent: ")


@pytest.fixture(scope="module")
def layout(kit: Path) -> Layout:
    return find_layout(kit / "checkpoints", version="expressive")


@pytest.fixture(scope="module")
def tokenizer(layout: Layout) -> SpeechTokenizer:
    return SpeechTokenizer.load(layout)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPIRITLM_CACHE_DIR", str(tmp_path))
    return tmp_path / "examples"


def test_text_turns_are_one_stretch_of_text(layout: Layout, tokenizer: SpeechTokenizer) -> None:
    turns = [ExampleConfig(user="Hi.", agent="Hello."), ExampleConfig(user="Bye.", agent="Bye!")]
    prompt = examples.prompt(turns, TAGS, tokenizer, layout)
    assert prompt == "[Text]\nUser: Hi.\nAgent: Hello.\nUser: Bye.\nAgent: Bye!"


def test_a_recording_is_tokenised_once_and_stands_where_it_is_said(
    kit: Path, layout: Layout, tokenizer: SpeechTokenizer, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    turns = [ExampleConfig(user="mls.wav", agent="Indeed.")]
    prompt = examples.prompt(turns, TAGS, tokenizer, layout, kit / "audio")
    assert prompt.startswith("[Text]\nUser: [Speech][St")
    assert prompt.endswith("][Text]\nAgent: Indeed.")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(SpeechTokenizer, "encode", lambda *a, **k: pytest.fail("encoded again"))
    assert examples.prompt(turns, TAGS, tokenizer, layout, kit / "audio") == prompt


def test_a_recording_that_is_not_there_is_named(layout: Layout, tokenizer: SpeechTokenizer) -> None:
    turns = [ExampleConfig(user="nowhere.wav", agent="?")]
    with pytest.raises(UserError, match=r"nowhere\.wav"):
        examples.prompt(turns, TAGS, tokenizer, layout)
