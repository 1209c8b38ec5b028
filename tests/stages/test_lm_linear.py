"""Matrices held in 16 bits: the same products, and only where 16 bits hold the matrix."""

from __future__ import annotations

import pytest
import torch

from stages.lm_linear import Dense, Half, halved


def make_matrix(size: int, out: int, bias: bool = False, seed: int = 0) -> Dense:
    """Values of bfloat16 in float32, as every published checkpoint has them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, out, generator=generator).mul(0.05).bfloat16().float()
    return Dense(weight, torch.randn(out, generator=generator) if bias else None)


@pytest.fixture(scope="module", autouse=True)
def fbgemm() -> None:
    if not isinstance(halved(make_matrix(8, 8)), Half):
        pytest.skip("this build of torch has no float16 product with float32 sums")


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("size", "out"), [(256, 768), (640, 256), (48, 97), (7, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_products_equal_those_in_float32(size: int, out: int, bias: bool, tokens: int) -> None:
    dense = make_matrix(size, out, bias)
    half = halved(dense)
    assert isinstance(half, Half)
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(1))
    exact = dense.weight.double()
    expected = x.double() @ exact + (0 if dense.bias is None else dense.bias.double())
    torch.testing.assert_close(half(x).double(), expected, atol=5e-6, rtol=1e-6)
    buffer = torch.full((tokens, out), 9.0)
    assert half(x, buffer).data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, half(x))


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(16, 16),
        torch.full((16, 16), 1e5),
        torch.full((16, 16), 1e-7),
        torch.randn(16, 16).bfloat16(),
    ],
    ids=["24 bits", "too large", "too small", "not float32"],
)
def test_what_16_bits_do_not_hold_stays_as_it_is(weight: torch.Tensor) -> None:
    dense = Dense(weight)
    assert halved(dense) is dense
