"""The corpus: alignments, the plan, and real recordings by the voices that are installed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from recipes import corpus, voices
from recipes.align import CMU, align, flite_segments, match_words, shift
from recipes.dialogues import Dialogues
from recipes.voices import FAST, LIVELY, MONOTONE, NEUTRAL, WHISPERED

HIBARI = pytest.mark.skipif(
    importlib.util.find_spec("hibari") is None, reason="hibari-tts is not installed: extra [train]"
)
SPLITS = ("train", "heldout")
FLITE = pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed (Debian)")


def job(text: str, voice: str, style: int = NEUTRAL, name: str = "test") -> corpus.Job:
    return corpus.Job(name, text, "request", "greet", voice, style, "train")


# ------------------------------------------------------------------------------- alignment


def test_alignment_shares_marks_and_finds_words() -> None:
    # pad h ə l ˈ O space j u . pad
    frames = [4, 2, 2, 2, 2, 4, 2, 2, 2, 4, 2]
    phones, words = align("həlˈO ju.", frames, 0.1, ["hello", "you"])
    assert [name for name, *_ in phones] == ["sil", "h", "ə", "l", "O", "j", "u", "sil"]
    assert phones[0] == ("sil", 0.0, pytest.approx(0.4))
    assert phones[3][2] == pytest.approx(1.1)  # half of the stress mark is the l's
    assert words is not None
    assert [word for word, *_ in words] == ["hello", "you"]
    assert words[0][1] == pytest.approx(0.4)
    assert words[0][2] == words[1][1] == pytest.approx(1.7)  # and half of the space each word's
    assert phones[-1][2] == pytest.approx(2.8)


def test_alignment_moves_by_the_lead_and_stays_gapless() -> None:
    phones, _ = align("ab", [4, 2, 2, 4], 0.1, ["ab"], lead=0.1)
    assert phones[0] == ("sil", 0.0, pytest.approx(0.3))
    assert phones[-1][2] == pytest.approx(1.2)
    assert all(a[2] == pytest.approx(b[1]) for a, b in itertools.pairwise(phones))


def test_alignment_without_matching_words_has_none() -> None:
    assert align("ab", [1, 1, 1, 1], 0.1, ["a", "b"])[1] is None


def test_alignment_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="3 durations for 2 phonemes"):
        align("ab", [1, 1, 1], 0.1, [])


def test_flite_segments_and_their_errors() -> None:
    assert flite_segments("pau:0.2 hh:0.25 ow:0.4") == [
        ("sil", 0.0, 0.2), ("h", 0.2, 0.25), ("O", 0.25, 0.4),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="xx:1"):
        flite_segments("pau:0.2 xx:1")


def test_shifting_clips_at_the_end() -> None:
    assert shift([("a", 0.0, 0.5), ("b", 0.5, 1.0)], 0.25, end=1.0) == [
        ("a", 0.25, 0.75), ("b", 0.75, 1.0),
    ]  # fmt: skip
    assert shift(None, 1.0) is None


def test_words_are_found_in_another_pronunciation() -> None:
    said = ["sil", "h", "ɛ", "l", "O", "sil", "j", "u"]
    phones = [(name, i / 10, (i + 1) / 10) for i, name in enumerate(said)]
    assert match_words(phones, ["Hello", "you"], ["həlˈO", "jə"]) == [
        ("Hello", 0.1, 0.5), ("you", 0.6, 0.8),
    ]  # fmt: skip
    assert match_words(phones[:6], ["Hello", "you"], ["həlˈO", "jə"]) is None


# ------------------------------------------------------------------------------------ plan


def test_the_plan_is_reproducible_and_complete() -> None:
    plan = corpus.plan(0)
    assert plan == corpus.plan(0)
    assert len({j.id for j in plan}) == len(plan)
    assert all(j.style in voices.styles_of(j.voice) for j in plan)
    assert {j.voice for j in plan if j.split == "train"} == set(voices.TRAINED)
    replies = {j.text for j in plan if j.role == "reply"}
    world = corpus.domain.build(0)
    wider = {reply for e in corpus.wider(0).examples for reply in e.replies}
    assert replies == set(world.replies) | wider
    assert all(j.voice == "heart" for j in plan if j.role == "reply")
    asked = {j.text for j in corpus.plan_first(0) if j.role == "request"}
    assert asked == {r.text for r in world.requests}


def test_the_second_part_is_new_training_speech_and_nothing_that_is_held_out() -> None:
    more = corpus.plan_more(0)
    assert {j.split for j in more} == {"train"} and {j.role for j in more} == {"request", "book"}
    world = corpus.domain.build(0)
    heldout = {r.transcript for r in world.requests if r.split == "heldout"}
    said = {corpus.domain.transcript(j.text) for j in more}
    assert not said & heldout
    requests = {corpus.domain.transcript(j.text) for j in more if j.role == "request"}
    assert not requests & {r.transcript for r in world.requests}


def wider_jobs() -> list[corpus.Job]:
    return corpus.plan_wider(corpus.wider(0), 0)


def test_the_third_part_has_requests_of_every_intent_that_was_not_recorded() -> None:
    asked = {s: [j for j in wider_jobs() if (j.role, j.split) == ("request", s)] for s in SPLITS}
    train = Counter(j.intent for j in asked["train"])
    intents = {e.intent for e in corpus.wider(0).split("train")}
    assert sum(train.values()) == corpus.WIDER_TRAIN and set(train) == intents
    heldout = {j.text for j in asked["heldout"]}
    assert len(heldout) == corpus.WIDER_HELDOUT
    also_unseen = sum(j.voice == "kal16" for j in asked["heldout"])
    assert 0.25 < also_unseen / corpus.WIDER_HELDOUT < 0.45
    said = {corpus.domain.transcript(j.text) for j in asked["train"]}
    assert not said & {corpus.domain.transcript(text) for text in heldout}


def test_what_was_recorded_stays_when_the_domain_grows() -> None:
    world = corpus.wider(0)
    half = world.examples[::2]
    smaller = corpus.plan_wider(Dialogues(half, world.topics), 0)
    whole = {job.id: job for job in wider_jobs()}

    def recording(made: corpus.Job) -> tuple[str, str, float, bool]:
        return made.text, made.voice, made.speed, made.noisy

    same = [j for j in smaller if j.id in whole]
    assert [recording(j) for j in same] == [recording(whole[j.id]) for j in same]
    replies = [job for job in smaller if job.role == "reply"]
    assert all(job.id in whole for job in replies)


def test_requests_recorded_before_are_answered_as_the_wider_domain_does() -> None:
    asked = {"Turn left.", "Please turn left."} | {j.text for j in corpus.plan_first(0)[:2000]}
    rows = list(corpus.dialogs(asked, 0))
    assert {row["request_text"] for row in rows} <= asked
    assert all(row["action"] for row in rows if row["intent"] == "turn" and not row["before"])
    assert any(row["before"] for row in rows)
    json.dumps(rows)
    splits: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        key = row["request_text"], json.dumps(row["before"])
        splits.setdefault(key, set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_unseen_voices_are_heldout_only() -> None:
    unseen = [j for j in corpus.plan(0) if not voices.VOICES[j.voice].trained]
    assert unseen and all(j.split == "heldout" for j in unseen)


def test_any_prefix_of_the_plan_is_a_mixture() -> None:
    start = corpus.plan(0)[:300]
    assert {j.role for j in start} == {"request", "reply", "book"}
    assert {j.voice for j in start} >= set(voices.TRAINED)


# ------------------------------------------------------------------------------ recordings


def check_row(row: dict[str, object], folder: Path) -> np.ndarray:
    wave, rate = soundfile.read(folder / str(row["wav"]), dtype="float32")
    info = soundfile.info(folder / str(row["wav"]))
    assert (rate, info.subtype, wave.ndim) == (16_000, "PCM_16", 1)
    assert len(wave) == row["samples"]
    assert np.isfinite(wave).all() and np.abs(wave).max() <= 1
    phones = row["phones"]
    assert isinstance(phones, list) and phones
    starts = [start for _, start, _ in phones]
    assert starts == sorted(starts) and phones[-1][2] <= len(wave) / 16_000 + 1e-3
    json.dumps(row)
    return wave


@HIBARI
def test_a_heart_recording_has_exact_words(tmp_path: Path) -> None:
    row = corpus.record(job("Hello! I am Nano, a small robot.", "heart"), tmp_path)
    wave = check_row(row, tmp_path)
    assert row["transcript"] == "hello i am nano a small robot"
    words = row["words"]
    assert [w for w, *_ in words] == ["Hello", "I", "am", "Nano", "a", "small", "robot"]
    start, end = (int(words[0][i] * 16_000) for i in (1, 2))
    quiet, loud = wave[: start - 800], wave[start:end]
    assert np.mean(loud**2) > 100 * np.mean(quiet**2)


@HIBARI
def test_recordings_are_reproducible(tmp_path: Path) -> None:
    rows = [corpus.record(job("Go to the kitchen.", "heart_low"), tmp_path / n) for n in "ab"]
    a, b = (soundfile.read(tmp_path / n / rows[0]["wav"])[0] for n in "ab")
    assert rows[0] == rows[1]
    np.testing.assert_array_equal(a, b)


@HIBARI
def test_styles_do_what_their_names_say() -> None:
    text = "Could you please go to the living room?"
    length = {s: len(voices.speak(text, "heart", s).wave) for s in (NEUTRAL, FAST)}
    assert length[FAST] < 0.93 * length[NEUTRAL]
    f0 = np.array([0, 180, 220, 0, 240], np.float32)
    assert np.ptp(voices._contour(f0, MONOTONE)[f0 > 0]) == 0
    assert voices._contour(f0, LIVELY).std() > f0.std()
    assert not voices._contour(f0, WHISPERED).any()
    assert (voices._contour(f0, LIVELY)[f0 == 0] == 0).all()


@FLITE
@HIBARI
@pytest.mark.parametrize("voice", ["slt", "kal16"])
def test_a_flite_recording_has_words_and_phones(voice: str, tmp_path: Path) -> None:
    row = corpus.record(job("Please turn left.", voice), tmp_path)
    check_row(row, tmp_path)
    words = row["words"]
    assert [w for w, *_ in words] == ["Please", "turn", "left"]
    starts = [start for phone, start, _ in row["phones"] if phone in ("p", "t", "l")]
    assert {words[0][1], words[1][1], words[2][1]} <= set(starts)
    assert {name for name, *_ in row["phones"]} <= set(CMU.values())


@FLITE
def test_flite_cannot_whisper() -> None:
    with pytest.raises(ValueError, match="slt speaks neutral or fast, not whispered"):
        voices.speak("Hello.", "slt", WHISPERED)


@FLITE
@HIBARI
def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    jobs = [job("Hello.", "heart", name="one"), job("Goodbye.", "slt", name="two")]
    corpus.synthesise(jobs[:1], tmp_path, processes=1)
    with (tmp_path / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"id": "two", "te')  # cut off in the middle of a line
    assert [row["id"] for row in corpus.read_manifest(tmp_path)] == ["one"]
    corpus.synthesise(jobs, tmp_path, processes=1)
    rows = corpus.read_manifest(tmp_path)
    assert [row["id"] for row in rows] == ["one", "two"]
    report = corpus.summary(rows)
    assert report["recordings"] == 2 and report["with_words"] == 2 and report["with_phones"] == 2


def test_levels_of_any_recording() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-4, 1.0, 50.0):
        wave = (scale * np.sin(np.arange(16_000) / 9)).astype(np.float32)
        for style in (NEUTRAL, WHISPERED):
            for noisy in (False, True):
                out, before = corpus.finish(wave, style, noisy, rng)
                assert np.abs(out).max() <= 1 and len(out) > len(wave) + before
    silent, _ = corpus.finish(np.zeros(1000, np.float32), NEUTRAL, False, rng)
    assert np.isfinite(silent).all()
