"""The page to listen to: everything in one file, nothing of it from outside."""

import base64
import io
import re

import numpy as np
import soundfile

from recipes.listen import Pair, Segment, Side, page, picture, segments
from stages.units import Units


def pairs() -> list[Pair]:
    wave = np.sin(np.arange(8000) / 20).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16_000, format="OGG", subtype="VORBIS")
    sound = "data:audio/ogg;base64," + base64.b64encode(buffer.getvalue()).decode()
    look = picture(wave, segments(Units([3, 3, 5], [1, 2], [0])))
    side = Side("<b>What is it?</b>", sound, look)
    return [Pair("heart", True, "what is it", False, side, Side("A test.", sound, look))]


def test_the_page_needs_nothing_else() -> None:
    html = page(pairs(), "nano")
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 4 and all(source.startswith("data:") for source in sources)


def test_words_are_shown_as_they_are() -> None:
    html = page(pairs(), "nano")
    assert "<b>What" not in html and "&lt;b&gt;What is it?" in html


def test_units_stand_where_they_were_heard() -> None:
    found = segments(Units([3, 3, 5], [1, 2], [0]))
    assert Segment("Hu", 5, 0.08, 0.12) in found
    assert Segment("Pi", 2, 0.08, 0.16) in found
    assert Segment("St", 0, 0.0, 1.0) in found


def test_silence_and_nothing_can_be_drawn() -> None:
    assert picture(np.zeros(100, np.float32), []).startswith("data:image/webp")
