"""The HTML report stands on its own, whatever was measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

from bench.conversation.document import build
from bench.conversation.page import page

MARKS = {
    "end_of_speech": 10.0, "endpoint": 610.0, "encoder_done": 250.0, "prefill_done": 270.0,
    "first_token": 280.0, "first_unit": 380.0, "first_sample": 611.0, "last_sample": 900.0,
}  # fmt: skip


def row(turn: int, slower: float = 1.0) -> dict[str, Any]:
    return {
        "turn": turn, "outcome": "answered", "at_seconds": 7.0 * turn, "memory_mb": 700.0 + turn,
        "marks_ms": MARKS, "work_ms": {"encode": 300.0 * slower}, "request_seconds": 2.0,
        "ms": {"end_to_sample": 611.0 * slower + turn, "endpoint_to_sample": slower + turn},
        "reply_seconds": 2.5, "heard": "<script>alert(1)</script>",
    }  # fmt: skip


def report(**systems: list[dict[str, Any]]) -> str:
    named = {name.replace("_", "-"): rows for name, rows in systems.items()}
    plan = {"black_box": "agent <script> & more"}
    return page(build("nano", None, plan, {}, named, 0.0))


class Tags(HTMLParser):
    """Counts what is opened and what is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_needs_nothing_from_anywhere() -> None:
    text = report(agent=[row(n) for n in range(1, 20)])
    assert not re.search(r"""(src|href|@import|url\()""", text)
    assert "//" not in text.replace("</", "")


def test_it_is_well_formed_and_holds_no_foreign_markup() -> None:
    text = report(agent=[row(n) for n in range(1, 20)], reference_flow=[row(1, 9), row(2, 9)])
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert "script" not in tags.seen
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_all_that_was_promised_is_drawn() -> None:
    text = report(agent=[row(n) for n in range(1, 20)], reference_flow=[row(1, 9), row(2, 9)])
    for heading in ("Where the time goes", "share of the turns within", "Cost against the turn",
                    "Memory against time", "times</b> sooner"):  # fmt: skip
        assert heading in text, heading


def test_numbers_stay_inside_the_drawing() -> None:
    text = report(agent=[row(n, 0.001) for n in range(1, 4)], reference_flow=[row(1, 9e4)])
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        wide, high = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawing)[0])
        for points in re.findall(r'points="([^"]*)"', drawing):
            for point in points.split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= wide and 0 <= y <= high


def test_an_agent_seen_from_outside_has_a_report_too() -> None:
    rows = [{"turn": 1, "outcome": "answered", "at_seconds": 3.0, "ms": {"end_to_sound": 900.0}},
            {"turn": 2, "outcome": "silent", "at_seconds": 9.0}]  # fmt: skip
    text = report(black_box=rows)
    assert "end of speech → first sound heard" in text
    assert "Memory" not in text


def test_a_run_in_which_nothing_was_answered_has_a_report() -> None:
    assert "1 requests without a turn" in report(agent=[{"turn": 1, "outcome": "lost"}])
