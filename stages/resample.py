"""Sampling rates and channels: from any recording to a mono wave at 16 kHz.

The resampler is the windowed sinc that torchaudio uses by default, and so the one that Spirit LM's
units were made with. For playing and for live audio, where 1e-5 does not matter, use soxr.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from stages import SAMPLE_RATE

ZERO_CROSSINGS = 6  # of the sinc on each side: torchaudio's lowpass_filter_width
ROLLOFF = 0.99  # cut-off as a fraction of the lower Nyquist frequency: torchaudio's rolloff

_BLOCK = 1 << 15  # output samples computed at a time, which bounds the memory


def resample(wave: ArrayLike, rate: int, to: int = SAMPLE_RATE) -> np.ndarray:
    """Resample ``wave`` ``[n]`` or ``[n, channels]`` from ``rate`` to ``to`` Hz, float32.

    The result has ``ceil(n * to / rate)`` samples; sample ``i`` is at time ``i / to``. It equals
    ``torchaudio.functional.resample`` with its default arguments to 1e-6.

    Raises:
        ValueError: a rate is no positive whole number.
    """
    for name, value in (("rate", rate), ("to", to)):
        if value != int(value) or value <= 0:
            raise ValueError(f"{name} {value}: a sampling rate is a positive whole number of Hz")
    x = np.asarray(wave, dtype=np.float32)
    common = math.gcd(int(rate), int(to))
    step, phases = int(rate) // common, int(to) // common
    if step == phases or not len(x):
        return x.copy()
    weights, offsets = _polyphase(step, phases)
    taps = weights.shape[1]
    length = -(-len(x) * phases // step)
    before = -int(offsets.min())
    last = (length - 1) // phases * step + int(offsets.max()) + taps
    padding = [(before, max(0, last - len(x))), *[(0, 0)] * (x.ndim - 1)]
    windows = sliding_window_view(np.pad(x, padding), taps, axis=0)
    out = np.empty((length, *x.shape[1:]), np.float32)
    for start in range(0, length, _BLOCK):
        period, phase = np.divmod(np.arange(start, min(start + _BLOCK, length)), phases)
        first = period * step + offsets[phase] + before
        out[start : start + _BLOCK] = np.einsum("n...t,nt->n...", windows[first], weights[phase])
    return out


def _polyphase(step: int, phases: int) -> tuple[np.ndarray, np.ndarray]:
    """The filter for ``phases`` output samples on every ``step`` input samples.

    Output sample ``p`` of a period stands at ``p * step / phases`` input samples. Its filter is a
    sinc cut off at ``ROLLOFF`` of the lower Nyquist frequency under a squared-cosine (Hann)
    window of ``ZERO_CROSSINGS`` on each side.

    Returns:
        weights float32 ``[phases, taps]`` and the input sample ``[phases]`` of the first tap.
    """
    cutoff = min(step, phases) * ROLLOFF / step  # in half cycles per input sample
    reach = ZERO_CROSSINGS / cutoff
    centres = np.arange(phases) * step / phases
    offsets = np.ceil(centres - reach).astype(np.int64)
    samples = offsets[:, None] + np.arange(math.floor(2 * reach) + 1)
    t = ((samples - centres[:, None]) * cutoff).clip(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = np.cos(t * np.pi / ZERO_CROSSINGS / 2) ** 2
    return (np.sinc(t) * window * cutoff).astype(np.float32), offsets


def to_mono(wave: ArrayLike, channel: int | None = None) -> np.ndarray:
    """The mean of the channels of ``wave``, or one of them: float32 ``[n]``.

    Args:
        wave: ``[n]`` or ``[n, channels]``, as soundfile reads it.
        channel: counted from 0; by default all are averaged, as the reference does.

    Raises:
        ValueError: no such channel, or another number of axes.
    """
    x = np.asarray(wave, dtype=np.float32)
    if x.ndim not in (1, 2):
        raise ValueError(f"a wave has shape [n] or [n, channels], not {list(x.shape)}")
    channels = 1 if x.ndim == 1 else x.shape[1]
    if channel is not None and not 0 <= channel < channels:
        raise ValueError(f"channel {channel}: the audio has channels 0 to {channels - 1}")
    if x.ndim == 1:
        return x
    if not channels:
        raise ValueError("the audio has no channel")
    return x.mean(axis=1, dtype=np.float32) if channel is None else x[:, channel].copy()
