"""nano's hearing over whole recordings, faster than window by window and equal to it.

The convolutions of nano's front end see a few frames, and neighbouring windows overlap by most of
their length: so the front end runs over the recording once, only the frames at the edges of each
window (where the window's silence differs from the recording's next samples) are computed again,
and the blocks run on windows of equal length in batches. Rounding apart, this is what
``PhoneticEncoder.features`` gives; the saving is a third.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F

from stages.checkpoint import CheckpointError, load_state
from stages.hubert import Hubert, build_hubert
from stages.phonetic import Quantizer, Window, load_quantizer, read_window

OUT = Path("checkpoints/nano/speech_tokenizer/hubert_25hz")
HUBERT, QUANTIZER = "mhubert_base_25hz.pt", "L11_quantizer_500.pt"
_EDGE = 2  # unit frames that hold every front-end frame which an edge can change
_BATCH = 8


class Listener:
    """Features and classes of recordings through the streaming window. Not thread-safe."""

    def __init__(self, hubert: Hubert, window: Window, quantizer: Quantizer | None = None) -> None:
        self.hubert, self.window, self.quantizer = hubert, window, quantizer
        self._constants: dict[int, Tensor] = {}
        self._taps: dict[int, Tensor] = {}

    @torch.inference_mode()
    def features(self, wave: np.ndarray) -> np.ndarray:
        """One recording, float32 ``[n]``, to features ``[T, width]`` float32."""
        total = self.hubert.frames(len(wave))
        x = torch.from_numpy(np.ascontiguousarray(wave[: total * self.hubert.hop], np.float32))
        out = np.zeros((total, self.hubert.width), np.float32)
        if total == 0:
            return out
        groups: dict[int, list[tuple[int, int, int, Tensor]]] = defaultdict(list)
        for window in self._fronts(x, total):
            groups[len(window[-1])].append(window)
        for group in groups.values():
            for i in range(0, len(group), _BATCH):
                part = group[i : i + _BATCH]
                features = self._blocks(torch.stack([front for *_, front in part])).numpy()
                for (first, end, low, _), row in zip(part, features, strict=True):
                    out[first:end] = row[first - low : end - low]
        return out

    @torch.inference_mode()
    def whole(self, wave: np.ndarray) -> np.ndarray:
        """Features of one recording heard as a whole, without windows."""
        return self.hubert(torch.from_numpy(wave.astype(np.float32))[None])[0].numpy()

    @torch.inference_mode()
    def classify(self, features: np.ndarray) -> np.ndarray:
        """Features ``[T, width]`` to classes, int64 ``[T]``."""
        assert self.quantizer is not None
        return self.quantizer(torch.from_numpy(features)).argmax(-1).numpy()

    def _fronts(self, x: Tensor, total: int) -> Iterator[tuple[int, int, int, Tensor]]:
        """For every chunk: its first frame and end, where its window begins, the front end's."""
        hop, pool = self.hubert.hop, self.hubert.pool
        whole = self._front(x[None])[0]
        windows = [
            (first, end, *self.window.seen(first, total))
            for first, end in self.window.spans(0, total)
        ]
        starts = sorted({low for *_, low, _ in windows if low > 0})
        stops = sorted({high for *_, high in windows if high < total})
        cuts = [slice(a * hop, (a + _EDGE) * hop) for a in starts]
        cuts += [slice((b - _EDGE) * hop, b * hop) for b in stops]
        edges = self._front(torch.stack([x[cut] for cut in cuts])) if cuts else whole[None, :0]
        at_start = dict(zip(starts, edges, strict=False))
        at_stop = dict(zip(stops, edges[len(starts) :], strict=False))
        for first, end, low, high in windows:
            front = whole[low * pool : high * pool].clone()
            if low in at_start:
                front[:pool] = at_start[low][:pool]
            if high in at_stop:
                front[-pool:] = at_stop[high][-pool:]
            yield first, end, low, front

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
        """The positional convolution by Fourier transform.

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


def load_listener(hubert: Path, quantizer: Path | None = None) -> Listener:
    """From a checkpoint that has a window. Raises CheckpointError if it cannot be used."""
    content = load_state(hubert)
    network = build_hubert(content, hubert)
    window = read_window(content["model_cfg"], hubert)
    if window is None:
        raise CheckpointError(f"{hubert}: model_cfg.window is missing; recipes are for nano's ears")
    return Listener(network, window, load_quantizer(quantizer) if quantizer else None)


def cache_stamp(*paths: Path) -> str:
    """Changes when the content of the files does."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def encode_many(
    hubert: Path,
    todo: Mapping[str, tuple[Path, int]],
    jobs: int,
    quantizer: Path | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Features, or classes where a quantizer is given, of many recordings, as they get done.

    Args:
        todo: by name, a 16 kHz mono file and how many samples to cut off its beginning.
        jobs: processes, of one thread each.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, _start, (hubert, quantizer)) as pool:
        items = [(name, *what) for name, what in todo.items()]
        yield from pool.imap_unordered(_encode, items, chunksize=4)


_LISTENER: list[Listener] = []  # of this worker process


def _start(hubert: Path, quantizer: Path | None) -> None:
    torch.set_num_threads(1)
    _LISTENER.append(load_listener(hubert, quantizer))


def _encode(item: tuple[str, Path, int]) -> tuple[str, np.ndarray]:
    name, path, cut = item
    wave, _ = soundfile.read(path, dtype="float32")
    features = _LISTENER[0].features(wave[cut:])
    return name, features if _LISTENER[0].quantizer is None else _LISTENER[0].classify(features)
