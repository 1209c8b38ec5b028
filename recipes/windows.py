"""Windowed features of many recordings, faster than window by window and equal to it.

The convolutions of nano's front end see a few frames, and neighbouring windows overlap by most of
their length: so the front end runs over the recording once, only the frames at the edges of each
window (where the window's silence differs from the recording's next samples) are computed again,
and the blocks run on windows of equal length in batches. Rounding apart (1e-5), this is what
``PhoneticEncoder.features`` gives.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.phonetic import PhoneticEncoder

_EDGE = 2  # unit frames that hold every front-end frame which an edge can change
_BATCH = 8


class WindowedFeatures:
    """Features of recordings through an encoder that has a window, on one CPU thread or more."""

    def __init__(self, encoder: PhoneticEncoder) -> None:
        if encoder.window is None:
            raise ValueError("this encoder listens to whole utterances: it has no window")
        self.encoder, self.window = encoder, encoder.window
        self.hubert = encoder.network.hubert
        self._constants: dict[int, Tensor] = {}
        self._taps: dict[int, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """One recording, float32 ``[n]``, to features ``[T, width]`` float32."""
        total = self.encoder.frames(len(wave))
        x = torch.from_numpy(np.ascontiguousarray(wave[: total * self.encoder.hop], np.float32))
        out = np.zeros((total, self.encoder.width), np.float32)
        if total == 0:
            return out
        groups: dict[int, list[tuple[int, int, int, Tensor]]] = defaultdict(list)
        for first, end, low, front in self._fronts(x, total):
            groups[len(front)].append((first, end, low, front))
        for group in groups.values():
            for i in range(0, len(group), _BATCH):
                part = group[i : i + _BATCH]
                features = self._blocks(torch.stack([front for *_, front in part])).numpy()
                for (first, end, low, _), row in zip(part, features, strict=True):
                    out[first:end] = row[first - low : end - low]
        return out

    def _fronts(self, x: Tensor, total: int) -> list[tuple[int, int, int, Tensor]]:
        """For every chunk: its first frame and end, where its window begins, the front end's."""
        hop, pool = self.encoder.hop, self.hubert.pool
        whole = self._front(x[None])[0]
        windows = [
            (first, end, *self.window.seen(first, total))
            for first, end in self.window.spans(0, total)
        ]
        starts = sorted({low for *_, low, _ in windows if low > 0})
        stops = sorted({high for *_, high in windows if high < total})
        cuts = [slice(a * hop, (a + _EDGE) * hop) for a in starts]
        cuts += [slice((b - _EDGE) * hop, b * hop) for b in stops]
        edges = self._front(torch.stack([x[cut] for cut in cuts])) if cuts else whole[None]
        at_start = dict(zip(starts, edges, strict=False))
        at_stop = dict(zip(stops, edges[len(starts) :], strict=False))
        out = []
        for first, end, low, high in windows:
            front = whole[low * pool : high * pool].clone()
            if low in at_start:
                front[:pool] = at_start[low][:pool]
            if high in at_stop:
                front[-pool:] = at_stop[high][-pool:]
            out.append((first, end, low, front))
        return out

    def _front(self, waves: Tensor) -> Tensor:
        """``[B, n]`` to what the last convolution gives, ``[B, frames, channels]``."""
        padded = F.pad(waves, self.hubert.padding)
        return self.hubert.model.feature_extractor(padded).transpose(1, 2)

    def _blocks(self, front: Tensor) -> Tensor:
        """``[B, frames, channels]`` through projection, positions and layers, pooled."""
        model = self.hubert.model
        hidden = model.feature_projection(front)
        hidden = hidden + self._positions(hidden)
        for layer in model.encoder.layers:
            hidden = layer(hidden)
        return F.avg_pool1d(hidden.transpose(1, 2), self.hubert.pool).transpose(1, 2)

    def _positions(self, hidden: Tensor) -> Tensor:
        """The positional convolution by Fourier transform, here several times as fast.

        The constant that the projection adds is a thousand times the signal: its part is computed
        once, exactly, and only the signal's goes through the transform.
        """
        model = self.hubert.model
        embed, constant = model.encoder.pos_conv_embed, model.feature_projection.projection.bias
        steps, taps = hidden.shape[1], embed.conv.weight[:, 0]
        if steps not in self._constants:
            flat = constant[None, :, None].expand(1, -1, steps)
            self._constants[steps] = embed.padding(embed.conv(flat)).transpose(1, 2)
            size = 1 << (steps + taps.shape[1] - 1).bit_length()
            self._taps[steps] = torch.fft.rfft(taps.flip(1), size)
        spectrum = self._taps[steps]
        size, before = 2 * (spectrum.shape[-1] - 1), taps.shape[1] - 1 - taps.shape[1] // 2
        signal = torch.fft.rfft((hidden - constant).transpose(1, 2), size)
        mixed = torch.fft.irfft(signal * spectrum, size)[..., before : before + steps]
        return embed.activation(mixed.transpose(1, 2) + self._constants[steps])
