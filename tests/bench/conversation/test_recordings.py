"""The requests that come with the program, and folders of requests that are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.errors import UserError
from bench.conversation.recordings import INDEX, LEVEL, folder, load, speech_bounds
from stages import SAMPLE_RATE


def test_a_dozen_short_requests_come_with_the_program() -> None:
    found = load()
    assert len(found) == 12
    assert all(len(request.wave) < 4 * SAMPLE_RATE for request in found)
    assert len({request.voice for request in found}) >= 6
    assert sum(path.stat().st_size for path in folder().iterdir()) < 1e6


@pytest.mark.parametrize("request_", load(), ids=lambda request: request.name)
def test_the_speech_begins_and_ends_where_the_index_says(request_: Any) -> None:
    step = SAMPLE_RATE // 100
    begin, end = speech_bounds(request_.wave)
    assert abs(begin - request_.begin) <= step
    assert abs(end - request_.end) <= step
    speech = request_.wave[request_.begin : request_.end]
    assert np.sqrt(np.mean(speech**2)) == pytest.approx(LEVEL, rel=0.05)


def test_silence_around_a_sound_is_not_part_of_it() -> None:
    wave = np.zeros(SAMPLE_RATE, np.float32)
    wave[4000:8000] = 0.5
    assert speech_bounds(wave) == (4000, 8000)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder(), tmp_path / "requests"))


def change(place: Path, **row: Any) -> None:
    index = json.loads((place / INDEX).read_text(encoding="utf-8"))
    index["requests"][0] |= row
    (place / INDEX).write_text(json.dumps(index), encoding="utf-8")


def test_other_recordings_are_taken_from_their_folder(copy: Path) -> None:
    change(copy, text="something else")
    assert load(copy)[0].text == "something else"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"end": 10**9}, r"00\.flac: speech from 3200 to 1000000000 of \d+ samples"),
        ({"begin": -1}, "impossible"),
        ({"begin": "soon"}, "not an index of requests"),
        ({"file": "none.flac"}, r"none\.flac: no such file"),
    ],
)
def test_a_wrong_row_is_named(copy: Path, row: dict[str, Any], message: str) -> None:
    change(copy, **row)
    with pytest.raises(UserError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not an index"), ("[]", "not an index"), ('{"requests": []}', "names no requests")],
)
def test_an_index_that_is_none_is_named(copy: Path, content: str, message: str) -> None:
    (copy / INDEX).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load(copy)


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"requests\.json: cannot be read"):
        load(tmp_path)
