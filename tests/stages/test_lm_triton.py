"""The Triton kernels: they compile for the GPUs they are meant for, and compute what PyTorch does.

Triton is not among what the project installs on a machine without a GPU: without it these tests
skip. With it they need no GPU: with ``TRITON_INTERPRET=1`` in the environment they run on the
CPU (Triton 3.6 does so with numpy older than 2.4), otherwise they are compiled for Hopper.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (it comes with CUDA builds)")

from stages import lm_kernels  # noqa: E402
from stages.llama_weights import random_llama  # noqa: E402
from stages.lm_linear import Scaled  # noqa: E402
from stages.lm_static import Row, StaticNetwork, table  # noqa: E402
from stages.lm_triton import MATVEC, SMALL, TritonNetwork, choices, disagreement  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
runs = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="no GPU, and TRITON_INTERPRET is not 1"
)


@runs
def test_the_kernels_compute_what_pytorch_does() -> None:
    assert disagreement(DEVICE) == ""


@runs
@pytest.mark.parametrize("part", ["product", "choice"])
def test_a_kernel_that_is_wrong_is_noticed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if part == "product":
        monkeypatch.setattr(TritonNetwork, "_add_linear", lambda *args: None)
    else:
        monkeypatch.setattr(TritonNetwork, "choose", lambda self, rows: self.picked.zero_())
    assert disagreement(DEVICE) != ""


@runs
@pytest.mark.parametrize("vocabulary", [61, 32768])
def test_tokens_are_chosen_as_by_pytorch(vocabulary: int) -> None:
    assert choices(DEVICE, vocabulary) == 1


@runs
@pytest.mark.parametrize("form", [None, "int8"])
def test_a_step_in_bfloat16_is_close(form: str | None) -> None:
    weights = random_llama(SMALL, DEVICE, torch.bfloat16, eight_bits=form)
    assert isinstance(weights.head, Scaled) == (form is not None)
    networks = [kind(SMALL, weights, 40, 1, 8) for kind in (StaticNetwork, TritonNetwork)]
    for at in range(3):
        for network in networks:
            network.controls[:1].copy_(table([Row(at + 5, 0, at)]))
            network.step(1, 40)
    plain, fast = (network.logits[0] for network in networks)
    assert (fast - plain).norm() / plain.norm() < 0.03


KERNELS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "matvec": (
        {"x": "*fp32", "gain": "*fp32", "weight": "*bf16", "scale": "*fp32", "out": "*bf16"},
        {"NORM": True, "GATED": True, "ADD": False, "SCALED": False, "stride_in": 1},
    ),
    "rotate_and_write": (
        {"qkv": "*bf16", "keys": "*bf16", "values": "*bf16", "cos": "*fp32", "sin": "*fp32"},
        {"HEADS": 32, "KV": 32, "HALF": 64, "BLOCK": 64},
    ),
    "attend_split": (
        {"qkv": "*bf16", "keys": "*bf16", "values": "*bf16", "sums": "*fp32", "tops": "*fp32"},
        {"HEADS": 32, "KV": 32, "SIZE": 128, "BLOCK": 128, "KEYS": 32, "SPLITS": 16},
    ),
    "attend_join": (
        {"sums": "*fp32", "tops": "*fp32", "out": "*bf16"},
        {"SIZE": 128, "BLOCK": 128, "SPLITS": 16},
    ),
    "choose": (
        {"logits": "*fp32", "banned": "*u8", "fractions": "*fp32", "chosen": "*i64"},
        {"BLOCK": 32768},
    ),
}
_OTHERS = {"controls": "*i32", "picked": "*i64", "eps": "fp32", "factor": "fp32"}


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is 1: nothing is compiled")
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_for_hopper_at_full_size(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, (types, constants) = getattr(lm_kernels, name), KERNELS[name]
    sizes = {"WIDTH": 8, "ROWS": MATVEC["rows"], "COLUMNS": MATVEC["columns"], **constants}
    constants = {key: value for key, value in sizes.items() if key in kernel.arg_names}
    signature = {
        key: "constexpr" if key in constants else types.get(key, _OTHERS.get(key, "i32"))
        for key in kernel.arg_names
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
