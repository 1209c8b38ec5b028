"""The streaming tokenizer: any chunking gives what the whole gives, and revisions say so."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from stages import encoder as module
from stages.checkpoint import find_layout
from stages.encoder import Revision, SpeechTokenizer, UnitEncoder, half_where_same
from stages.units import HUBERT, UnitFrame, interleave

NANO = Path(__file__).resolve().parents[2] / "checkpoints" / "nano"
MODELS = ("kit-base", "kit-expressive", "nano")
Load = Callable[[str], SpeechTokenizer]


@functools.cache
def _load(root: Path, version: str) -> SpeechTokenizer:
    return SpeechTokenizer.load(find_layout(root, version=version))


@pytest.fixture
def load(kit: Path) -> Load:
    def by_name(name: str) -> SpeechTokenizer:
        if name != "nano":
            return _load(kit / "checkpoints", name.removeprefix("kit-"))
        if not (NANO / "speech_tokenizer" / "style_encoder_w2v2").is_dir():
            pytest.skip("nano is not trained yet")
        return _load(NANO, "expressive")

    return by_name


@pytest.fixture(scope="module")
def speech(kit: Path) -> np.ndarray:
    """3.4 s of speech with a pause in it, of no round length."""
    wave, _ = soundfile.read(kit / "audio" / "espeak.wav", dtype="float32")
    return np.concatenate([wave[:30000], np.zeros(9000, np.float32), wave[40000:55321]])


def chunks(wave: np.ndarray, seed: int, largest: int) -> list[np.ndarray]:
    """``wave`` cut at random places, empty chunks included."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, largest, size=len(wave) // max(1, largest // 4) + 8)
    cuts = [int(c) for c in np.cumsum(sizes) if c < len(wave)]
    return [wave[a:b] for a, b in itertools.pairwise([0, *cuts, len(wave)])]


def stream(encoder: UnitEncoder, parts: list[np.ndarray]) -> tuple[list[UnitFrame], list[Revision]]:
    """What has been told in the end, and the revisions, each checked as it comes."""
    told: list[UnitFrame] = []
    revisions = []
    for part in parts:
        for revision in encoder.push(part):
            assert not revision.exact
            told = checked(told, revision)
            revisions.append(revision)
    for revision in encoder.flush():
        told = checked(told, revision)
        revisions.append(revision)
    assert revisions[-1].exact
    return told, revisions


def checked(told: list[UnitFrame], revision: Revision) -> list[UnitFrame]:
    """``told`` after ``revision``; it takes back no more than it must, and nothing final."""
    assert 0 <= revision.keep <= len(told)
    after = revision.apply(told)
    if revision.keep < len(told) and revision.frames:
        old, new = told[revision.keep], revision.frames[0]
        assert (old.kind, old.index, old.sample) != (new.kind, new.index, new.sample)
    now = {(f.kind, f.index, f.sample) for f in after}
    for frame in told[revision.keep :]:
        assert not frame.final or (frame.kind, frame.index, frame.sample) in now
    samples = [f.sample for f in after if f.kind == HUBERT]
    assert samples == sorted(samples)
    return after


def whole(tokenizer: SpeechTokenizer, wave: np.ndarray) -> list[UnitFrame]:
    return interleave(tokenizer.encode(wave, allow_unvoiced=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("seed", "largest"), [(0, 700), (1, 9000), (2, 40000)])
def test_any_chunking_gives_the_whole(
    load: Load, speech: np.ndarray, model: str, seed: int, largest: int
) -> None:
    tokenizer = load(model)
    told, revisions = stream(UnitEncoder(tokenizer), chunks(speech, seed, largest))
    assert told == whole(tokenizer, speech)
    assert all(frame.final for frame in told)
    assert len(revisions) > 1, "something is told before the end"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("samples", [0, 1, 1279, 1280, 1281, 5000, 12800, 16000, 20479, 20480])
def test_short_utterances(load: Load, speech: np.ndarray, model: str, samples: int) -> None:
    tokenizer = load(model)
    wave = speech[20000 : 20000 + samples]
    told, _ = stream(UnitEncoder(tokenizer), chunks(wave, samples, 3000))
    assert told == whole(tokenizer, wave)
    assert bool(told) == (samples >= 1280)


@pytest.mark.parametrize("model", MODELS)
def test_pieces(
    load: Load, speech: np.ndarray, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long input is cut; the last piece is long enough for units, or too short for them."""
    monkeypatch.setattr(module, "PIECE", 24000)
    tokenizer = load(model)
    for length, seed in ((48000, 0), (48000 + 1279, 1), (len(speech), 2)):
        wave = speech[:length]
        told, _ = stream(UnitEncoder(tokenizer), chunks(wave, seed, 20000))
        assert told == whole(tokenizer, wave)
    in_one_go, _ = stream(UnitEncoder(tokenizer), [speech])
    assert in_one_go == whole(tokenizer, speech)


@pytest.mark.parametrize("model", MODELS)
def test_settling_is_exact_and_the_utterance_may_go_on(
    load: Load, speech: np.ndarray, model: str
) -> None:
    tokenizer = load(model)
    encoder = UnitEncoder(tokenizer)
    told: list[UnitFrame] = []
    for start, end in ((0, 9000), (9000, 9000), (9000, 41000)):
        for revision in [*encoder.push(speech[start:end]), *encoder.settle()]:
            told = checked(told, revision)
        expected = whole(tokenizer, speech[:end])
        assert [(f.kind, f.index, f.sample) for f in told] == [
            (f.kind, f.index, f.sample) for f in expected
        ]
    for revision in [*encoder.push(speech[41000:]), *encoder.flush()]:
        told = checked(told, revision)
    assert told == whole(tokenizer, speech)


def test_flush_after_settling_costs_nothing(
    load: Load, speech: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load("kit-expressive")
    encoder = UnitEncoder(tokenizer)
    encoder.push(speech[:20000])
    encoder.settle()
    monkeypatch.setattr(tokenizer, "encode_piece", None)  # calling it would fail
    (revision,) = encoder.flush()
    assert revision.exact and not revision.frames


def test_a_stage_starts_anew(load: Load, speech: np.ndarray) -> None:
    tokenizer = load("kit-expressive")
    encoder = UnitEncoder(tokenizer)
    first, _ = stream(encoder, [speech[:30000]])
    again, _ = stream(encoder, [speech[:30000]])
    encoder.push(speech)
    encoder.reset()
    after_reset, _ = stream(encoder, [speech[:30000]])
    assert first == again == after_reset


def test_nothing_provisional_on_request(load: Load, speech: np.ndarray) -> None:
    tokenizer = load("kit-expressive")
    encoder = UnitEncoder(tokenizer, provisional=False)
    told, revisions = stream(encoder, chunks(speech, 3, 5000))
    assert len(revisions) == 1
    assert told == whole(tokenizer, speech)


def test_a_whisper_has_units(load: Load) -> None:
    """Without any voiced frame the reference fails; a conversation must not."""
    tokenizer = load("kit-expressive")
    noise = 0.01 * np.random.default_rng(0).standard_normal(30000).astype(np.float32)
    noise[:5000] = 0
    assert tokenizer.pitch is not None
    assert not tokenizer.pitch.f0(noise, allow_unvoiced=True)[1].any()
    told, _ = stream(UnitEncoder(tokenizer), chunks(noise, 0, 4000))
    assert told == whole(tokenizer, noise)
    assert {f.kind for f in told} == {"St", "Pi", "Hu"}


def test_with_a_window_phonetic_units_are_final_at_once(load: Load, speech: np.ndarray) -> None:
    tokenizer = load("nano")
    base = SpeechTokenizer(tokenizer.phonetic)
    encoder = UnitEncoder(base)
    told: list[UnitFrame] = []
    for part in chunks(speech, 5, 3000):
        for revision in encoder.push(part):
            assert revision.keep == len(told)
            assert all(frame.final for frame in revision.frames)
            told = revision.apply(told)
    (last,) = encoder.flush()
    assert last.keep == len(told)
    assert last.apply(told) == whole(base, speech)


def test_cost_of_a_second_does_not_grow(
    load: Load, speech: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load("kit-expressive")
    assert tokenizer.pitch is not None and tokenizer.style is not None
    seen: list[int] = []

    def watched(call: Callable[..., Any], wave: np.ndarray, *rest: Any, **named: Any) -> Any:
        seen.append(len(wave))
        return call(wave, *rest, **named)

    for part, name in (
        (tokenizer.phonetic, "raw_codes"),
        (tokenizer.pitch, "f0"),
        (tokenizer.style, "units"),
    ):
        monkeypatch.setattr(part, name, functools.partial(watched, getattr(part, name)))
    encoder = UnitEncoder(tokenizer)
    for _ in range(4):
        for start in range(0, len(speech), 4000):
            encoder.push(speech[start : start + 4000])
    assert max(seen) <= 81 * 640
    assert sum(seen) < 13 * 4 * len(speech)  # 80 / 12 + 28 / 12 + 3 times


def test_only_mono_waves() -> None:
    encoder = UnitEncoder.__new__(UnitEncoder)
    with pytest.raises(ValueError, match="mono wave"):
        encoder.push(np.zeros((10, 2), np.float32))


class Rounded:
    """The style network as a graph, and another in its place when half precision is asked for."""

    def __init__(self, network: torch.nn.Module, other: torch.nn.Module) -> None:
        self.network, self.other = network, other

    def __call__(self, wave: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            return [self.network(torch.from_numpy(wave)).numpy()]

    def half(self) -> Rounded:
        return Rounded(self.other, self.other)


def test_half_precision_only_where_no_unit_moves(kit: Path, load: Load, speech: np.ndarray) -> None:
    layout = find_layout(kit / "checkpoints", version="expressive")
    style = load("kit-expressive").style
    assert style is not None
    moved = copy.deepcopy(style.network)
    with torch.no_grad():
        moved.classifier.bias[(style.units(speech)[0] + 1) % style.classes] += 1e6
    for other, taken in ((style.network, True), (moved, False)):
        graph: Any = Rounded(style.network, other)
        (chosen,) = half_where_same(layout, {"style": graph, "vocoder": graph}, [speech]).values()
        assert (chosen is not graph) == taken
    with pytest.raises(ValueError, match="without a unit"):
        half_where_same(layout, {"style": graph}, [speech[:100]])
