"""Extending a published Llama with speech: the base stays what it is until something is learnt, and
what is shipped is what was trained. A small base with random weights stands for SmolLM2; what needs
the real one skips without its package.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_base import MISSING, small_base
from small_corpus import write_corpus
from transformers import LlamaConfig, LlamaForCausalLM

from recipes import smol, smol_talk
from recipes.dialogues import Dialogues, Example
from recipes.lm_corpus import Vocabulary, load_corpus, load_units
from recipes.lm_data import Streams
from recipes.smol_base import SMOLLM2, BaseModel
from recipes.smol_model import write_untrained
from recipes.text_tokenizer import speech_tokens
from stages.checkpoint import CheckpointError
from stages.constrained import JsonGrammar
from stages.llama_adapter import ADAPTER, SETTINGS, half_split
from stages.lm import LanguageModel, Sampling, rotate
from stages.models import find_model
from stages.text import Tokenizer

SMALL = {"length": 64, "rows": 2, "long_every": 2, "rank": 4, "rate": 2e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseModel]:
    folder = tmp_path_factory.mktemp("site")
    source = small_base(folder)
    sys.path.insert(0, str(folder))
    yield BaseModel(source)
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def untrained(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    write_untrained(base, 512, folder)
    return folder


@pytest.fixture(scope="module")
def streams(work: Path, untrained: Path) -> Streams:
    vocabulary = Vocabulary(untrained / "tokenizer.json")
    return Streams(load_corpus(work, vocabulary, load_units(work))["train"], vocabulary)


def trainer(base: BaseModel, streams: Streams, workers: int = 0) -> smol.Trainer:
    settings = smol.settings_for(base, **SMALL)
    return smol.Trainer(settings, streams.vocabulary, streams, base=base, workers=workers)


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = LanguageModel.load(folder)
    model.append(ids)
    return model.logits


# ------------------------------------------------------------------------------------ the base


def test_queries_and_keys_turn_with_position_as_in_their_file() -> None:
    """GGUF turns neighbours of a head by one angle, Llama as it is loaded here the two halves."""
    generator = torch.Generator().manual_seed(0)
    heads, dim, hidden = 3, 8, 16
    weight = torch.randn(heads * dim, hidden, generator=generator)
    x = torch.randn(hidden, generator=generator)
    angles = torch.rand(dim // 2, generator=generator)
    pairs = torch.view_as_complex((weight @ x).view(heads, dim // 2, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(dim // 2), angles))
    cos, sin = angles.cos(), angles.sin()
    turned = rotate(
        (half_split(weight, heads) @ x).view(1, heads, dim),
        torch.cat((cos, cos))[None, None],
        torch.cat((-sin, sin))[None, None],
    )
    torch.testing.assert_close(turned[0].view(heads, 2, dim // 2).transpose(1, 2), expected)


def test_speech_and_missing_bytes_follow_the_pieces_of_the_base(
    base: BaseModel, untrained: Path
) -> None:
    tokenizer = Tokenizer.load(untrained)
    assert tokenizer.size == base.pieces + len(MISSING) + len(speech_tokens())
    assert tokenizer.text_tag == base.pieces + len(MISSING)
    assert tokenizer.vocab_size % 64 == 0
    text = "caf\u00e9 \x04 \U00040000 日本 <|im_end|>"
    ids = tokenizer.encode(f"[Text]{text}[Speech][Hu3][Pi1]")
    assert tokenizer.decode(ids) == f"[Text]{text}[Speech][Hu3][Pi1]"
    assert tokenizer.eos not in ids


def test_until_something_is_learnt_text_is_what_it_was(
    base: BaseModel, streams: Streams, untrained: Path, tmp_path: Path
) -> None:
    trainer(base, streams).write(untrained, tmp_path / "new")
    ids = list(range(5, 30))
    before, after = logits(untrained, ids), logits(tmp_path / "new", ids)
    assert torch.equal(before[: base.pieces], after[: base.pieces])
    assert not torch.equal(before, after), "the new rows are no longer zero"


def test_an_action_is_written_as_it_will_be_decoded(untrained: Path) -> None:
    vocabulary, tokenizer = Vocabulary(untrained / "tokenizer.json"), Tokenizer.load(untrained)
    schema = {"type": "object", "properties": {"action": {"const": "turn"}},
              "required": ["action"], "additionalProperties": False}  # fmt: skip
    plan = 'go left | {"action":"turn"} I turn.'
    ids = vocabulary.text(plan).tolist()
    assert tokenizer.decode([tokenizer.text_tag, *ids]) == f"[Text]{plan}"
    decoded = JsonGrammar(tokenizer, schema).begin().forced()
    begin = len(vocabulary.text("go left | "))
    assert ids[:begin] == vocabulary.text("go left | ").tolist()
    assert ids[begin : begin + len(decoded)] == decoded


# ---------------------------------------------------------------------------------- the training


def test_it_learns_and_the_base_stays(base: BaseModel, streams: Streams) -> None:
    run = trainer(base, streams)
    frozen = {name: value.clone() for name, value in run.model.named_buffers()}

    def loss() -> float:
        sums, counts = run.train_step(0.1)
        return float(sums.sum() / counts.sum())

    losses = [loss() for _ in range(40)]
    assert np.mean(losses[-5:]) < losses[0] - 1
    assert all(torch.equal(frozen[name], value) for name, value in run.model.named_buffers())


def test_what_is_shipped_is_what_was_trained(
    base: BaseModel, streams: Streams, untrained: Path, tmp_path: Path
) -> None:
    run = trainer(base, streams)
    for _ in range(3):
        run.train_step(0.1)
    run.write(untrained, tmp_path)
    ids = streams.batch(0, 1, 100)[0][0]
    with torch.no_grad():
        expected = run.model(torch.from_numpy(ids)[None])[0, -1]
    # The adapter is rounded to float16, and so is its sum with the base.
    torch.testing.assert_close(logits(tmp_path, ids.tolist()), expected, atol=2e-2, rtol=0)
    again = trainer(base, streams)
    again.begin_with(tmp_path)
    again.write(untrained, tmp_path / "again")
    assert (tmp_path / ADAPTER).read_bytes() == (tmp_path / "again" / ADAPTER).read_bytes()


def test_what_is_shipped_is_what_another_library_merges(
    base: BaseModel, streams: Streams, untrained: Path, tmp_path: Path
) -> None:
    """Merged by hand, the model is a Llama for transformers too, shared keys included."""
    run = trainer(base, streams)
    run.train_step(0.1)
    run.write(untrained, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    reference = LlamaForCausalLM(LlamaConfig(**config))
    state = {
        f"{name}.weight": module.weight.half().float()
        for name, module in run.model.named_modules()
        if hasattr(module, "weight")
    }
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    reference.tie_weights()
    ids = streams.batch(1, 1, 60)[0][0]
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)[None]).logits[0, -1]
    torch.testing.assert_close(logits(tmp_path, ids.tolist()), expected, atol=1e-2, rtol=0)


def test_a_resumed_run_goes_on_as_if_never_stopped(
    base: BaseModel, streams: Streams, tmp_path: Path
) -> None:
    one, other = trainer(base, streams), trainer(base, streams)
    one.train_step(0.1)
    one.save(tmp_path / "state.pt")
    one.train_step(0.2)
    other.resume(tmp_path / "state.pt")
    other.train_step(0.2)
    assert other.step == one.step == 2
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_saved_state_has_nothing_of_the_base(
    base: BaseModel, streams: Streams, tmp_path: Path
) -> None:
    run = trainer(base, streams)
    run.save(tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)["model"]
    assert {name.rpartition(".")[2] for name in saved} == {"lora_A", "lora_B", "rows"}


def test_batches_drawn_ahead_are_the_same(base: BaseModel, streams: Streams) -> None:
    alone, helped = trainer(base, streams), trainer(base, streams, workers=1)
    for step in range(3):
        shape = alone.settings.shape(step)
        for a, b in zip(alone._batch(step, *shape), helped._batch(step, *shape), strict=True):
            assert (a == b).all()


def test_a_run_in_pieces_ends_in_a_folder_that_loads(
    base: BaseModel, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "work"
    shutil.copytree(work, place)
    monkeypatch.setattr(smol, "SMOLLM2", base.source)
    common = {"work": place, "out": tmp_path / "smol", "steps": 3, "talks": 0, "rows": 1,
              "length": 64, "measured": 0}  # fmt: skip
    run(common | {"pause": 0.0})
    assert torch.load(place / "smol" / "state.pt", weights_only=True)["step"] == 0
    run(common)
    assert torch.load(place / "smol" / "state.pt", weights_only=True)["step"] == 3
    layout = find_model(tmp_path / "smol")
    assert layout.lm == tmp_path / "smol" and layout.hubert.is_file(), "nano's ears go with it"
    model, tokenizer = LanguageModel.load(layout), Tokenizer.load(layout)
    model.append(tokenizer.encode("[Speech][Hu3][Text]"))
    assert model.decode(Sampling(greedy=True), tokenizer.mask("text")) < tokenizer.text_tag


def run(options: dict) -> None:
    defaults = {"minutes": 1.0, "steps": None, "pause": None, "begin": None, "mix": "", "rank": 4,
                "rate": 1e-3, "noise": 0.1, "seed": 0, "workers": 0, "device": "cpu",
                "threads": 1}  # fmt: skip
    smol.main(**(defaults | options))


# ------------------------------------------------------------------------------------ small talk


def test_small_talk_is_shown_in_training_only(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    rows = [
        {"number": 0, "talk": ["Do you like tea?", "I love tea."]},
        {"number": 1, "talk": None},
        {"number": 2, "talk": ["What time is it?", "It is late."]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = Example("time", "What time is it?", (), ("It is noon.",), 0, "heldout")
    world = smol.with_small_talk(Dialogues([asked], {}), path)
    assert [(e.text, e.replies) for e in world.split("train")] == [
        ("Do you like tea?", ("I love tea.",))
    ], "what is held out is not trained"
    assert world.split("heldout") == [asked]


def test_small_talk_goes_on_where_it_stopped(untrained: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    smol_talk.write_talk(once, untrained, 4)
    smol_talk.write_talk(twice, untrained, 2)
    smol_talk.write_talk(twice, untrained, 4)
    assert once.read_text() == twice.read_text()
    assert len(once.read_text().splitlines()) == 4


# --------------------------------------------------------------------------------------- errors


def test_what_is_wrong_with_a_base_or_an_adapter_is_named(
    base: BaseModel, untrained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(untrained, folder)
    settings = json.loads((folder / SETTINGS).read_text())

    def change(**values: str) -> None:
        (folder / SETTINGS).write_text(
            json.dumps(settings | {"base": settings["base"] | values}), encoding="utf-8"
        )

    for values, message in (
        ({"package": "no_such_package"}, "no_such_package is not installed.*: pip install small"),
        ({"package": "os.path"}, r"os\.path is not installed"),
        ({"file": "../small_published_llama/small.gguf"}, "is not installed"),
        ({"sha256": "0"}, "not the file from which this model was made"),
    ):
        change(**values)
        with pytest.raises(CheckpointError, match=message):
            LanguageModel.load(folder)
    change()
    (folder / SETTINGS).write_text(json.dumps({**settings, "r": "four"}))
    with pytest.raises(CheckpointError, match="key 'r' is a str"):
        LanguageModel.load(folder)


def test_a_model_that_is_not_there_says_how_to_make_it() -> None:
    if (Path(smol.__file__).parents[1] / smol.DEFAULT_OUT).exists():
        pytest.skip("smol has been trained here")
    with pytest.raises(CheckpointError, match="python -m recipes smol"):
        find_model("smol")


# ------------------------------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        SMOLLM2.find()
    except CheckpointError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2")
    write_untrained(BaseModel(SMOLLM2), 1024, folder)
    return folder


def test_smollm2_answers_as_it_does_elsewhere_and_is_held_in_16_bits(published: Path) -> None:
    talker = smol_talk.Talker(published)
    matrices = {type(m).__name__ for x in talker.lm._weights.layers for m in (x.qkv, x.down)}
    if "fbgemm" in torch.backends.quantized.supported_engines:
        assert matrices == {"Half"}
    asked = talker._message("user", "What is the capital of France?") + talker._header("assistant")
    talker.lm.reset()
    talker.lm.append(asked)
    ids: list[int] = []
    while talker.tokenizer.eos not in ids and len(ids) < 12:
        ids.append(talker.lm.decode(Sampling(greedy=True)))
    assert talker.tokenizer.decode(ids) == "The capital of France is Paris."
