"""Matrices of a language model, in the forms in which they can be held.

With a single token every product reads its whole matrix once and computes next to nothing with it:
the time is the size in memory. Published weights are 16-bit numbers, so 16 bits hold them, and
:class:`Half` multiplies them in float32 all the same: half of the bytes, the same result. 8 bits
(:class:`Scaled`) do not hold them; they are for a GPU, where asked for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# The largest error, relative to the norm of the matrix, at which 16 bits "hold" it: that of
# rounding to float32. float16 has all bits of a bfloat16 number but for those next to zero.
_HELD = 2.0**-24


class Linear(Protocol):
    """A matrix with or without a bias."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` ``[T, in]`` to ``[T, out]``, written into ``out`` if that is given."""
        ...


@dataclass(frozen=True)
class Dense:
    """``weight`` ``[in, out]``, ``bias`` ``[out]``.

    The transpose of the checkpoint's: with a single token a CPU streams it 1.6 times faster.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight, out=out)
        return torch.addmm(self.bias, x, self.weight, out=out)


@dataclass(frozen=True)
class Half:
    """A matrix packed as float16 for FBGEMM, which reads 16 bits and computes in float32."""

    packed: Any
    bias: Tensor | None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.packed, self.bias)
        return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.packed, self.bias, out)


@dataclass(frozen=True)
class Scaled:
    """A matrix ``[out, in]`` in 8 bits, ``scale`` float32 ``[out]``, ``bias`` ``[out]``.

    This product unpacks the matrix each time; reading half of the bytes pays where a kernel unpacks
    it on the way (:mod:`stages.lm_triton`).
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = (x @ self.weight.to(x.dtype).T) * self.scale.to(x.dtype)
        if self.bias is not None:
            y = y + self.bias
        return y if out is None else out.copy_(y)


FORMS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""8-bit forms of a matrix, by name."""


def scaled(matrix: Dense, form: str) -> Scaled:
    """``matrix`` in 8 bits, each row scaled so that its largest number is the largest there is.

    Raises:
        ValueError: there is no such form.
    """
    if form not in FORMS:
        raise ValueError(f"8-bit form {form!r}: expected one of {', '.join(FORMS)}")
    dtype = FORMS[form]
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    weight = matrix.weight.T.float()
    scale = weight.abs().amax(1).clamp(min=1e-12) / most
    held = weight / scale[:, None]
    held = held.round_() if dtype == torch.int8 else held
    return Scaled(held.to(dtype), scale, matrix.bias)


def halved(matrix: Dense) -> Half | Dense:
    """``matrix`` in half of its bytes, or as it is if float16 does not hold its values, or this
    build of torch has no such product (FBGEMM is for x86; torch has marked it for removal)."""
    weight = matrix.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _held(weight):
        return matrix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's announcement of the removal
        try:
            packed = torch.fbgemm_pack_gemm_matrix_fp16(weight.T.contiguous())
            half = Half(packed, matrix.bias)
            x = torch.linspace(-1, 1, weight.shape[0])[None]
            y = half(x, torch.empty(1, weight.shape[1]))
        except (AttributeError, RuntimeError, TypeError):
            return matrix
    expected = matrix(x)
    return half if torch.allclose(y, expected, rtol=1e-3, atol=1e-3) else matrix


def _held(weight: Tensor) -> bool:
    error = (weight.half().float() - weight).norm()
    return bool(error <= _HELD * weight.norm())
