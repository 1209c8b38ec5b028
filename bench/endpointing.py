"""How often a turn is cut in mid-sentence, against how long one waits after its end.

``python -m bench.endpointing`` synthesises held-out requests of nano's domain with hesitations in
them, lets the VAD listen with nano's settings, and compares ways of choosing the hangover.

What the recordings are: hibari says each request with a comma, or with "um," or "uh,", where the
speaker is to pause, so that the phrase before it has the melody and the length of one that goes
on; the silence that the synthesiser makes there is stretched to the pause drawn. Half of the
speakers pause in most turns (log-normal, median 0.5 s, 0.2 to 1.2 s), the others seldom and
shortly. Noise lies under all of it. Each speaker is one session: what was learnt of the speaker in
a turn holds for the next.

What they are not: recordings of people. Synthetic commas are more alike than human ones, a comma
after a function word ("turn on the, light") is not quite how people hesitate, the distribution of
pauses is an assumption, and every pause is inside one sentence. Compare the rows with each other
and do not expect their absolute figures in a living room.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agent.config import load_config
from agent.endpointing import Endpointing
from agent.schema import TurnsConfig
from bench.report import RESULTS, about, save
from recipes.domain import FUNCTION_WORDS, build
from recipes.grammar import QUESTION
from recipes.voices import speak
from stages import SAMPLE_RATE
from stages.checkpoint import CheckpointError
from stages.turn_end import TurnEndDetector
from stages.vad import (
    SilenceStarted,
    SpeechEnded,
    SpeechResumed,
    SpeechStarted,
    VadSettings,
    VoiceActivityDetector,
)

MS = SAMPLE_RATE // 1000
HANGOVERS_MS = (300, 400, 500, 600, 700, 800, 1000, 1200)
STARTS_MS = (400, 600, 800)
LEVEL = 0.06  # RMS of the speech, about -24 dBFS
NOISE = 0.0016  # RMS of the noise, about -56 dBFS
PAUSING, FLUENT = "pausing", "fluent"
SPEAKERS = {
    "heart": PAUSING,
    "heart_low": PAUSING,
    "heart_child": PAUSING,
    "heart_man": PAUSING,
    "heart_high": FLUENT,
    "heart_deep": FLUENT,
    "heart_mid": FLUENT,
    "heart_brisk": FLUENT,
}
# chance of a pause in a turn, of a second one, median in seconds, spread of the logarithm
HABITS = {PAUSING: (0.85, 0.35, 0.5, 0.45), FLUENT: (0.1, 0.0, 0.25, 0.2)}


@dataclass(frozen=True)
class Pause:
    """A silence inside a sentence, on the sample clock of its recording.

    ``kind``: after a "filler" (um, uh), after a function "word" (the, to), or after a "phrase",
    which could be the end of a sentence.
    """

    start: int
    end: int
    kind: str


@dataclass(frozen=True, eq=False)
class Recording:
    """A request (float32, 16 kHz), its pauses, and the sample after its last sound."""

    text: str
    wave: np.ndarray
    pauses: list[Pause]
    end: int


@dataclass(frozen=True)
class Strategy:
    """One way of choosing the hangover; ``hangover_ms`` is where an adaptive one starts."""

    hangover_ms: int
    adapt: bool
    smart: bool

    @property
    def family(self) -> str:
        return ("adaptive" if self.adapt else "plain") + (" + smart-turn" if self.smart else "")


@dataclass(frozen=True)
class Outcome:
    """One turn: how often it was cut, and samples from its true end to the endpoint, if heard."""

    cuts: int
    delay: int | None


def hesitant(text: str, places: Iterable[int], rng: random.Random) -> tuple[str, dict[int, str]]:
    """``text`` with a comma or a filler after the words at ``places`` (0 is the first word).

    Returns it with the kinds of pauses by the number of the word that they follow in the result.
    """
    words: list[str] = []
    kinds: dict[int, str] = {}
    for number, word in enumerate(text.split()):
        words.append(word)
        if number not in places:
            continue
        bare = word.strip(",").lower()
        words[-1] = word.strip(",") + ","
        kind = "word" if bare in FUNCTION_WORDS | QUESTION else "phrase"
        if rng.random() < 0.35:
            words.append(rng.choice(("um,", "uh,")))
            kind = "filler"
        kinds[len(words) - 1] = kind
    return " ".join(words), kinds


def habit(group: str, count: int, rng: random.Random) -> dict[int, float]:
    """Where a speaker of ``group`` pauses in a request of ``count`` words: word to seconds."""
    chance, second, median, spread = HABITS[group]
    pauses = (rng.random() < chance) * (1 + (rng.random() < second))
    places = sorted(rng.sample(range(count - 1), min(pauses, count - 1)))
    return {p: min(max(rng.lognormvariate(np.log(median), spread), 0.2), 1.2) for p in places}


def stretch(
    wave: np.ndarray, gaps: Sequence[tuple[float, float, float, str]]
) -> tuple[np.ndarray, list[Pause]]:
    """Make silences longer: ``gaps`` holds start, end, wanted length (seconds) and kind of each."""
    parts: list[np.ndarray] = []
    pauses: list[Pause] = []
    done = length = 0
    for start, end, wanted, kind in gaps:
        cut = round((start + end) / 2 * SAMPLE_RATE)
        more = max(0, round((wanted - (end - start)) * SAMPLE_RATE))
        parts += [_faded(wave[done:cut], bool(done)), np.zeros(more, np.float32)]
        middle = length + cut - done
        half = round((end - start) / 2 * SAMPLE_RATE)
        pauses.append(Pause(middle - half, middle + more + half, kind))
        done, length = cut, middle + more
    parts.append(_faded(wave[done:], bool(done), last=True))
    return np.concatenate(parts), pauses


def _faded(wave: np.ndarray, first: bool, last: bool = False) -> np.ndarray:
    """Without clicks where it was cut: 5 ms ramps."""
    wave = wave.copy()
    ramp = np.linspace(0, 1, min(5 * MS, len(wave)), dtype=np.float32)
    if first:
        wave[: len(ramp)] *= ramp
    if not last:
        wave[len(wave) - len(ramp) :] *= ramp[::-1]
    return wave


def _last_sound(wave: np.ndarray) -> int:
    """One past the last 10 ms that are within 40 dB of the loudest ones."""
    step = 10 * MS
    power = np.square(wave[: len(wave) // step * step].reshape(-1, step)).mean(1)
    return (int(np.flatnonzero(power > power.max() * 1e-4)[-1]) + 1) * step


def record(text: str, voice: str, rng: random.Random) -> Recording:
    """One request of a speaker, with silence before and after, in noise."""
    pauses = habit(SPEAKERS[voice], len(text.split()), rng)
    said, kinds = hesitant(text, pauses, rng)
    speech = speak(said, voice, seed=rng.randrange(2**31))
    words = speech.words
    if words is None:  # not aligned: the request is said without pauses
        speech, words, kinds = speak(text, voice), [], {}
    lengths = dict(zip(kinds, pauses.values(), strict=True)) if kinds else {}
    gaps = [(words[n][2], words[n + 1][1], lengths[n], kind) for n, kind in kinds.items()]
    wave, silences = stretch(speech.wave, gaps)
    wave *= LEVEL / float(np.sqrt(np.mean(np.square(speech.wave))))
    lead, trail = 500 * MS, 2500 * MS
    noise = np.random.default_rng(rng.randrange(2**31))
    whole = noise.normal(0, NOISE, lead + len(wave) + trail).astype(np.float32)
    whole[lead : lead + len(wave)] += wave
    shifted = [Pause(p.start + lead, p.end + lead, p.kind) for p in silences]
    return Recording(said, whole, shifted, lead + _last_sound(wave))


def sessions(turns: int, seed: int) -> dict[str, list[Recording]]:
    """``turns`` requests of at least four words from every speaker."""
    texts = [r.text for r in build().requests if r.split == "heldout" and r.text.count(" ") > 2]
    recorded = {}
    for voice in SPEAKERS:
        rng = random.Random(f"{seed} {voice}")
        recorded[voice] = [record(text, voice, rng) for text in rng.sample(texts, turns)]
    return recorded


class Judge:
    """smart-turn's verdicts, each computed once, with what they took."""

    def __init__(self, threads: int) -> None:
        self._detector = TurnEndDetector.load(threads)
        self._known: dict[tuple[int, int], float] = {}
        self.took_ms: list[float] = []
        self.worked_ms: list[float] = []  # of the CPU, other work on the machine left out
        self.by_kind: dict[str, list[float]] = defaultdict(list)

    def __call__(self, recording: Recording, start: int, silence: int, now: int) -> float:
        """About the silence that began at ``silence``, in a turn from ``start``."""
        key = (id(recording), silence)
        if key not in self._known:
            began, worked = time.perf_counter(), time.thread_time()
            self._known[key] = self._detector.probability(recording.wave[start:now])
            self.took_ms.append((time.perf_counter() - began) * 1e3)
            self.worked_ms.append((time.thread_time() - worked) * 1e3)
            inside = [p.kind for p in recording.pauses if p.start - 80 * MS <= silence < p.end]
            kind = inside[0] if inside else "end" if silence > recording.end - 240 * MS else "other"
            self.by_kind[kind].append(self._known[key])
        return self._known[key]


def listen(
    recording: Recording,
    settings: VadSettings,
    endpointing: Endpointing,
    judge: Callable[[Recording, int, int, int], float] | None,
    lag: int,
) -> Outcome:
    """Let the VAD hear one request. A verdict comes ``lag`` samples after the silence is told."""
    vad = VoiceActivityDetector(settings)
    frame, pre_roll = settings.frame_ms * MS, settings.pre_roll_ms * MS
    ended: list[SpeechEnded] = []
    turn = silence = 0
    verdict: tuple[int, float] | None = None
    for now in range(frame, len(recording.wave) + 1, frame):
        vad.hangover = endpointing.hangover
        for event in vad.push(recording.wave[now - frame : now]):
            if isinstance(event, SpeechStarted):
                if ended:
                    last = ended[-1]
                    onset = max(event.sample + pre_roll, last.endpoint)
                    endpointing.overrun(onset - last.end_of_speech)
                turn = turn or event.sample
            elif isinstance(event, SilenceStarted):
                endpointing.silence()
                silence = event.sample
                if judge is not None:
                    verdict = (now + lag, judge(recording, turn, silence, now))
            elif isinstance(event, SpeechResumed):
                endpointing.resumed(event.sample - silence)
                verdict = None
            elif isinstance(event, SpeechEnded):
                endpointing.ended()
                ended.append(event)
                verdict = None
        if verdict is not None and now >= verdict[0]:
            endpointing.judged(verdict[1])
            verdict = None
    heard = bool(ended) and ended[-1].endpoint >= recording.end
    delay = ended[-1].endpoint - recording.end if heard else None
    return Outcome(len(ended) - heard, delay)


def strategies() -> list[Strategy]:
    """All that are compared."""
    return [
        Strategy(ms, adapt, smart)
        for smart in (False, True)
        for adapt, lengths in ((False, HANGOVERS_MS), (True, STARTS_MS))
        for ms in lengths
    ]


def measure(
    strategy: Strategy,
    recorded: dict[str, list[Recording]],
    settings: VadSettings,
    judge: Judge,
    lag: int,
) -> dict[str, list[Outcome]]:
    """The outcomes of every turn, by group of speakers."""
    turns = TurnsConfig(adapt=strategy.adapt)
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for voice, recordings in recorded.items():
        endpointing = Endpointing(turns, strategy.hangover_ms)
        outcomes[SPEAKERS[voice]] += [
            listen(recording, settings, endpointing, judge if strategy.smart else None, lag)
            for recording in recordings
        ]
    return dict(outcomes)


def summary(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Rate of false endpoints in percent of the turns, delays in ms."""
    delays = [o.delay / MS for o in outcomes if o.delay is not None]
    cut = sum(o.cuts > 0 for o in outcomes)
    p50, p95 = np.percentile(delays, [50, 95])
    return {
        "turns": len(outcomes),
        "false_endpoints_percent": round(100 * cut / len(outcomes), 1),
        "delay_p50_ms": round(float(p50)),
        "delay_p95_ms": round(float(p95)),
        "delay_mean_ms": round(statistics.fmean(delays)),
        "last_word_lost": len(outcomes) - len(delays),
    }


def show(rows: Sequence[dict[str, Any]], verdicts: dict[str, dict[str, float]]) -> None:
    """The tables on the terminal."""
    console = Console()
    title = "turns cut (%), ms until the endpoint: all, pausing, fluent speakers"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("hangover", no_wrap=True)
    for heading in ("ms", *("cut", "p50/p95") * 3):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for group in ("all", PAUSING, FLUENT):
            figures = row[group]
            cells.append(f"{figures['false_endpoints_percent']:.1f}")
            cells.append(f"{figures['delay_p50_ms']}/{figures['delay_p95_ms']}")
        table.add_row(row["family"], str(row["hangover_ms"]), *cells)
    console.print(table)
    table = Table(
        "silence after", "n", "p10", "p50", "p90", title="smart-turn: finished?", box=SIMPLE_HEAD
    )
    for kind, figures in verdicts.items():
        shares = (f"{figures[key]:.2f}" for key in ("p10", "p50", "p90"))
        table.add_row(kind, str(figures["n"]), *shares)
    console.print(table)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """False endpoints against mean delay, a line for each family, a panel for each group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.5), sharey=True, layout="constrained")
    for panel, group in zip(panels, ("all", PAUSING, FLUENT), strict=True):
        for family in dict.fromkeys(row["family"] for row in rows):
            points = [row for row in rows if row["family"] == family]
            delay = [row[group]["delay_mean_ms"] for row in points]
            cut = [row[group]["false_endpoints_percent"] for row in points]
            line = "" if family.startswith("adaptive") else "-"
            panel.plot(delay, cut, marker="o" if line else "D", linestyle=line, label=family)
        panel.set(title=f"{group} speakers", xlabel="end of speech to endpoint, mean, ms")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("turns cut inside a sentence, %")
    panels[0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _verdicts(judge: Judge) -> dict[str, dict[str, float]]:
    def figures(values: list[float]) -> dict[str, float]:
        p10, p50, p90 = np.percentile(values, [10, 50, 90]).round(3).tolist()
        return {"n": len(values), "p10": p10, "p50": p50, "p90": p90}

    return {kind: figures(values) for kind, values in sorted(judge.by_kind.items())}


def _about(judge: Judge, **settings: Any) -> dict[str, Any]:
    p50, p95 = np.percentile(judge.took_ms, [50, 95]).round(1).tolist()
    cpu = round(float(np.median(judge.worked_ms)), 1)
    packages = ("numpy", "onnxruntime", "hibari-tts", "pipecat-ai", "webrtcvad-wheels")
    return {
        **about("endpointing", packages),
        "settings": settings,
        "smart_turn_ms_per_call": {
            "p50": p50,
            "p95": p95,
            "cpu_of_calling_thread_p50": cpu,
            "calls": len(judge.took_ms),
        },
    }


def main(
    turns: Annotated[int, typer.Option(help="Requests of each of the eight speakers.", min=2)] = 40,
    seed: Annotated[int, typer.Option(help="Of requests, pauses and noise.")] = 2,
    verdict_ms: Annotated[
        int, typer.Option(help="From the event of a silence to the detector's verdict, ms.", min=0)
    ] = 100,
    threads: Annotated[int, typer.Option(help="CPU threads of the detector.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder for JSON and PNG.")] = RESULTS,
) -> None:
    """Compare plain and adaptive hangovers, with and without smart-turn.

    A turn counts as cut when an endpoint comes before its last word has ended. The verdict's
    delay is set, not measured, so that the outcome does not depend on what else the machine does;
    what a call really took is reported beside it.
    """
    try:
        judge = Judge(threads)
    except CheckpointError as error:
        typer.echo(error, err=True)
        raise typer.Exit(2) from error
    recorded = sessions(turns, seed)
    settings = load_config("nano").vad.settings()
    rows = []
    for strategy in strategies():
        outcomes = measure(strategy, recorded, settings, judge, verdict_ms * MS)
        groups = {"all": [o for group in outcomes.values() for o in group], **outcomes}
        figures = {group: summary(some) for group, some in groups.items()}
        rows.append({"family": strategy.family, **asdict(strategy), **figures})
    verdicts = _verdicts(judge)
    show(rows, verdicts)
    report = _about(judge, turns=turns, seed=seed, verdict_ms=verdict_ms, threads=threads)
    report |= {"rows": rows, "verdicts": verdicts}
    cost = report["smart_turn_ms_per_call"]
    print(
        f"smart-turn: {cost['p50']} ms a call (p95 {cost['p95']}; its thread worked for "
        f"{cost['cpu_of_calling_thread_p50']}), {report['machine']}, "
        f"load {report['load_average']:.1f}"
    )
    path = save("endpointing", report, out)
    draw(rows, path.with_suffix(".png"))
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
