"""Phonetic units: HuBERT features at 25 Hz, a small quantizer with a blank, the blank rule.

Two ways of listening. An official checkpoint normalises over the whole utterance, so its units
exist only at the end. nano's carries a :class:`Window`: its units are computed from a stretch of
the past and a short look-ahead, so that a stream and a file give the same ones, and each is final
as soon as its window is complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.checkpoint import CheckpointError, Layout, load_state, load_weights, require
from stages.hubert import Hubert, build_hubert

Graph = Callable[..., Sequence[np.ndarray]]


@dataclass(frozen=True)
class Window:
    """What a chunk of unit frames is computed from, in unit frames.

    The units of frames ``[k * chunk, (k + 1) * chunk)`` see the samples of frames
    ``[k * chunk - left, (k + 1) * chunk + right)``, as far as the utterance has them, and nothing
    else.
    """

    chunk: int
    left: int
    right: int

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Frames ``[start, stop)`` cut at the chunks' borders: (first, last + 1) of each piece."""
        while start < stop:
            end = min(stop, (start // self.chunk + 1) * self.chunk)
            yield start, end
            start = end

    def seen(self, frame: int, total: int) -> tuple[int, int]:
        """Frames that the chunk around ``frame`` sees in an utterance of ``total`` frames."""
        first = frame // self.chunk * self.chunk
        return max(0, first - self.left), min(total, first + self.chunk + self.right)

    def ready(self, total: int) -> int:
        """How many frames are final once ``total`` frames of an unfinished utterance are there."""
        return max(0, (total - self.right) // self.chunk * self.chunk)


class Quantizer(nn.Sequential):
    """Three linear layers with leaky ReLU (slope 0.01); the last class is the blank.

    Widths ``d``, ``d - m // 4``, ``d - m // 2``, ``classes`` with ``m = upstream - classes``.
    """

    def __init__(self, dim: int, upstream: int, classes: int) -> None:
        m = upstream - classes
        widths = (dim, dim - m // 4, dim - m // 2, classes)
        first, second, third = (nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        super().__init__(first, nn.LeakyReLU(), second, nn.LeakyReLU(), third)
        self.width, self.classes = dim, classes


class PhoneticNetwork(nn.Module):
    """``forward``: waves ``[B, n]`` to features ``[B, T, width]``, logits ``[B, T, classes]``."""

    def __init__(self, hubert: Hubert, quantizer: Quantizer) -> None:
        super().__init__()
        self.hubert = hubert
        self.quantizer = quantizer

    def forward(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        features = self.hubert(wave)
        return features, self.quantizer(features)


class PhoneticEncoder:
    """Waves (float32 mono at 16 kHz) to phonetic units. Holds no state between calls.

    Attributes:
        hop: samples to a unit frame; frame ``i`` begins at sample ``i * hop``.
        blank: the quantizer's blank class.
        window: how it listens; ``None`` for whole utterances only.
    """

    def __init__(
        self,
        network: PhoneticNetwork,
        window: Window | None = None,
        device: str | torch.device = "cpu",
        graph: Graph | None = None,
    ) -> None:
        """``graph``, where given, is called in place of the torch network: wave ``[1, n]`` float32
        to features and logits."""
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.window = window
        self.hop = network.hubert.hop
        self.width = network.hubert.width
        self.classes = network.quantizer.classes
        self.blank = self.classes - 1
        self._graph = graph

    @classmethod
    def load(
        cls, layout: Layout, device: str | torch.device = "cpu", graph: Graph | None = None
    ) -> PhoneticEncoder:
        """From a checkpoint's ``hubert_25hz`` folder.

        Raises:
            CheckpointError: a file is missing, damaged, at odds with its configuration, or wants
                normalised input (which the reference cannot do either).
        """
        checkpoint = _mapping(load_state(layout.hubert), layout.hubert)
        hubert = build_hubert(checkpoint, layout.hubert)
        quantizer = load_quantizer(layout.quantizer)
        if quantizer.width != hubert.width:
            raise CheckpointError(
                f"{layout.quantizer}: takes features of width {quantizer.width}, but "
                f"{layout.hubert.name} gives {hubert.width}. Do the two belong together?"
            )
        window = read_window(checkpoint["model_cfg"], layout.hubert)
        if window is not None and any(hubert.frames(n * hubert.hop) != n for n in (1, 99)):
            raise CheckpointError(
                f"{layout.hubert}: with a window, every {hubert.hop} samples must give one frame; "
                "model_cfg.input_padding does not fit model_cfg.conv_feature_layers"
            )
        return cls(PhoneticNetwork(hubert, quantizer), window, device, graph)

    def through(self, window: Window | None) -> PhoneticEncoder:
        """The same network listening through another window, or to whole utterances."""
        return PhoneticEncoder(self.network, window, self.device, self._graph)

    def frames(self, samples: int) -> int:
        """Unit frames of an utterance of ``samples`` samples."""
        return samples // self.hop if self.window else self.network.hubert.frames(samples)

    def frames_ready(self, samples: int) -> int:
        """Frames that are final when ``samples`` samples of an unfinished utterance are there."""
        return self.window.ready(self.frames(samples)) if self.window else 0

    def features(self, wave: np.ndarray) -> np.ndarray:
        """One utterance ``[n]`` to features ``[T, width]`` float32."""
        return self._whole(wave, 0)

    def logits(self, wave: np.ndarray) -> np.ndarray:
        """One utterance ``[n]`` to logits ``[T, classes]`` float32, before any softmax."""
        return self._whole(wave, 1)

    def raw_codes(self, wave: np.ndarray) -> np.ndarray:
        """One utterance ``[n]`` to the best class of each frame, blanks included, int64 ``[T]``."""
        return self.logits(wave).argmax(-1).astype(np.int64)

    def units(self, wave: np.ndarray) -> np.ndarray:
        """One utterance ``[n]`` to phonetic units, int64 ``[T]`` at 25 Hz, after the blank rule."""
        return fill_blanks(self.raw_codes(wave), self.blank)

    def window_codes(
        self, wave: np.ndarray, start: int, stop: int, *, origin: int = 0, total: int
    ) -> np.ndarray:
        """Codes of frames ``[start, stop)``, window by window: what :meth:`raw_codes` gives there.

        Args:
            wave: samples from frame ``origin`` on, at least those that the windows see.
            start, stop: frames wanted; windows are cut at multiples of ``window.chunk``.
            origin: the frame at which ``wave`` begins, for a stream that forgets its past.
            total: frames of the utterance so far; where it ends if it has ended.

        Raises:
            ValueError: ``wave`` does not hold what the windows see, or there is no window.
        """
        parts = [p.argmax(-1) for p in self._windows(wave, start, stop, origin, total, 1)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _whole(self, wave: np.ndarray, output: int) -> np.ndarray:
        wave = np.asarray(wave, np.float32)
        total = self.frames(len(wave))
        if total < 1:
            return np.zeros((0, (self.width, self.classes)[output]), np.float32)
        if self.window is None:
            return self._run(wave, output)
        return np.concatenate(list(self._windows(wave, 0, total, 0, total, output)))

    def _windows(
        self, wave: np.ndarray, start: int, stop: int, origin: int, total: int, output: int
    ) -> Iterator[np.ndarray]:
        if self.window is None:
            raise ValueError("this encoder listens to whole utterances only: it has no window")
        for first, end in self.window.spans(start, stop):
            low, high = self.window.seen(first, total)
            a, b = (low - origin) * self.hop, (high - origin) * self.hop
            if a < 0 or b > len(wave):
                raise ValueError(
                    f"frames {first} to {end} see samples {low * self.hop} to {high * self.hop}, "
                    f"but the wave holds {origin * self.hop} to {origin * self.hop + len(wave)}"
                )
            yield self._run(wave[a:b], output)[first - low : end - low]

    @torch.inference_mode()
    def _run(self, wave: np.ndarray, output: int) -> np.ndarray:
        x = np.ascontiguousarray(wave, np.float32)[None]
        if self._graph is not None:
            return np.asarray(self._graph(x)[output][0])
        return self.network(torch.from_numpy(x).to(self.device))[output][0].cpu().numpy()


def fill_blanks(codes: np.ndarray, blank: int = 500) -> np.ndarray:
    """Give every blank the nearest code to its left, circularly; int64, shape kept.

    Leading blanks take the last code of the sequence. The rows of a batch are one sequence, as in
    the reference: a row's leading blanks take the end of the row before. Nothing but blanks stays
    so.
    """
    flat = np.asarray(codes, np.int64).reshape(-1)
    known = flat != blank
    if known.any():
        source = np.where(known, np.arange(len(flat)), -1)
        source = np.maximum.accumulate(source)
        source[source < 0] = source[-1]
        flat = flat[source]
    return flat.reshape(np.shape(codes))


def load_quantizer(path: Path) -> Quantizer:
    """The quantizer in ``path``: a mapping with ``model_cfg`` and ``model_weight``.

    Raises:
        CheckpointError: missing, damaged, or at odds with its configuration.
    """
    checkpoint = _mapping(load_state(path), path)
    dim, upstream, vocabulary = (
        require(checkpoint, f"model_cfg.{key}", path, int)
        for key in ("dim", "upstream_dim", "vocab_size")
    )
    try:
        quantizer = Quantizer(dim, upstream, vocabulary + 1)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: model_cfg describes no quantizer ({error})") from error
    load_weights(quantizer, require(checkpoint, "model_weight", path, dict), path)
    return quantizer.eval().requires_grad_(False)


def read_window(cfg: Mapping[str, Any], path: Path) -> Window | None:
    """The ``window`` of a ``model_cfg``; :class:`CheckpointError` where it makes no sense."""
    value = cfg.get("window")
    if value is None:
        return None
    sizes = [require(value, key, f"{path}: model_cfg.window", int) for key in _WINDOW_KEYS]
    if sizes[0] < 1 or min(sizes) < 0:
        raise CheckpointError(
            f"{path}: model_cfg.window is {value!r}, expected chunk >= 1, left and right >= 0"
        )
    return Window(*sizes)


_WINDOW_KEYS = ("chunk", "left", "right")


def _mapping(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: expected a mapping, found a {type(value).__name__}")
    return value
