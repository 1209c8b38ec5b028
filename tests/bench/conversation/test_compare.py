"""Two results side by side: noise is not marked, a regression is, and files are not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from agent.errors import UserError
from bench.conversation.compare import (
    BETTER,
    SAME,
    WORSE,
    Difference,
    compare,
    compare_command,
    doubts,
    table,
)
from bench.conversation.document import FORMAT, VERSION, Document, Row


def row(turn: int, ms: float, **more: Any) -> Row:
    return {"turn": turn, "outcome": "answered", "ms": {"end_to_sample": ms}, **more}


def document(shift: float = 0.0, turns: int = 60, seed: int = 0, **more: Any) -> Document:
    """Answers after about 600 ms + ``shift``, with a spread of 40 ms."""
    delays = np.random.default_rng(seed).normal(600 + shift, 40, turns)
    rows = [row(n, float(ms), **more) for n, ms in enumerate(delays, 1)]
    about = {"cores": 2, "config": "nano", "load_average": {"before": 0.5, "after": 1.0}}
    return {"format": FORMAT, "version": VERSION, "about": about, "plan": {"seed": seed},
            "systems": {"agent": {"turns": rows}}}  # fmt: skip


def found(before: Document, after: Document, figure: str) -> Difference:
    return next(d for d in compare(before, after) if d.figure == figure)


MEDIAN = "end of speech → first sample, p50"


@pytest.mark.parametrize("seed", range(1, 6))
def test_two_runs_of_the_same_program_are_alike(seed: int) -> None:
    verdicts = {d.verdict for d in compare(document(), document(seed=seed))}

    assert verdicts == {SAME}


def test_what_became_slower_is_worse_and_the_other_way_round_better() -> None:
    slower = found(document(), document(100, seed=1), MEDIAN)
    faster = found(document(100), document(seed=1), MEDIAN)

    assert (slower.verdict, faster.verdict) == (WORSE, BETTER)
    assert slower.low < 100 < slower.high


def test_what_nobody_notices_is_not_marked_however_certain_it_is() -> None:
    before, after = document(turns=2000), document(15, turns=2000, seed=1)
    small = found(before, after, MEDIAN)

    assert small.low > 0 and small.verdict == SAME


def test_of_a_handful_of_turns_nothing_is_said() -> None:
    assert found(document(turns=3), document(900, turns=3), MEDIAN).verdict == SAME


def test_counters_are_compared_with_their_chance() -> None:
    few, many = document(glitches=0), document(glitches=0)
    for n in range(3):
        few["systems"]["agent"]["turns"][n]["glitches"] = 1
    for n in range(20):
        many["systems"]["agent"]["turns"][n]["glitches"] = 1

    assert found(document(), few, "glitches in the playback").verdict == SAME
    assert found(document(), many, "glitches in the playback").verdict == WORSE
    assert found(many, document(), "glitches in the playback").verdict == BETTER


def test_memory_is_compared() -> None:
    one, other = document(memory_mb=500.0), document(memory_mb=900.0)

    assert found(one, other, "memory, MB").verdict == WORSE


def test_results_of_different_machines_are_said_to_be() -> None:
    other = document()
    other["about"] |= {"cores": 64, "load_average": {"before": 12.0, "after": 13.0}}

    assert doubts(document(), document()) == []
    assert doubts(document(), other) == [
        "cores: 2 before, 64 after",
        "load average: 1.0 before, 13.0 after",
    ]


def test_results_without_a_system_in_common_are_refused() -> None:
    other = document()
    other["systems"] = {"black-box": other["systems"]["agent"]}

    with pytest.raises(UserError, match="measures agent, the other black-box"):
        compare(document(), other)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    app = typer.Typer()
    app.command()(compare_command)

    def run(before: Any, after: Any, *options: str) -> tuple[int, str]:
        paths = []
        for name, content in (("a.json", before), ("b.json", after)):
            text = content if isinstance(content, str) else json.dumps(content)
            paths.append(tmp_path / name)
            paths[-1].write_text(text, encoding="utf-8")
        done = CliRunner().invoke(app, [*map(str, paths), *options], terminal_width=140)
        return done.exit_code, done.output

    return run


def test_the_command_fails_only_where_it_is_asked_to(run: Any) -> None:
    slower = document(100, seed=1)

    assert run(document(), slower)[0] == 0
    assert run(document(), slower, "--fail")[0] == 1
    assert run(slower, document(), "--fail")[0] == 0
    assert "2 worse, 0 better" in run(document(), slower)[1]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{half a fil", "is damaged or no JSON"),
        ({"some": "JSON"}, "is no result of"),
        ({"format": FORMAT, "version": VERSION + 1}, f"of version {VERSION + 1}"),
        ({"format": FORMAT, "version": VERSION, "about": {}, "plan": {}}, "'systems' is missing"),
    ],
)
def test_files_that_are_no_results_are_refused(run: Any, content: Any, complaint: str) -> None:
    code, output = run(document(), content)

    assert code == 2
    assert complaint in " ".join(output.split())


def test_the_table_names_every_figure_once() -> None:
    differences = compare(document(), document(seed=1))

    assert table(differences).row_count == len(differences) + 1
