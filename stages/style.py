"""Style units: a wav2vec2 sequence classifier that gives one of its classes for every second.

The network is ``Wav2Vec2Model`` of transformers with a projection, a mean over blocks of 50
frames (one second; a shorter last block counts) and a linear classifier, as in Spirit LM's
expressive tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import Wav2Vec2Config, Wav2Vec2Model

from stages.checkpoint import (
    CheckpointError,
    Layout,
    fold_weight_norm,
    load_json,
    load_state,
    load_weights,
)
from stages.runtime import Graph

FRAMES_PER_UNIT = 50
_VARIANCE_FLOOR = 1e-7  # of wav2vec2's feature extractor


class StyleNetwork(nn.Module):
    """``forward``: normalised waves ``[B, n]`` to logits ``[B, ceil(T / 50), classes]`` at 1 Hz."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.wav2vec2 = Wav2Vec2Model(config)
        projection = config.classifier_proj_size or config.hidden_size
        self.projector = nn.Linear(config.hidden_size, projection)
        self.classifier = nn.Linear(projection, config.num_labels or 0)
        # The weight norm is folded: it costs time at run time and only complicates an export.
        positions = self.wav2vec2.encoder.pos_conv_embed.conv
        if parametrize.is_parametrized(positions):
            parametrize.remove_parametrizations(positions, "weight")

    def hidden(self, wave: Tensor) -> Tensor:
        """wav2vec2's last hidden state, ``[B, T, hidden]`` at 50 Hz."""
        out: Tensor = self.wav2vec2(wave).last_hidden_state
        return out

    def pool(self, hidden: Tensor) -> Tensor:
        """Projected and averaged over seconds, ``[B, ceil(T / 50), projection]``."""
        x = self.projector(hidden).transpose(1, 2)
        # With ceil_mode, a last window that runs over the end is the mean of what is there.
        pooled = F.avg_pool1d(x, FRAMES_PER_UNIT, FRAMES_PER_UNIT, ceil_mode=True)
        return pooled.transpose(1, 2)

    def forward(self, wave: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.pool(self.hidden(wave)))
        return out


class StyleEncoder:
    """Waves to style units. Holds no state between calls.

    ``graph``, where given, is called in place of the torch network: normalised wave ``[1, n]``
    float32 to logits ``[1, S, classes]``.
    """

    def __init__(
        self,
        network: StyleNetwork,
        device: str | torch.device = "cpu",
        graph: Graph | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.classes: int = network.classifier.out_features
        self._graph = graph

    @classmethod
    def load(
        cls, layout: Layout, device: str | torch.device = "cpu", graph: Graph | None = None
    ) -> StyleEncoder:
        """From a checkpoint's ``style_encoder_w2v2``, weights in ``.bin`` or ``.safetensors`` form.

        Raises:
            CheckpointError: a file is missing, damaged or at odds with its configuration.
        """
        return cls(load_style_network(layout.style), device, graph)

    @torch.inference_mode()
    def logits(self, wave: np.ndarray) -> np.ndarray:
        """One utterance, float32 mono at 16 kHz ``[n]``, to logits ``[ceil(T / 50), classes]``."""
        x = normalise(wave)[None]
        if self._graph is not None:
            return np.asarray(self._graph(x)[0][0])
        return self.network(torch.from_numpy(x).to(self.device))[0].cpu().numpy()

    def units(self, wave: np.ndarray) -> np.ndarray:
        """One utterance to int64 style units, one for each second begun."""
        return self.logits(wave).argmax(-1).astype(np.int64)


def normalise(wave: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance, as wav2vec2's feature extractor has it. Float32 ``[n]``."""
    wave = np.asarray(wave, np.float32)
    return ((wave - wave.mean()) / np.sqrt(wave.var() + _VARIANCE_FLOOR)).astype(np.float32)


def load_style_network(folder: Path) -> StyleNetwork:
    """The network in ``folder``, which holds ``config.json`` and the weights.

    Raises:
        CheckpointError: a file is missing, damaged or at odds with its configuration.
    """
    path = folder / "config.json"
    try:
        config = Wav2Vec2Config(**load_json(path))
        # Masking is for training; without it the embedding it needs is not made.
        config.mask_time_prob = config.mask_feature_prob = 0.0
        network = StyleNetwork(config)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises many kinds for values that do not fit
        raise CheckpointError(f"{path}: not a usable wav2vec2 configuration ({error})") from error
    path = folder / "model.safetensors"
    if not path.is_file():
        path = folder / "pytorch_model.bin"
    state = load_state(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: expected a mapping, found a {type(state).__name__}")
    # The positional convolution has one gain per tap.
    load_weights(network, fold_weight_norm(state, path, axis=2), path, ignore=[_MASK])
    return network.eval().requires_grad_(False)


_MASK = "wav2vec2.masked_spec_embed"
