"""A waveform front end for Whisper's blocks, constructed, not trained.

Whisper hears a log-mel spectrogram through two convolutions. A ``HubertModel`` hears the wave
through layers of convolution, layer norm over channels and GELU. This module writes the first in
terms of the second: four layers, strides 160, 1, 1, 2 and kernels 400, 1, 3, 3.

*Layer norm as a fixed scale.* Eight neutral channels per layer hold constants of +pin and -pin,
much larger than the signal, and the other channels are made to sum to zero. So the mean is zero
and the variance, but for a small part, ``8 pin^2 / channels``; the norm's gain undoes it. Neutral
channels have zero gain and die in the GELU.

1. *Power spectrum.* 400-point frames under a Hann window, DFT bins 1 to 200, each in three phases
   120 degrees apart, times a small gain. ``gelu(x) = x / 2 + x^2 / sqrt(2 pi) + O(x^4)``: summed
   over the phases of ``A cos(p + 2 pi k / 3)`` the odd part vanishes and ``A^2 * 1.5 /
   sqrt(2 pi)`` remains. The phases sum to zero as they are.
2. *Bent mel energies.* A 1 x 1 convolution sums phases and applies Whisper's mel filters; each
   band is there once for every knee ``e_j``, with alternating sign, so that the channels sum to
   zero. The norm's gain (which undoes the sign) and bias make ``gelu(s (1 - E / e_j))``: bent at
   the knee, close to zero above it. Because of that, no two large numbers ever cancel.
3. *Logarithm and first convolution.* A least-squares combination of the knees is
   ``(log10(E + floor) + 4) / 4``, Whisper's input but for its floor, which hangs on the loudest
   frame of the utterance and so cannot be streamed. The combination is folded into Whisper's
   first convolution. Balancing channels carry minus the sum of the others.
4. *Second convolution*, as it is, with balancing channels.

*Positions.* The projection subtracts a large constant ``c``; over it runs a depthwise positional
convolution with taps ``-(P[t] - P[t - 1]) / c`` on the past. Its zero padding on the left makes
the sum end at the first frame, so that it gives ``P[t]``, Whisper's absolute position, but for a
leak of the signal of the order of 1 / c. A bias of ``c`` lifts it over GELU's bend and cancels
the constant in the residual sum.

The input is padded by 520 zeros before and 200 after: frames are centred on multiples of 160
samples, as Whisper's are, and the two unpadded kernels of 3 find their neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.whisper import MELS, mel_filters

FRAME, HOP, BINS = 400, 160, 200
PHASES = 3
NEUTRAL = 8
STRIDES = (HOP, 1, 1, 2)
INPUT_PADDING = (520, 200)


@dataclass(frozen=True)
class Constants:
    """The numbers of the construction.

    Attributes:
        gain: of the spectrum before the first GELU. Smaller is more exact and less precise.
        pins: the constant of each layer's neutral channels. Larger is more exact, less precise.
        knees: how many; log-spaced from ``lowest`` to ``highest`` in Whisper's energy.
        sharpness: ``s`` of the bends.
        floor: energy added before the logarithm.
        positions: taps of the positional convolution; half as many frames get a position.
        carrier: the constant under the positions.
    """

    gain: float = 1 / 20
    pins: tuple[float, float, float, float] = (5.0, 100.0, 400.0, 400.0)
    knees: int = 14
    lowest: float = 10**-4.7
    highest: float = 10**2.5
    sharpness: float = 1.0
    floor: float = 1e-5
    positions: int = 384
    carrier: float = 1000.0


@dataclass(frozen=True)
class Layer:
    """Weights of one convolution ``[out, in, kernel]`` and of the layer norm after it."""

    weight: Tensor
    bias: Tensor
    gain: Tensor
    offset: Tensor


def front_end(whisper: dict[str, Tensor], constants: Constants) -> list[Layer]:
    """The four layers in float64, from Whisper's encoder weights (CTranslate2 names)."""
    pins = constants.pins
    combination, constant = fit_logarithm(constants)[1:]
    return [
        _spectrum(constants.gain, pins[0]),
        _energies(constants, pins[1]),
        _first_convolution(whisper, combination, constant, pins[2]),
        _second_convolution(whisper, pins[3]),
    ]


def fit_logarithm(constants: Constants) -> tuple[np.ndarray, np.ndarray, float]:
    """Knees ``e_j``, weights ``w_j`` and constant ``k`` of the approximate logarithm.

    ``sum_j w_j gelu(s (1 - E / e_j)) + k`` is ``(log10(E + floor) + 4) / 4`` to 0.005 (RMS) for
    energies from 1e-7 to ``highest``.
    """
    knees = np.logspace(np.log10(constants.lowest), np.log10(constants.highest), constants.knees)
    grid = np.concatenate([[0.0], np.logspace(-7, 3, 2000)])
    bent = F.gelu(torch.from_numpy(constants.sharpness * (1 - grid[:, None] / knees))).numpy()
    basis = np.concatenate([bent, np.ones((len(grid), 1))], 1)
    target = (np.log10(grid + constants.floor) + 4) / 4
    weights = np.linalg.lstsq(basis, target, rcond=None)[0]
    return knees, weights[:-1], float(weights[-1])


def positional(whisper: dict[str, Tensor], constants: Constants) -> tuple[Tensor, Tensor]:
    """Weight ``[width, 1, positions]`` and bias ``[width]`` of the positional convolution."""
    half = constants.positions // 2
    table = whisper["position_encodings/encodings"].double()[:half].T
    steps = torch.diff(table, dim=1, prepend=table.new_zeros(len(table), 1))
    taps = -steps.flip(1) / constants.carrier  # tap ``half`` meets the present frame
    weight = F.pad(taps, (1, half - 1))
    return weight[:, None], weight.new_full((len(table),), constants.carrier)


def _spectrum(gain: float, pin: float) -> Layer:
    time = np.arange(FRAME)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * time / FRAME)
    bins = np.arange(1, BINS + 1)[:, None, None]
    phases = 2 * np.pi * np.arange(PHASES)[None, :, None] / PHASES
    bank = gain * hann * np.cos(2 * np.pi * bins * time / FRAME + phases)
    weight = torch.from_numpy(bank.reshape(-1, 1, FRAME))
    return _pinned(weight, torch.zeros(len(weight), dtype=weight.dtype), pin, balanced=True)


def _energies(constants: Constants, pin: float) -> Layer:
    per_power = PHASES / 2 * constants.gain**2 / np.sqrt(2 * np.pi)
    filters = torch.from_numpy(mel_filters()[:, 1:]) / per_power
    summed = filters.repeat_interleave(PHASES, 1)  # over the phases of every bin
    signs = torch.ones(constants.knees, dtype=summed.dtype)
    signs[1::2] = -1
    weight = (signs[None, :, None] * summed[:, None]).reshape(-1, summed.shape[1], 1)
    knees = torch.from_numpy(fit_logarithm(constants)[0])
    gain = (-signs * constants.sharpness / knees).repeat(MELS)
    offset = torch.full_like(gain, constants.sharpness)
    bias = torch.zeros_like(gain)
    weight = F.pad(weight, (0, 0, 0, NEUTRAL))
    return _pinned(weight, bias, pin, gain, offset, balanced=constants.knees % 2 == 0)


def _first_convolution(
    whisper: dict[str, Tensor], combination: np.ndarray, constant: float, pin: float
) -> Layer:
    convolution = whisper["conv1/weight"].double()  # [384, 80, 3]
    mix = torch.from_numpy(combination)
    weight = (convolution[:, :, None] * mix[:, None]).flatten(1, 2)
    bias = whisper["conv1/bias"].double() + constant * convolution.sum((1, 2))
    return _pinned(F.pad(weight, (0, 0, 0, NEUTRAL)), bias, pin)


def _second_convolution(whisper: dict[str, Tensor], pin: float) -> Layer:
    weight = F.pad(whisper["conv2/weight"].double(), (0, 0, 0, 2 * NEUTRAL))
    return _pinned(weight, whisper["conv2/bias"].double(), pin)


def _pinned(
    weight: Tensor,
    bias: Tensor,
    pin: float,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    balanced: bool = False,
) -> Layer:
    """Add neutral channels, and balancing ones unless the outputs sum to zero by themselves.

    ``gain`` and ``offset`` are what the norm shall do to the signal channels (by default nothing).
    """
    gain = torch.ones_like(bias) if gain is None else gain
    offset = torch.zeros_like(bias) if offset is None else offset
    if not balanced:
        share = -weight.sum(0, keepdim=True) / NEUTRAL
        weight = torch.cat([weight, share.expand(NEUTRAL, -1, -1)])
        bias = torch.cat([bias, (-bias.sum() / NEUTRAL).expand(NEUTRAL)])
    signs = torch.ones(NEUTRAL, dtype=bias.dtype)
    signs[1::2] = -1
    weight = torch.cat([weight, weight.new_zeros(NEUTRAL, *weight.shape[1:])])
    bias = torch.cat([bias, pin * signs])
    scale = (NEUTRAL * pin**2 / len(bias)) ** 0.5
    rest = (0, len(bias) - len(gain))
    return Layer(weight, bias, F.pad(gain * scale, rest), F.pad(offset, rest))
