"""Waves to units: the whole speech tokenizer, for recordings and for live audio.

:class:`SpeechTokenizer` takes a recording; :class:`UnitEncoder` takes the same sound in chunks,
says at once what the units probably are, and in the end exactly what the tokenizer says. What was
said too early is taken back by a :class:`Revision`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from stages import SAMPLE_RATE
from stages.checkpoint import Layout
from stages.phonetic import PhoneticEncoder, fill_blanks
from stages.pitch import PitchEncoder
from stages.provisional import Listener
from stages.resample import resample, to_mono
from stages.runtime import Graph, OnnxGraph
from stages.style import StyleEncoder
from stages.units import HOPS, HUBERT, PITCH, STYLE, Interleaver, UnitFrame, Units

PIECE = 100 * SAMPLE_RATE  # longer input is cut here, and each piece encoded by itself
ENCODER_GRAPHS = ("phonetic", "f0", "pitch", "style")
SHORTEST = 1280  # samples; a piece with fewer has no units


class SpeechTokenizer:
    """Recordings to units. Holds no state between calls.

    Without ``pitch`` and ``style`` it is a Base tokenizer: phonetic units only.
    """

    def __init__(
        self,
        phonetic: PhoneticEncoder,
        pitch: PitchEncoder | None = None,
        style: StyleEncoder | None = None,
    ) -> None:
        if (pitch is None) != (style is None):
            raise ValueError("pitch and style encoders come together (Expressive) or not (Base)")
        self.phonetic, self.pitch, self.style = phonetic, pitch, style

    @classmethod
    def load(
        cls,
        layout: Layout,
        device: str | torch.device = "cpu",
        graphs: Mapping[str, Graph] | None = None,
    ) -> SpeechTokenizer:
        """Everything that the layout's version needs.

        Args:
            graphs: exported graphs by name ("phonetic", "f0", "pitch", "style") to use in place of
                the torch networks.

        Raises:
            CheckpointError: a file is missing, damaged or at odds with its configuration.
        """
        graph = (graphs or {}).get
        phonetic = PhoneticEncoder.load(layout, device, graph("phonetic"))
        if not layout.expressive:
            return cls(phonetic)
        return cls(
            phonetic,
            PitchEncoder.load(layout, device, graph("f0"), graph("pitch")),
            StyleEncoder.load(layout, device, graph("style")),
        )

    @property
    def expressive(self) -> bool:
        return self.pitch is not None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units that come out."""
        return (STYLE, PITCH, HUBERT) if self.expressive else (HUBERT,)

    def encode(
        self,
        wave: np.ndarray,
        rate: int = SAMPLE_RATE,
        channel: int | None = None,
        allow_unvoiced: bool = False,
    ) -> Units:
        """A recording to its units, each stream at its own rate.

        Args:
            wave: float32 ``[n]`` or ``[n, channels]`` in [-1, 1] at ``rate`` Hz.
            channel: the one to take; by default all are averaged.
            allow_unvoiced: take F0 as 0 where no frame of 100 s is voiced, as in a whisper, for
                which the reference has no answer.

        Returns:
            empty streams for less than 1280 samples at 16 kHz.

        Raises:
            UnvoicedError: (Expressive) no frame is voiced, and that is not allowed.
            ValueError: no such channel, a rate or shape that is none.
        """
        mono = resample(to_mono(wave, channel), rate)
        units = self.no_units()
        for start in range(0, len(mono), PIECE):
            units += self.encode_piece(mono[start : start + PIECE], allow_unvoiced)
        return units

    def encode_piece(
        self, wave: np.ndarray, allow_unvoiced: bool = False, codes: np.ndarray | None = None
    ) -> Units:
        """At most 100 s of mono sound at 16 kHz to units; none if it is shorter than 1280 samples.

        ``codes``: the phonetic codes of the first frames, where they are known already.
        """
        if len(wave) < SHORTEST:
            return self.no_units()
        if self.pitch is None or self.style is None:
            return Units(self._phonetic(wave, codes).tolist())
        # Someone waits for these at the end of a turn. Pitch takes about as long as the rest, and
        # outside Python's lock: beside it, on a core that has nothing to do just then.
        with ThreadPoolExecutor(1) as beside:
            pitch = beside.submit(self.pitch.units, wave, allow_unvoiced)
            hubert = self._phonetic(wave, codes)
            style = self.style.units(wave)
            return Units(hubert.tolist(), pitch.result().tolist(), style.tolist())

    def no_units(self) -> Units:
        """Empty streams."""
        return Units([], [], []) if self.expressive else Units([])

    def _phonetic(self, wave: np.ndarray, codes: np.ndarray | None) -> np.ndarray:
        if codes is None or self.phonetic.window is None:
            return self.phonetic.units(wave)
        total = self.phonetic.frames(len(wave))
        rest = self.phonetic.window_codes(wave, len(codes), total, total=total)
        return fill_blanks(np.concatenate([codes, rest]), self.phonetic.blank)


def half_where_same(
    layout: Layout, graphs: Mapping[str, OnnxGraph], waves: Sequence[np.ndarray]
) -> dict[str, OnnxGraph]:
    """The encoder graphs, each in half precision if that leaves the units of ``waves`` as they are.

    Args:
        graphs: by name, as :meth:`SpeechTokenizer.load` takes them; vocoder graphs are left out.
        waves: speech, float32 mono at 16 kHz; the more of it, the more the answer is worth.

    Raises:
        CheckpointError: as :meth:`SpeechTokenizer.load`.
        ValueError: no units in ``waves``: they would stay the same in any precision.
    """
    chosen = {name: graph for name, graph in graphs.items() if name in ENCODER_GRAPHS}

    def units() -> list[Units]:
        tokenizer = SpeechTokenizer.load(layout, graphs=chosen)
        return [tokenizer.encode(wave, allow_unvoiced=True) for wave in waves]

    exact = units()
    if not any(u.hubert for u in exact):
        raise ValueError(f"{len(waves)} recordings without a unit: nothing to compare")
    for name, graph in list(chosen.items()):
        chosen[name] = graph.half()
        if units() != exact:
            chosen[name] = graph
    return chosen


@dataclass(frozen=True)
class Revision:
    """News about the unit stream of an utterance.

    "Of all the frames told so far keep the first ``keep``, then append ``frames``." ``keep`` is as
    large as it can be. A frame that is not final may be taken back later; the last revision, which
    ``flush`` gives, has ``exact`` set: all that it keeps and appends is as final as can be.
    """

    keep: int
    frames: list[UnitFrame] = field(default_factory=list)
    exact: bool = False

    def apply(self, told: Sequence[UnitFrame]) -> list[UnitFrame]:
        """What has been told after this revision, given what had been told before."""
        frames = [*told[: self.keep], *self.frames]
        return [replace(f, final=True) for f in frames] if self.exact else frames


class UnitEncoder:
    """The streaming tokenizer: a stage from waves of any length to :class:`Revision`.

    ``push`` tells provisional units, in chunks of about half a second (Base) or one second
    (Expressive), at a cost that does not grow with the utterance; only when a piece of 100 s is
    full is it encoded exactly. Phonetic units of a network with a window are final when they
    come. ``flush`` gives the exact units: applying all revisions in order yields the very frames
    of ``interleave(tokenizer.encode(whole, allow_unvoiced=True))``, whatever the chunks were.

    ``settle`` gives the exact units too, but the utterance may go on after it: that is for the
    silence in which the speaker may have finished. A ``flush`` that follows it costs nothing.
    """

    def __init__(self, tokenizer: SpeechTokenizer, provisional: bool = True) -> None:
        """``provisional=False`` tells nothing before ``settle`` or ``flush``, which saves work."""
        self.tokenizer = tokenizer
        self._provisional = provisional
        self.reset()

    def reset(self) -> None:
        """A new utterance."""
        self._told: list[UnitFrame] = []
        self._whole = Interleaver(self.tokenizer.kinds)  # fed with complete pieces, exactly
        self._whole_frames: list[UnitFrame] = []
        self._whole_units = self.tokenizer.no_units()
        self._settled: list[UnitFrame] | None = None
        self._begin_piece()

    def push(self, wave: np.ndarray) -> list[Revision]:
        """Take more of the utterance: float32 ``[n]`` at 16 kHz. At most one revision comes back.

        Raises:
            ValueError: ``wave`` has more than one axis.
        """
        wave = np.asarray(wave, np.float32)
        if wave.ndim != 1:
            raise ValueError(f"expected a mono wave [n], not an array of shape {list(wave.shape)}")
        if len(wave):
            self._settled = None
        news = False
        while len(wave):
            room = PIECE - self._listener.sound.length
            self._listener.sound.append(wave[:room])
            wave = wave[room:]
            full = self._listener.sound.length == PIECE
            news |= self._listen(exact_only=full or not self._provisional)
            if full:
                self._end_piece()
                news = True
        return self._tell(self._sure + self._tail()) if news else []

    def settle(self) -> list[Revision]:
        """The exact units if the utterance ended here; it may still go on."""
        frames, sure = self._exact(), len(self._whole_frames)
        return self._tell(frames[:sure] + [replace(f, final=False) for f in frames[sure:]])

    def flush(self) -> list[Revision]:
        """The exact units of the utterance, which ends here. Always one revision."""
        frames = self._exact()
        keep = _common(self._told, frames)
        self.reset()
        return [Revision(keep, frames[keep:], exact=True)]

    def _begin_piece(self) -> None:
        t = self.tokenizer
        self._listener = Listener(t.phonetic, t.pitch, t.style)
        self._stream = copy.deepcopy(self._whole)
        self._sure = list(self._whole_frames)  # their place among the frames named is certain

    def _end_piece(self) -> None:
        units = self._encode_piece()
        self._whole_units += units
        self._whole_frames += self._whole.push(units)
        self._begin_piece()

    def _encode_piece(self) -> Units:
        heard = self._listener
        codes = heard.codes if self.tokenizer.phonetic.window is not None else None
        return self.tokenizer.encode_piece(heard.sound.all(), allow_unvoiced=True, codes=codes)

    def _exact(self) -> list[UnitFrame]:
        if self._settled is None:
            whole = copy.deepcopy(self._whole)
            rest = whole.push(self._encode_piece()) + whole.flush()
            self._settled = self._whole_frames + rest
        return self._settled

    def _listen(self, exact_only: bool) -> bool:
        """Name new provisional units; whether there are any."""
        new = self._listener.listen(exact_only)
        self._sure += self._marked(self._stream.push(new))
        return any(new.streams().values())

    def _tail(self) -> list[UnitFrame]:
        """What comes after the sure frames, up to where every stream but style has been heard.

        The style of a second that is not over is taken to be that of the second before.
        """
        units = (self._whole_units + self._listener.units).streams()
        heard = min(len(units[kind]) * HOPS[kind] for kind in units if kind != STYLE)
        guess = self.tokenizer.no_units()
        if STYLE in units:
            if not units[STYLE]:
                return []
            begun = -(-heard // HOPS[STYLE]) - len(units[STYLE])
            guess.style = units[STYLE][-1:] * max(0, begun)
        tail = self._stream.tail(guess)
        return self._marked([frame for frame in tail if frame.sample < heard])

    def _marked(self, frames: Iterable[UnitFrame]) -> list[UnitFrame]:
        certain = self._listener.phonetic_final
        return [replace(f, final=certain and f.kind == HUBERT) for f in frames]

    def _tell(self, frames: list[UnitFrame]) -> list[Revision]:
        keep = _common(self._told, frames)
        if keep == len(self._told) == len(frames):
            return []
        self._told = frames
        return [Revision(keep, frames[keep:])]


def _common(a: Sequence[UnitFrame], b: Sequence[UnitFrame]) -> int:
    """Length of the longest common prefix, whether frames are final or not."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if (x.index, x.sample, x.kind) != (y.index, y.sample, y.kind):
            return i
    return min(len(a), len(b))
