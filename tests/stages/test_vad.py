"""Where speech begins and ends: on real speech, on silence and noise, in any chunking."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages import SAMPLE_RATE
from stages.vad import (
    SilenceStarted,
    SpeechAudio,
    SpeechEnded,
    SpeechResumed,
    SpeechStarted,
    VadEvent,
    VadSettings,
    VoiceActivityDetector,
)

Wave = NDArray[np.float32]
Clip = Callable[[str], Wave]
MS = SAMPLE_RATE // 1000


@pytest.fixture(scope="session")
def clip(kit: Path) -> Clip:
    def read(name: str) -> Wave:
        return sf.read(kit / "audio" / f"{name}.wav", dtype="float32")[0]

    return read


@pytest.fixture(scope="session")
def word(clip: Clip) -> Wave:
    """A little over two seconds of uninterrupted speech."""
    return clip("mls")[:38_000]


def silence(milliseconds: int) -> Wave:
    return np.zeros(milliseconds * MS, np.float32)


def join(*waves: Wave) -> Wave:
    return np.concatenate(waves)


def detect(
    wave: Wave, vad: VadSettings | None = None, cuts: list[int] | None = None
) -> list[VadEvent]:
    detector = VoiceActivityDetector(vad)
    events: list[VadEvent] = []
    for begin, end in itertools.pairwise([0, *(cuts or []), len(wave)]):
        events += detector.push(wave[begin:end])
    return events + detector.flush()


def marks(events: list[VadEvent]) -> list[VadEvent]:
    return [e for e in events if not isinstance(e, SpeechAudio)]


def kinds(events: list[VadEvent]) -> list[type]:
    return [type(e) for e in marks(events)]


def audio(events: list[VadEvent]) -> list[SpeechAudio]:
    return [e for e in events if isinstance(e, SpeechAudio)]


def comparable(events: list[VadEvent]) -> list[object]:
    return [
        (e.first_sample, e.samples.tobytes()) if isinstance(e, SpeechAudio) else e for e in events
    ]


def test_one_utterance_is_found_with_pre_roll_and_hangover(word: Wave) -> None:
    events = detect(join(silence(1000), word, silence(1500)))
    start, _, end = marks(events)
    assert isinstance(start, SpeechStarted)
    assert isinstance(end, SpeechEnded)
    begins, ends = 1000 * MS, 1000 * MS + len(word)
    assert begins - 300 * MS <= start.sample < begins + 200 * MS
    assert abs(end.end_of_speech - ends) < 250 * MS
    assert end.endpoint - end.end_of_speech == 600 * MS


def test_pre_roll_reaches_back_before_the_first_voiced_frame(word: Wave) -> None:
    wave = join(silence(1000), word, silence(1000))
    with_it, without = (
        marks(detect(wave, VadSettings(pre_roll_ms=ms)))[0].sample for ms in (300, 0)
    )
    assert without - with_it == 300 * MS


def test_audio_is_the_utterance_without_gap_and_with_a_little_silence(word: Wave) -> None:
    wave = join(silence(1000), word, silence(1500))
    events = detect(wave)
    start, *_, end = marks(events)
    parts = audio(events)
    for one, other in itertools.pairwise(parts):
        assert other.first_sample == one.first_sample + len(one.samples)
    sound = join(*(p.samples for p in parts))
    assert parts[0].first_sample == start.sample
    assert len(sound) == end.end_of_speech + 200 * MS - start.sample
    np.testing.assert_array_equal(sound, wave[start.sample : start.sample + len(sound)])
    assert sound.dtype == np.float32


def test_a_pause_shorter_than_the_hangover_resumes_and_loses_nothing(word: Wave) -> None:
    wave = join(silence(500), word, silence(250), word, silence(1000))
    events = detect(wave)
    assert kinds(events) == [
        SpeechStarted,
        SilenceStarted,
        SpeechResumed,
        SilenceStarted,
        SpeechEnded,
    ]
    start, silent, resumed, _, end = marks(events)
    assert silent.sample <= resumed.sample
    sound = join(*(p.samples for p in audio(events)))
    assert len(sound) == end.end_of_speech + 200 * MS - start.sample
    np.testing.assert_array_equal(sound, wave[start.sample : start.sample + len(sound)])


def test_a_pause_longer_than_the_hangover_makes_two_utterances(word: Wave) -> None:
    events = detect(join(silence(500), word, silence(1500), word, silence(1000)))
    assert kinds(events) == [SpeechStarted, SilenceStarted, SpeechEnded] * 2


def test_audio_flows_without_delay_until_the_trailing_silence_and_is_then_withheld(
    word: Wave,
) -> None:
    detector = VoiceActivityDetector(VadSettings(trailing_ms=100))
    frame = 20 * MS
    wave = join(silence(500), word, silence(2000))
    given = out = 0
    end_of_speech = None
    for begin in range(0, len(wave) - frame, frame):
        for event in detector.push(wave[begin : begin + frame]):
            if isinstance(event, SpeechAudio):
                out = event.first_sample + len(event.samples)
            elif isinstance(event, SilenceStarted):
                end_of_speech = event.sample
        given = begin + frame
        if detector.in_utterance:
            allowed = given if end_of_speech is None else min(given, end_of_speech + 100 * MS)
            assert out <= allowed
            assert out >= min(given, allowed) - 200 * MS
    assert end_of_speech is not None
    assert out == end_of_speech + 100 * MS


@pytest.mark.parametrize("name", ["silence", "min_1280", "short_0100ms"])
def test_silence_and_bursts_too_short_are_no_speech(clip: Clip, name: str) -> None:
    assert detect(join(silence(500), clip(name), silence(1000))) == []


def test_a_burst_shorter_than_the_minimum_never_starts_an_utterance(word: Wave) -> None:
    wave = join(silence(500), word[8000 : 8000 + 250 * MS], silence(1000))
    assert kinds(detect(wave, VadSettings(min_speech_ms=100)))[0] is SpeechStarted
    assert detect(wave, VadSettings(min_speech_ms=600)) == []


@pytest.mark.parametrize("level", [1e-4, 1e-3])
@pytest.mark.parametrize("sound", ["hum", "noise", "offset"])
def test_faint_hum_and_noise_are_no_speech(sound: str, level: float) -> None:
    n = 5 * SAMPLE_RATE
    wave = {
        "hum": np.sin(2 * np.pi * 50 * np.arange(n) / SAMPLE_RATE),
        "noise": np.random.default_rng(1).normal(size=n),
        "offset": np.full(n, 100.0),
    }[sound]
    assert detect((wave * level).astype(np.float32)) == []


def test_speech_below_the_energy_floor_is_none(word: Wave) -> None:
    wave = join(silence(500), word, silence(1000))
    assert kinds(detect(wave * np.float32(0.1)))[0] is SpeechStarted
    assert detect(wave * np.float32(0.1), VadSettings(energy_floor_dbfs=-20.0)) == []


def test_an_endless_utterance_is_cut_and_the_next_follows_without_a_gap(clip: Clip) -> None:
    wave = np.tile(clip("mls")[:35_000], 6)
    events = detect(wave, VadSettings(max_utterance_ms=4000))
    starts = [e for e in marks(events) if isinstance(e, SpeechStarted)]
    ends = [e for e in marks(events) if isinstance(e, SpeechEnded)]
    assert len(starts) == len(ends) >= 3
    for start, end, after in zip(starts, ends, starts[1:], strict=False):
        assert end.endpoint - start.sample <= 4000 * MS
        assert after.sample >= min(end.endpoint, end.end_of_speech + 200 * MS)
    assert starts[1].sample - ends[0].end_of_speech <= 300 * MS


def test_flush_closes_an_open_utterance_up_to_the_last_sample(word: Wave) -> None:
    wave = join(silence(500), word)[:-7]
    events = detect(wave)
    end = marks(events)[-1]
    assert isinstance(end, SpeechEnded)
    assert end.endpoint == len(wave)
    last = audio(events)[-1]
    assert last.first_sample + len(last.samples) == len(wave)


def test_reset_starts_afresh(word: Wave) -> None:
    wave = join(silence(500), word, silence(1000))
    detector = VoiceActivityDetector()
    first = detector.push(wave[:30_001])
    detector.reset()
    again = detector.push(wave) + detector.flush()
    assert first
    assert comparable(again) == comparable(detect(wave))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), frame_ms=st.sampled_from([10, 20, 30]))
def test_streaming_is_offline_for_any_chunking(
    clip_for_property: Wave, data: st.DataObject, frame_ms: int
) -> None:
    wave = clip_for_property
    size = st.one_of(st.integers(0, len(wave)), st.sampled_from([1, 319, 320, 321, len(wave) - 1]))
    cuts = sorted(data.draw(st.lists(size, max_size=40)))
    vad = VadSettings(frame_ms=frame_ms)
    assert comparable(detect(wave, vad, cuts)) == comparable(detect(wave, vad))


@pytest.fixture(scope="session")
def clip_for_property(clip: Clip) -> Wave:
    return join(silence(313), clip("mls")[:60_011], silence(700), clip("espeak")[:30_003])


def test_single_samples_are_a_chunking_too(word: Wave) -> None:
    wave = join(silence(100), word[:9000], silence(50))
    assert comparable(detect(wave, cuts=list(range(len(wave))))) == comparable(detect(wave))


def test_memory_stays_bounded_while_nobody_speaks() -> None:
    detector = VoiceActivityDetector()
    for _ in range(50):
        detector.push(silence(1000))
    held = sum(v.nbytes for v in vars(detector).values() if isinstance(v, np.ndarray))
    assert held < 100_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"frame_ms": 25},
        {"aggressiveness": 4},
        {"on_share": 0.2, "off_share": 0.5},
        {"window_ms": 10},
        {"trailing_ms": 900, "hangover_ms": 600},
        {"pre_roll_ms": -1},
        {"max_utterance_ms": 100},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_share")[0]):
        VadSettings(**wrong)  # type: ignore[arg-type]
