"""Any voice agent, measured from outside: how long after a request does its answer sound?

An agent is reached over a line: a program that takes and gives raw sound through pipes
(:class:`Process`), or whatever is at the other end of a loudspeaker and a microphone
(:mod:`bench.conversation.devices`). Recorded requests are spoken at the pace of the clock. An
answer is the first sound that begins after the true end of the speech in the recording, wherever it
comes from; so systems can be compared that have nothing else in common.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from agent.errors import UserError
from bench.conversation.recordings import Request
from bench.conversation.sound import CHUNK, NOISE, Listener, Pace
from stages import SAMPLE_RATE

Row = dict[str, Any]
LONGEST_WAIT = 60.0  # seconds for a program to get ready
_SETTLE = 1.0  # seconds of silence after which an answer is over
_BACKLOG = 10 * SAMPLE_RATE * 2  # bytes that a program may be behind: ten seconds
_READ = 1 << 16


class Line(Protocol):
    """A way to an agent.

    Attributes:
        listener: when there was sound on the way back, seconds of the line's clock.
    """

    listener: Listener

    @property
    def dropped(self) -> int:
        """Samples at 16 kHz that the agent did not take."""

    @property
    def trouble(self) -> str:
        """Why nothing can come any more; empty while it can."""

    @property
    def now(self) -> float:
        """The line's clock, s."""

    async def ready(self) -> None:
        """Wait until the agent can hear."""

    async def say(self, chunk: np.ndarray) -> None:
        """Float32 samples at 16 kHz to the agent; returns when the last one was spoken."""

    def when(self, sample: int) -> float:
        """When ``sample``, of those said, reached the agent; seconds of the line's clock."""


class Process:
    """A program that speaks through pipes: an async context manager.

    It gets 16-bit little-endian mono at 16 kHz on standard input and gives such sound at ``rate``
    Hz on standard output, at any pace: what it writes at once is heard at the pace of the clock,
    from when it came. Silence that it writes ahead of time is not waited for.

    Args:
        command: as on a command line, without a shell.
        wait: seconds, at most, for its first output, before which nothing is said to it.

    Raises:
        UserError: on entering: there is no such program.
    """

    def __init__(self, command: str, rate: int = SAMPLE_RATE, wait: float = LONGEST_WAIT) -> None:
        self.command = command
        self.listener = Listener(rate)
        self.dropped = 0
        self._rate = rate
        self._wait = wait
        self._pace = Pace()
        self._spoke = asyncio.Event()
        self._sounds_until = 0.0
        self._said_last = b""

    async def __aenter__(self) -> Process:
        pipe = asyncio.subprocess.PIPE
        try:
            words = shlex.split(self.command)
            self._process = await asyncio.create_subprocess_exec(
                *words, stdin=pipe, stdout=pipe, stderr=pipe
            )
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"--black-box {self.command!r}: cannot be started ({error}); give a program and "
                "its arguments, what only a shell understands as: sh -c '...'"
            ) from None
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._note())]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stdin.close()
        for end in (None, self._process.terminate, self._process.kill):
            with contextlib.suppress(ProcessLookupError):
                if end is not None:
                    end()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), 3)
                break
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def trouble(self) -> str:
        code = self._process.returncode
        if code is None:
            return ""
        last = self._said_last.decode(errors="replace").strip()
        return f"it ended with exit code {code}" + (f": {last}" if last else "")

    @property
    def now(self) -> float:
        return time.perf_counter()

    async def ready(self) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._spoke.wait(), self._wait)
        self._pace.resume()

    async def say(self, chunk: np.ndarray) -> None:
        chunk = await self._pace(chunk)
        if self._stdin.transport.get_write_buffer_size() > _BACKLOG:
            self.dropped += len(chunk)
        elif not (self.trouble or self._stdin.is_closing()):
            pcm = np.round(np.clip(chunk, -1, 1) * 32767).astype("<i2")
            self._stdin.write(pcm.tobytes())

    def when(self, sample: int) -> float:
        return self._pace.when(sample)

    async def _hear(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while data := await self._process.stdout.read(_READ):
            came = time.perf_counter()
            data = rest + data
            whole = len(data) // 2 * 2
            rest = data[whole:]
            samples = np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32768
            self.listener.block(samples, max(came, self._sounds_until))
            if self.listener.stretches:
                self._sounds_until = self.listener.stretches[-1].end
            self._spoke.set()
        self._spoke.set()  # it has closed its output: there is nothing to wait for

    async def _note(self) -> None:
        """Keep the last line of what it says to people, for the message if it dies."""
        assert self._process.stderr is not None
        kept = b""
        while data := await self._process.stderr.read(_READ):
            kept = (kept + data)[-4096:]
            lines = kept.strip().splitlines()
            self._said_last = lines[-1][-300:] if lines else b""


async def measure(
    line: Line,
    requests: Iterable[Request],
    progress: Callable[[int], None] = lambda count: None,
    patience: float = 15.0,
    seed: int = 0,
) -> list[Row]:
    """Speak every request and wait for its answer, or ``patience`` seconds.

    Returns:
        a row for each request. ``outcome`` is "answered", with ``end_to_sound`` in ms; "silent":
        no sound began in time; or "died": then it is the last row, and ``ended`` says why.
        ``early`` is 1 where a sound began while the request was still spoken.
    """
    speaker = _Caller(line, patience, seed)
    await line.ready()
    begun = line.now
    rows: list[Row] = []
    for number, request in enumerate(requests, 1):
        row: Row = {"turn": number, "request": request.name}
        rows.append({**row, **await speaker.turn(request, begun)})
        progress(number)
        if line.trouble:
            break
    return rows


class _Caller:
    """Who speaks: room noise under everything, and no request before the answer is over."""

    def __init__(self, line: Line, patience: float, seed: int) -> None:
        self._line = line
        self._patience = patience
        self._noise = np.random.default_rng(seed)
        self._said = 0

    async def turn(self, request: Request, begun: float) -> Row:
        """Speak one request and listen; what came of it."""
        line, patience = self._line, round(self._patience * SAMPLE_RATE)
        await self._quiet(round(_SETTLE * SAMPLE_RATE), patience)
        start = self._said
        for at in range(0, len(request.wave), CHUNK):
            await self._say(request.wave[at : at + CHUNK])
        end = start + request.end
        while self._said < end + patience and not line.trouble:
            if self._answer(end) is not None:
                break
            await self._say(np.zeros(CHUNK, np.float32))
        ended, sound = line.when(end), self._answer(end)
        early = line.listener.first_after(line.when(start + request.begin), ended) is not None
        row: Row = {"at_seconds": round(ended - begun, 2), "early": int(early)}
        row["request_seconds"] = round((request.end - request.begin) / SAMPLE_RATE, 2)
        row["outcome"] = "answered" if sound is not None else "died" if line.trouble else "silent"
        if sound is not None:
            row["ms"] = {"end_to_sound": round(1e3 * (sound - ended), 2)}
        if line.trouble:
            row["ended"] = line.trouble
        return row

    def _answer(self, end: int) -> float | None:
        return self._line.listener.first_after(self._line.when(end))

    async def _quiet(self, least: int, most: int) -> None:
        """Say nothing until the agent says nothing either, for ``least`` of at most ``most``."""
        line, begun = self._line, self._said
        while self._said - begun < most and not line.trouble:
            stretches = line.listener.stretches
            last = stretches[-1].end if stretches else float("-inf")
            if self._said - begun >= least and line.now - last >= least / SAMPLE_RATE:
                return
            await self._say(np.zeros(CHUNK, np.float32))

    async def _say(self, chunk: np.ndarray) -> None:
        self._said += len(chunk)
        noise = self._noise.normal(0, NOISE, len(chunk)).astype(np.float32)
        await self._line.say(chunk + noise)


async def measure_process(
    command: str,
    requests: Iterable[Request],
    rate: int = SAMPLE_RATE,
    progress: Callable[[int], None] = lambda count: None,
    patience: float = 15.0,
    wait: float = LONGEST_WAIT,
    seed: int = 0,
) -> list[Row]:
    """:func:`measure` of a program.

    Raises:
        UserError: it cannot be started, or ended before it answered anything.
    """
    async with Process(command, rate, wait) as line:
        rows = await measure(line, requests, progress, patience, seed)
    if rows and rows[-1]["outcome"] == "died" and not any("ms" in row for row in rows):
        raise UserError(
            f"--black-box {command!r}: {rows[-1]['ended']}; it has to read sound from standard "
            "input until that ends"
        )
    return rows
