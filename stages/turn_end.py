"""Whether a turn sounds finished: smart-turn, an audio-only model of prosody, on ONNX Runtime.

smart-turn v3.2 (https://github.com/pipecat-ai/smart-turn, BSD-2-Clause) is a Whisper-tiny encoder
with a classifier on top, quantised to 8 bits. It looks at the last 8 s of the turn: shorter turns
are preceded by zeros, so that the last moment is always in the same place; the whole 8 s, zeros
included, are brought to zero mean and unit variance; then come Whisper's log mel features. The
graph gives a probability, not a logit, whatever its output is called. It expects to be asked at
the beginning of a silence, with some 0.2 s of it in the wave.

The file comes with the PyPI package ``pipecat-ai`` as data. The package is not imported.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages import SAMPLE_RATE
from stages.checkpoint import CheckpointError, package_file
from stages.fcpe import slaney_mel_filters
from stages.runtime import OnnxGraph

WEIGHTS = "smart-turn-v3.2-cpu.onnx"
WINDOW = 8 * SAMPLE_RATE  # samples that the model looks at

_INSTALL = "pip install --no-deps pipecat-ai==1.14.0"
_FFT = 400  # samples; with the hop, the bands and the floor, those of Whisper
_HOP = 160
_BANDS = 80
_POWER_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0  # decades under the loudest bin of the window
_VARIANCE_FLOOR = 1e-7


def find_weights() -> Path:
    """The model inside the installed ``pipecat-ai`` package, which is not imported.

    Raises:
        CheckpointError: the package is not installed or has no such file.
    """
    found = package_file("pipecat", f"audio/turn/smart_turn/data/{WEIGHTS}")
    if found is not None:
        return found
    raise CheckpointError(
        f"{WEIGHTS}: not found. The turn-end model comes with a Python package: run `{_INSTALL}`, "
        "which installs it alone (the extra, pip install 'spiritlm-agent[turn]', brings all that "
        "it depends on as well), or set turns.detector to none"
    )


@cache
def _tables() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A periodic Hann window [400] and mel filters [201, 80]."""
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)).astype(np.float32)
    mels = slaney_mel_filters(SAMPLE_RATE, _FFT, _BANDS, 0.0, SAMPLE_RATE / 2)
    return hann, np.ascontiguousarray(mels.T)


def features(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the model reads of ``wave`` (float32 ``[n]``, 16 kHz): float32 ``[80, 800]``.

    What transformers' ``WhisperFeatureExtractor(chunk_length=8)`` with ``do_normalize`` makes of
    the last 8 s, zeros in front where there is less.
    """
    wave = np.asarray(wave, np.float32)[-WINDOW:]
    padded = np.zeros(WINDOW, np.float32)
    padded[WINDOW - len(wave) :] = wave
    padded = (padded - padded.mean()) / np.sqrt(padded.var() + _VARIANCE_FLOOR)
    hann, mels = _tables()
    framed = np.lib.stride_tricks.sliding_window_view(
        np.pad(padded, _FFT // 2, mode="reflect"), _FFT
    )[: WINDOW // _HOP * _HOP : _HOP]
    power = np.abs(np.fft.rfft(framed * hann)).astype(np.float32) ** 2
    log = np.log10(np.maximum(power @ mels, _POWER_FLOOR))
    log = np.maximum(log, log.max() - _DYNAMIC_RANGE)
    return np.ascontiguousarray(((log + 4) / 4).T, np.float32)


class TurnEndDetector:
    """Tells from its sound how likely a turn is over. Keeps no state between calls."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph

    @classmethod
    def load(cls, threads: int = 1) -> TurnEndDetector:
        """Open the installed model on the CPU, with ``threads`` threads inside a call.

        Raises:
            CheckpointError: it is not installed, or its file is damaged.
        """
        path = find_weights()
        try:
            return cls(OnnxGraph(path, "cpu", threads))
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: not a usable ONNX graph ({error.__cause__}). "
                f"Run `{_INSTALL} --force-reinstall`"
            ) from error

    def probability(self, wave: NDArray[np.float32]) -> float:
        """That the speaker has finished, 0 to 1.

        Args:
            wave: float32 ``[n]``, 16 kHz: the turn so far, with the silence that began. Only the
                last 8 s count; no audio at all gives what the model makes of silence.
        """
        (out,) = self._graph(features(wave)[None])
        return float(np.asarray(out).reshape(-1)[0])
