"""The corpus as the language model sees it: recordings as ids, requests with their replies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from recipes.dialogues import action_text
from recipes.text_tokenizer import read_jsonl
from stages.byte_pieces import BytePieces
from stages.checkpoint import load_json
from stages.pieces import Pieces
from stages.units import Units, interleave

REPLY_VOICE = "heart"
FRAMES_PER_SECOND = 25


class Vocabulary:
    """Ids by name, from a ``tokenizer.model`` in the official form or a ``tokenizer.json``.

    Attributes:
        prefix: the ids with which every sequence begins.
    """

    def __init__(self, path: Path) -> None:
        self.processor = _pieces(path)
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        self._byte_level = path.suffix == ".json"
        # Sentencepiece puts a word boundary before a tag.
        boundary = [] if self._byte_level else [self.processor.piece_to_id("▁")]
        self.prefix = (self.bos, *boundary)
        self.text_tag, self.speech_tag = self.id("[Text]"), self.id("[Speech]")
        self._units: dict[str, np.ndarray] = {}
        for kind, count in (("Hu", 501), ("Pi", 64), ("St", 100)):
            ids = [self.id(f"[{kind}{i}]") for i in range(count)]
            self._units[kind] = np.array(ids, dtype=np.int64)

    def __len__(self) -> int:
        return self.processor.get_piece_size()

    def id(self, name: str) -> int:
        """The id of a piece. Raises ValueError when there is none of that name."""
        found = self.processor.piece_to_id(name)
        if found == self.processor.unk_id():
            raise ValueError(f"the tokenizer has no piece {name!r}")
        return int(found)

    def text(self, text: str) -> np.ndarray:
        """Ids of ``text`` as it stands after a tag: without a word boundary of its own.

        An action begins with a piece of its own, not with one that holds the blank before it too:
        so it is written when it is decoded (:mod:`stages.constrained`).
        """
        before, brace, action = text.partition("{")
        if not (self._byte_level and brace):
            ids = self.processor.encode("[Text]" + text)
        else:
            ids = self.processor.encode("[Text]" + before) + self.processor.encode(brace + action)
        return np.array(ids[ids.index(self.text_tag) + 1 :], dtype=np.int64)

    def unit(self, kind: str, index: int) -> int:
        """Id of the unit ``kind`` ("Hu", "Pi", "St") number ``index``."""
        return int(self._units[kind][index])

    @property
    def phonetic(self) -> np.ndarray:
        """Ids of all phonetic units, by unit number."""
        return self._units["Hu"]

    @property
    def style(self) -> np.ndarray:
        """Ids of all style units, by unit number."""
        return self._units["St"]


def _pieces(path: Path) -> Pieces:
    if path.suffix == ".json":
        return BytePieces.load(path, load_json(path.with_name("tokenizer_config.json")))
    return sentencepiece.SentencePieceProcessor(str(path))


@dataclass(frozen=True)
class Recording:
    """One recording as unit tokens.

    Attributes:
        ids, starts: the interleaved tokens and their samples on its clock.
        frames, pitch, styles: the unit streams (25, 12.5 and 1 Hz) they were made from.
        phones: name, first and last but one frame of each; empty where not known.
    """

    id: str
    role: str
    voice: str
    style: int
    text: str
    transcript: str
    ids: np.ndarray
    starts: np.ndarray
    words: list[tuple[str, float, float]] | None
    frames: np.ndarray
    pitch: list[int] | None
    styles: list[int] | None
    phones: list[tuple[str, int, int]]


class Answer(NamedTuple):
    """A right reply: its words, the style in which they are spoken, and the action before them."""

    words: str
    style: int
    action: str = ""  # JSON

    @property
    def plan(self) -> str:
        """The reply as it is planned: the action, a blank, the words."""
        return f"{self.action} {self.words}".strip()


@dataclass
class Corpus:
    """One split of the recordings with their units, and which request may have which reply.

    ``later`` are requests that have an answer only after some other turn.
    """

    requests: list[Recording] = field(default_factory=list)
    later: list[Recording] = field(default_factory=list)
    replies: dict[str, list[Recording]] = field(default_factory=lambda: defaultdict(list))
    sentences: list[Recording] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))

    @property
    def recordings(self) -> list[Recording]:
        replies = (r for rs in self.replies.values() for r in rs)
        return [*self.requests, *self.later, *self.sentences, *replies]


def load_units(work: Path) -> dict[str, dict[str, Any]]:
    """Units of every recording by its id: ``hu`` (25 Hz), ``pi`` (12.5 Hz), ``st`` (1 Hz).

    Raises:
        FileNotFoundError: a recipe has not been run yet.
    """
    units = {row["id"]: row for row in read_jsonl(work / "units" / "units.jsonl")}
    for name in ("pitch", "style"):
        for row in read_jsonl(work / "units" / f"{name}.jsonl"):
            if row["id"] in units:
                units[row["id"]].update(row)
    return units


def load_corpus(
    work: Path, vocabulary: Vocabulary, units: Mapping[str, Mapping[str, Any]]
) -> dict[str, Corpus]:
    """Read the corpus from ``work``; replies belong to both splits, being few and fixed.

    Args:
        units: as :func:`load_units` gives them; recordings without units are left out.

    Returns:
        ``{"train": ..., "heldout": ...}``.

    Raises:
        FileNotFoundError: a recipe has not been run yet.
        ValueError: no recording has units.
    """
    corpora = {"train": Corpus(), "heldout": Corpus()}
    for row in read_jsonl(work / "corpus" / "manifest.jsonl"):
        if row["id"] not in units:
            continue
        recording = _recording(row, units[row["id"]], vocabulary)
        corpus = corpora[row["split"]]
        if recording.role == "request":
            corpus.requests.append(recording)
        elif recording.role == "book":
            corpus.sentences.append(recording)
        else:
            for either in corpora.values():
                either.replies[recording.text].append(recording)
    later: dict[str, set[str]] = defaultdict(set)
    for row in read_jsonl(work / "corpus" / "dialogs.jsonl"):
        if row.get("before"):
            later[row["split"]].add(row["request_text"])
        else:
            answer = (row["reply_text"], row["reply_style"], action_text(row.get("action")))
            corpora[row["split"]].answers[row["request_text"]].append(Answer(*answer))
    for split, corpus in corpora.items():
        asked, corpus.requests = corpus.requests, []
        for recording in asked:
            if recording.text in corpus.answers:
                corpus.requests.append(recording)
            elif recording.text in later[split]:
                corpus.later.append(recording)
    if not corpora["train"].requests:
        raise ValueError(f"{work}: no request of the corpus has units; run the units recipe")
    return corpora


def tokens(
    frames: list[int], pitch: list[int] | None, styles: list[int] | None, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Interleaved ids and their samples, of units at 25, 12.5 and 1 Hz."""
    merged = interleave(Units(frames, pitch, styles))
    ids = np.array([vocabulary.unit(f.kind, f.index) for f in merged], dtype=np.int64)
    return ids, np.array([f.sample for f in merged], dtype=np.int64)


def _recording(
    row: Mapping[str, Any], units: Mapping[str, Any], vocabulary: Vocabulary
) -> Recording:
    frames, pitch, styles = units["hu"], units.get("pi") or None, units.get("st") or None
    ids, starts = tokens(frames, pitch, styles, vocabulary)
    words = row.get("words")

    def frame(seconds: float) -> int:
        return min(round(seconds * FRAMES_PER_SECOND), len(frames))

    return Recording(
        id=row["id"],
        role=row["role"],
        voice=row["voice"],
        style=row["style"],
        text=row["text"],
        transcript=row["transcript"],
        ids=ids,
        starts=starts,
        words=[(w, a, b) for w, a, b in words] if words else None,
        frames=np.array(frames, dtype=np.int64),
        pitch=pitch,
        styles=styles,
        phones=[(p, frame(a), frame(b)) for p, a, b in row.get("phones") or ()],
    )
