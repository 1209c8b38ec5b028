"""What a benchmark writes down: statistics, the JSON file, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.errors import UserError
from bench.conversation.document import (
    VERSION,
    build,
    cost_trend,
    percentiles,
    ratios,
    read,
    summary,
    write,
)

Row = dict[str, Any]


def row(turn: int, first_sample: float = 600.0, work: float = 500.0, **more: Any) -> Row:
    return {
        "turn": turn,
        "outcome": "answered",
        "ms": {"end_to_sample": first_sample, "endpoint_to_sample": first_sample - 590},
        "work_ms": {"encode": work / 2, "decode": work / 2},
        "request_seconds": 2.0,
        "reply_seconds": 3.0,
        "real_time_factor": 0.2,
        "inter_token_ms": [5.0, 7.0],
        **more,
    }


def document(rows: list[Row]) -> dict[str, Any]:
    return build("nano", None, {"turns": len(rows)}, {}, {"agent": rows}, load=0.5)


def test_percentiles_lie_between_the_nearest_two() -> None:
    found = percentiles([float(n) for n in range(101)])
    assert found == {"n": 101, "p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([1.0, 2.0])["p50"] == 1.5


def test_a_summary_counts_what_should_not_be() -> None:
    rows = [row(1, glitches=2, false_endpoints=1), row(2, dropped=3)]
    rows += [{"turn": 3, "outcome": "lost"}, {"turn": 4, "outcome": "silent"}]
    found = summary(rows)
    counters = found["counters"]
    assert counters == {
        "lost": 1, "no_answer": 1, "early": 0, "false_endpoints": 1, "glitches": 2, "dropped": 3,
    }  # fmt: skip
    assert found["figures"]["end_to_sample"]["n"] == 2
    assert found["figures"]["inter_token"]["n"] == 4, "every token counts"
    assert "barge_in_to_silence" not in found["figures"], "nobody interrupted"


def test_the_trend_of_the_cost_is_flat_or_not() -> None:
    flat = cost_trend([row(n, work=500.0) for n in range(1, 41)])
    assert flat is not None and flat["ratio"] == 1.0
    growing = cost_trend([row(n, work=500.0 + 10 * n) for n in range(1, 41)])
    assert growing is not None and growing["ratio"] == pytest.approx(900 / 510, abs=0.01)


def test_one_slow_turn_makes_no_trend() -> None:
    rows = [row(n, work=50_000.0 if n == 40 else 500.0) for n in range(1, 41)]
    found = cost_trend(rows)
    assert found is not None and found["ratio"] == 1.0


def test_a_few_turns_have_no_trend() -> None:
    assert cost_trend([row(n) for n in range(1, 5)]) is None


def test_the_ratio_is_that_of_the_medians() -> None:
    systems = {
        name: {"summary": summary([row(1, first), row(2, first)])}
        for name, first in (("agent", 600.0), ("reference-flow", 2400.0))
    }
    assert ratios(systems) == {"end_to_sample": 4.0, "endpoint_to_sample": 181.0}
    assert ratios({"agent": systems["agent"]}) == {}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = document([row(n, heard='what "is" it', said="a {brace} @0@") for n in range(1, 13)])
    path = tmp_path / "new folder" / "a.json"
    write(found, path)
    assert read(path) == json.loads(json.dumps(found))
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum('"turn": ' in line for line in lines) == 12, "a turn is a line"


def test_the_command_is_kept_without_where_its_results_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["agent", "bench", "--turns", "2", "--out", "/home/me/results", "--seed", "3"]
    monkeypatch.setattr("sys.argv", words)
    assert document([row(1)])["about"]["command"] == "python -m agent bench --turns 2 --seed 3"


def test_it_says_what_was_measured_with_which_machine() -> None:
    about = document([row(1)])["about"]
    assert {"date", "command", "commit", "platform", "cores", "python", "packages"} <= set(about)
    assert about["load_average"]["before"] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged or no JSON"),
        ("[1]", "no result of `python -m agent bench`"),
        ('{"turns": []}', "no result of `python -m agent bench`"),
        ({"version": VERSION + 1}, f"of version {VERSION + 1}"),
        ({"about": None}, "'about' is missing or damaged"),
        ({"systems": {}}, "'systems' is missing or damaged"),
        ({"systems": {"agent": {"turns": [{"turn": "one"}]}}}, r"'systems\.agent\.turns'"),
        ({"systems": {"agent": {"turns": [{"turn": 1, "outcome": "answered", "ms": {"a": "b"}}]}}},
         r"'systems\.agent\.turns'"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "a.json"
    if isinstance(content, dict):
        content = json.dumps({**document([row(1)]), **content})
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(path) in str(error.value), "the file is named"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "none.json")
