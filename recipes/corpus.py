"""``python -m recipes corpus``: synthesise the speech that nano learns from, exactly aligned.

Writes {work}/corpus: wav files (16 kHz, PCM16), manifest.jsonl (one recording a line),
dialogs.jsonl (requests with their right replies) and, at the end, DONE with a summary. The first
part holds what is held out of the first domain and its replies, the second more words in more
orders for the language model, the third requests and replies of the wider domain (dialogues.py).
Each is shuffled, so that a prefix of the manifest is a fair sample; an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer
from rich.progress import track

from agent.errors import UserError
from recipes import dialogues, domain
from recipes.align import shift
from recipes.clock import Stopwatch
from recipes.lm_words import more_requests
from recipes.manifest import PROCESSES, read_manifest
from recipes.manifest import corpus_seed as corpus_seed
from recipes.voices import (
    FAST,
    LIVELY,
    MONOTONE,
    NEUTRAL,
    SAMPLE_RATE,
    TRAINED,
    VOICES,
    WHISPERED,
    speak,
    styles_of,
)

LEVEL = 0.07  # RMS of a recording, about -23 dBFS; whispers are half as loud
HEART_SHARE = 0.25  # of the requests
KAL_SHARE = 0.35  # of the held-out requests, also in a voice never trained on
FLITE = ("slt", "rms", "awb")
REQUEST_STYLES = {NEUTRAL: 80, LIVELY: 7, MONOTONE: 4, WHISPERED: 3, FAST: 6}
BOOK_STYLES = {NEUTRAL: 50, LIVELY: 16, MONOTONE: 10, WHISPERED: 10, FAST: 14}
NOISY_SHARE = 0.05
# Of the second part of the corpus, which is there for new sequences of words:
MORE_REQUESTS, MIXED, MORE_BOOK = 5600, 1600, 900  # recordings
MIXED_HEART_SHARE = 0.4  # the voice that must learn to say every word
# Of the third part, which is there for new intents:
WIDER_TRAIN, WIDER_HELDOUT = 6000, 700  # requests
SECOND_TAKE = 0.3  # of its replies


@dataclass(frozen=True)
class Job:
    """One recording to be made."""

    id: str
    text: str
    role: str
    intent: str | None
    voice: str
    style: int
    split: str
    speed: float = 1.0
    noisy: bool = False


def _draw_voice(rng: random.Random, but: Iterable[str] = ()) -> str:
    warped = [v for v in TRAINED if v != "heart" and v not in FLITE]
    share = (1 - HEART_SHARE) / (len(TRAINED) - 1)
    weights = {"heart": HEART_SHARE} | dict.fromkeys((*warped, *FLITE), share)
    names = [v for v in weights if v not in but]
    return rng.choices(names, [weights[v] for v in names])[0]


def _draw_style(rng: random.Random, voice: str, weights: dict[int, int]) -> int:
    possible = styles_of(voice)
    return rng.choices(possible, [weights[s] for s in possible])[0]


def plan(seed: int = 0) -> list[Job]:
    """Every recording of the corpus, in three parts, each shuffled; the same for the same seed."""
    return [*plan_first(seed), *plan_more(seed), *plan_wider(wider(seed), seed)]


def plan_first(seed: int = 0) -> list[Job]:
    """The drawn requests, all replies, the varied sentences; everything that is held out."""
    world = domain.build(seed)
    rng = random.Random(f"corpus {seed}")
    jobs = [*_plan_requests(world, rng), *_plan_replies(world, rng), *_plan_book(seed, rng)]
    rng.shuffle(jobs)
    return jobs


def _plan_requests(world: domain.Domain, rng: random.Random) -> Iterator[Job]:
    for number, request in enumerate(world.requests):
        heldout = request.split == "heldout"
        count = 2 if rng.random() < 0.25 else 1
        voices: list[str] = []
        for _ in range(count):
            voices.append(_draw_voice(rng, voices))
        if heldout and rng.random() < KAL_SHARE:
            voices.append("kal16")
        for voice in voices:
            yield _request(f"req{number:05d}", request, voice, rng)


def _request(
    name: str, request: domain.Request | dialogues.Example, voice: str, rng: random.Random
) -> Job:
    # The unseen voice speaks as it is: its figures mean the voice and not the style.
    style = NEUTRAL if voice == "kal16" else _draw_style(rng, voice, REQUEST_STYLES)
    return Job(
        f"{name}-{voice}", request.text, "request", request.intent, voice, style,
        request.split, round(rng.uniform(0.9, 1.12), 3),
        voice != "kal16" and rng.random() < NOISY_SHARE,
    )  # fmt: skip


def _plan_replies(world: domain.Domain, rng: random.Random) -> Iterator[Job]:
    intents = {reply: r.intent for r in world.requests for reply in r.replies}
    for number, (text, style) in enumerate(world.styles.items()):
        for take, speed in enumerate((1.0, round(rng.choice((0.93, 0.96, 1.05, 1.1)), 3))):
            name = f"rep{number:05d}-heart-{take}"
            yield Job(name, text, "reply", intents.get(text), "heart", style, "train", speed)


def _plan_book(seed: int, rng: random.Random) -> Iterator[Job]:
    train, heldout = domain.book(seed=seed)
    for number, text in enumerate((*train, *heldout)):
        split = "train" if number < len(train) else "heldout"
        style = _draw_style(rng, "heart", BOOK_STYLES) if split == "train" else NEUTRAL
        speed = round(rng.uniform(0.92, 1.08), 3)
        yield Job(f"book{number:05d}-heart", text, "book", None, "heart", style, split, speed)
        if rng.random() < 0.2:
            voice = _draw_voice(rng, ["heart"])
            style = _draw_style(rng, voice, REQUEST_STYLES)
            speed = round(rng.uniform(0.9, 1.12), 3)
            yield Job(f"book{number:05d}-{voice}", text, "book", None, voice, style, split, speed)


def plan_more(seed: int = 0) -> list[Job]:
    """Training requests not drawn yet, sentences mixed of their phrases, other voices' books."""
    rng = random.Random(f"more {seed}")
    recorded = {request.transcript for request in domain.build(seed).requests}
    pool = [r for t, r in more_requests(seed).items() if t not in recorded]
    jobs: list[Job] = []
    for number, request in enumerate(rng.sample(pool, min(MORE_REQUESTS, len(pool)))):
        voice = _draw_voice(rng)
        style = _draw_style(rng, voice, REQUEST_STYLES)
        jobs.append(
            Job(
                f"more{number:05d}-{voice}", request.text, "request", request.intent, voice, style,
                "train", round(rng.uniform(0.85, 1.15), 3), rng.random() < NOISY_SHARE,
            )
        )  # fmt: skip
    for number in range(MIXED):
        voice = "heart" if rng.random() < MIXED_HEART_SHARE else _draw_voice(rng, ["heart"])
        style = _draw_style(rng, voice, REQUEST_STYLES)
        jobs.append(_plain(f"mixed{number:05d}", _mixed(rng, pool), voice, style, rng))
    sentences, _ = domain.book(seed=seed)
    for number in rng.sample(range(len(sentences)), min(MORE_BOOK, len(sentences))):
        voice = _draw_voice(rng, ["heart"])
        style = _draw_style(rng, voice, REQUEST_STYLES)
        jobs.append(_plain(f"again{number:05d}", sentences[number], voice, style, rng))
    rng.shuffle(jobs)
    return jobs


@cache
def wider(seed: int = 0) -> dialogues.Dialogues:
    """The wider domain; it takes seconds to draw."""
    return dialogues.load(seed)


def plan_wider(world: dialogues.Dialogues, seed: int = 0) -> list[Job]:
    """All replies that the first domain does not have; requests of every intent of ``world``.

    Voice and speed depend on the text alone, as does the name of the recording: what stays in a
    domain that grows is not made again.
    """
    known = domain.build(seed).styles
    replies = {r: e for e in reversed(world.examples) for r in e.replies if r not in known}
    jobs = [job for text, e in replies.items() for job in _plan_wider_reply(text, e, seed)]
    recorded = {request.transcript for request in domain.build(seed).requests}
    recorded |= {domain.transcript(job.text) for job in plan_more(seed)}
    for split, count in (("train", WIDER_TRAIN), ("heldout", WIDER_HELDOUT)):
        new = [e for e in world.split(split) if e.added and e.transcript not in recorded]
        for example in evenly(new, count, seed):
            jobs += _plan_wider_request(example, seed)
    random.Random(f"wider {seed}").shuffle(jobs)
    return jobs


def _plan_wider_reply(text: str, example: dialogues.Example, seed: int) -> Iterator[Job]:
    rng = random.Random(f"wider {seed} {text}")
    for take in range(2 if rng.random() < SECOND_TAKE else 1):
        speed = 1.0 if take == 0 else rng.choice((0.93, 0.96, 1.05, 1.1))
        name = f"wrep{_name(text)}-heart-{take}"
        yield Job(name, text, "reply", example.intent, "heart", example.style, "train", speed)


def _plan_wider_request(example: dialogues.Example, seed: int) -> Iterator[Job]:
    rng = random.Random(f"wider {seed} {example.text}")
    voices = [_draw_voice(rng)]
    if example.split == "heldout" and rng.random() < KAL_SHARE:
        voices.append("kal16")
    for voice in voices:
        yield _request(f"wreq{_name(example.text)}", example, voice, rng)


def _name(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def evenly(
    examples: Iterable[dialogues.Example], count: int, seed: int = 0
) -> list[dialogues.Example]:
    """At most ``count`` examples of different texts, as far as there are the same number of every
    intent."""
    by_intent: dict[str, list[dialogues.Example]] = defaultdict(list)
    for example in {e.transcript: e for e in examples}.values():
        by_intent[example.intent].append(example)
    for some in by_intent.values():
        some.sort(key=lambda e: _name(f"{seed} {e.transcript}"))
    rounds = zip_longest(*by_intent.values())
    return [e for one_of_each in rounds for e in one_of_each if e is not None][:count]


def _plain(name: str, text: str, voice: str, style: int, rng: random.Random) -> Job:
    speed = round(rng.uniform(0.9, 1.12), 3)
    return Job(f"{name}-{voice}", text, "book", None, voice, style, "train", speed)


def _mixed(rng: random.Random, pool: Sequence[domain.Request]) -> str:
    """A sentence of two to four phrases out of different requests or their replies."""
    words: list[str] = []
    for _ in range(rng.randint(2, 4)):
        request = rng.choice(pool)
        source = request.transcript
        if rng.random() < 0.3:
            source = domain.transcript(rng.choice(request.replies))
        phrase = source.split()
        size = min(len(phrase), rng.randint(1, 4))
        start = rng.randint(0, len(phrase) - size)
        words += phrase[start : start + size]
    return domain.sentence(" ".join(words))


def finish(
    wave: np.ndarray, style: int, noisy: bool, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Level, silence of 0.05 to 0.4 s around, a noise floor, sometimes a noisy room.

    Returns the recording and the samples added before the speech.
    """
    level = LEVEL * (0.5 if style == WHISPERED else 1.0)
    wave = wave * (level / max(float(np.sqrt(np.mean(wave**2))), 1e-6))
    wave = wave * min(1.0, 0.97 / max(float(np.abs(wave).max()), 1e-6))
    before, after = (int(rng.uniform(0.05, 0.4) * SAMPLE_RATE) for _ in range(2))
    recording = np.pad(wave.astype(np.float32), (before, after))
    floor = 10 ** (rng.uniform(-72, -60) / 20)
    if noisy:
        floor = level * 10 ** (-rng.uniform(15, 30) / 20)
        recording *= min(10 ** (rng.uniform(-8, 6) / 20), 0.97 / float(np.abs(recording).max()))
    noise = rng.standard_normal(len(recording) + 1).astype(np.float32)
    colour = rng.uniform(0, 0.9)  # from white to the low rumble of a room
    noise = noise[1:] + colour * noise[:-1]
    return np.clip(recording + floor * noise / np.sqrt(1 + colour**2), -1, 1), before


def record(job: Job, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Synthesise one job into ``folder`` and return its row of the manifest."""
    number = zlib.crc32(f"{seed} {job.id}".encode())
    speech = speak(job.text, job.voice, job.style, job.speed, number)
    wave, before = finish(speech.wave, job.style, job.noisy, np.random.default_rng(number))
    path = Path("wav") / job.voice / f"{job.id}.wav"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / path, wave, SAMPLE_RATE, subtype="PCM_16")
    row = asdict(job)
    noisy, speed = row.pop("noisy"), row.pop("speed")
    return row | {
        "transcript": domain.transcript(job.text),
        "wav": path.as_posix(),
        "samples": len(wave),
        "words": shift(speech.words, before / SAMPLE_RATE),
        "phones": shift(speech.phones, before / SAMPLE_RATE, len(wave) / SAMPLE_RATE),
        "speed": speed,
        "noisy": noisy,
    }


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _record_star(arguments: tuple[Job, Path, int]) -> tuple[dict[str, Any], float]:
    """A recording's row, and the seconds of work."""
    watch = Stopwatch()
    return record(*arguments), watch.lap()


def synthesise(
    jobs: Sequence[Job], folder: Path, seed: int = 0, processes: int = 2,
    minutes: float | None = None,
) -> None:  # fmt: skip
    """Make the recordings that the manifest does not have yet, adding a line for each.

    Args:
        minutes: of work after which no more are made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_manifest(folder)
    path = folder / "manifest.jsonl"
    path.write_text("".join(map(_line, rows)), encoding="utf-8")
    have = {row["id"] for row in rows}
    todo = [(job, folder, seed) for job in jobs if job.id not in have]
    with (
        path.open("a", encoding="utf-8") as manifest,
        multiprocessing.get_context("spawn").Pool(processes) as pool,
    ):
        done = pool.imap_unordered(_record_star, todo, chunksize=4)
        worked = 0.0
        for row, seconds in track(done, "corpus", total=len(todo)):
            manifest.write(_line(row))
            manifest.flush()
            worked += seconds / processes
            if minutes is not None and worked > 60 * minutes:
                break


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Hours by voice, style, role and split, and what could be aligned."""
    seconds: dict[str, Counter[str]] = {k: Counter() for k in ("voice", "style", "role", "split")}
    count, words, phones = 0, 0, 0
    for row in rows:
        count += 1
        words += row["words"] is not None
        phones += row["phones"] is not None
        for key, counter in seconds.items():
            counter[str(row[key])] += row["samples"] / SAMPLE_RATE
    hours = {k: {n: round(s / 3600, 3) for n, s in c.most_common()} for k, c in seconds.items()}
    total = round(sum(seconds["role"].values()) / 3600, 3)
    return {"recordings": count, "hours": total, "with_words": words, "with_phones": phones} | hours


def corpus(
    work: Path, seed: int = 0, limit: int | None = None, processes: int = 2,
    minutes: float | None = None, speakers: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Make the corpus under ``work`` and return its summary.

    Args:
        speakers: only recordings in these voices; all where there are none.
        limit: only so many recordings.
        minutes: of work after which no more are made; those there are a fair sample.
    """
    folder = work / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in plan(seed) if not speakers or job.voice in speakers]
    asked = {job.text for job in jobs if job.role == "request"}
    # What was recorded from an earlier state of the domain stays in use where it still has it.
    asked |= {row["text"] for row in read_manifest(folder) if row["role"] == "request"}
    rows = dialogs(asked, seed)
    (folder / "dialogs.jsonl").write_text("".join(map(_line, rows)), encoding="utf-8")
    synthesise(jobs[:limit], folder, seed, processes, minutes)
    report = summary(read_manifest(folder)) | {"seed": seed, "voices": list(VOICES)}
    (work / "reports").mkdir(exist_ok=True)
    text = json.dumps(report, indent=2)
    (work / "reports" / "corpus.json").write_text(text + "\n", encoding="utf-8")
    if limit is None and minutes is None and not speakers:
        (folder / "DONE").write_text(text + "\n", encoding="utf-8")
    return report


def dialogs(asked: Collection[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of dialogs.jsonl: one for each request, dialogue before it and right reply.

    ``action`` is what the reply makes the robot do, ``before`` the turns before the request, each
    with ``request``, ``reply``, ``style`` and ``action``. A request of training that is held out
    of the wider domain has no row, and is not used.

    Args:
        asked: the texts of the requests that are recorded.
    """
    first = [*domain.build(seed).requests, *more_requests(seed).values()]
    examples = {(e.text, e.before): e for e in dialogues.answered(first, seed)}
    for example in wider(seed).examples:
        examples.setdefault((example.text, example.before), example)
    for example in examples.values():
        if example.text in asked:
            yield from _dialog_rows(example)


def _dialog_rows(example: dialogues.Example) -> Iterator[dict[str, Any]]:
    for reply in example.replies:
        yield {
            "intent": example.intent,
            "request_text": example.text,
            "reply_text": reply,
            "reply_style": example.style,
            "split": example.split,
            "action": example.action,
            "before": [asdict(turn) for turn in example.before],
        }


def main(
    work: Annotated[Path, typer.Option(help="Folder for what the recipes make.")] = Path("work"),
    seed: Annotated[int, typer.Option(help="Another seed gives another corpus.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Make only so many recordings.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Make no more after so many minutes in this run.")
    ] = None,
    voices: Annotated[str, typer.Option(help="Only these voices of the plan: heart,slt")] = "",
    processes: Annotated[int, typer.Option(help="Processes that synthesise.")] = PROCESSES,
) -> None:
    """Synthesise the corpus: requests, replies and varied sentences, with alignments."""
    speakers = [name.strip() for name in voices.split(",") if name.strip()]
    for name in speakers:
        if name not in VOICES:
            raise UserError(f"corpus: no voice {name!r}; known are {', '.join(VOICES)}")
    report = corpus(work, seed, limit, processes, minutes, speakers)
    typer.echo(f"{report['recordings']} recordings, {report['hours']} hours, in {work / 'corpus'}")
