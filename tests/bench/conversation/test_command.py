"""``python -m agent bench`` from the outside: what it takes, what it leaves, what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.conversation.cli import app
from bench.conversation.document import FORMAT, read

REPOSITORY = Path(__file__).parents[3]
AGENT = Path(__file__).with_name("scripted_agent.py")


def agent(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_the_command_line_does_without_the_benchmarks_until_they_are_wanted() -> None:
    code = "import sys, agent.cli; print([m for m in sys.modules if m.split('.')[0] == 'bench'])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )

    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--black-box", "x", "--devices", "a", "b"], "exclude each other"),
        (["--requests", "no/such/folder"], "no/such/folder"),
        (["compare", "no-such.json", "no-such.json"], "no-such.json: cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 2
    assert complaint in " ".join(done.output.split())


@pytest.mark.slow
@pytest.mark.realtime
def test_two_turns_both_ways_leave_a_result_a_report_and_a_ratio(tmp_path: Path) -> None:
    done = agent(
        "bench", "--turns", 2, "--baseline", "reference-flow", "--listen", 0.3, "--seed", 4,
        "--out", tmp_path, "--plain",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    found = read(path)
    assert found["format"] == FORMAT and found["plan"]["seed"] == 4
    assert set(found["systems"]) == {"agent", "reference-flow"}
    mine, other = (found["systems"][name]["turns"] for name in ("agent", "reference-flow"))
    assert [row["request"] for row in mine] == [row["request"] for row in other]
    assert {row["outcome"] for row in (*mine, *other)} == {"answered"}
    assert found["systems"]["agent"]["summary"]["counters"]["lost"] == 0
    assert found["ratios"]["end_to_sample"] > 0
    assert "times sooner than the reference flow" in done.stdout

    same = agent("bench", "compare", path, path, "--fail", "--plain")
    assert same.returncode == 0, same.stdout
    assert "0 worse, 0 better" in same.stdout

    page = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert not re.search(r"(src|href)=|@import|url\(|<script|<link|https?://(?!www\.w3)", page)


@pytest.mark.realtime
def test_another_agent_is_measured_by_its_command(tmp_path: Path) -> None:
    command = f"{sys.executable} {AGENT} --after 400"
    done = agent("bench", "--black-box", command, "--turns", 1, "--out", tmp_path, "--plain")

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text(encoding="utf-8"))["systems"]["black-box"]["turns"]
    assert row["outcome"] == "answered"
    assert path.with_suffix(".html").is_file()
