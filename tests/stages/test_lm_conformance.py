"""The language model against the numbers of the reference (conformance kit, ``lm_*``)."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from stages.lm import LanguageModel, Sampling

KIT = Path(
    os.environ.get("SPIRIT_CONFORMANCE_DIR", Path(__file__).parents[3] / "shared" / "conformance")
)
DEVICE = os.environ.get("SPIRIT_TEST_DEVICE", "cpu")  # "cuda" where there is a GPU
TOLERANCE = 1e-3
LIBRARY_MAX_LENGTH = 20  # prompt and continuation, where a run gives no max_new_tokens
VERSIONS = ("base", "expressive")


def runs(version: str) -> list[dict[str, Any]]:
    path = KIT / "expected" / f"lm_{version}.json"
    return json.loads(path.read_text())["runs"] if path.is_file() else []


if not runs("base"):
    if os.environ.get("SPIRIT_CONFORMANCE_REQUIRED") == "1":
        raise FileNotFoundError(f"no conformance kit in {KIT}")
    pytest.skip(
        f"no conformance kit in {KIT} (set SPIRIT_CONFORMANCE_DIR)", allow_module_level=True
    )

CASES = [pytest.param(v, run, id=f"{v}-{run['name']}") for v in VERSIONS for run in runs(v)]


@cache
def folder(version: str) -> Path:
    return next((KIT / "checkpoints" / "spiritlm_model").glob(f"*{version}*"))


@cache
def model(version: str) -> LanguageModel:
    return LanguageModel.load(folder(version), device=DEVICE, dtype=torch.float32)


@cache
def mask(version: str, modality: str) -> torch.Tensor:
    """What the reference allows: padding rows always, the end of the sequence always."""
    allowed = torch.ones(model(version).vocab_size, dtype=torch.bool)
    processor = sentencepiece.SentencePieceProcessor(str(folder(version) / "tokenizer.model"))
    tag = processor.PieceToId("[Text]")
    if modality == "TEXT":
        allowed[tag : len(processor)] = False
    elif modality == "SPEECH":
        allowed[:tag] = False
        allowed[[tag, processor.PieceToId("[Speech]")]] = False
        allowed[processor.eos_id()] = True
    return allowed


@pytest.mark.parametrize(("version", "run"), CASES)
def test_conformance_greedy_continuations(version: str, run: dict[str, Any]) -> None:
    lm = model(version)
    lm.reset()
    lm.append(run["input_ids"])
    limit = run["max_new_tokens"] or LIBRARY_MAX_LENGTH - lm.length
    forced = run.get("force_tokens_to_output_modality", True)
    allowed = mask(version, run["output_modality"] if forced else "ARBITRARY")
    generated: list[int] = []
    while len(generated) < limit and 2 not in generated[-1:]:
        generated.append(lm.decode(Sampling(greedy=True), allowed))
    assert generated == run["generated_ids"]


@pytest.mark.parametrize("version", VERSIONS)
def test_conformance_logits_and_hidden_states(version: str) -> None:
    lm = model(version)
    arrays = np.load(KIT / "expected" / f"lm_{version}.npz")
    inputs = {run["name"]: run["input_ids"] for run in runs(version)}
    names = [n.removesuffix(".logits_last") for n in arrays.files if n.endswith(".logits_last")]
    assert names
    for name in names:
        hidden = lm.hidden_states(inputs[name])
        logits = lm.project(hidden)
        lm.reset()
        lm.append(inputs[name])
        for got, key in (
            (hidden, "hidden_last_layer"),
            (logits.cpu()[:, arrays["logit_columns"]], "logits_columns"),
            (logits[-1], "logits_last"),
            (lm.logits, "logits_last"),
        ):
            np.testing.assert_allclose(
                got.cpu().numpy(), arrays[f"{name}.{key}"], rtol=0, atol=TOLERANCE, err_msg=key
            )
        assert logits.argmax(-1).tolist() == arrays[f"{name}.argmax"].tolist()
