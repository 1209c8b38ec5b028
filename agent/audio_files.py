"""Audio files of any rate and channel count, as a source and as a sink of 16 kHz mono waves.

Files are read and written in blocks, so memory does not grow with their length, and never on the
event loop. A file from outside is not trusted: what is wrong with it is said in one sentence, with
the mend.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from agent.errors import UserError
from stages import SAMPLE_RATE

Wave: TypeAlias = NDArray[np.float32]
Pace: TypeAlias = Literal["fast", "realtime"]

CHUNK_SAMPLES = 320
"""20 ms: what a sound card hands over at a time."""

_BLOCK_SECONDS = 0.5  # of file read at a time
_RATES = (2_000, 768_000)  # Hz; what speech can be in, and what converters do
_READS = "WAV, FLAC, OGG, MP3 or another format that libsndfile reads"
_FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
}


def check_audio(path: str | Path, max_seconds: float = 3600.0) -> soundfile._SoundFileInfo:
    """Look at the header of ``path`` before anything is done with it.

    Returns:
        what libsndfile says: ``samplerate`` (Hz), ``channels``, ``frames``, ``duration`` (s).

    Raises:
        UserError: it is missing, a directory, unreadable, not audio, empty or too long.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected an audio file ({_READS})")
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; record or copy it again")
    try:
        with path.open("rb"):
            pass
        info = soundfile.info(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except (soundfile.LibsndfileError, RuntimeError, TypeError):
        raise UserError(f"{path}: is not audio; expected {_READS}") from None
    if info.frames <= 0:
        raise UserError(f"{path}: holds no audio at all (0 samples); record it again")
    if not _RATES[0] <= info.samplerate <= _RATES[1]:
        raise UserError(
            f"{path}: has a sampling rate of {info.samplerate} Hz, expected {_RATES[0]} to "
            f"{_RATES[1]}; export the audio again"
        )
    if info.duration > max_seconds:
        raise UserError(
            f"{path}: is {_hours(info.duration)} long, more than the {_hours(max_seconds)} of "
            "audio.max_seconds; cut it, or raise the limit with --set audio.max_seconds=..."
        )
    return info


def read_chunks(
    path: str | Path, chunk_samples: int = CHUNK_SAMPLES, max_seconds: float = 3600.0
) -> Iterator[Wave]:
    """The file as float32 mono chunks at 16 kHz.

    Channels are averaged; another rate is resampled in a stream (soxr, high quality), so that
    memory stays constant. All chunks but the last have ``chunk_samples``. The file is checked at
    once, not at the first chunk, and closed when the iterator ends or is closed.

    Raises:
        UserError: see :func:`check_audio`; while reading, a damaged file or samples that are not
            finite numbers.
    """
    if chunk_samples < 1:
        raise ValueError(f"chunk_samples is {chunk_samples}, expected at least 1")
    path = Path(path).expanduser()
    check_audio(path, max_seconds)
    return _rechunk(_resampled(path), chunk_samples)


def _blocks(path: Path, file: soundfile.SoundFile) -> Iterator[Wave]:
    """Mono blocks at the file's own rate."""
    size = max(1, int(_BLOCK_SECONDS * file.samplerate))
    position = 0
    while True:
        try:
            block = file.read(size, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            at = position / file.samplerate
            raise UserError(
                f"{path}: is damaged after {at:.1f} s ({error}); copy or convert it again"
            ) from None
        if not len(block):
            return
        if not np.isfinite(block).all():
            bad = position + int(np.argmin(np.isfinite(block).all(axis=1)))
            raise UserError(
                f"{path}: sample {bad} ({bad / file.samplerate:.2f} s) is NaN or infinite; "
                "export the audio again as PCM"
            )
        position += len(block)
        yield block.mean(axis=1, dtype=np.float32)


def _resampled(path: Path) -> Iterator[Wave]:
    with soundfile.SoundFile(path) as file:
        if file.samplerate == SAMPLE_RATE:
            yield from _blocks(path, file)
            return
        stream = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")
        for block in _blocks(path, file):
            yield stream.resample_chunk(block)
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _rechunk(blocks: Iterator[Wave], size: int) -> Iterator[Wave]:
    # Closing a generator does not close those it iterates over: the file would stay open.
    with contextlib.closing(blocks):  # type: ignore[type-var]
        rest = np.zeros(0, np.float32)
        for block in blocks:
            rest = np.concatenate((rest, block))
            whole = len(rest) // size * size
            for begin in range(0, whole, size):
                yield rest[begin : begin + size]
            rest = rest[whole:]
        if len(rest):
            yield rest


class AudioFileSource:
    """An audio file as a stream of chunks: ``async with AudioFileSource(p) as source: async for``.

    Args:
        pace: "realtime" gives out each chunk when its last sample would have been spoken, by the
            event loop's clock; "fast" as soon as it is asked for.

    Raises:
        UserError: at once if the file cannot be used, see :func:`check_audio`; while iterating if
            its contents cannot.
    """

    def __init__(
        self,
        path: str | Path,
        pace: Pace = "fast",
        *,
        chunk_samples: int = CHUNK_SAMPLES,
        max_seconds: float = 3600.0,
    ) -> None:
        if pace not in ("fast", "realtime"):
            raise UserError(f"pace is {pace!r}, expected 'fast' or 'realtime'")
        self.path = Path(path).expanduser()
        self.seconds = float(check_audio(self.path, max_seconds).duration)
        self._pace = pace
        self._arguments = (self.path, chunk_samples, max_seconds)

    async def __aenter__(self) -> AudioFileSource:
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Every iteration closes its own file; nothing is left to do."""

    def __aiter__(self) -> AsyncIterator[Wave]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Wave]:
        loop = asyncio.get_running_loop()
        started, given = loop.time(), 0
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spirit-read")
        chunks: Iterator[Wave] = iter(())
        try:
            chunks = await loop.run_in_executor(reader, lambda: read_chunks(*self._arguments))
            # A second of chunks at a time: one hop to the thread per chunk would cost more.
            batch = max(1, SAMPLE_RATE // self._arguments[1])
            while waves := await loop.run_in_executor(reader, _take, chunks, batch):
                for wave in waves:
                    given += len(wave)
                    if self._pace == "realtime":
                        due = started + given / SAMPLE_RATE
                        await asyncio.sleep(max(0.0, due - loop.time()))
                    yield wave
        finally:
            # In the reader's thread, after whatever it is doing: then the file is surely closed.
            closing = reader.submit(_close, chunks)
            reader.shutdown(wait=False)
            await asyncio.shield(asyncio.wrap_future(closing))


class AudioFileSink:
    """Writes float32 mono waves to a WAV, FLAC or OGG file as they come.

    A WAV file is a valid one after every write, so that it can be played while it grows. Nothing
    is created before the first write or :meth:`open`.

    Args:
        rate: Hz of what is written.

    Raises:
        UserError: the ending is unknown, or the file cannot be created or written.
    """

    def __init__(self, path: str | Path, rate: int = SAMPLE_RATE) -> None:
        self.path = Path(path).expanduser()
        self.rate = rate
        self.samples = 0
        self._file: soundfile.SoundFile | None = None
        if self.path.suffix.lower() not in _FORMATS:
            raise UserError(f"{self.path}: ending not known, expected {', '.join(_FORMATS)}")
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a directory, expected a file name such as reply.wav")
        if not self.path.parent.is_dir():
            raise UserError(f"{self.path.parent}: no such folder; create it, or write elsewhere")

    def __enter__(self) -> AudioFileSink:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Create the file, without samples yet."""
        if self._file is None:
            form, subtype = _FORMATS[self.path.suffix.lower()]
            try:
                with self.path.open("wb"):
                    pass
                self._file = soundfile.SoundFile(
                    self.path, "w", self.rate, 1, subtype=subtype, format=form
                )
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror}); choose another folder"
                ) from None
            except (soundfile.LibsndfileError, ValueError) as error:
                raise UserError(f"{self.path}: cannot be written ({error})") from None

    def write(self, wave: Wave) -> None:
        """Append ``wave``; values beyond [-1, 1] are clipped."""
        self.open()
        assert self._file is not None
        try:
            self._file.write(np.clip(np.asarray(wave, np.float32), -1.0, 1.0))
            # libsndfile rewrites the header of a WAV file here.
            self._file.flush()
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise UserError(
                f"{self.path}: cannot be written ({error}); is the disk full?"
            ) from None
        self.samples += len(wave)

    def close(self) -> None:
        """Finish the file. More than once does no harm."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _take(chunks: Iterator[Wave], count: int) -> list[Wave]:
    return [wave for _, wave in zip(range(count), chunks, strict=False)]


def _close(chunks: Iterator[Wave]) -> None:
    close = getattr(chunks, "close", None)
    if close is not None:
        close()


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:g} s"
    if seconds < 5400:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.4g} h"
