"""A recording answered: a source, the pipeline, a file that grows with the reply."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable
from contextlib import aclosing

import numpy as np

from agent.audio_files import AudioFileSink, Wave
from agent.config import Config
from agent.events import Event, ReplyAudio, TurnEnded
from agent.models import Models
from agent.session import Session
from agent.telemetry import TurnTrace
from agent.workers import Worker
from stages import SAMPLE_RATE

PAUSE_SAMPLES = SAMPLE_RATE // 2
"""Silence between the replies of one file."""


async def answer(
    models: Models,
    config: Config,
    source: AsyncIterable[Wave],
    sink: AudioFileSink,
    show: Callable[[Event], None],
) -> list[TurnTrace]:
    """Answer every utterance of ``source`` into ``sink``, and tell ``show`` what happens.

    Nothing is written where nobody spoke. Whatever happens, the file is complete up to there.

    Returns:
        the trace of each turn, in order.
    """
    writer = Worker("sink")
    traces: list[TurnTrace] = []
    try:
        async with (
            Session(models, config) as session,
            aclosing(session.converse(source)) as events,
        ):
            async for event in events:
                show(event)
                if isinstance(event, ReplyAudio):
                    pause = 0 if event.first_sample or not sink.samples else PAUSE_SAMPLES
                    sound = np.concatenate((np.zeros(pause, np.float32), event.samples))
                    await writer.run(sink.write, sound)
                elif isinstance(event, TurnEnded):
                    traces.append(event.trace)
    finally:
        await writer.close()
        sink.close()
    return traces
