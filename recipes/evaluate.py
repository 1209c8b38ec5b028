"""``python -m recipes evaluate``: what the shipped nano can do, judged by another recognizer.

Everything is measured on heldout material: requests in phrasings that training never saw, in
voices it knew (from other sentences) and in voices it never heard; book sentences for the vocoder.
Writes {work}/reports/evaluation.json, a few replies as wav files, and the model card.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer
from rich.progress import track

from recipes import domain, report
from recipes.corpus import read_manifest
from recipes.scoring import RECOGNIZER, Recognizer, rate, spoken, word_errors
from recipes.strangers import human_prompts, joe_requests
from recipes.voices import SAMPLE_RATE, VOICES
from stages.checkpoint import find_layout
from stages.encoder import SpeechTokenizer
from stages.lm import LanguageModel, Sampling
from stages.prompt import Modality
from stages.text import Tokenizer
from stages.units import units_to_string
from stages.vocoder import Vocoder, VocoderError

SEPARATOR = "|"  # between what nano heard and what it answers
LONGEST_TEXT = 80  # tokens
LONGEST_REPLY = 500  # tokens, about 15 s
SPOKEN = 200  # heldout requests per group whose replies are also spoken
PLAYED = 12  # replies kept as wav files

Row = dict[str, Any]


@dataclass
class Turn:
    """One answer: what nano heard, what it says, and how long each part took, in seconds."""

    heard: str
    reply: str
    units: str = ""
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Nano:
    """The shipped model, through the same stages that the agent runs."""

    def __init__(self, checkpoint: Path, sampling: Sampling) -> None:
        layout = find_layout(checkpoint)
        self.ears = SpeechTokenizer.load(layout)
        self.text = Tokenizer.load(layout)
        self.lm = LanguageModel.load(layout)
        self.voice = Vocoder.load(layout)
        self.sampling = sampling
        self._text = self.text.mask(Modality.TEXT, also=[self.text.speech_tag])
        self._speech = self.text.mask(Modality.SPEECH)

    def encode(self, wave: np.ndarray) -> str:
        """A recording as the token string that the language model reads; whispers too."""
        return units_to_string(self.ears.encode(wave, allow_unvoiced=True))

    def listen(self, wave: np.ndarray) -> Turn:
        """Encode a request, transcribe it and form the reply as text (both greedily)."""
        began = time.perf_counter()
        prompt = f"[Speech]{self.encode(wave)}[Text]"
        encoded = time.perf_counter()
        self.lm.reset()
        self.lm.append(self.text.encode(prompt))
        filled = time.perf_counter()
        ids: list[int] = []
        while len(ids) < LONGEST_TEXT:
            ids.append(self.lm.decode(Sampling(greedy=True), self._text))
            if ids[-1] in (self.text.speech_tag, self.text.eos):
                break
        else:
            self.lm.append([self.text.speech_tag])
        heard, _, reply = self.text.decode(ids[:-1]).partition(SEPARATOR)
        turn = Turn(heard.strip(), reply.strip(), tokens=len(ids))
        now = time.perf_counter()
        turn.seconds = {
            "encode": encoded - began,
            "prefill": filled - encoded,
            "text": now - filled,
        }
        return turn

    def answer(self, turn: Turn) -> np.ndarray:
        """Speak the reply of a turn that :meth:`listen` has just made; empty if nothing comes."""
        began = time.perf_counter()
        ids: list[int] = []
        while len(ids) < LONGEST_REPLY:
            ids.append(self.lm.decode(self.sampling, self._speech))
            if ids[-1] == self.text.eos:
                break
        turn.units = self.text.decode([i for i in ids if i != self.text.eos])
        turn.tokens += len(ids)
        spoken_at = time.perf_counter()
        try:
            wave = self.voice.decode(turn.units)
        except VocoderError:
            wave = np.zeros(0, np.float32)
        turn.seconds["units"] = spoken_at - began
        turn.seconds["vocoder"] = time.perf_counter() - spoken_at
        return wave


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


def measure_dialogs(
    nano: Nano, judge: Recognizer, world: domain.Domain, rows: Sequence[tuple[Row, np.ndarray]],
    speak: int, keep: Path | None = None,
) -> list[Row]:  # fmt: skip
    """Every request answered; the first ``speak`` replies also spoken and recognised."""
    results = []
    for number, (row, wave) in enumerate(track(rows, "requests")):
        request = world.by_transcript[row["transcript"]]
        slots = dict(request.slots)
        turn = nano.listen(wave)
        result: Row = {
            "voice": row["voice"],
            "text": row["text"],
            "heard": turn.heard,
            "reply": turn.reply,
            "right": world.is_right(request.intent, slots, turn.reply),
            "recognizer": judge.hear(wave),
            "request_seconds": len(wave) / SAMPLE_RATE,
        }
        if number < speak:
            reply = nano.answer(turn)
            result["reply_heard"] = judge.hear(reply)
            result["right_spoken"] = world.is_right(request.intent, slots, result["reply_heard"])
            result["reply_seconds"] = len(reply) / SAMPLE_RATE
            if keep is not None and number < PLAYED and len(reply):
                name = f"{number:02d}-{spoken(row['text']).replace(' ', '_')[:50]}.wav"
                soundfile.write(keep / name, reply, SAMPLE_RATE, subtype="PCM_16")
        results.append(result | {"tokens": turn.tokens, "seconds": turn.seconds})
    return results


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
        "right_text": rate([row["right"] for row in results]),
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
    folder = work / "corpus"
    rows = [row for row in read_manifest(folder) if row["split"] == "heldout"]
    if not rows:
        raise FileNotFoundError(f"no heldout recordings in {folder}: run `recipes corpus` first")
    sampling = sampling or Sampling(temperature=0.7, top_p=0.9, seed=seed)
    nano, judge, world = Nano(checkpoint, sampling), Recognizer(threads), domain.build(seed)
    keep = work / "evaluation" / "replies"
    keep.mkdir(parents=True, exist_ok=True)

    heart = [row for row in rows if row["voice"] == "heart"]
    sets = {
        "domain": choose((r for r in heart if r["role"] == "request"), min(limit or 60, 60), seed),
        "book": choose((r for r in heart if r["role"] == "book"), min(limit or 60, 60), seed),
    }
    asked = [r for r in rows if r["role"] == "request" and r["transcript"] in world.by_transcript]
    trained = choose((r for r in asked if VOICES[r["voice"]].trained), limit, seed)
    unseen = choose((r for r in asked if not VOICES[r["voice"]].trained), limit, seed)
    joe = joe_requests(world, work, min(limit or 150, 150), seed)

    def loaded(some: Sequence[Row], where: Path) -> list[tuple[Row, np.ndarray]]:
        return [(row, load_wave(where / row["wav"])) for row in some]

    known = {
        w for r in read_manifest(folder) if r["split"] == "train" for w in spoken(r["text"]).split()
    }
    strangers = loaded(unseen, folder) + loaded(joe, work / "evaluation")
    random.Random(seed).shuffle(strangers)
    trained_results = measure_dialogs(
        nano, judge, world, loaded(trained, folder), spoken_limit, keep
    )
    unseen_results = measure_dialogs(nano, judge, world, strangers, spoken_limit)
    prompts = human_prompts(known, limit)
    result = {
        "recognizer": RECOGNIZER,
        "checkpoint": str(checkpoint),
        "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed},
        "vocoder": measure_vocoder(nano, judge, folder, sets),
        "voices": by_voice([*trained_results, *unseen_results]),
        "trained": together(trained_results),
        "unseen": together(unseen_results),
        "human": measure_human(nano, judge, prompts) if prompts else None,
        "speed": speed(trained_results),
        "examples": [_example(row) for row in trained_results[:12]],
    }
    (work / "reports").mkdir(exist_ok=True)
    details = {"trained": trained_results, "unseen": unseen_results}
    for name, content in (("evaluation", result), ("evaluation-details", details)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (work / "reports" / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return result


def _example(row: Row) -> Row:
    return {k: row[k] for k in ("voice", "text", "heard", "reply", "reply_heard") if k in row}


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
