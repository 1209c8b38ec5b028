"""A conversation through pipes, for other programs: ``python -m agent talk --stdio``.

Raw sound, 16-bit little-endian mono at 16 kHz, comes on standard input and leaves on standard
output, both at the pace of the clock: what is not heard in time is not waited for, and where
nothing is said there are zeros. What people read goes to standard error.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from io import RawIOBase

import numpy as np

from agent.channels import Channel, ChannelClosed, Policy
from agent.events import Event
from agent.loudspeaker import Loudspeaker
from agent.models import Models
from agent.paced import PacedOutput
from agent.ring import JitterTarget, Samples
from agent.session import Session

CHUNK = 640  # bytes, 20 ms
_WAITING = 256  # chunks, about five seconds


async def converse(
    models: Models, source: RawIOBase, sink: RawIOBase, view: Callable[[Event], None]
) -> None:
    """Hold one conversation, until ``source`` ends and the last reply was played.

    Args:
        source, sink: raw sound, as above. Without buffers: the thread that waits for more sound
            would keep the lock of one, and the program could not end.
        view: told what happens.

    Raises:
        BrokenPipeError: nobody reads ``sink`` any more.
    """
    sound = models.config.sound
    playback = Loudspeaker(JitterTarget(sound.latency_ms / 1000, sound.max_latency_ms / 1000))
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def write(block: Samples, _: float) -> None:
        try:
            sink.write(to_pcm(block))
        except OSError:
            loop.call_soon_threadsafe(task.cancel)
            raise

    output = PacedOutput(playback, write, sound.block_ms)
    try:
        with output:
            async with (
                Session(models, models.config) as session,
                aclosing(session.converse(_read(source), playback)) as events,
            ):
                async for event in events:
                    view(event)
    except asyncio.CancelledError:
        if output.failed is None:
            raise
        raise BrokenPipeError(f"standard output: {output.failed}") from None


async def _read(source: RawIOBase) -> AsyncIterator[Samples]:
    """What comes, chunk by chunk. If it comes faster than it is heard, whoever writes it waits."""
    loop = asyncio.get_running_loop()
    chunks: Channel[bytes] = Channel("stdin", _WAITING, Policy.BLOCK)

    def read() -> None:
        try:
            while chunk := source.read(CHUNK):
                asyncio.run_coroutine_threadsafe(chunks.put(chunk), loop).result()
            loop.call_soon_threadsafe(chunks.close)
        except (ChannelClosed, RuntimeError, OSError):  # nobody listens any more
            return

    threading.Thread(target=read, name="spirit-stdin", daemon=True).start()
    half = b""  # of a sample
    try:
        async for chunk in chunks:
            whole = len(half + chunk) // 2 * 2
            samples, half = from_pcm(half + chunk), (half + chunk)[whole:]
            yield samples
    finally:
        chunks.close()


def to_pcm(samples: Samples) -> bytes:
    """Float samples as 16-bit little-endian; what is too loud is clipped."""
    return np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()


def from_pcm(chunk: bytes) -> Samples:
    """16-bit little-endian as float32; half a sample at the end is dropped."""
    whole = np.frombuffer(chunk[: len(chunk) // 2 * 2], "<i2")
    return whole.astype(np.float32) / np.float32(32768)
