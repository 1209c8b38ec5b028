"""Whether a reply that comes back into the microphone interrupts itself.

``python -m bench.echo`` plays replies of a synthetic voice through a simulated room into a
simulated microphone, at -6 dB and with noise, for 100 turns of one session, with and without the
canceller; the VAD of nano's configuration listens. A false barge-in is speech over the reply for
longer than ``turns.barge_in_ms``. Then somebody says something over each reply, as loud
as the echo, or 6 or 12 dB louder: how often that is noticed, and how late after its beginning.

The room is an exponentially decaying noise (300 ms to -60 dB), after a delay drawn anew for every
session of 10 turns, as when a device is opened again; the canceller starts anew with it. What is
not simulated: loudspeakers that distort, clocks that drift, a person walking about.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agent.config import load_config
from agent.echo import EchoCanceller
from bench.report import about, save
from recipes.voices import speak
from stages import SAMPLE_RATE
from stages.vad import (
    SilenceStarted,
    SpeechEnded,
    SpeechResumed,
    SpeechStarted,
    VoiceActivityDetector,
)

MS = SAMPLE_RATE // 1000
ECHO_DB = -6.0
LEVEL = 0.06  # RMS of the reply, about -24 dBFS
NOISE = 0.0016  # RMS, about -56 dBFS
LEAD_MS = 20  # the sound card's: the canceller gets what is played so much early
TURNS_PER_SESSION = 10
OVER_ECHO_DB = (0.0, 6.0, 12.0)
REPLIES = (
    "the kitchen light is on now, and the door is locked.",
    "it is seven in the evening, and the timer has three minutes left.",
    "i have set the heating to twenty one degrees for tonight.",
    "yes, the window in the bedroom is still open.",
)
REQUESTS = ("stop it that is not what i asked for.", "wait turn the light off again please.")
"""Each longer than the barge-in."""


@dataclass(frozen=True)
class Outcome:
    """One turn: the longest speech over the reply, ms; the barge-in's delay, ms, or None."""

    longest_ms: float
    delay_ms: float | None


def voice(text: str, name: str) -> np.ndarray:
    """``text`` at 16 kHz and :data:`LEVEL`."""
    wave = speak(text, name).wave
    sounding = np.flatnonzero(np.abs(wave) > 0.05 * np.abs(wave).max())
    wave = wave[sounding[0] : sounding[-1] + 1]  # the synthesiser begins and ends in silence
    return (wave * LEVEL / np.sqrt(np.mean(wave**2))).astype(np.float32)


def room(random: np.random.Generator) -> np.ndarray:
    """An impulse response of energy 1: delay, direct sound, reverberation."""
    delay = int(random.uniform(5, 60) * MS)
    tail = random.standard_normal(300 * MS) * 10 ** (-3 * np.arange(300 * MS) / (300 * MS))
    tail *= 0.5 / np.sqrt(np.sum(tail**2))
    tail[0] = np.sqrt(1 - 0.25)
    return np.concatenate((np.zeros(delay), tail))


def through(wave: np.ndarray, response: np.ndarray) -> np.ndarray:
    size = 1 << (len(wave) + len(response)).bit_length()
    heard = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(response, size), size)
    return heard[: len(wave)]


def session(
    replies: list[np.ndarray],
    requests: list[np.ndarray],
    over_echo_db: float,
    random: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray, int, int]]:
    """For each turn: what is captured, what is played, and where speech over it begins and ends."""
    response = room(random)
    for _ in range(TURNS_PER_SESSION):
        reply = replies[random.integers(len(replies))]
        gap = np.zeros(SAMPLE_RATE, np.float32)
        played = np.concatenate((gap, reply, gap))
        captured = 10 ** (ECHO_DB / 20) * through(played, response)
        captured += NOISE * random.standard_normal(len(captured))
        start = end = len(gap) + int(random.uniform(0.5, 1.0) * SAMPLE_RATE)
        if requests:
            request = requests[random.integers(len(requests))][: len(gap) + len(reply) - start]
            end = start + len(request)
            captured[start:end] += 10 ** ((ECHO_DB + over_echo_db) / 20) * request
        yield captured.astype(np.float32), played, start, end


def hear(wave: np.ndarray, vad: VoiceActivityDetector, barge_in: int) -> tuple[float, int | None]:
    """The longest speech, samples; and when an interruption would be decided, on ``wave``'s clock.

    As in the session: from the VAD's beginning of speech, while it lasts, for ``barge_in``.
    """
    vad.reset()
    began: int | None = None
    longest, decided = 0, None
    for now in range(0, len(wave), 20 * MS):
        for event in vad.push(wave[now : now + 20 * MS]):
            if isinstance(event, SpeechStarted):
                began = now
            elif isinstance(event, SilenceStarted | SpeechEnded):
                began = None
            elif isinstance(event, SpeechResumed):
                began = now
        if began is not None:
            longest = max(longest, now + 20 * MS - began)
            if longest >= barge_in and decided is None:
                decided = now + 20 * MS
    return longest, decided


def measure(
    turns: int, cancel: bool, requests: list[np.ndarray], over_echo_db: float = 0.0
) -> list[Outcome]:
    """Play ``turns`` replies; over each, one of ``requests`` if there are any."""
    config = load_config("nano", ())
    barge_in = config.turns.barge_in_ms * MS
    random = np.random.default_rng(7)
    replies = [voice(text, "heart") for text in REPLIES]
    outcomes: list[Outcome] = []
    vad = VoiceActivityDetector(config.vad.settings())
    while len(outcomes) < turns:
        canceller = EchoCanceller(LEAD_MS) if cancel else None
        for captured, played, start, _ in session(replies, requests, over_echo_db, random):
            whole = len(captured) // 160 * 160
            early = np.concatenate((played[LEAD_MS * MS :], np.zeros(LEAD_MS * MS, np.float32)))
            wave = captured[:whole]
            if canceller is not None:
                wave = canceller.process(wave, early[:whole])
            longest, decided = hear(wave, vad, barge_in)
            right = decided is not None and decided >= start
            delay = (decided - start) / MS if right and decided is not None else None
            outcomes.append(Outcome(longest / MS, delay))
    return outcomes[:turns]


def main(turns: Annotated[int, typer.Option(help="Of each kind.")] = 100) -> None:
    """Measure, print a table and write JSON to bench/results."""
    barge_in = load_config("nano", ()).turns.barge_in_ms
    said = [voice(text, "heart_man") for text in REQUESTS]
    table = Table(box=SIMPLE_HEAD, title=f"{turns} turns each, echo at {ECHO_DB:.0f} dB")
    for column in ("canceller", "talker over echo, dB", "barge-ins", "after, ms: p50", "p95",
                   "longest speech, ms"):  # fmt: skip
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for cancel, over in [(False, None), (True, None), *((True, db) for db in OVER_ECHO_DB)]:
        turned = measure(turns, cancel, [] if over is None else said, over or 0.0)
        row = _row(cancel, over, turned, barge_in)
        rows.append(row)
        shown = ("on" if cancel else "off", "nobody talks" if over is None else f"{over:+.0f}",
                 *(_cell(value) for value in list(row.values())[2:6]))  # fmt: skip
        table.add_row(*shown)
    Console().print(table)
    path = save(
        "echo", {**about("echo", ("livekit", "webrtcvad-wheels")), "turns": turns, "rows": rows}
    )
    print(path)


def _row(
    cancel: bool, over: float | None, turned: list[Outcome], barge_in_ms: int
) -> dict[str, Any]:
    """Without a talker every barge-in is false; with one, those before he talks are not counted."""
    delays = sorted(o.delay_ms for o in turned if o.delay_ms is not None)
    false = sum(o.longest_ms >= barge_in_ms for o in turned)
    talks = over is not None and bool(delays)
    return {
        "canceller": cancel,
        "talker_over_echo_db": over,
        "barge_ins": false if over is None else len(delays),
        "delay_p50_ms": statistics.median(delays) if talks else None,
        "delay_p95_ms": delays[int(0.95 * (len(delays) - 1))] if talks else None,
        "longest_speech_ms": max(o.longest_ms for o in turned),
        "turns": [asdict(o) for o in turned],
    }


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    typer.run(main)
