"""Units to waveform: the vocoder with the reference's rules about what is spoken for how long.

One unit frame is 640 samples (40 ms at 16 kHz). The network is in :mod:`stages.hifigan`, the
streaming form in :mod:`stages.vocoder_stream`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.checkpoint import CheckpointError, Layout, fold_weight_norm, load_state, load_weights
from stages.hifigan import UnitHiFiGAN, VocoderConfig, official_state
from stages.runtime import Graph
from stages.units import RANDOM_STYLES, Units, string_to_units

__all__ = [
    "Frames",
    "UnitHiFiGAN",
    "Vocoder",
    "VocoderConfig",
    "VocoderError",
    "official_state",
]

MAX_FRAMES = 25 * 3600
UnitsLike = str | Units | Mapping[str, Any]


class VocoderError(ValueError):
    """The units given cannot be spoken; the message names the unit, speaker, style or length."""


@dataclass(frozen=True)
class Frames:
    """What the generator is given: one entry per unit or, once repeated, per frame; int64 [T]."""

    code: np.ndarray
    pitch: np.ndarray | None = None
    style: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.code)

    def __getitem__(self, part: slice | np.ndarray) -> Frames:
        return self._each(lambda a: a[part])

    def repeat(self, counts: np.ndarray) -> Frames:
        """Each entry ``counts[i]`` times."""
        return self._each(lambda a: np.repeat(a, counts))

    def _each(self, change: Callable[[np.ndarray], np.ndarray]) -> Frames:
        streams = (self.code, self.pitch, self.style)
        return Frames(*(None if a is None else change(a) for a in streams))  # type: ignore[arg-type]


class Vocoder:
    """Speaks units: ``decode`` as the tokenizer does, ``speak`` as the bare vocoder does.

    ``speakers`` and ``styles`` are the names in the checkpoint's text files, by index. The graphs,
    where given, are called in place of the torch network: ``graph`` with the frames' streams
    ``[1, T]``, the speaker ``[1]``, Base, the style ``[1]``, and the frames of context before and
    after (int64 scalars); ``duration_graph`` with units ``[1, N]``.
    """

    def __init__(
        self,
        model: UnitHiFiGAN,
        *,
        device: str | torch.device = "cpu",
        speakers: Sequence[str] = (),
        styles: Sequence[str] = (),
        graph: Graph | None = None,
        duration_graph: Graph | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.config = model.config
        self.speakers = tuple(speakers)
        self.styles = tuple(styles)
        self._graph = graph
        self._duration_graph = duration_graph

    @classmethod
    def load(
        cls,
        layout: Layout | str | Path,
        device: str | torch.device = "cpu",
        graph: Graph | None = None,
        duration_graph: Graph | None = None,
    ) -> Vocoder:
        """Load ``config.json`` and ``generator.pt`` from a layout or from a vocoder's own folder.

        Raises:
            CheckpointError: a file or key is missing or has another shape than configured.
        """
        folder = layout.vocoder if isinstance(layout, Layout) else Path(layout)
        config = VocoderConfig.load(folder / "config.json")
        path = folder / "generator.pt"
        state = load_state(path)
        if not isinstance(state, Mapping) or not isinstance(state.get("generator"), Mapping):
            raise CheckpointError(f"{path}: key 'generator' is missing")
        model = UnitHiFiGAN(config)
        load_weights(model, fold_weight_norm(state["generator"], path), path)
        return cls(
            model,
            device=device,
            speakers=_names(folder / "speakers.txt"),
            styles=_names(folder / "styles.txt"),
            graph=graph,
            duration_graph=duration_graph,
        )

    # The two computations.

    def log_durations(self, code: np.ndarray) -> np.ndarray:
        """Units int64 [N] -> log(frames + 1), float32 [N]."""
        if self._duration_graph is not None:
            return np.asarray(self._duration_graph(np.asarray(code, np.int64)[None])[0][0])
        with torch.inference_mode():
            batch = torch.as_tensor(code, dtype=torch.int64, device=self.device)[None]
            return self.model.log_durations(batch)[0].float().cpu().numpy()

    def generate(
        self, frames: Frames, speaker: int, style_id: int, left: int = 0, right: int = 0
    ) -> np.ndarray:
        """Frames [T], one speaker and (Base) style -> waveform float32 [(T - left - right) * hop].

        ``left`` and ``right`` frames at the ends are context: heard by the others, not spoken.
        """
        if self._graph is not None:
            given = [a for a in (frames.code, frames.pitch, frames.style) if a is not None]
            inputs = [np.asarray(a, np.int64)[None] for a in given]
            inputs.append(np.array([speaker], np.int64))
            if self.config.styles:
                inputs.append(np.array([style_id], np.int64))
            inputs += [np.array(left, np.int64), np.array(right, np.int64)]
            return np.asarray(self._graph(*inputs)[0][0, 0])
        with torch.inference_mode():
            code, pitch, style, who, how = (
                None if a is None else torch.as_tensor(a, dtype=torch.int64, device=self.device)
                for a in (frames.code, frames.pitch, frames.style, [speaker], [style_id])
            )
            streams = [None if a is None else a[None] for a in (code, pitch, style)]
            wave = self.model(*streams, who, how, left, right)
            return wave[0, 0].float().cpu().numpy()

    # The rules.

    def durations(self, hu: Sequence[int] | np.ndarray) -> np.ndarray:
        """Frames for which each unit is held: ``max(1, round(exp(y) - 1))``, int64 [N].

        ``y`` is the predictor's output for the units; ties round to even.
        """
        code = self._codes(hu, "unit", self.config.units)
        return frames_of(self.log_durations(code)) if len(code) else code

    def decode(
        self,
        units: UnitsLike,
        speaker: int | None = None,
        *,
        dur_pred: bool = True,
        fallback_style: int | None = None,
        seed: int | None = None,
    ) -> np.ndarray:
        """Speak a token string or unit streams, as the reference's tokenizer decodes them.

        A string gives every unit its pitch and style; streams of other lengths than the units'
        are at their own rates (pitch 12.5 Hz, style 1 Hz), and then durations are not predicted.
        Repeated units are kept. A Base vocoder ignores pitch and style.

        Args:
            speaker: index of the speaker; by default 2, or ``default_speaker`` in the config.
            dur_pred: whether to predict durations; otherwise each unit is one frame.
            fallback_style: style token for units without any; drawn from the reference's three
                (by ``seed``) or, where the table lacks those, 0.

        Returns:
            float32 waveform at 16 kHz in [-1, 1].

        Raises:
            VocoderError: nothing to speak, an index beyond its table, a missing pitch stream or
                one that does not fit the units' length.
        """
        hubert, pitch, style = _streams(units)
        if not self.config.expressive:
            pitch = style = None
        else:
            if not pitch and hubert:
                raise VocoderError(
                    "no pitch token: an Expressive vocoder needs at least one [Pi..] with the "
                    "units; put one in front, or use a Base vocoder"
                )
            if not style:
                style = [self.fallback_style(fallback_style, seed)] * max(1, len(pitch or ()))
            dur_pred = dur_pred and len(pitch or ()) == len(hubert)
        return self.speak(hubert, pitch, style, speaker=speaker, dur_pred=dur_pred, dedup=False)

    def speak(
        self,
        code: Sequence[int] | np.ndarray,
        pitch: Sequence[int] | np.ndarray | None = None,
        style: Sequence[int] | np.ndarray | None = None,
        *,
        speaker: int | None = None,
        style_id: int | None = None,
        dur_pred: bool = True,
        dedup: bool = True,
    ) -> np.ndarray:
        """Speak unit streams, as the reference's bare vocoder does.

        Negative units are dropped. With predicted durations, repeated units are merged first
        unless ``dedup`` is off, and pitch and style need one entry per unit.

        Raises:
            VocoderError: as :meth:`decode`.
        """
        frames = self.frames(code, pitch, style, dur_pred=dur_pred, dedup=dedup)
        speaker, style_id = self.voice(speaker, style_id)
        return self.generate(frames, speaker, style_id)

    def frames(
        self,
        code: Sequence[int] | np.ndarray,
        pitch: Sequence[int] | np.ndarray | None = None,
        style: Sequence[int] | np.ndarray | None = None,
        *,
        dur_pred: bool = True,
        dedup: bool = True,
    ) -> Frames:
        """What :meth:`speak` hands to the generator: every stream with one entry per frame."""
        raw = np.asarray(code, dtype=np.int64).reshape(-1)
        keep = raw >= 0
        codes = self._codes(raw[keep], "unit", self.config.units)
        if not len(codes):
            raise VocoderError("nothing to speak: there is no unit [Hu..] in the input")
        extras = (
            self._extra(pitch, "pitch", self.config.pitches, keep, dur_pred),
            self._extra(style, "style", self.config.style_tokens, keep, dur_pred),
        )
        if not dur_pred:
            n = len(codes)
            ratios = (self.config.pitch_repeat, self.config.style_repeat)
            kinds = ("pitch", "style")
            fitted = [
                None if e is None else stretch(e, r, n, k)
                for e, r, k in zip(extras, ratios, kinds, strict=True)
            ]
            return Frames(codes, *fitted)
        given = Frames(codes, *extras)
        if dedup:
            given = given[np.r_[True, codes[1:] != codes[:-1]]]
        counts = self.durations(given.code)
        if counts.sum() > MAX_FRAMES:
            raise VocoderError(
                f"the predicted durations add up to {int(counts.sum())} frames, more than an hour; "
                "is the duration predictor of this checkpoint damaged?"
            )
        return given.repeat(counts)

    def voice(self, speaker: int | None = None, style_id: int | None = None) -> tuple[int, int]:
        """Speaker and (Base) style indices with their defaults, checked against the tables."""
        speaker = self.config.default_speaker if speaker is None else int(speaker)
        style_id = self.config.default_style if style_id is None else int(style_id)
        for name, index, size in (
            ("speaker", speaker, self.config.speakers),
            ("style", style_id, self.config.styles),
        ):
            if size and not 0 <= index < size:
                raise VocoderError(f"{name} {index}: this vocoder has {name}s 0 to {size - 1}")
        return speaker, style_id

    def fallback_style(self, style: int | None = None, seed: int | None = None) -> int:
        """Style token for units without any: ``style``, else one of the reference's three."""
        if style is not None:
            return style
        known = [s for s in RANDOM_STYLES if s < self.config.style_tokens]
        return random.Random(seed).choice(known or [0])

    def _extra(
        self,
        given: Sequence[int] | np.ndarray | None,
        kind: str,
        size: int,
        keep: np.ndarray,
        per_unit: bool,
    ) -> np.ndarray | None:
        """A pitch or style stream, checked; None where this vocoder has no such table."""
        if not size:
            return None
        if given is None or not len(given):
            raise VocoderError(f"no {kind} stream: an Expressive vocoder needs pitch and style")
        codes = self._codes(given, kind, size)
        if not per_unit:
            return codes
        if len(codes) != len(keep):
            raise VocoderError(
                f"{len(codes)} {kind} tokens for {len(keep)} units: predicting durations needs one "
                f"per unit; give one each, or switch the prediction off"
            )
        return codes[keep]

    def _codes(self, given: Sequence[int] | np.ndarray, kind: str, size: int) -> np.ndarray:
        codes = np.asarray(given, dtype=np.int64).reshape(-1)
        wrong = codes[(codes < 0) | (codes >= size)]
        if len(wrong):
            raise VocoderError(f"{kind} {wrong[0]}: this vocoder's table has 0 to {size - 1}")
        return codes


def frames_of(log_durations: np.ndarray) -> np.ndarray:
    """``max(1, round_half_even(exp(y) - 1))`` as int64; float32 as the reference computes it."""
    with np.errstate(over="ignore"):
        raw = np.round(np.exp(log_durations.astype(np.float32)) - np.float32(1))
    if not np.isfinite(raw).all():
        raise VocoderError("the duration predictor gave no finite number; is the file damaged?")
    return np.maximum(raw, 1).astype(np.int64)


def stretch(codes: np.ndarray, ratio: int, frames: int, kind: str) -> np.ndarray:
    """Hold each code for ``ratio`` frames, then cut, or extend by the last one, to ``frames``.

    Raises:
        VocoderError: the lengths differ by two codes or more.
    """
    held = np.repeat(codes, ratio)
    if abs(len(held) - frames) // ratio > 1:
        raise VocoderError(
            f"{len(codes)} {kind} tokens cover {len(held)} frames, the units {frames}: they differ "
            f"by more than one token; give one {kind} token per {ratio} units"
        )
    return np.pad(held, (0, max(0, frames - len(held))), mode="edge")[:frames]


def _streams(units: UnitsLike) -> tuple[list[int], list[int] | None, list[int] | None]:
    """Hu, Pi and St indices of a token string, a :class:`Units` or a mapping of streams."""
    if isinstance(units, str):
        units = string_to_units(units)
    if isinstance(units, Mapping):
        return (
            _numbers(units.get("hubert", ()), "hubert"),
            _numbers(units["pitch"], "pitch") if "pitch" in units else None,
            _numbers(units["style"], "style") if "style" in units else None,
        )
    return units.hubert, units.pitch, units.style


def _numbers(stream: Any, name: str) -> list[int]:
    """A stream given as ints or as a space-separated string (the reference's form)."""
    parts = stream.split() if isinstance(stream, str) else stream
    try:
        return [int(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise VocoderError(
            f"{name} units {str(stream)[:40]!r}: expected whole numbers, or a string of them "
            "separated by spaces"
        ) from error


def _names(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split() if path.is_file() else []
