"""Units to waveform while the units still come: small first chunks, then growing ones.

A chunk of frames is generated together with the frames around it that its samples depend on (the
halo), so that every sample, the first and last included, equals the offline result. Durations need
two units of look-ahead, waveforms :func:`receptive_field` frames; ``lookahead_frames`` trades the
latter for latency.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stages.hifigan import receptive_field
from stages.vocoder import Frames, Vocoder, VocoderError, frames_of


@dataclass(frozen=True)
class UnitSpan:
    """Samples ``[start, end)`` of the reply in which one unit is spoken.

    ``unit`` counts the phonetic units pushed since the reset, ``token`` all units pushed (pitch and
    style too): the ledger that finds the token being spoken at a heard position.
    """

    unit: int
    token: int
    start: int
    end: int


@dataclass(frozen=True)
class AudioChunk:
    """Consecutive samples at 16 kHz, float32 in [-1, 1], and which unit each belongs to.

    ``first_sample`` is the chunk's place in the reply. A unit cut by the chunk's end has one span
    in each of the chunks.
    """

    samples: np.ndarray
    first_sample: int
    units: tuple[UnitSpan, ...]

    @property
    def end(self) -> int:
        return self.first_sample + len(self.samples)


class UnitLike(Protocol):
    """A :class:`stages.units.UnitFrame` or :class:`stages.units.Unit`."""

    @property
    def kind(self) -> str: ...
    @property
    def index(self) -> int: ...


class StreamingVocoder:
    """A stage from units to :class:`AudioChunk`.

    Push the units of the token stream in order: each phonetic unit takes the latest pitch and style
    before it, those before any the first that comes (they wait for it, unless ``initial_pitch`` and
    ``initial_style`` are given). A Base vocoder ignores pitch and style.

    Args:
        speaker, style_id: as in :meth:`Vocoder.speak`.
        dur_pred: whether to predict durations; otherwise each unit is one frame.
        first_chunk_frames: frames in the first chunk (40 ms each).
        max_chunk_frames: chunks double up to this.
        lookahead_frames: frames after a chunk that must be known before it is generated; None for
            as many as make it exact (nano 7). Fewer gain nano little: by ``python -m
            bench.lookahead``, -41 dB of error at 4 for a first sound 4 ms sooner, -25 dB at 2 and
            -14 dB at 0 for 6 ms. 60 sentences were too few to tell word error rates apart.
        fallback_style: style when none came before the end; drawn at random otherwise.

    Raises:
        VocoderError: from the constructor for an unknown speaker or style, from ``push`` for a unit
            beyond its table, from ``flush`` where :meth:`Vocoder.decode` would raise it.
    """

    def __init__(
        self,
        vocoder: Vocoder,
        *,
        speaker: int | None = None,
        style_id: int | None = None,
        dur_pred: bool = True,
        first_chunk_frames: int = 4,
        max_chunk_frames: int = 32,
        lookahead_frames: int | None = None,
        initial_pitch: int | None = None,
        initial_style: int | None = None,
        fallback_style: int | None = None,
    ) -> None:
        if not 1 <= first_chunk_frames <= max_chunk_frames:
            raise ValueError(
                f"first_chunk_frames {first_chunk_frames} and max_chunk_frames {max_chunk_frames}: "
                "expected 1 <= first <= max"
            )
        self.vocoder = vocoder
        self.speaker, self.style_id = vocoder.voice(speaker, style_id)
        self.dur_pred = dur_pred
        self.left, self.right = receptive_field(vocoder.config)
        exact = lookahead_frames is None or lookahead_frames >= self.right
        self.lookahead = self.right if exact or lookahead_frames is None else lookahead_frames
        if self.lookahead < 0:
            raise ValueError(f"lookahead_frames {lookahead_frames}: expected 0 or more, or None")
        self.first, self.most = first_chunk_frames, max_chunk_frames
        self.initial = (initial_pitch, initial_style)
        self.fallback_style = fallback_style
        self.reset()

    def reset(self) -> None:
        """Forget everything pushed: a new utterance."""
        wanted = self.vocoder.config.expressive
        self._pitch, self._style = self.initial if wanted else (0, 0)
        self._firsts = (self._pitch, self._style)
        self._tokens = 0
        self._waiting: list[tuple[int, int, int | None, int | None]] = []
        self._units: list[tuple[int, int, int, int]] = []  # code, pitch, style, token
        self._frames: list[int] = []  # the unit of each frame
        self._timed = 0  # units whose durations are known
        self._spoken = 0  # frames emitted
        self._samples = 0
        self._chunk = self.first

    @property
    def pending_frames(self) -> int:
        """Frames known but not yet spoken."""
        return len(self._frames) - self._spoken

    def push(self, item: UnitLike) -> list[AudioChunk]:
        """Take one unit of the stream; return the chunks that can be spoken now."""
        self._take(item)
        return self._advance(final=False)

    def push_all(self, items: Iterable[UnitLike]) -> list[AudioChunk]:
        """As :meth:`push`, for several units at once."""
        for item in items:
            self._take(item)
        return self._advance(final=False)

    def flush(self) -> list[AudioChunk]:
        """The units have ended: the rest, in chunks. An empty utterance gives none."""
        if self._waiting:
            if self._pitch is None:
                raise VocoderError(
                    f"{len(self._waiting)} units but no pitch token: an Expressive vocoder needs "
                    "one; push one, or give initial_pitch"
                )
            self._style = self.vocoder.fallback_style(self.fallback_style)
            self._attach()
        return self._advance(final=True)

    def _take(self, item: UnitLike) -> None:
        config, index = self.vocoder.config, int(item.index)
        if item.kind == "Hu":
            self._check("unit", index, config.units)
            self._waiting.append((index, self._tokens, self._pitch, self._style))
        elif item.kind == "Pi" and config.expressive:
            self._check("pitch", index, config.pitches)
            self._pitch = index
        elif item.kind == "St" and config.expressive:
            self._check("style", index, config.style_tokens)
            self._style = index
        elif item.kind not in ("Pi", "St"):
            raise VocoderError(f"unit kind {item.kind!r}: expected 'Hu', 'Pi' or 'St'")
        self._tokens += 1
        self._attach()

    def _check(self, kind: str, index: int, size: int) -> None:
        if not 0 <= index < size:
            raise VocoderError(f"{kind} {index}: this vocoder's table has 0 to {size - 1}")

    def _attach(self) -> None:
        """Units wait until a pitch and a style have been seen; those before any take the first."""
        first_pitch, first_style = self._firsts
        first_pitch = self._pitch if first_pitch is None else first_pitch
        first_style = self._style if first_style is None else first_style
        self._firsts = (first_pitch, first_style)
        if first_pitch is None or first_style is None:
            return
        for code, token, pitch, style in self._waiting:
            pitch = first_pitch if pitch is None else pitch
            style = first_style if style is None else style
            self._units.append((code, pitch, style, token))
        self._waiting.clear()

    def _advance(self, final: bool) -> list[AudioChunk]:
        self._time(final)
        chunks = []
        while count := self._next_count(final):
            chunks.append(self._speak(count, final))
            self._chunk = min(2 * self._chunk, self.most)
        return chunks

    def _time(self, final: bool) -> None:
        """Give frames to every unit whose duration no later unit can change."""
        # Two convolutions of this kernel: each unit sees kernel - 1 units either side.
        halo = self.vocoder.config.duration_kernel - 1 if self.dur_pred else 0
        end = len(self._units) if final else len(self._units) - halo
        if end <= self._timed:
            return
        counts = np.ones(end - self._timed, dtype=np.int64)
        if self.dur_pred:
            start = max(0, self._timed - halo)
            code = np.array([unit[0] for unit in self._units[start:]], dtype=np.int64)
            counts = frames_of(self.vocoder.log_durations(code)[self._timed - start : end - start])
        for unit, count in zip(range(self._timed, end), counts.tolist(), strict=True):
            self._frames += [unit] * count
        self._timed = end

    def _next_count(self, final: bool) -> int:
        """Frames of the next chunk; 0 while too few are known."""
        known = self.pending_frames
        if not final:
            return self._chunk if known >= self._chunk + self.lookahead else 0
        # A last chunk of a few frames would cost as much again in halo: join it to this one.
        return known if known <= self._chunk + self._chunk // 2 else self._chunk

    def _speak(self, count: int, final: bool) -> AudioChunk:
        begin, end = self._spoken, self._spoken + count
        low = max(0, begin - self.left)
        high = min(len(self._frames), end + (self.right if final else self.lookahead))
        samples = self.vocoder.generate(
            self._halo(low, high), self.speaker, self.style_id, begin - low, high - end
        )
        chunk = AudioChunk(samples, self._samples, self._spans(begin, end, len(samples)))
        self._spoken, self._samples = end, chunk.end
        return chunk

    def _halo(self, low: int, high: int) -> Frames:
        units = np.array([self._units[u][:3] for u in self._frames[low:high]], dtype=np.int64)
        if self.vocoder.config.expressive:
            return Frames(units[:, 0], units[:, 1], units[:, 2])
        return Frames(units[:, 0])

    def _spans(self, begin: int, end: int, samples: int) -> tuple[UnitSpan, ...]:
        hop, spans = self.vocoder.config.hop, []
        at = begin
        while at < end:
            unit, after = self._frames[at], at + 1
            while after < end and self._frames[after] == unit:
                after += 1
            stop = self._samples + (samples if after == end else (after - begin) * hop)
            spans.append(UnitSpan(unit, self._units[unit][3], self._samples + (at - begin) * hop,
                                  stop))  # fmt: skip
            at = after
        return tuple(spans)
