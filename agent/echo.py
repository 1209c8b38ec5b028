"""Taking the reply out of what the microphone hears: WebRTC's audio processing, from livekit.

Only its computation is used: nothing connects anywhere.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from agent.errors import UserError
from stages import SAMPLE_RATE

FRAME = SAMPLE_RATE // 100  # samples; the processor knows frames of 10 ms only
MEND = "pip install 'spiritlm-agent[aec]', or say sound.echo=off and use headphones"


class EchoCanceller:
    """Subtracts the echo of what is played from what is captured, both float32 at 16 kHz.

    Args:
        delay_ms: from a sample handed over as played to its earliest echo among those captured, ms.

    Raises:
        ImportError, OSError: livekit is not installed, or not for this machine.
    """

    def __init__(self, delay_ms: int = 0) -> None:
        from livekit import rtc

        self._frame: Any = rtc.AudioFrame
        self._processor: Any = rtc.AudioProcessingModule(
            echo_cancellation=True, high_pass_filter=True
        )
        self._processor.set_stream_delay_ms(delay_ms)

    def process(self, captured: np.ndarray, played: np.ndarray) -> np.ndarray:
        """What of ``captured`` is no echo of ``played``: as many samples, a multiple of 160.

        Raises:
            ValueError: another length, or two.
        """
        if len(captured) != len(played) or len(captured) % FRAME:
            raise ValueError(
                f"{len(captured)} captured and {len(played)} played samples, expected as many of "
                f"both and a multiple of {FRAME}"
            )
        cleaned = np.empty(len(captured), np.float32)
        for begin in range(0, len(captured), FRAME):
            part = slice(begin, begin + FRAME)
            self._processor.process_reverse_stream(self._wrap(played[part]))
            frame = self._wrap(captured[part])
            self._processor.process_stream(frame)
            cleaned[part] = np.frombuffer(bytes(frame.data), np.int16) / np.float32(32768)
        return cleaned

    def _wrap(self, samples: np.ndarray) -> Any:
        pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
        return self._frame(bytearray(pcm.tobytes()), SAMPLE_RATE, 1, FRAME)


def make_canceller(echo: Literal["auto", "on", "off"], delay_ms: int = 0) -> EchoCanceller | None:
    """The canceller that a setting asks for, or None.

    Raises:
        UserError: ``on``, and livekit cannot be imported.
    """
    if echo == "off":
        return None
    try:
        return EchoCanceller(delay_ms)
    except (ImportError, OSError) as error:
        if echo == "on":
            raise UserError(f"sound.echo is on, but livekit is missing ({error}): {MEND}") from None
        return None
