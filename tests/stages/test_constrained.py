"""JSON that cannot leave its schema, with the vocabulary and the schema that come with nano."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from agent.config import config_folder, load_config
from stages.constrained import JsonGrammar
from stages.text import Tokenizer

SCHEMA = json.loads((config_folder() / "nano-actions.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(load_config("nano").model.layout())


@pytest.fixture(scope="module")
def grammar(tokenizer: Tokenizer) -> JsonGrammar:
    return JsonGrammar(tokenizer, SCHEMA)


def test_the_mask_has_as_many_rows_as_the_model_and_its_padding_is_never_allowed(
    tokenizer: Tokenizer, grammar: JsonGrammar
) -> None:
    assert tokenizer.vocab_size > tokenizer.size
    mask = grammar.begin().mask()
    assert mask.shape == (tokenizer.vocab_size,) and mask.any()
    assert not mask[tokenizer.size :].any()


@pytest.mark.parametrize("seed", range(10))
def test_whoever_draws_what_is_allowed_ends_in_an_action_of_the_schema(
    tokenizer: Tokenizer, grammar: JsonGrammar, seed: int
) -> None:
    draw, action = torch.Generator().manual_seed(seed), grammar.begin()
    pieces = tokenizer.pieces(range(tokenizer.size))
    for step in range(400):
        action.forced()
        if action.complete:
            break
        allowed = action.mask().nonzero()[:, 0]
        ends = [i for i in allowed.tolist() if '"' in pieces[i] or "}" in pieces[i]]
        # A name may be long: nobody who draws blindly finds its end.
        of = torch.tensor(ends) if ends and step > 20 else allowed
        action.push(int(of[torch.randint(len(of), (1,), generator=draw)]))
    jsonschema.validate(action.value, SCHEMA)
