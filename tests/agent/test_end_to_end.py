"""The whole pipeline with the kit's small random models: what streams is what is computed whole."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agent.answer import answer
from agent.audio_files import AudioFileSink, AudioFileSource, read_chunks
from agent.config import Config
from agent.events import Event, Heard, ReplyAudio, ReplyText, TurnEnded, TurnStarted
from agent.models import Models
from agent.telemetry import MARKS, TurnTrace
from stages import SAMPLE_RATE
from stages.lm import LanguageModel
from stages.units import interleave
from stages.vad import SpeechAudio, SpeechEnded, VoiceActivityDetector

Session = tuple[list[TurnTrace], list[Event], tuple[int, ...]]

DECIDED = ("end_of_speech", "endpoint", "first_sample", "last_sample")
MADE = ("encoder_done", "prefill_done", "first_token", "first_unit", "first_sample")


def configuration(kit: Path, version: str, mode: str) -> Config:
    root = kit / "checkpoints"
    found = sorted((root / "spiritlm_model").glob(f"*{version}*"))
    if not found:
        pytest.skip(f"this kit has no {version} language model")
    sampling = {"seed": 3}
    return Config.model_validate(
        {
            "model": {"root": str(root), "lm": found[0].name, "runtime": "torch"},
            "sampling": {"text": sampling, "speech": sampling},
            "reply": {"mode": mode, "max_seconds": 1.5, "max_text_tokens": 10},
        }
    )


@pytest.fixture(scope="module")
def models(kit: Path) -> Models:
    return Models.load(configuration(kit, "expressive", "text-then-speech"))


@pytest.fixture(scope="module")
def recording(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two utterances, a second and a half of silence between them, in stereo at 24 kHz."""
    rate = 24_000
    wave, given = soundfile.read(kit / "audio" / "mls.wav", dtype="float32")
    wave = np.repeat(wave[: 2 * given], 3)[::2]  # 16 to 24 kHz, coarsely
    quiet = np.zeros(int(1.5 * rate), np.float32)
    both = np.concatenate([quiet, wave, quiet, wave[::-1][: len(wave) // 2], quiet])
    path = tmp_path_factory.mktemp("audio") / "talk.flac"
    soundfile.write(path, np.stack([both, both], axis=1), rate)
    return path


def converse(models: Models, config: Config, recording: Path, out: Path) -> Session:
    events: list[Event] = []
    sink = AudioFileSink(out)

    async def run() -> list[TurnTrace]:
        return await answer(models, config, AudioFileSource(recording), sink, events.append)

    traces = asyncio.run(run())
    return traces, events, models.lm.ids


@pytest.fixture(scope="module")
def session(models: Models, recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    out = tmp_path_factory.mktemp("out") / "reply.wav"
    return converse(models, models.config, recording, out)


def utterances(config: Config, recording: Path) -> list[np.ndarray]:
    """What the detector cuts out of the whole recording, handed over at once."""
    wave = np.concatenate(list(read_chunks(recording)))
    vad, parts, found = VoiceActivityDetector(config.vad.settings()), [], []
    for event in [*vad.push(wave), *vad.flush()]:
        if isinstance(event, SpeechAudio):
            parts.append(event.samples)
        elif isinstance(event, SpeechEnded):
            found.append(np.concatenate(parts))
            parts = []
    return found


def test_the_cache_holds_what_a_whole_recording_gives(
    models: Models, session: Session, recording: Path
) -> None:
    """Request units in the language model's cache: those of the utterances encoded offline."""
    _, _, ids = session
    heard = utterances(models.config, recording)
    assert heard, "the kit's recording should count as speech"
    tokenizer, position = models.tokenizer, 0
    opening = tokenizer.encode("[Speech]")
    for wave in heard:
        units = models.speech_tokenizer.encode(wave, allow_unvoiced=True)
        expected = [*opening, *tokenizer.unit_ids(interleave(units))]
        opening = [tokenizer.speech_tag]
        assert list(ids[position : position + len(expected)]) == expected
        assert ids[position + len(expected)] == tokenizer.text_tag
        end = ids.index(tokenizer.eos, position)
        assert tokenizer.speech_tag in ids[position + len(expected) : end]
        position = end + 1
    assert position == len(ids)


def test_the_cache_is_as_if_it_had_been_filled_at_once(models: Models, session: Session) -> None:
    _, _, ids = session
    fresh = LanguageModel.load(models.layout)
    fresh.append(ids)
    assert models.lm.ids == ids
    np.testing.assert_allclose(models.lm.logits, fresh.logits, atol=1e-4)


def test_every_turn_is_told_in_order_and_traced(session: Session) -> None:
    traces, events, _ = session
    assert [trace.turn for trace in traces] == list(range(1, len(traces) + 1))
    for trace in traces:
        told = [e for e in events if e.turn == trace.turn]
        assert isinstance(told[0], TurnStarted) and isinstance(told[-1], TurnEnded)
        times = trace.milliseconds
        assert list(times) == [mark for mark in MARKS if mark != "first_heard"]
        for order in (DECIDED, MADE):
            moments = [times[mark] for mark in order]
            assert moments == sorted(moments)
        assert trace.said == "".join(e.text for e in told if isinstance(e, ReplyText))
        assert len([e for e in told if isinstance(e, Heard)]) <= 1
        audio = [e for e in told if isinstance(e, ReplyAudio)]
        assert [e.first_sample for e in audio] == list(
            np.cumsum([0, *(len(e.samples) for e in audio)])[:-1]
        )
        assert 0 < trace.reply_samples <= 1.5 * SAMPLE_RATE
        assert trace.counts["speech_tokens"] > 0
        for counters in trace.channels.values():
            assert counters["dropped"] == 0
            assert int(counters["high_water"]) <= int(counters["capacity"])


def test_the_file_holds_the_replies(
    models: Models, recording: Path, session: Session, tmp_path: Path
) -> None:
    """A second session says the same, sample for sample, and leaves nothing behind."""
    _, before, _ = session
    with _nothing_left_behind():
        traces, events, _ = converse(models, models.config, recording, tmp_path / "reply.wav")
    first, second = (
        np.concatenate([e.samples for e in told if isinstance(e, ReplyAudio)])
        for told in (before, events)
    )
    np.testing.assert_array_equal(first, second)
    written, rate = soundfile.read(tmp_path / "reply.wav", dtype="float32")
    assert rate == SAMPLE_RATE
    assert len(written) == len(second) + (len(traces) - 1) * SAMPLE_RATE // 2
    start = traces[0].reply_samples
    np.testing.assert_allclose(written[:start], second[:start], atol=1e-4)


@pytest.mark.parametrize("version", ["base", "expressive"])
@pytest.mark.parametrize("mode", ["speech", "any"])
def test_models_that_only_continue(
    kit: Path, recording: Path, tmp_path: Path, version: str, mode: str
) -> None:
    config = configuration(kit, version, mode)
    models = Models.load(config)
    traces, _, ids = converse(models, config, recording, tmp_path / "reply.wav")
    assert traces and all(trace.ended for trace in traces)
    opening = models.tokenizer.encode("[Speech]")
    assert list(ids[: len(opening)]) == opening
    assert max(ids) < len(models.tokenizer.mask("any")) and ids.count(models.tokenizer.eos)


class _nothing_left_behind:
    """No thread and no open file more than before."""

    def __enter__(self) -> None:
        self._before = self._open()

    def __exit__(self, *exception: object) -> None:
        assert self._open() <= self._before

    @staticmethod
    def _open() -> set[str]:
        files = set()
        for link in Path("/proc/self/fd").glob("*") if Path("/proc/self/fd").is_dir() else ():
            with contextlib.suppress(OSError):
                files.add(link.readlink())
        named = {str(file) for file in files if file.suffix in (".flac", ".wav")}
        threads = {thread.name for thread in threading.enumerate()}
        return named | {name for name in threads if name.startswith("spirit")}


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("spirit")]
