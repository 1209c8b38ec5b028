"""Token ids against the reference (conformance kit, ``text_tokenizer_*`` and modality masks)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.text import IncrementalDecoder, IncrementalEncoder, Tokenizer

Read = Callable[..., Any]
CONTROL = ("<s>", "</s>", "<unk>")


@pytest.fixture(scope="module", params=["base", "expressive"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(version: str, lm_folder: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.load(lm_folder(version))


def test_conformance_vocabulary(version: str, tokenizer: Tokenizer, expected: Read) -> None:
    facts = expected(f"text_tokenizer_{version}")
    assert tokenizer.size == facts["vocabulary"]
    assert tokenizer.legacy == facts["legacy"]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.unk) == (
        facts["bos"], facts["eos"], facts["unk"]
    )  # fmt: skip
    for name, i in facts["special_ids"].items():
        known = {"[Text]": tokenizer.text_tag, "[Speech]": tokenizer.speech_tag}.get(name)
        unit = re.fullmatch(r"\[(..)([0-9]+)\]", name)
        if known is not None:
            assert known == i
        elif unit is not None and i != facts["unk"]:
            assert tokenizer.unit_id(unit[1], int(unit[2])) == i
            assert tokenizer.id_to_unit(i) == (unit[1], int(unit[2]))
        elif unit is not None:
            with pytest.raises(ValueError, match="vocabulary has"):
                tokenizer.unit_id(unit[1], int(unit[2]))


def test_conformance_encode(version: str, tokenizer: Tokenizer, expected: Read) -> None:
    cases = expected(f"text_tokenizer_{version}")["encode"]
    assert cases
    for case in cases:
        assert tokenizer.pieces(case["ids"]) == case["tokens"]
        if any(token in case["text"] for token in CONTROL):
            # The one departure: control tokens typed by somebody stay text.
            ids = tokenizer.encode(case["text"], bos=False)
            assert not any(tokenizer.is_special(i) for i in ids)
            with_tag = "[Text]" + case["text"].replace("\u2581", " ")
            assert tokenizer.decode(tokenizer.encode(with_tag)) == with_tag
        else:
            assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_conformance_incremental_encode(version: str, tokenizer: Tokenizer, expected: Read) -> None:
    for case in expected(f"text_tokenizer_{version}")["encode"]:
        for size in (1, 2, 5, 1000):
            encoder = IncrementalEncoder(tokenizer)
            ids = encoder.ids
            for start in range(0, len(case["text"]), size):
                keep, new = encoder.push(case["text"][start : start + size])
                ids = ids[:keep] + new
                assert ids == encoder.ids == tokenizer.encode(case["text"][: start + size])


def test_conformance_decode(version: str, tokenizer: Tokenizer, expected: Read) -> None:
    facts = expected(f"text_tokenizer_{version}")
    for case in facts["encode"] + facts["decode"]:
        assert tokenizer.decode(case["ids"]) == case["decoded"], case
        if "decoded_with_special" in case:
            whole = tokenizer.decode(case["ids"], skip_special_tokens=False)
            assert whole == case["decoded_with_special"], case


def test_conformance_incremental_decode(version: str, tokenizer: Tokenizer, expected: Read) -> None:
    for case in expected(f"text_tokenizer_{version}")["decode"]:
        decoder = IncrementalDecoder(tokenizer, continuing=False)
        said = [item for i in case["ids"] for item in decoder.push(i)] + decoder.flush()
        text = "".join(getattr(item, "tag", None) or str(item) for item in said)
        assert text == case["decoded"], case


def test_conformance_modality_masks(version: str, tokenizer: Tokenizer, expected: Read) -> None:
    for case in expected("strings").get("forbidden_by_modality", []):
        if case["expressive"] == (version == "expressive"):
            allowed = torch.ones(tokenizer.vocab_size, dtype=torch.bool)
            for first, last in case["ranges_in_order"]:
                allowed[first : last + 1] = False
            allowed[tokenizer.eos] = True  # the library never bans it
            mask = tokenizer.mask(case["output_modality"], compat=True)
            assert mask.equal(allowed)
            allowed[tokenizer.size :] = False
            assert tokenizer.mask(case["output_modality"]).equal(allowed)


def test_conformance_added_tokens_form(
    version: str,
    tokenizer: Tokenizer,
    expected: Read,
    lm_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The same vocabulary with the speech tokens in ``added_tokens.json``."""
    source = lm_folder(version)
    model = (source / "tokenizer.model").read_bytes()
    first = tokenizer.text_tag
    (tmp_path / "tokenizer.model").write_bytes(without_pieces(model, first))
    added = {tokenizer.pieces([i])[0]: i for i in range(first, tokenizer.size)}
    settings = json.loads((source / "tokenizer_config.json").read_text())
    config = (source / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    for form in ("added_tokens", "added_tokens_decoder"):
        if form == "added_tokens":
            (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        else:
            (tmp_path / "added_tokens.json").unlink()
            settings[form] = {str(i): {"content": token} for token, i in added.items()}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        other = Tokenizer.load(tmp_path)
        assert (other.size, other.vocab_size) == (tokenizer.size, tokenizer.vocab_size)
        for case in expected(f"text_tokenizer_{version}")["encode"]:
            assert other.encode(case["text"]) == tokenizer.encode(case["text"])
            assert other.decode(case["ids"]) == case["decoded"]


def without_pieces(model: bytes, count: int) -> bytes:
    """The serialised ModelProto with only its first ``count`` pieces (field 1)."""
    kept, pieces, at = b"", 0, 0
    while at < len(model):
        start = at
        key, at = varint(model, at)
        if key & 7 == 2:
            length, at = varint(model, at)
            at += length
        else:
            assert key & 7 == 0
            _, at = varint(model, at)
        if key >> 3 == 1:
            pieces += 1
            if pieces > count:
                continue
        kept += model[start:at]
    return kept


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
