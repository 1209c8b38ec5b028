"""The cached language model against transformers' own Llama, and against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from stages.checkpoint import CheckpointError
from stages.lm import CacheFullError, LanguageModel, Sampling
from stages.lm_linear import Dense, Half

VOCAB = 97
GREEDY = Sampling(greedy=True)


def make_reference(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 3e-5,
            "rope_theta": 5000.0,
            "initializer_range": 0.15,
            "attn_implementation": "eager",
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return make_reference()


@pytest.fixture(scope="module")
def folder(reference: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_official(reference, path)
    return path


def save_official(model: LlamaForCausalLM, path: Path) -> None:
    """config.json and pytorch_model.bin, as in the official folders."""
    config = model.config.to_dict()
    theta = config.pop("rope_parameters", {}).get("rope_theta", config.get("rope_theta"))
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": theta}))
    torch.save(model.state_dict(), path / "pytorch_model.bin")


def reference_logits(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    ids=["gqa", "tied", "mha", "mqa-wide-heads", "biases", "rope-linear"],
)
@pytest.mark.parametrize("published", [True, False], ids=["bfloat16", "float32"])
def test_logits_equal_transformers_at_every_step(
    changes: dict, published: bool, tmp_path: Path
) -> None:
    """``published``: with values of bfloat16, which a CPU holds in 16 bits."""
    model = make_reference(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            if published:
                parameter.copy_(parameter.bfloat16())
    model.save_pretrained(tmp_path)
    lm = LanguageModel.load(tmp_path)
    assert published or isinstance(lm._weights.head, Dense)
    assert not published or isinstance(lm._weights.head, kind_of_published())
    ids = random_ids(40)
    expected = reference_logits(model, ids)
    for i, token in enumerate(ids):
        lm.append([token])
        close(lm.logits, expected[i])
    lm.reset()
    lm.append(ids)
    close(lm.logits, expected[-1])


def kind_of_published() -> type:
    """16 bits, unless this build of torch cannot."""
    return Half if hasattr(torch, "fbgemm_pack_gemm_matrix_fp16") else Dense


def test_greedy_continuation_equals_generate(reference: LlamaForCausalLM, folder: Path) -> None:
    lm = LanguageModel.load(folder)
    prompt = random_ids(9)
    lm.append(prompt)
    decoded = [lm.decode(GREEDY) for _ in range(30)]
    expected = reference.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None
    )[0, len(prompt) :]
    assert decoded == expected.tolist()
    assert lm.ids == (*prompt, *decoded)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_chunking_equals_the_whole(folder: Path, data: st.DataObject) -> None:
    ids = random_ids(50, seed=data.draw(st.integers(0, 9)))
    cuts = data.draw(st.lists(st.integers(0, 50), max_size=8).map(sorted))
    lm = shared(folder)
    lm.reset()
    for a, b in zip([0, *cuts], [*cuts, 50], strict=True):
        lm.append(ids[a:b])
    fresh = LanguageModel(lm.config, lm._weights)
    fresh.append(ids)
    assert lm.ids == fresh.ids == tuple(ids)
    close(lm.logits, fresh.logits)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_rewind_then_append_equals_a_fresh_prefill(folder: Path, data: st.DataObject) -> None:
    lm = shared(folder)
    lm.reset()
    kept: list[int] = []
    for step in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["append", "decode", "rewind", "look"]))
        if action == "append" or not kept:
            new = random_ids(data.draw(st.integers(1, 12)), seed=step)
            lm.append(new)
            kept += new
        elif action == "decode":
            kept.append(lm.decode(Sampling(seed=step)))
        elif action == "rewind":
            length = data.draw(st.integers(0, len(kept)))
            lm.rewind(length)
            del kept[length:]
        else:
            _ = lm.logits
    assert lm.ids == tuple(kept) and lm.length == len(kept)
    if kept:
        fresh = LanguageModel(lm.config, lm._weights)
        fresh.append(kept)
        close(lm.logits, fresh.logits)


_models: dict[Path, LanguageModel] = {}


def shared(folder: Path) -> LanguageModel:
    """One model for all examples, so that leftovers of earlier examples would be found."""
    if folder not in _models:
        _models[folder] = LanguageModel.load(folder)
    return _models[folder]


def test_decode_feeds_its_token_only_when_needed(folder: Path) -> None:
    lm = LanguageModel.load(folder)
    lm.append([1, 2, 3])
    before = lm.logits
    lm.decode(GREEDY)
    assert lm.length == 4
    lm.rewind(3)
    assert lm.logits is before


def test_hidden_states_and_projection(reference: LlamaForCausalLM, folder: Path) -> None:
    lm = LanguageModel.load(folder)
    lm.append([7])
    ids = random_ids(20)
    with torch.no_grad():
        expected = reference.model(torch.tensor([ids])).last_hidden_state[0]
    hidden = lm.hidden_states(ids)
    close(hidden, expected)
    close(lm.project(hidden), reference_logits(reference, ids))
    assert lm.ids == (7,)


# ------------------------------------------------------------------------------------ sampling


def test_a_seed_repeats_and_survives_rewinding(folder: Path) -> None:
    lm = LanguageModel.load(folder)
    sampling = Sampling(temperature=2.0, seed=11)
    lm.append([1, 2, 3])
    first = [lm.decode(sampling) for _ in range(20)]
    lm.rewind(13)
    assert [lm.decode(sampling) for _ in range(10)] == first[10:]
    lm.rewind(3)
    assert [lm.decode(Sampling(temperature=2.0, seed=12)) for _ in range(20)] != first


def test_masked_tokens_are_never_chosen(folder: Path) -> None:
    lm = LanguageModel.load(folder)
    lm.append([1])
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[[4, 8]] = True
    for sampling in (GREEDY, Sampling(temperature=5.0, top_p=1.0, seed=1)):
        assert {lm.decode(sampling, mask) for _ in range(20)} <= {4, 8}
    with pytest.raises(ValueError, match="allows no token"):
        lm.decode(GREEDY, torch.zeros(VOCAB, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected torch.bool \[97\]"):
        lm.decode(GREEDY, torch.ones(5, dtype=torch.bool))


def test_streams_over_the_same_weights_know_nothing_of_each_other(folder: Path) -> None:
    lm = LanguageModel.load(folder)
    lm.append([1, 2, 3])
    beside = lm.another()
    assert beside.length == 0 and beside.capacity == lm.capacity
    beside.append([9, 8])
    alone = LanguageModel.load(folder)
    alone.append([1, 2, 3])
    assert lm.decode(GREEDY) == alone.decode(GREEDY)
    assert torch.equal(lm.logits, alone.logits)


# ---------------------------------------------------------------------------------------- limits


def test_a_full_cache_says_so_and_changes_nothing(folder: Path) -> None:
    lm = LanguageModel.load(folder, capacity=10)
    lm.append(random_ids(9))
    logits = lm.logits.clone()
    with pytest.raises(CacheFullError, match="9 tokens and 2 more do not fit into a cache of 10"):
        lm.append([1, 2])
    assert lm.length == 9 and torch.equal(lm.logits, logits)
    lm.decode(GREEDY)
    with pytest.raises(CacheFullError):
        lm.decode(GREEDY)
    assert lm.logits.shape == (VOCAB,)


def test_bad_arguments_are_refused(folder: Path) -> None:
    lm = LanguageModel.load(folder)
    with pytest.raises(ValueError, match="no tokens yet"):
        lm.decode(GREEDY)
    with pytest.raises(ValueError, match="token id 97"):
        lm.append([3, VOCAB])
    assert lm.length == 0
    with pytest.raises(ValueError, match="cannot rewind to 1"):
        lm.rewind(1)
    with pytest.raises(ValueError, match="capacity 129"):
        LanguageModel.load(folder, capacity=129)


# --------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard_size", ["1GB", "40KB"], ids=["whole", "sharded"])
def test_every_published_form_loads(
    reference: LlamaForCausalLM, folder: Path, tmp_path: Path, safe: bool, shard_size: str
) -> None:
    if safe:
        reference.save_pretrained(tmp_path, max_shard_size=shard_size)
    else:
        save_official(reference, tmp_path)
        if shard_size == "40KB":
            split_bin(tmp_path)
    files = [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".safetensors")]
    assert (len(files) > 1) == (shard_size == "40KB")
    lm, expected = LanguageModel.load(tmp_path), LanguageModel.load(folder)
    lm.append([1, 5, 9])
    expected.append([1, 5, 9])
    assert torch.equal(lm.logits, expected.logits)


def split_bin(path: Path) -> None:
    whole = torch.load(path / "pytorch_model.bin", weights_only=True)
    (path / "pytorch_model.bin").unlink()
    names = {k: f"pytorch_model-{i % 2 + 1:05d}-of-00002.bin" for i, k in enumerate(whole)}
    for name in set(names.values()):
        torch.save({k: v.clone() for k, v in whole.items() if names[k] == name}, path / name)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))


def test_weights_are_cast_to_the_wanted_type(folder: Path) -> None:
    lm = LanguageModel.load(folder, dtype=torch.bfloat16)
    lm.append([1, 5, 9])
    assert lm.dtype == torch.bfloat16 and lm.logits.dtype == torch.float32


def broken(folder: Path, tmp_path: Path) -> tuple[Path, dict]:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path, torch.load(folder / "pytorch_model.bin", weights_only=True)


def test_damaged_checkpoints_are_named(folder: Path, tmp_path: Path) -> None:
    path, state = broken(folder, tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    cases = [
        ({k: v for k, v in state.items() if k != key}, f"{key}' missing"),
        ({**state, key: state[key][:-1]}, rf"{key}' has shape \[79, 48\], expected \[80, 48\]"),
        ({**state, key: "text"}, f"{key}' is a str"),
        ({**state, "model.layers.9.extra": state[key]}, "model.layers.9.extra' does not belong"),
        ([1], "expected a state dict"),
    ]
    for content, message in cases:
        torch.save(content, path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            LanguageModel.load(path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no weights; expected one of pytorch_model\.bin"):
        LanguageModel.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling 'yarn'"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"hidden_size": "48"}, "'hidden_size' is a str, expected int"),
    ],
)
def test_configurations_of_other_models_are_refused(
    folder: Path, tmp_path: Path, change: dict, message: str
) -> None:
    path, _ = broken(folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        LanguageModel.load(path)


def test_shards_outside_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    path, _ = broken(folder, tmp_path)
    index = {"weight_map": {"model.norm.weight": "../pytorch_model.bin"}}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a file name"):
        LanguageModel.load(path)
