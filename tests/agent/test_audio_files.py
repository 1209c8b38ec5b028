"""Audio files in and out: any rate and channels, constant memory, nothing left open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from numpy.typing import NDArray

from agent.audio_files import AudioFileSink, AudioFileSource, check_audio, read_chunks
from agent.errors import UserError

Wave = NDArray[np.float32]
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a file of a 440 Hz tone."""

    def make(
        name: str = "a.wav",
        seconds: float = 1.0,
        rate: int = 16000,
        channels: int = 1,
        **how: Any,
    ) -> Path:
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
        sf.write(tmp_path / name, np.repeat(tone[:, None], channels, axis=1), rate, **how)
        return tmp_path / name

    return make


def whole(path: Path, chunk: int = 320) -> Wave:
    return np.concatenate(list(read_chunks(path, chunk)))


def open_files() -> set[str]:
    links = Path("/proc/self/fd")
    if not links.is_dir():
        pytest.skip("no /proc to look for open files in")
    return {str(p.readlink()) for p in links.iterdir() if p.is_symlink()}


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 1), (48000, 1)])
def test_every_format_rate_and_channel_count_becomes_16_khz_mono(
    make: Make, name: str, rate: int, channels: int
) -> None:
    wave = whole(make(name, 1.0, rate, channels))
    assert wave.dtype == np.float32
    assert abs(len(wave) - 16000) <= 1
    spectrum = np.abs(np.fft.rfft(wave[:16000]))
    assert np.argmax(spectrum) == 440
    assert np.abs(wave[2000:-2000]).max() == pytest.approx(0.5, abs=0.03)


def test_eight_channels_at_96_khz(make: Make) -> None:
    wave = whole(make("a.wav", 2.0, 96000, 8, subtype="PCM_24"))
    assert abs(len(wave) - 32000) <= 1


def test_16_khz_mono_is_exact_and_channels_are_averaged(tmp_path: Path) -> None:
    pcm = np.random.default_rng(0).integers(-32768, 32767, (5000, 2), dtype=np.int16)
    sf.write(tmp_path / "a.wav", pcm[:, 0], 16000, subtype="PCM_16")
    np.testing.assert_array_equal(whole(tmp_path / "a.wav"), pcm[:, 0] / np.float32(32768))
    sf.write(tmp_path / "b.wav", pcm, 16000, subtype="PCM_16")
    expected = pcm.astype(np.float64).mean(axis=1) / 32768
    np.testing.assert_allclose(whole(tmp_path / "b.wav"), expected, atol=1e-7)


def test_chunks_have_the_size_asked_for_and_do_not_change_the_wave(make: Make) -> None:
    path = make(rate=44100, seconds=1.3)
    chunks = list(read_chunks(path, 777))
    assert {len(c) for c in chunks[:-1]} == {777}
    assert 0 < len(chunks[-1]) <= 777
    np.testing.assert_array_equal(np.concatenate(chunks), whole(path, 16000))


def test_memory_does_not_grow_with_the_file(make: Make) -> None:
    import tracemalloc

    def peak(path: Path) -> int:
        tracemalloc.start()
        for _ in read_chunks(path):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    short, long = make("s.wav", 2, 48000, 2), make("l.wav", 12, 48000, 2)
    assert peak(long) < 1.2 * peak(short)


def refusal(path: str | Path, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_chunks(path, **how)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_is_wrong_with_a_file_is_said_before_reading(tmp_path: Path, make: Make) -> None:
    text, empty, nothing = (tmp_path / n for n in ("a.txt", "empty.wav", "nothing.wav"))
    text.write_text("this is not audio")
    empty.touch()
    sf.write(nothing, np.zeros(0), 16000)
    assert "no such file" in refusal(tmp_path / "none.wav")
    assert "is a directory" in refusal(tmp_path)
    assert "is not audio" in refusal(text)
    assert "is empty" in refusal(empty)
    assert "no audio at all" in refusal(nothing)
    assert "audio.max_seconds" in refusal(make("long.wav", 3.0), max_seconds=2.0)
    slow = tmp_path / "slow.wav"
    sf.write(slow, np.zeros(100), 10)
    assert "sampling rate of 10 Hz" in refusal(slow)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_found_where_they_are(tmp_path: Path, value: float) -> None:
    wave = np.zeros((48000, 2), np.float32)
    wave[36000, 1] = value
    sf.write(tmp_path / "a.wav", wave, 24000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"sample 36000 \(1.50 s\) is NaN or infinite"):
        list(read_chunks(tmp_path / "a.wav"))


def test_a_damaged_file_ends_in_a_message(make: Make) -> None:
    path = make("a.flac", 5.0)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) // 2))
    try:
        wave = whole(path)
    except UserError as error:
        assert "damaged" in str(error)
    else:
        assert len(wave) <= 5 * 16000


def test_files_are_closed_also_when_reading_stops_early(make: Make) -> None:
    path = make(seconds=3.0, rate=48000)
    chunks = read_chunks(path)
    next(chunks)
    assert str(path) in open_files()
    chunks.close()  # type: ignore[attr-defined]
    assert str(path) not in open_files()


def test_the_source_gives_the_file_and_leaves_nothing_behind(make: Make) -> None:
    path = make(seconds=2.5)

    async def read() -> tuple[Wave, Wave]:
        async with AudioFileSource(path) as source:
            assert source.seconds == 2.5
            everything = [c async for c in source]
            first = [c async for c in source][:1]
        return np.concatenate(everything), first[0]

    everything, first = asyncio.run(read())
    np.testing.assert_array_equal(everything, whole(path))
    np.testing.assert_array_equal(first, everything[:320])
    assert str(path) not in open_files()


def test_the_source_closes_its_file_when_left_or_cancelled(make: Make) -> None:
    path = make(seconds=30.0)

    async def read_one() -> None:
        iterator = aiter(AudioFileSource(path, "realtime"))
        await anext(iterator)
        await iterator.aclose()  # type: ignore[attr-defined]

    async def cancelled() -> None:
        async def read() -> None:
            async for _ in AudioFileSource(path, "realtime"):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for way in (read_one, cancelled):
        asyncio.run(way())
        assert str(path) not in open_files()


def test_real_time_is_the_loop_s_time(make: Make) -> None:
    """With a clock that jumps to the next timer, a recording takes no time and its own length."""
    path = make(seconds=20.0)

    class JumpingLoop(asyncio.SelectorEventLoop):
        def __init__(self) -> None:
            super().__init__()
            self.now = 0.0

        def time(self) -> float:
            return self.now

        def call_at(self, when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
            self.call_soon(setattr, self, "now", max(self.now, when))
            return super().call_at(when, *args, **kwargs)

    async def read() -> list[tuple[float, int]]:
        loop, given, seen = asyncio.get_running_loop(), 0, []
        async for chunk in AudioFileSource(path, "realtime", chunk_samples=1600):
            given += len(chunk)
            seen.append((loop.time(), given))
        return seen

    loop = JumpingLoop()
    try:
        seen = loop.run_until_complete(read())
    finally:
        loop.close()
    assert seen[-1][1] == 20 * 16000
    assert all(time == pytest.approx(samples / 16000, abs=1e-6) for time, samples in seen)


def test_an_unknown_pace_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="'fast' or 'realtime'"):
        AudioFileSource(make(), "slow")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["r.wav", "r.flac", "r.ogg"])
def test_the_sink_writes_what_the_source_reads(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(3)
    wave = (0.3 * np.sin(np.arange(20000) / 20) + 0.01 * rng.normal(size=20000)).astype(np.float32)
    with AudioFileSink(tmp_path / name) as sink:
        for begin in range(0, 20000, 777):
            sink.write(wave[begin : begin + 777])
        assert sink.samples == 20000
    assert len(whole(tmp_path / name)) == 20000
    tolerance = 1e-4 if name != "r.ogg" else 0.2
    np.testing.assert_allclose(whole(tmp_path / name), wave, atol=tolerance)
    assert str(tmp_path / name) not in open_files()


def test_a_growing_wav_is_valid_after_every_write(tmp_path: Path) -> None:
    path = tmp_path / "r.wav"
    with AudioFileSink(path, 24000) as sink:
        for n in range(1, 4):
            sink.write(np.full(1000, 0.1, np.float32))
            info = sf.info(path)
            assert (info.frames, info.samplerate, info.channels) == (1000 * n, 24000, 1)


def test_the_sink_clips_and_accepts_being_closed_twice(tmp_path: Path) -> None:
    sink = AudioFileSink(tmp_path / "r.wav")
    sink.write(np.array([2.0, -2.0, 0.5], np.float32))
    sink.close()
    sink.close()
    np.testing.assert_allclose(whole(tmp_path / "r.wav"), [1, -1, 0.5], atol=1e-4)


def test_nothing_is_created_before_there_is_something_to_write(tmp_path: Path) -> None:
    AudioFileSink(tmp_path / "r.wav")
    assert not (tmp_path / "r.wav").exists()


def test_a_sink_that_cannot_be_names_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ending not known, expected \.wav"):
        AudioFileSink(tmp_path / "r.mp4")
    with pytest.raises(UserError, match="no such folder"):
        AudioFileSink(tmp_path / "none" / "r.wav")
    (tmp_path / "d.wav").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        AudioFileSink(tmp_path / "d.wav")


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    place = Path("/proc/reply.wav")  # nobody can create files there, root included
    if not place.parent.is_dir():
        pytest.skip("no /proc")
    with pytest.raises(UserError, match="cannot be written"), AudioFileSink(place) as sink:
        sink.write(np.zeros(10, np.float32))


def test_the_header_says_what_is_in_the_file(make: Make) -> None:
    info = check_audio(make("a.wav", 2.0, 96000, 8))
    assert (info.samplerate, info.channels, info.duration) == (96000, 8, 2.0)
