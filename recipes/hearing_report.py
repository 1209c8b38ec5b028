"""What nano hears: how close to its teacher, how phonetic, how alike across voices."""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rapidfuzz.distance import Levenshtein

from recipes import domain
from recipes.corpus import Job, record
from recipes.front_end import Constants
from recipes.strangers import human_prompts, joe_requests
from recipes.whisper import WhisperEncoder, log_mel
from recipes.windows import Listener

Row = dict[str, Any]


def measure(
    listener: Listener, teacher: WhisperEncoder, work: Path, manifest: Sequence[Row], seed: int
) -> dict[str, Any]:
    """All figures, on held-out recordings and on speakers that were never in the corpus."""
    held = [row for row in manifest if row["split"] == "heldout"]
    random.Random(seed).shuffle(held)
    joe, human = _strangers(work, manifest, seed)
    return {
        "teacher": {
            **{v: _teacher(listener, teacher, waves) for v, waves in _by_voice(held, work).items()},
            "joe (unseen)": _teacher(listener, teacher, [b for _, b in joe]),
            "human (unseen)": _teacher(listener, teacher, [b for _, b in human]),
        },
        "phones": _phones(listener, held, work),
        "same_sentence": {
            "corpus voices": _sentences(listener, _pairs(held, work, unseen=False)),
            "kal16 (unseen) and a corpus voice": _sentences(
                listener, _pairs(held, work, unseen=True)
            ),
            "joe (unseen) and heart": _sentences(listener, joe),
            "human (unseen) and heart": _sentences(listener, human),
        },
    }


def without_repeats(units: np.ndarray) -> list[int]:
    """Units with runs made one."""
    return [int(u) for i, u in enumerate(units) if i == 0 or u != units[i - 1]]


def unit_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Edit distance without repeats, over the longer length: 0 same, 1 nothing in common."""
    return float(Levenshtein.normalized_distance(without_repeats(a), without_repeats(b)))


def information(codes: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(mutual information of codes and labels over the labels' entropy, purity of the codes)."""
    _, rows = np.unique(labels, return_inverse=True)
    joint = np.zeros((rows.max() + 1, codes.max() + 1))
    np.add.at(joint, (rows, codes), 1)
    joint /= joint.sum()
    label, code = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    known = joint > 0
    mutual = (joint[known] * np.log((joint / (label * code + 1e-30))[known])).sum()
    entropy = -(label[label > 0] * np.log(label[label > 0])).sum()
    return float(mutual / entropy), float(joint.max(0).sum())


def _read(work: Path, row: Row) -> np.ndarray:
    return soundfile.read(work / row["wav"], dtype="float32")[0]


def _by_voice(rows: Iterable[Row], work: Path, limit: int = 4) -> dict[str, list[np.ndarray]]:
    out: dict[str, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        if len(out[row["voice"]]) < limit and row["style"] == 0:
            out[row["voice"]].append(_read(work / "corpus", row))
    return dict(sorted(out.items()))


def _teacher(
    listener: Listener, teacher: WhisperEncoder, waves: Sequence[np.ndarray]
) -> dict[str, float]:
    """Units of the constructed network against those of the blocks on a log-mel spectrogram.

    Once with the logarithm's floor as it is constructed, which judges the construction; once with
    Whisper's own, which hangs on the utterance's loudest frame and cannot be streamed.
    """
    pool, floor = listener.hubert.pool, Constants().floor
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for wave in waves:
        wave = wave[: listener.hubert.frames(len(wave)) * listener.hubert.hop]
        ours = listener.classify(listener.whole(wave))
        found["windowed_equal_to_whole"].append(ours == listener.classify(listener.features(wave)))
        for name, soft in (("", floor), ("_with_whispers_floor", None)):
            heard = teacher.features(log_mel(torch.from_numpy(wave), soft))
            theirs = listener.classify(heard.view(-1, pool, heard.shape[-1]).mean(1).numpy())
            found[f"frames_equal{name}"].append(theirs == ours)
            found[f"unit_distance{name}"].append(np.array([unit_distance(theirs, ours)]))
    return {key: float(np.concatenate(values).mean()) for key, values in sorted(found.items())}


def _phones(listener: Listener, rows: Iterable[Row], work: Path) -> dict[str, dict[str, float]]:
    """Phone information in streamed units, silence left out, by voice."""
    from recipes.hearing import phone_labels

    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for row in rows:
        if row["phones"] and len(found[row["voice"]]) < 16:
            codes = listener.classify(listener.features(_read(work / "corpus", row)))
            found[row["voice"]].append((codes, phone_labels(row["phones"], len(codes))))
    groups = {"all": [pair for pairs in found.values() for pair in pairs], **found}
    out = {}
    for voice, pairs in groups.items():
        codes, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
        speech = labels != "sil"
        nmi, purity = information(codes[speech], labels[speech])
        out[voice] = {"frames": int(speech.sum()), "nmi": nmi, "purity": purity}
    return out


Pair = tuple[np.ndarray, np.ndarray]


def _sentences(listener: Listener, pairs: Sequence[Pair]) -> dict[str, float]:
    """Unit distance of the same and of different sentences, and how often the same is nearest."""
    if not pairs:
        return {"pairs": 0}
    left, right = (
        [listener.classify(listener.features(wave)) for wave in column]
        for column in zip(*pairs, strict=True)
    )
    table = np.array([[unit_distance(a, b) for b in right] for a in left])
    same = np.eye(len(pairs), dtype=bool)
    return {
        "pairs": len(pairs),
        "same": float(table[same].mean()),
        "different": float(table[~same].mean()) if len(pairs) > 1 else float("nan"),
        "right_one_first": float((table.argmin(1) == np.arange(len(pairs))).mean()),
    }


def _pairs(rows: Iterable[Row], work: Path, *, unseen: bool, limit: int = 40) -> list[Pair]:
    """The same sentence in two voices, one of them kal16 where ``unseen``."""
    by_text: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_text[row["text"]].append(row)
    pairs: list[Pair] = []
    for takes in by_text.values():
        trained = [row for row in takes if row["voice"] != "kal16"]
        others = [row for row in takes if row["voice"] == "kal16"] if unseen else trained[1:]
        others = [row for row in others if trained and row["voice"] != trained[0]["voice"]]
        if others and len(pairs) < limit:
            pairs.append((_read(work / "corpus", trained[0]), _read(work / "corpus", others[0])))
    return pairs


def _strangers(
    work: Path, manifest: Sequence[Row], seed: int, limit: int = 40
) -> tuple[list[Pair], list[Pair]]:
    """Sentences by heart and by joe; and by heart and by a person. Empty where not installed."""
    folder = work / "evaluation"
    rows = joe_requests(domain.build(seed), work, limit, seed)
    joe = [(_heart(folder, row["text"], seed), _read(folder, row)) for row in rows]
    known = {word for row in manifest for word in row["transcript"].split()}
    spoken = [(t, w) for t, w in human_prompts(known, None) if len(t.split()) > 3][:limit]
    human = [(_heart(folder, text, seed), wave.astype(np.float32)) for text, wave in spoken]
    return joe, human


def _heart(folder: Path, text: str, seed: int) -> np.ndarray:
    name = f"hearing{zlib.crc32(text.encode()):010d}-heart"
    return _read(
        folder, record(Job(name, text, "request", None, "heart", 0, "heldout"), folder, seed)
    )
