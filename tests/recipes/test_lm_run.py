"""A whole training of the language model: its end, its log, and what it gains over guessing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpus import HELDOUT, REQUESTS, write_corpus

from agent.errors import UserError
from recipes import lm, lm_corpus, text_tokenizer
from recipes.dialogues import Dialogues, Example

SMALL = replace(lm.sized(64, 2, 2, rate=5e-3), length=64, long_every=2)
WORLD = Dialogues(
    [
        *(Example(q, q, (), tuple(answers), 0, "train") for q, answers in REQUESTS.items()),
        Example("left", HELDOUT, (), ("I go to the left.",), 0, "heldout", added=False),
    ],
    {},
)


def train(
    work: Path, steps: int, weights: Path | None = None
) -> tuple[lm.Trainer, dict[str, lm_corpus.Corpus]]:
    vocabulary = lm_corpus.Vocabulary(work / "model" / "tokenizer.model")
    until = lm.Until(0, steps)
    return lm.train(SMALL, vocabulary, work, until, work / "model", WORLD, weights)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = write_corpus(tmp_path)
    text_tokenizer.main(path, path / "model", text_pieces=70)
    return path


def test_a_model_that_has_learnt_is_better_than_guessing(work: Path) -> None:
    before = lm.against_chance(*train(work, 1), WORLD)
    trainer, corpora = train(work, 150)
    after = lm.against_chance(trainer, corpora, WORLD)
    assert trainer.step == 150
    assert before["all"]["gain"] < 0.2 < 0.5 < after["all"]["gain"]
    assert after["all"]["chance"] == before["all"]["chance"]
    lines = (work / "lm" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["from_step"] for line in lines if "from_step" in line] == [0, 1]


def test_losses_are_those_of_the_tokens_that_come_next(work: Path) -> None:
    trainer, _ = train(work, 1)
    ids = trainer.streams.batch(0, 2, 30)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = trainer.model(torch.from_numpy(ids[:, :-1])).float()
    wanted = torch.from_numpy(ids[:, 1:, None])
    expected = -logits.log_softmax(-1).gather(-1, wanted)[..., 0]
    np.testing.assert_allclose(trainer.losses(ids), expected.numpy(), rtol=1e-4)


def test_another_run_may_begin_with_what_one_has_learnt(work: Path) -> None:
    trained, _ = train(work, 3)
    (work / "lm" / "state.pt").rename(work / "begin.pt")
    other, _ = train(work, 0, work / "begin.pt")
    assert other.step == 0 and other.seconds == 0
    for a, b in zip(trained.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_ends_after_its_steps_or_else_its_minutes(work: Path) -> None:
    trainer, _ = train(work, 1)
    trainer.step, trainer.seconds = 3, 90.0
    assert lm.Until(2).share(trainer) == 0.75
    assert lm.Until(2, steps=6).share(trainer) == 0.5
    assert lm.Until(0).share(trainer) == lm.Until(1, steps=0).share(trainer) == 1


def test_too_little_gain_is_an_error_that_says_so() -> None:
    lm.require(1.2, 1.0)
    with pytest.raises(UserError, match=r"0\.40 nats .* expected at least 1\.0"):
        lm.require(0.4, 1.0)


def test_sizes_keep_the_proportions_of_the_shipped_model() -> None:
    default = lm.Settings()
    assert lm.sized(default.hidden, default.layers, default.rows) == default
    with pytest.raises(UserError, match="multiple of 64"):
        lm.sized(100, 4, 2)
