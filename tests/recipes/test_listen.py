"""The page to listen to: everything in one file, nothing of it from outside."""

import base64
import io
import re
from typing import Any

import numpy as np
import soundfile

from recipes.dialogues import Dialogues, Example, Turn
from recipes.evaluate import Exam
from recipes.listen import Pair, Segment, Side, choose, page, picture, segments
from stages.units import Units


def pairs() -> list[Pair]:
    wave = np.sin(np.arange(8000) / 20).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16_000, format="OGG", subtype="VORBIS")
    sound = "data:audio/ogg;base64," + base64.b64encode(buffer.getvalue()).decode()
    look = picture(wave, segments(Units([3, 3, 5], [1, 2], [0])))
    side = Side("<b>What is it?</b>", sound, look)
    answer = Side("A test.", sound, look)
    before = [Turn("Are <i>you</i> there?", "I am here.")]
    follow = Pair("slt", True, "and now", True, side, answer, before, '{"action":"stop"}')
    return [Pair("heart", True, "what is it", False, side, answer), follow]


def test_the_page_needs_nothing_else() -> None:
    html = page(pairs(), "nano")
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 8 and all(source.startswith("data:") for source in sources)


def test_words_are_shown_as_they_are() -> None:
    html = page(pairs(), "nano")
    assert "<b>What" not in html and "&lt;b&gt;What is it?" in html


def test_a_follow_up_shows_the_turns_before_it_and_its_action() -> None:
    first, second = page(pairs(), "nano").split("<section>")[1:]
    assert "Are &lt;i&gt;you&lt;/i&gt; there?” – “I am here.”" in second and "before:" not in first
    assert "<code>{&#34;action&#34;:&#34;stop&#34;}</code>" in second and "<code>" not in first


def test_every_kind_of_request_and_of_voice_is_on_the_page() -> None:
    def example(name: str, **others: Any) -> Example:
        return Example(name, name, (), ("Yes.",), 0, "heldout", **others)

    stop = {"action": "stop"}
    kinds = {
        "old": example("old", added=False),
        "new": example("new"),
        "go": example("go", action=stop),
        "and": example("and", before=(Turn("a", "b"),), action=stop),
    }
    exam = Exam(Dialogues(list(kinds.values()), {}))
    rows = [
        {"id": f"{name}{voice}{n}", "transcript": name, "voice": voice, "split": "heldout",
         "role": "request"}
        for name in (*kinds, "unknown") for voice in ("slt", "kal16") for n in range(5)
    ]  # fmt: skip
    chosen = choose(exam, [*rows, {**rows[0], "split": "train"}], 12)
    found = [(row["transcript"], row["voice"]) for row in chosen]
    assert len(chosen) == 12 and len(set(found)) == 8 and max(map(found.count, found)) == 2
    assert choose(exam, rows[::-1], 12) == chosen


def test_units_stand_where_they_were_heard() -> None:
    found = segments(Units([3, 3, 5], [1, 2], [0]))
    assert Segment("Hu", 5, 0.08, 0.12) in found
    assert Segment("Pi", 2, 0.08, 0.16) in found
    assert Segment("St", 0, 0.0, 1.0) in found


def test_silence_and_nothing_can_be_drawn() -> None:
    assert picture(np.zeros(100, np.float32), []).startswith("data:image/webp")
