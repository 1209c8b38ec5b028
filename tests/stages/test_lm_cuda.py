"""The engine for a GPU, run on the CPU: what is captured there is called here, no more differs.

Judged by :class:`stages.lm_torch.TorchEngine` on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stages.llama_weights import LlamaConfig, Weights, random_llama
from stages.lm import CacheFullError, LanguageModel, Sampling
from stages.lm_cuda import CudaEngine
from stages.lm_linear import Dense, scaled
from stages.lm_runner import PREFILL_ROWS, Runner
from stages.lm_static import GREEDY, Row, StaticNetwork
from stages.lm_torch import TorchEngine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPACITY = 700  # more than one span of attention, more than one prefill


def config(**changes: object) -> LlamaConfig:
    values: dict = {
        "vocab_size": 97,
        "hidden": 48,
        "intermediate": 80,
        "layers": 2,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 8,
        "max_positions": 1024,
        "rope_theta": 5000.0,
    }
    return LlamaConfig(**{**values, **changes})


SHAPE = config()
WEIGHTS = random_llama(SHAPE, DEVICE, torch.float32, seed=3)


def expected_model(shape: LlamaConfig = SHAPE, weights: Weights = WEIGHTS) -> LanguageModel:
    return LanguageModel(shape, weights, CAPACITY, TorchEngine(shape, weights, CAPACITY))


def model(shape: LlamaConfig = SHAPE, weights: Weights = WEIGHTS) -> LanguageModel:
    return LanguageModel(shape, weights, CAPACITY, CudaEngine(shape, weights, CAPACITY))


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPE.vocab_size, (count,), generator=generator).tolist()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"kv_heads": 6}, {"kv_heads": 1, "head_dim": 16}, {"rope_factor": 2.0}],
    ids=["gqa", "tied", "mha", "mqa-wide-heads", "rope-linear"],
)
def test_logits_equal_those_of_plain_pytorch(changes: dict) -> None:
    shape = config(**changes)
    weights = random_llama(shape, DEVICE, torch.float32)
    lm, plain = model(shape, weights), expected_model(shape, weights)
    for count in (1, 5, 40, 1, 300, 1):
        for each in (lm, plain):
            each.append(random_ids(count, seed=count))
        close(lm.logits, plain.logits)


def test_biases_are_added() -> None:
    shape = config(attention_bias=True, mlp_bias=True)
    weights = random_llama(shape, DEVICE, torch.float32)
    for layer in weights.layers:
        for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
            assert isinstance(matrix, Dense) and matrix.bias is not None
            matrix.bias.normal_()
    lm, plain = model(shape, weights), expected_model(shape, weights)
    for ids in (random_ids(9), [4]):
        for each in (lm, plain):
            each.append(ids)
        close(lm.logits, plain.logits)


SAMPLINGS = [
    Sampling(greedy=True),
    Sampling(seed=5),
    Sampling(temperature=1.7, top_p=0.6, seed=6),
    Sampling(temperature=0.8, top_p=1.0, top_k=7, seed=7),
]


def masks() -> list[torch.Tensor | None]:
    even = torch.arange(SHAPE.vocab_size) % 2 == 0
    return [None, even, ~even]


_one: dict[str, LanguageModel] = {}


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_is_asked_gives_what_plain_pytorch_gives(data: st.DataObject) -> None:
    # One engine for all examples, so that what earlier ones left behind would be found.
    lm = _one.setdefault("lm", model())
    lm.reset()
    plain = expected_model()
    for step in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["append", "decode", "decode", "rewind", "look"]))
        if action == "append" or not plain.length:
            count = data.draw(st.sampled_from([1, 2, 7, 9, 40, 130, 257]))
            new = random_ids(min(count, CAPACITY - plain.length), seed=step)
            answers = [each.append(new) for each in (lm, plain)]
        elif action == "decode":
            sampling, mask = (
                data.draw(st.sampled_from(SAMPLINGS)),
                data.draw(st.sampled_from(masks())),
            )
            count = min(data.draw(st.integers(1, 6)), CAPACITY - plain.length)
            answers = [[x.decode(sampling, mask) for _ in range(count)] for x in (lm, plain)]
        elif action == "rewind":
            length = data.draw(st.integers(max(0, plain.length - 20), plain.length))
            answers = [each.rewind(length) for each in (lm, plain)]
        else:
            close(lm.logits, plain.logits)
            continue
        assert answers[0] == answers[1]
    assert lm.ids == plain.ids
    if plain.length:
        close(lm.logits, plain.logits)


def test_the_network_runs_one_token_ahead_and_never_past_the_cache() -> None:
    engine = CudaEngine(SHAPE, WEIGHTS, 12)
    lm = LanguageModel(SHAPE, WEIGHTS, 12, engine)
    plain = LanguageModel(SHAPE, WEIGHTS, 12, TorchEngine(SHAPE, WEIGHTS, 12))
    for each in (lm, plain):
        each.append([5, 6, 7])
    assert [lm.decode(GREEDY) for _ in range(8)] == [plain.decode(GREEDY) for _ in range(8)]
    assert engine.held == lm.length == 11
    assert lm.decode(GREEDY) == plain.decode(GREEDY)
    close(lm.logits, plain.logits)
    with pytest.raises(CacheFullError):
        lm.decode(GREEDY)


def test_a_mask_changed_in_place_holds_from_the_next_token_on() -> None:
    lm = model()
    lm.append([1, 2, 3])
    mask = torch.ones(SHAPE.vocab_size, dtype=torch.bool)
    lm.decode(GREEDY, mask)
    mask[:] = False
    mask[[11, 12]] = True
    assert {lm.decode(Sampling(seed=i), mask) for i in range(5)} <= {11, 12}
    with pytest.raises(ValueError, match="allows no token"):
        lm.decode(GREEDY, torch.zeros_like(mask))
    assert lm.decode(GREEDY) == expected_after(lm.ids)


def expected_after(ids: tuple[int, ...]) -> int:
    plain = expected_model()
    plain.append(ids)
    return plain.decode(GREEDY)


def test_another_engine_has_a_cache_of_its_own() -> None:
    lm = model()
    lm.append([1, 2, 3])
    beside = lm.another()
    beside.append([4, 5])
    assert lm.decode(GREEDY) == expected_after((1, 2, 3))
    assert beside.decode(GREEDY) == expected_after((4, 5))


def test_padding_leaves_no_trace() -> None:
    """Rows of padding write to a place of their own, whatever number of them."""
    network = StaticNetwork(SHAPE, WEIGHTS, 60, 3, PREFILL_ROWS[-1])
    runner = Runner(network, batches=[1, 4])
    runner.prefill(1, random_ids(20), 0)
    runner.logits(1)  # once it is through
    before = network._cache[:, :, :, :, :60].clone()
    logits = network.logits[:3].clone()
    runner.step([Row(4, 0, 0)])
    runner.step([Row(4, 0, 1), Row(5, 2, 0)])
    runner.collect(2)
    assert torch.equal(network._cache[:, :, 1, :, :60], before[:, :, 1])
    assert torch.equal(network.logits[1], logits[1])
    assert network._cache[:, :, 0, :, 2:60].count_nonzero() == 0


class Recorder(TorchDispatchMode):
    """The operators that run, but for those on views; and whether one is given a number as a tensor
    of the host, which a GPU would have to fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.fetches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.names.add(name)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if name in ("where", "index_fill_") and any(t.dim() == 0 for t in tensors):
            self.fetches.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("slots", [1, 3])
def test_what_is_captured_never_asks_the_host(slots: int) -> None:
    """A graph cannot wait for the host, or size a tensor by what it computed."""
    network = StaticNetwork(SHAPE, WEIGHTS, 60, slots, PREFILL_ROWS[-1])
    with Recorder() as recorded:
        network.prefill(8, 60)
        network.step(slots, 60)
        network.choose(slots)
    assert "index_put_" in recorded.names and "sort" in recorded.names
    asking = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "item"}
    assert not asking & recorded.names and not recorded.fetches


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_eight_bits_are_close(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = Dense(torch.randn(64, 40, generator=generator), torch.randn(40, generator=generator))
    x = torch.randn(3, 64, generator=generator)
    error = (scaled(dense, form)(x) - dense(x)).norm() / dense(x).norm()
    assert error < (0.01 if form == "int8" else 0.04)
    buffer = torch.empty(3, 40)
    assert scaled(dense, form)(x, buffer) is buffer


def test_an_unknown_form_of_eight_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"int4.*expected one of int8, fp8"):
        scaled(Dense(torch.ones(2, 2)), "int4")


Make = Callable[[], LanguageModel]


@pytest.mark.parametrize("make", [model, expected_model], ids=["cuda", "plain"])
def test_without_tokens_there_is_nothing_to_decode(make: Make) -> None:
    with pytest.raises(ValueError, match="no tokens yet"):
        make().decode(GREEDY)


def test_eight_bits_are_not_for_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"8-bit weights \(int8\) are for a GPU, not for cpu"):
        LanguageModel.load(tmp_path, eight_bits="int8")


def test_streams_of_one_model_are_decoded_together() -> None:
    first = LanguageModel.shared(SHAPE, WEIGHTS, CAPACITY, streams=2)
    second = first.another()
    first.append([1, 2, 3])
    second.append([4, 5])
    assert first.decode(GREEDY) == expected_after((1, 2, 3))
    assert second.decode(GREEDY) == expected_after((4, 5))
    second.close()
    assert first.another().length == 0


def test_decoding_with_eight_bits_follows_the_held_numbers() -> None:
    """An engine computes with the numbers that are held, as plain PyTorch does."""
    weights = random_llama(SHAPE, DEVICE, torch.float32, eight_bits="int8")
    lm, plain = model(SHAPE, weights), expected_model(SHAPE, weights)
    for each in (lm, plain):
        each.append(random_ids(12))
    close(lm.logits, plain.logits)
    assert [lm.decode(GREEDY) for _ in range(5)] == [plain.decode(GREEDY) for _ in range(5)]
