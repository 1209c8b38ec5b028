"""How units are compared, and which windows."""

from __future__ import annotations

from bench.agreement import LONGEST, Agreement, rows_of, windows


def test_only_what_was_named_early_is_compared() -> None:
    counts = Agreement()
    counts.add([1, 1, 2, 3], [1, 1, 2, 4, 5, 6])
    assert counts.row() == {"frames": 0.75, "edit_distance": round(1 / 3, 4)}
    counts.add([], [7, 8])
    assert counts.frames == 4


def test_repeats_do_not_count_as_edits() -> None:
    counts = Agreement()
    counts.add([1, 2, 2, 2], [1, 1, 1, 2])
    assert counts.row() == {"frames": 0.5, "edit_distance": 0.0}


def test_all_speech_is_weighed_by_its_frames() -> None:
    few, many = Agreement(), Agreement()
    few.add([1], [2])
    many.add([1, 2, 3], [1, 2, 3])
    assert rows_of({"few": few, "many": many})["all"]["frames"] == 0.75


def test_windows_stay_within_the_networks_positions() -> None:
    shapes = list(windows())
    assert len(set(shapes)) == len(shapes)
    assert max(w.left + w.chunk + w.right for w in shapes) <= LONGEST
    assert any((w.chunk, w.left, w.right) == (12, 60, 8) for w in shapes), "the shipped one"
