"""The steps that make a model: what each reads and writes, and what it goes on from.

Places are templates: ``{work}`` is the folder of a recipe, ``{out}`` that of the model, ``{ears}``,
``{voice}`` and ``{lm}`` its parts, ``{recipes}`` this package, ``{configs}`` the configurations.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from agent.config import config_folder
from recipes import made
from recipes.made import Entry

PACKAGE = Path(__file__).parent
Place = str | tuple[str, ...]
FREE = frozenset(
    {"processes", "jobs", "threads", "device", "card", "judge"}
)  # what comes out is the same


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        places: options that say where to read and write.
        reads, writes: by the name under which a change is told.
        state: what a run goes on from, out of the way when it has to begin anew.
        caches: of single recordings; they hold for a corpus that has grown, and are out of the way
            only when the step's own settings or code changed.
        goes_on: what may change without beginning anew: settings or inputs.
        timed: its options in minutes, which a budget sets.
        apart: modules that only measure: what the step makes is the same without them.
    """

    summary: str
    reads: Mapping[str, Place]
    writes: Mapping[str, Place]
    places: Mapping[str, str] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    goes_on: frozenset[str] = frozenset()
    timed: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()


TEXTS = {"texts": ("{recipes}/*.txt", "{configs}/nano-actions.json")}
CORPUS = {"corpus": "{work}/corpus"}
WORDS = {"words": ("{work}/corpus/manifest.jsonl", "{work}/corpus/dialogs.jsonl")}
EARS = {"ears": "{ears}/hubert_25hz"}
UNITS = {
    "units": "{work}/units/units.jsonl",
    "pitch units": "{work}/units/pitch.jsonl",
    "style units": "{work}/units/style.jsonl",
}
VOICE = {"voice": "{voice}"}
TEXT_TOKENIZER = {
    "text tokenizer": (
        "{lm}/tokenizer.model", "{lm}/tokenizer_config.json", "{lm}/special_tokens_map.json",
    )
}  # fmt: skip
LM = {"language model": ("{lm}/config.json", "{lm}/pytorch_model.bin")}
MODEL = {"speech tokenizer": "{out}/speech_tokenizer", "language model": "{out}/spiritlm_model"}
PHASES = ("mel_minutes", "unit_minutes", "minutes", "sharpen_minutes")

STEPS: dict[str, Step] = {
    "corpus": Step(
        "Synthesise the corpus: requests, replies and varied sentences, aligned.",
        reads=TEXTS,
        writes=CORPUS,
        caches=("corpus", "f0", "hearing", "units", "evaluation"),
        goes_on=frozenset({"texts", "limit", "minutes"}),
        timed=("minutes",),
    ),
    "hearing": Step(
        "Construct nano's ears from Whisper's blocks and fit the phonetic units.",
        reads=CORPUS,
        writes=EARS,
        places={"out": "{ears}/hubert_25hz"},
        caches=("hearing",),
        apart=("recipes.hearing_report",),
    ),
    "units": Step(
        "Encode the corpus to phonetic units, as the stream will give them.",
        reads={**CORPUS, **EARS},
        writes={"units": UNITS["units"]},
        places={"checkpoint": "{ears}/hubert_25hz"},
        caches=("units/units.jsonl", "units/units.stamp"),
    ),
    "tokenizers": Step(
        "Train the pitch and style tokenizers and encode the corpus with them.",
        reads=CORPUS,
        writes={
            "pitch tokenizer": "{ears}/vqvae_f0_quantizer",
            "style tokenizer": "{ears}/style_encoder_w2v2",
            "pitch units": UNITS["pitch units"],
            "style units": UNITS["style units"],
        },
        places={"out": "{ears}"},
        state=(
            "{work}/tokenizers",
            "{ears}/vqvae_f0_quantizer",
            "{ears}/style_encoder_w2v2",
            "{work}/units/pitch.jsonl",
            "{work}/units/style.jsonl",
        ),
        caches=("f0",),
    ),
    "vocoder": Step(
        "Train the unit vocoder of the reply voice.",
        reads={**CORPUS, **UNITS},
        writes=VOICE,
        places={"ship": "{voice}"},
        state=("{work}/vocoder",),
        goes_on=frozenset({*PHASES, "evaluate", "duration_steps"}),
        timed=PHASES,
        apart=("recipes.vocoder_report",),
    ),
    "text_tokenizer": Step(
        "Train the text tokenizer and add the speech tokens to it.",
        reads=WORDS,
        writes=TEXT_TOKENIZER,
        places={"out": "{lm}"},
    ),
    "lm": Step(
        "Train the language model on speech, text and mixed streams.",
        reads={**TEXTS, **WORDS, **UNITS, **TEXT_TOKENIZER},
        writes=LM,
        places={"out": "{lm}"},
        state=("{work}/lm",),
        goes_on=frozenset({"minutes", "steps", "mix", "rate", "noise", "measured", "margin"}),
        timed=("minutes",),
        apart=("recipes.lm_measure", "recipes.chance"),
    ),
    "evaluate": Step(
        "Measure the checkpoint with an independent recognizer; write the model card.",
        reads={**TEXTS, **CORPUS, **MODEL},
        writes={"evaluation": "{work}/reports/evaluation.json", "card": "{out}/README.md"},
        places={"checkpoint": "{out}"},
        caches=("evaluation",),
        goes_on=frozenset({"limit", "spoken"}),
    ),
    "listen": Step(
        "Write a page of questions and answers to listen to.",
        reads={**TEXTS, **CORPUS, **MODEL},
        writes={"page": "{work}/listen.html"},
        places={"checkpoint": "{out}", "out": "{work}/listen.html"},
    ),
    "pack": Step(
        "Pack the model with its card, the page and checksums into one archive.",
        reads={**MODEL, "card": "{out}/README.md", "page": "{work}/listen.html"},
        writes={"archive": "{work}/{model}.tar.gz"},
        places={
            "checkpoint": "{out}",
            "page": "{work}/listen.html",
            "out": "{work}/{model}.tar.gz",
        },
    ),
}


@dataclass(frozen=True)
class Folders:
    """Where a recipe works and where its model goes."""

    work: Path
    out: Path
    model: str

    def path(self, template: str) -> Path:
        ears = self.out / "speech_tokenizer"
        return Path(
            template.format(
                work=self.work,
                out=self.out,
                ears=ears,
                voice=ears / "hifigan_spiritlm_expressive_w2v2",
                lm=self.out / "spiritlm_model" / f"spirit-lm-{self.model}",
                recipes=PACKAGE,
                configs=config_folder(),
                model=self.model,
            )
        )

    def places(self, step: str) -> dict[str, Path]:
        """The options of ``step`` that name files."""
        places = {option: self.path(place) for option, place in STEPS[step].places.items()}
        return (
            places if step == "pack" else {"work": self.work, **places}
        )  # it needs the model only

    def contents(self, places: Mapping[str, Place]) -> dict[str, str]:
        """What is in each of ``places``, by name (see :func:`recipes.made.content`)."""
        return {name: "+".join(map(made.content, self.paths(p))) for name, p in places.items()}

    def paths(self, place: Place) -> list[Path]:
        """The files and folders that a place stands for."""
        found: list[Path] = []
        for path in map(self.path, (place,) if isinstance(place, str) else place):
            found += sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        return found


def module(step: str) -> ModuleType:
    """The module of a step. Raises ModuleNotFoundError when a package is missing."""
    return importlib.import_module(f"recipes.{step}")


def entry(step: str, settings: Mapping[str, Any], folders: Folders) -> Entry:
    """What ``step`` would be made of now."""
    counted = {
        name: made.content(value) if isinstance(value, Path) else value
        for name, value in settings.items()
        if name not in FREE
    }
    inputs = folders.contents(STEPS[step].reads)
    return Entry(counted, inputs, made.code(f"recipes.{step}", STEPS[step].apart))


def why(step: str, before: Entry | None, now: Entry, folders: Folders) -> str:
    """Why a step has to run; "" where it has not."""
    if before is None:
        return "not made yet"
    changes = before.changes(now)
    if changes:
        return ", ".join(changes.values())
    if not before.outputs:
        return "not finished"
    outputs = folders.contents(STEPS[step].writes)
    lost = [name for name, content in outputs.items() if before.outputs.get(name) != content]
    return f"{', '.join(lost)} changed or gone" if lost else ""


def clear(step: str, changes: Mapping[str, str], folders: Folders) -> bool:
    """Whether the step begins anew after ``changes``; what it must not go on from is moved away.

    It lies in {work}/before/STEP until the next time: an edit should cost nobody a training.
    """
    own = STEPS[step]
    anew = set(changes) - own.goes_on
    if not anew:
        return False
    paths = [folders.path(place) for place in own.state]
    if anew - set(own.reads):
        paths += [folders.work / cache for cache in own.caches]
    aside = folders.work / "before" / step
    shutil.rmtree(aside, ignore_errors=True)
    for path in filter(Path.exists, paths):
        aside.mkdir(parents=True, exist_ok=True)
        shutil.move(path, aside / path.name)
    return True
