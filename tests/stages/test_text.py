"""Properties of the tokenizer: incremental is whole, nothing is smuggled in, errors are clear."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_base import CONTROLS, byte_level_bpe
from tokenizers import AddedToken

from stages.checkpoint import CheckpointError
from stages.prompt import Modality
from stages.text import IncrementalDecoder, IncrementalEncoder, Tokenizer
from stages.units import Unit, UnitFrame

# The tokenizer is shared by all examples; it has no state.
shared = settings(suppress_health_check=list(HealthCheck))

WORDS = st.text("abet hil.,'!<s>/[]Hu1\u2581\né日😀", max_size=12)
TOKENS = st.builds("[{}{}]".format, st.sampled_from(["Hu", "Pi", "St"]), st.integers(0, 70))
MIXED = st.lists(
    WORDS | TOKENS | st.sampled_from(["[Text]", "[Speech]", "<s>", "</s>", "[Hu1", *CONTROLS])
)


NANO = Path(__file__).parents[2] / "checkpoints" / "nano" / "spiritlm_model" / "spirit-lm-nano"


def byte_level(folder: Path) -> Path:
    """A byte-level BPE with speech tokens, as ``smol`` has it."""
    tokenizer = byte_level_bpe()
    speech = ["[Text]", "[Speech]", *(f"[Hu{i}]" for i in range(80)), "[Pi3]", "[St3]"]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in speech])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(ends))
    (folder / "config.json").write_text('{"vocab_size": 512}')
    return folder


@pytest.fixture(scope="module", params=["base", "expressive", "nano", "byte-level"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "nano":
        return Tokenizer.load(NANO)
    if request.param == "byte-level":
        return Tokenizer.load(byte_level(tmp_path_factory.mktemp("byte-level")))
    return Tokenizer.load(request.getfixturevalue("lm_folder")(request.param))


@shared
@given(parts=MIXED, data=st.data())
def test_ids_built_piece_by_piece_are_those_of_the_whole(
    tokenizer: Tokenizer, parts: list[str], data: st.DataObject
) -> None:
    string = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(string)), max_size=6)))
    encoder = IncrementalEncoder(tokenizer)
    ids = encoder.ids
    for start, end in zip([0, *cuts], [*cuts, len(string)], strict=True):
        keep, new = encoder.push(string[start:end])
        assert keep <= len(ids)
        ids = ids[:keep] + new
        assert ids == encoder.ids == tokenizer.encode(string[:end])


@shared
@given(parts=MIXED)
def test_no_control_token_comes_out_of_text(tokenizer: Tokenizer, parts: list[str]) -> None:
    assert not any(tokenizer.is_special(i) for i in tokenizer.encode("".join(parts), bos=False))


@shared
@given(data=st.data())
@example(data=None)
def test_decoding_id_by_id_is_decoding_the_whole(
    tokenizer: Tokenizer, data: st.DataObject | None
) -> None:
    byte_ids = list(tokenizer._bytes)
    some = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(byte_ids)
    ids = data.draw(st.lists(some)) if data is not None else [*byte_ids[0xE3:0xE5], 5]
    # In front stands a tag, which the spaces of the legacy form do not touch.
    ids = [tokenizer.text_tag, *ids]
    decoder = IncrementalDecoder(tokenizer)
    said = [item for i in ids for item in decoder.push(i)] + decoder.flush()
    assert said.count("") == 0
    text = "".join(i.tag if isinstance(i, Modality) else str(i) for i in said)
    assert text == tokenizer.decode(ids)


@shared
@given(data=st.data())
def test_decoding_is_that_of_sentencepiece(tokenizer: Tokenizer, data: st.DataObject) -> None:
    byte_ids = list(tokenizer._bytes)
    some = st.integers(3, tokenizer.size - 1) | st.sampled_from(byte_ids)
    ids = [tokenizer.text_tag, *data.draw(st.lists(some))]
    assert tokenizer.decode(ids) == tokenizer._sp.decode(ids)


@shared
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\u2581", "")
    assert tokenizer.decode(tokenizer.encode("[Text]" + text)) == "[Text]" + text


def test_a_byte_level_vocabulary_keeps_the_sign_for_a_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    text = " \u2581 a"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    decoder = IncrementalDecoder(tokenizer, continuing=False)
    said = [part for i in tokenizer.encode(text) for part in decoder.push(i)]
    assert "".join(map(str, said)) == text


def test_control_tokens_are_never_sampled_but_the_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level(tmp_path))
    ids = [tokenizer._sp.piece_to_id(name) for name in CONTROLS]
    assert all(tokenizer.is_special(i) for i in ids)
    allowed = [name for name, i in zip(CONTROLS, ids, strict=True) if tokenizer.mask("any")[i]]
    assert allowed == ["<|im_start|>", "<|im_end|>"]


def test_a_character_comes_whole(tokenizer: Tokenizer) -> None:
    decoder = IncrementalDecoder(tokenizer)
    ids = [tokenizer._sp.piece_to_id(f"<0x{byte:02X}>") for byte in "日".encode()]
    assert [decoder.push(i) for i in ids] == [[], [], ["日"]]
    decoder.push(ids[0])
    unit = tokenizer.unit_id("Hu", 7)
    assert decoder.push(unit) == ["\ufffd", Unit("Hu", 7)]
    assert decoder.push(tokenizer.speech_tag) == [Modality.SPEECH]
    assert decoder.push(tokenizer.eos) == []


def test_units_and_ids(tokenizer: Tokenizer) -> None:
    kind, index = tokenizer.kinds[0], 3
    i = tokenizer.unit_id(kind, index)
    assert tokenizer.id_to_unit(i) == (kind, index)
    assert tokenizer.unit_ids([Unit(kind, index), UnitFrame(kind, index, 0)]) == [i, i]
    assert tokenizer.encode(f"[Speech][{kind}{index}]", bos=False)[-1] == i
    assert tokenizer.id_to_unit(tokenizer.text_tag) is None
    assert tokenizer.id_to_tag(tokenizer.speech_tag) is Modality.SPEECH
    with pytest.raises(ValueError, match="Hu100000"):
        tokenizer.unit_id("Hu", 100_000)


def test_a_mask_can_be_widened_and_is_a_copy(tokenizer: Tokenizer) -> None:
    mask = tokenizer.mask("text", also=[tokenizer.speech_tag])
    assert mask[tokenizer.speech_tag] and not mask[tokenizer.text_tag]
    mask[:] = False
    assert tokenizer.mask("text").any()


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"character 1 .* surrogate"):
        tokenizer.encode("a\ud800")


def test_broken_folders_are_refused(tmp_path: Path, lm_folder: Callable[[str], Path]) -> None:
    source = lm_folder("base")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: no such file"):
        Tokenizer.load(tmp_path)
    other = tmp_path / "tokenizer.json"
    other.write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)
    byte_level_bpe().save(str(other))
    with pytest.raises(CheckpointError, match="expected bos_token and eos_token"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no token '<s>'"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"\x0anonsense")
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        Tokenizer.load(tmp_path)
    model.write_bytes((source / "tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    with pytest.raises(CheckpointError, match="100 rows"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[Text]": 5}))
    with pytest.raises(CheckpointError, match=r"'\[Text\]' is added as id 5"):
        Tokenizer.load(tmp_path)
