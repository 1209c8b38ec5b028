"""``python -m recipes evaluate``: what the shipped nano can do, judged by another recognizer.

Everything is measured on heldout material: requests in phrasings that training never saw, in
voices it knew (from other sentences) and in voices it never heard; book sentences for the vocoder.
An answer is right when its words and its action are. The requests that the first nano was measured
with and those added since are told apart.
Writes {work}/reports/evaluation.json, a few replies as wav files, and the model card; every answer
is kept in {work}/evaluation, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import os
import platform
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer
from rich.progress import track

from recipes import dialogues, domain, report
from recipes.board import Board
from recipes.manifest import corpus_seed, read_manifest
from recipes.nano import Nano, Turn, fingerprint
from recipes.scoring import RECOGNIZER, Recognizer, rate, spoken, word_errors
from recipes.strangers import human_prompts, joe_requests
from recipes.voices import SAMPLE_RATE, VOICES
from stages.lm import Sampling

SPOKEN = 200  # heldout requests per group whose replies are also spoken; of those added, half
TYPED = 300  # heldout requests of each kind that are typed
VOCODED = 60  # sentences per group for the vocoder alone
JOE = 150  # requests in the unseen voice joe
SHOWN = 4  # answers of each group in the card
PLAYED = 12  # replies kept as wav files
ADDED = "added_"  # before the names of groups of requests that the first nano did not have

Row = dict[str, Any]


# ------------------------------------------------------------------------------ what is measured


def load_wave(path: Path) -> np.ndarray:
    """A recording of the corpus: float32 at 16 kHz."""
    wave, sample_rate = soundfile.read(path, dtype="float32")
    if sample_rate != SAMPLE_RATE:
        raise ValueError(f"{path} has {sample_rate} Hz: the corpus has {SAMPLE_RATE}")
    return wave


def choose(rows: Iterable[Row], limit: int | None, seed: int = 0) -> list[Row]:
    """At most ``limit`` rows, a fixed random choice."""
    rows = sorted(rows, key=lambda row: str(row["id"]))
    random.Random(seed).shuffle(rows)
    return rows[:limit]


def measure_vocoder(
    nano: Nano, judge: Recognizer, folder: Path, groups: dict[str, list[Row]]
) -> dict[str, Any]:
    """WER of the vocoder on units of real recordings, beside the WER of the recordings."""
    result = {}
    for name, rows in groups.items():
        made, original, said = [], [], []
        for row in track(rows, f"vocoder, {name}"):
            wave = load_wave(folder / row["wav"])
            said.append(row["text"])
            original.append(judge.hear(wave))
            made.append(judge.hear(nano.voice.decode(nano.encode(wave))))
        result[name] = word_errors(said, made) | {
            "wer_of_recordings": word_errors(said, original)["wer"]
        }
    return result


@dataclass
class Exam:
    """The held-out requests and what answers them."""

    world: dialogues.Dialogues

    @cached_property
    def examples(self) -> dict[str, dialogues.Example]:
        """By transcript."""
        heldout = self.world.split("heldout")
        return {example.transcript: example for example in reversed(heldout)}

    @cached_property
    def added(self) -> domain.Domain:
        """The requests added since the first nano, follow-ups too."""
        wanted = [
            domain.Request(e.intent, e.text, e.slots, e.replies, e.style, e.split)
            for e in self.examples.values()
            if e.added
        ]
        return domain.Domain(wanted)

    def judge(self, example: dialogues.Example, turn: Turn) -> Row:
        """Whether words and action are right; ``right_action`` is None where none is wanted."""
        words = self.world.is_right(example, turn.reply)
        action = turn.action == example.action
        return {
            "right": words and action,
            "right_words": words,
            "right_action": None if example.action is None else action,
        }


def measure_typed(nano: Nano, exam: Exam, limit: int, seed: int = 0) -> dict[str, Row]:
    """Right answers to typed requests, of the first nano's (``first``) and of those ``added``."""
    heldout = exam.world.split("heldout")
    result = {}
    for name, added in (("first", False), ("added", True)):
        some = [example for example in heldout if example.added == added]
        chosen = random.Random(seed).sample(some, min(limit, len(some)))
        judged = [
            exam.judge(example, nano.read(example.transcript, example.before))
            for example in track(chosen, f"typed, {name}")
        ]
        result[name] = rights(judged)
    return result


def rights(results: Sequence[Row]) -> Row:
    """The shares of right answers, and of right words and actions by themselves."""
    acting = [row["right_action"] for row in results if row["right_action"] is not None]
    return {
        "right_text": rate([row["right"] for row in results]),
        "right_words": rate([row["right_words"] for row in results]),
        "right_action": rate(acting),
    }


def measure_dialogs(
    nano: Nano, judge: Recognizer, exam: Exam, rows: Sequence[tuple[Row, Path]],
    speak: int, done: Path, keep: Path | None = None,
) -> list[Row]:  # fmt: skip
    """Every request answered; the first ``speak`` replies also spoken and recognised.

    ``rows`` are rows of a manifest with the folder of their waves. Results are added to the file
    ``done`` at once, and what is there already is not measured again.
    """
    results = {row["id"]: row for row in read_rows(done)}
    with done.open("a", encoding="utf-8") as lines:
        for number, (row, folder) in enumerate(track(rows, "requests")):
            aloud = number < speak
            if row["id"] in results and (not aloud or "reply_heard" in results[row["id"]]):
                continue
            name = None
            if keep is not None and number < PLAYED:
                name = keep / f"{number:02d}-{spoken(row['text']).replace(' ', '_')[:50]}.wav"
            result = measure_one(nano, judge, exam, row, folder, aloud, name)
            results[row["id"]] = result
            lines.write(json.dumps(result, ensure_ascii=False) + "\n")
            lines.flush()
    return [results[row["id"]] for row, _ in rows]


def measure_one(
    nano: Nano, judge: Recognizer, exam: Exam, row: Row, folder: Path, aloud: bool,
    keep: Path | None = None,
) -> Row:  # fmt: skip
    """One request answered, if ``aloud`` in speech; ``keep``: where to write that."""
    example = exam.examples[row["transcript"]]
    wave = load_wave(folder / row["wav"])
    turn = nano.listen(wave, example.before)
    result: Row = {key: row[key] for key in ("id", "voice", "style", "intent", "text")} | {
        "heard": turn.heard,
        "reply": turn.reply,
        "action": turn.action,
        "before": [[past.request, past.reply] for past in example.before],
        **exam.judge(example, turn),
        "recognizer": judge.hear(wave),
        "request_seconds": len(wave) / SAMPLE_RATE,
    }
    if aloud:
        reply = nano.answer(turn)
        result["reply_heard"] = judge.hear(reply)
        understood = exam.world.is_right(example, result["reply_heard"])
        result["right_spoken"] = understood and turn.action == example.action
        result["reply_seconds"] = len(reply) / SAMPLE_RATE
        if keep is not None and len(reply):
            soundfile.write(keep, reply, SAMPLE_RATE, subtype="PCM_16")
    return result | {"tokens": turn.tokens, "seconds": turn.seconds}


def read_rows(path: Path) -> list[Row]:
    """The complete lines of a file of JSON lines; [] where there is none."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[-1]:  # an interrupted run left half a line: the next one must not go on in it
        path.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
    return [json.loads(line) for line in lines[:-1] if line]


def by_voice(results: Sequence[Row]) -> dict[str, Row]:
    """For each voice: WER of nano's transcription and of the recognizer's, and right replies."""
    table = {}
    for voice in dict.fromkeys(sorted(row["voice"] for row in results)):
        some = [row for row in results if row["voice"] == voice]
        said = [row["text"] for row in some]
        table[voice] = word_errors(said, [row["heard"] for row in some]) | {
            "wer_of_recognizer": word_errors(said, [row["recognizer"] for row in some])["wer"],
            "right": rate([row["right"] for row in some]),
        }
    return table


def together(results: Sequence[Row]) -> Row:
    """The same over several voices, and what became of the spoken replies."""
    said = [row["text"] for row in results]
    aloud = [row for row in results if "reply_heard" in row]
    planned = [row for row in aloud if row["reply"]]
    return {
        "transcription": word_errors(said, [row["heard"] for row in results]),
        "recognizer": word_errors(said, [row["recognizer"] for row in results]),
        **rights(results),
        "right_spoken": rate([row["right_spoken"] for row in aloud]),
        "speech": word_errors([r["reply"] for r in planned], [r["reply_heard"] for r in planned]),
    }


def speed(results: Sequence[Row]) -> Row:
    """Decoding speed, and computing time against the length of the replies."""
    aloud = [row for row in results if row.get("reply_seconds")]
    if not aloud:
        return {}

    def total(*parts: str) -> float:
        return sum(row["seconds"][part] for row in aloud for part in parts)

    tokens = sum(row["tokens"] for row in aloud)
    reply = sum(row["reply_seconds"] for row in aloud)
    request = sum(row["request_seconds"] for row in aloud)
    return {
        "machine": f"{platform.machine()}, {_processor()}",
        "load": round(os.getloadavg()[0], 1),
        "lm_tokens_per_second": round(tokens / total("text", "units"), 1),
        "lm_tokens_per_second_of_reply": round(tokens / reply, 1),
        "encoder_rtf": round(total("encode") / request, 3),
        "vocoder_rtf": round(total("vocoder") / reply, 3),
        "reply_rtf": round(total("text", "units", "vocoder") / reply, 3),
        "whole_rtf": round(total("encode", "prefill", "text", "units", "vocoder") / reply, 3),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else "unknown processor"


def measure_human(nano: Nano, judge: Recognizer, prompts: Sequence[tuple[str, np.ndarray]]) -> Row:
    """WER of nano's transcription of a real voice, outside the domain."""
    said = [text for text, _ in prompts]
    heard = [nano.listen(wave).heard for _, wave in track(prompts, "a human")]
    other = [judge.hear(wave) for _, wave in prompts]
    return word_errors(said, heard) | {"wer_of_recognizer": word_errors(said, other)["wer"]}


# ------------------------------------------------------------------------------------- the run


def evaluate(
    work: Path, checkpoint: Path, limit: int | None = None, spoken_limit: int = SPOKEN,
    sampling: Sampling | None = None, seed: int = 0, threads: int = 1,
) -> Row:  # fmt: skip
    """Measure everything; ``limit`` bounds every group, ``spoken_limit`` the replies spoken."""
    import torch

    torch.set_num_threads(threads)
    folder, reports = work / "corpus", work / "reports"
    rows = read_manifest(folder)
    if not any(row["split"] == "heldout" for row in rows):
        raise FileNotFoundError(f"no heldout recordings in {folder}: run `recipes corpus` first")
    sampling = sampling or Sampling(temperature=0.7, top_p=0.9, seed=seed)
    nano, judge = Nano(checkpoint, sampling, threads), Recognizer(threads)
    drawn = corpus_seed(work)
    first, exam = domain.build(drawn), Exam(dialogues.load(drawn))
    mark = fingerprint(checkpoint, sampling)
    sets = choose_sets(rows, first, limit, seed)
    groups = choose_groups(sets, choose_sets(rows, exam.added, limit, seed), folder)
    joe = joe_requests(first, work, min(limit or JOE, JOE), seed)
    groups["unseen"] += [(row, work / "evaluation") for row in joe]
    random.Random(seed).shuffle(groups["unseen"])
    (work / "evaluation" / "replies").mkdir(parents=True, exist_ok=True)
    answers = {}
    for name, asked in groups.items():
        keep = work / "evaluation" / "replies" if name == "trained" else None
        aloud = spoken_limit // 2 if name.startswith(ADDED) else spoken_limit
        done = work / "evaluation" / f"{name}-{mark}.jsonl"
        answers[name] = measure_dialogs(nano, judge, exam, asked, aloud, done, keep)
    words = {w for r in rows if r["split"] == "train" for w in spoken(r["text"]).split()}
    prompts = human_prompts(words, limit)
    result = {
        "recognizer": RECOGNIZER,
        "checkpoint": str(checkpoint),
        "fingerprint": mark,
        "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed},
        "vocoder": measure_vocoder(
            nano, judge, folder, {name: sets[name] for name in ("domain", "book")}
        ),
        "voices": by_voice([*answers["trained"], *answers["unseen"]]),
        **{name: together(results) for name, results in answers.items()},
        "typed": measure_typed(nano, exam, min(limit or TYPED, TYPED), seed),
        "human": measure_human(nano, judge, prompts) if prompts else None,
        "followups": rights([r for rows in answers.values() for r in rows if r.get("before")]),
        "speed": speed(answers["trained"]),
        "examples": [_example(row) for rows in answers.values() for row in rows[:SHOWN]],
    }
    reports.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (reports / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    board = Board(work / "tensorboard" / "evaluate")
    board.add(0, {name: row for name, row in result.items() if name != "sampling"})
    board.close()
    return result


def choose_sets(
    rows: Iterable[Row], world: domain.Domain, limit: int | None, seed: int
) -> dict[str, list[Row]]:
    """The heldout recordings to measure: requests in known and in unseen voices, and for the
    vocoder requests ("domain") and book sentences of the reply voice."""
    heldout = [row for row in rows if row["split"] == "heldout"]
    asked = [
        r for r in heldout if r["role"] == "request" and r["transcript"] in world.by_transcript
    ]
    few = min(limit or VOCODED, VOCODED)
    heart = [row for row in heldout if row["voice"] == "heart"]
    return {
        "domain": choose((row for row in heart if row["role"] == "request"), few, seed),
        "book": choose((row for row in heart if row["role"] == "book"), few, seed),
        "trained": choose((row for row in asked if VOICES[row["voice"]].trained), limit, seed),
        "unseen": choose((row for row in asked if not VOICES[row["voice"]].trained), limit, seed),
    }


def choose_groups(
    first: dict[str, list[Row]], added: dict[str, list[Row]], folder: Path
) -> dict[str, list[tuple[Row, Path]]]:
    """Requests to be answered, with the folder of their waves: the first nano's and those added,
    each in known and in unseen voices."""
    return {
        prefix + name: [(row, folder) for row in sets[name]]
        for prefix, sets in (("", first), (ADDED, added))
        for name in ("trained", "unseen")
    }


def _example(row: Row) -> Row:
    keys = ("voice", "before", "text", "heard", "action", "reply", "reply_heard")
    return {k: row[k] for k in keys if k in row}


def main(
    work: Annotated[Path, typer.Option(help="Folder with the corpus.")] = Path("work"),
    checkpoint: Annotated[Path, typer.Option(help="The model to measure.")] = Path(
        "checkpoints/nano"
    ),
    limit: Annotated[int | None, typer.Option(help="At most so many of everything.")] = None,
    spoken: Annotated[int, typer.Option(help="Replies to speak, per group of voices.")] = SPOKEN,
    temperature: Annotated[float, typer.Option(help="For the units; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="For the units.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of choices and sampling.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    card: Annotated[bool, typer.Option(help="Write the model card into the checkpoint.")] = True,
) -> None:
    """Measure nano with an independent recognizer and write its model card."""
    greedy = temperature <= 0
    sampling = Sampling(temperature if not greedy else 1.0, top_p, seed, greedy)
    result = evaluate(work, checkpoint, limit, spoken, sampling, seed, threads)
    for line in report.headline(result):
        typer.echo(line)
    if card:
        path = report.write_card(checkpoint, work / "reports")
        typer.echo(f"model card: {path}")
