"""Pitch units: F0 by FCPE at 200 Hz, the speaker's mean taken away, coded by a VQ-VAE at 12.5 Hz.

The steps and constants are those of Spirit LM's expressive tokenizer: frames under 50 Hz are
unvoiced and filled by interpolation, F0 is cut at 1100 Hz, the mean over the voiced frames of the
utterance is subtracted, and the encoder's output is replaced by the nearest of 64 code vectors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from stages import SAMPLE_RATE
from stages.checkpoint import CheckpointError, Layout, require
from stages.fcpe import FCPE, LogMel, load_fcpe
from stages.runtime import Graph
from stages.vqvae import PitchVQVAE, load_vqvae

PEAK_THRESHOLD = 0.05  # FCPE scores at or below this mean: no pitch
F0_MIN = 50.0  # Hz; below, a frame counts as unvoiced
F0_MAX = 1100.0  # Hz; F0 is cut here


class UnvoicedError(ValueError):
    """No frame of the utterance is voiced, so that its pitch has no mean to be measured against."""

    def __init__(self, samples: int) -> None:
        super().__init__(
            f"no voiced frame in {samples / SAMPLE_RATE:.2f} s of audio (silence or a whisper?): "
            "its pitch is undefined. Pass allow_unvoiced=True, or use a Base model"
        )


class PitchEncoder:
    """Waves to pitch units. Holds no state between calls.

    ``f0_graph`` and ``code_graph``, where given, are called in place of the torch networks: log
    mel ``[1, T, bands]`` to (peak ``[1, T]``, Hz ``[1, T]``), and F0 with voicing ``[1, 2, T]``
    to codes ``[1, T']``.
    """

    def __init__(
        self,
        mel: LogMel,
        fcpe: FCPE,
        vqvae: PitchVQVAE | None,
        *,
        hop: int = 80,
        device: str | torch.device = "cpu",
        f0_graph: Graph | None = None,
        code_graph: Graph | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.mel, self.fcpe = mel.to(self.device), fcpe.to(self.device)
        self._vqvae = vqvae.to(self.device) if vqvae is not None else None
        self.hop = hop
        self._f0_graph = f0_graph
        self._code_graph = code_graph

    @classmethod
    def load(
        cls,
        layout: Layout,
        device: str | torch.device = "cpu",
        f0_graph: Graph | None = None,
        code_graph: Graph | None = None,
    ) -> PitchEncoder:
        """From a checkpoint's ``vqvae_f0_quantizer`` and the FCPE weights of package ``torchfcpe``.

        Raises:
            CheckpointError: a file is missing, damaged or at odds with its configuration.
        """
        vqvae, config = load_vqvae(layout.pitch)
        path = layout.pitch / "config.yaml"
        if require(config, "sampling_rate", path, int) != SAMPLE_RATE:
            raise CheckpointError(f"{path}: key 'sampling_rate': only {SAMPLE_RATE} is known")
        mel, fcpe = load_fcpe()
        hop = require(config, "code_hop_size", path, int)
        return cls(
            mel, fcpe, vqvae, hop=hop, device=device, f0_graph=f0_graph, code_graph=code_graph
        )

    @property
    def vqvae(self) -> PitchVQVAE:
        """The quantizer. Raises :class:`ValueError` if this encoder was made for F0 alone."""
        if self._vqvae is None:
            raise ValueError("this PitchEncoder has no VQ-VAE: it was made for F0 alone")
        return self._vqvae

    @property
    def code_hop(self) -> int:
        """Samples to a pitch unit."""
        return self.hop * self.vqvae.factor

    @torch.inference_mode()
    def raw_f0(self, wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """FCPE's answer: F0 in Hz (0: no pitch) and peak score, each ``[n // 160 + 1]``."""
        mel = self.mel(torch.from_numpy(np.ascontiguousarray(wave, np.float32)).to(self.device))
        if self._f0_graph is not None:
            peak, hz = self._f0_graph(mel[None].cpu().numpy())
        else:
            peak, hz = (x.cpu().numpy() for x in self.fcpe(mel[None]))
        return np.where(peak[0] > PEAK_THRESHOLD, hz[0], np.float32(0)), peak[0]

    def f0(self, wave: np.ndarray, allow_unvoiced: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """F0 in Hz, interpolated through unvoiced frames, and voicing (1 or 0), at 200 Hz.

        Args:
            wave: float32 mono at 16 kHz, ``[n]``.
            allow_unvoiced: give zeros for a wave without any voiced frame.

        Returns:
            Two float32 arrays ``[n // 80 + 1]``.

        Raises:
            UnvoicedError: no frame is voiced, and that is not allowed.
        """
        raw, _ = self.raw_f0(wave)
        voiced = raw >= F0_MIN
        frames = len(wave) // self.hop + 1
        if not voiced.any():
            if not allow_unvoiced:
                raise UnvoicedError(len(wave))
            return np.zeros(frames, np.float32), np.zeros(frames, np.float32)
        index = np.arange(len(raw))
        filled = np.interp(index, index[voiced], raw[voiced]).astype(np.float32)
        return _stretch(np.minimum(filled, F0_MAX), frames), _stretch(voiced, frames)

    @staticmethod
    def remove_mean(f0: np.ndarray, vuv: np.ndarray, mean: float | None = None) -> np.ndarray:
        """The VQ-VAE's input ``[2, T]``: F0 less its mean over voiced frames, and voicing.

        ``mean``: in Hz, where it is known from elsewhere.
        """
        voiced = vuv > 0
        if mean is None:
            mean = f0[voiced].mean() if voiced.any() else 0.0
        return np.stack([np.where(f0 != 0, f0 - mean, 0), vuv]).astype(np.float32)

    @torch.inference_mode()
    def codes_of(self, pitch_input: np.ndarray) -> np.ndarray:
        """Mean-removed F0 and voicing ``[2, T]`` to int64 codes ``[T // 16]``."""
        if self._code_graph is not None:
            return np.asarray(self._code_graph(pitch_input[None])[0][0])
        x = torch.from_numpy(pitch_input).to(self.device)
        return self.vqvae(x[None])[0].cpu().numpy()

    def units(self, wave: np.ndarray, allow_unvoiced: bool = False) -> np.ndarray:
        """One utterance, at least 1280 samples long, to int64 pitch units at 12.5 Hz.

        Raises:
            UnvoicedError: see :meth:`f0`.
        """
        return self.codes_of(self.remove_mean(*self.f0(wave, allow_unvoiced)))


def _stretch(x: np.ndarray, frames: int) -> np.ndarray:
    """Nearest neighbour: output ``i`` is input ``floor(i * len(x) / frames)``."""
    out = F.interpolate(torch.from_numpy(x.astype(np.float32))[None, None], size=frames)
    return out[0, 0].numpy()
