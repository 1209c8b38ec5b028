"""What was made of what; time worked; figures; several processes; the archive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from recipes import board, chance, made, pack
from recipes.clock import Stopwatch
from recipes.lm_data import MASKED, REPLY_TEXT, TRANSCRIPT

# ------------------------------------------------------------------------------------- contents


def test_contents_are_told_apart_and_times_are_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("1")
    assert made.content(tmp_path / "a") == made.content(tmp_path / "b") != ""
    (tmp_path / "b" / "x.partial").write_text("half")
    assert made.content(tmp_path / "a") == made.content(tmp_path / "b")
    (tmp_path / "b" / "x").write_text("22")
    assert made.content(tmp_path / "a") != made.content(tmp_path / "b")
    assert made.content(tmp_path / "nothing") == ""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("def f():\n    from recipes import two\n    return two.x\n")
    (folder / "two.py").write_text("x = 1\n")
    (folder / "three.py").write_text("y = 1\n")
    monkeypatch.setattr(made, "ROOT", tmp_path)
    return folder


@pytest.mark.parametrize(
    ("file", "text", "same"),
    [
        ("two", "x = 2\n", False),
        ("two", '"""What x is."""\nx = 1  # one\n', True),
        ("two", "x = (\n    1\n)\n", True),
        ("three", "y = 2\n", True),
    ],
)
def test_code_counts_with_what_it_imports(package: Path, file: str, text: str, same: bool) -> None:
    before = made.code("recipes.one")
    made._imports.cache_clear()
    made._tree.cache_clear()
    (package / f"{file}.py").write_text(text)
    assert (made.code("recipes.one") == before) == same


def test_code_that_only_measures_does_not_count(package: Path) -> None:
    before = made.code("recipes.one", apart=["recipes.two"])
    assert before != made.code("recipes.one")
    (package / "two.py").write_text("x = 2\n")
    made._tree.cache_clear()
    assert made.code("recipes.one", apart=["recipes.two"]) == before


# ----------------------------------------------------------------------------------------- time


def test_a_process_that_was_stopped_has_not_worked() -> None:
    script = (
        "import sys, time\n"
        "from recipes.clock import Stopwatch\n"
        "watch = Stopwatch()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(watch.lap(), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=made.ROOT,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert float(process.stdout.readline()) < 0.4


def test_laps_add_up_to_the_work() -> None:
    watch, whole = Stopwatch(), Stopwatch()
    laps = []
    for _ in range(3):
        sum(range(100_000))
        laps.append(watch.lap())
    assert all(lap > 0 for lap in laps) and sum(laps) <= whole.lap() + 1e-3


# -------------------------------------------------------------------------------------- figures


def test_numbers_are_found_with_their_paths() -> None:
    values = {"loss": 1, "first": {"right": 0.5, "n": 2}, "examples": ["x"], "done": True}
    assert dict(board.numbers(values)) == {"loss": 1.0, "first/right": 0.5, "first/n": 2.0}


def test_figures_are_written_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    own = board.Board(tmp_path)
    own.add(3, {"loss": 1.5}, "joint")
    own.close()
    (written,) = tmp_path.glob("events*")
    assert b"joint/loss" in written.read_bytes()


def test_without_the_package_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    own = board.Board(tmp_path)
    own.add(1, {"loss": 1.0})
    own.close()
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- chance


def test_guessing_gains_nothing_over_guessing_and_knowing_does() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 4, (40, 101))
    kinds = np.full((40, 101), TRANSCRIPT)
    kinds[:, 50:] = REPLY_TEXT
    kinds[:, 0] = MASKED
    drawn = ids, kinds
    fair = chance.compare(lambda x: np.full(x[:, 1:].shape, np.log(4)), drawn, drawn, 4)
    assert set(fair) == {"transcript", "reply_text", "all"}
    assert fair["all"].gain == pytest.approx(0, abs=0.01)
    known = chance.compare(lambda x: np.zeros(x[:, 1:].shape), drawn, drawn, 4)
    assert known["all"].gain == pytest.approx(np.log(4), abs=0.01)


# ------------------------------------------------------------------------------------ processes

TRAIN = """
import torch
from recipes import together
place = together.join("cpu")
weight = torch.nn.Parameter(torch.zeros(3))
unused = torch.nn.Parameter(torch.zeros(2))
(weight * (together.rank() + 1)).sum().backward()
together.average([weight, unused])
minutes, stopped = together.agree(float(together.rank()), together.rank() == 0)
row = (together.rank(), together.first(), weight.grad.tolist(), minutes, stopped)
print(row, flush=True)
together.leave()
"""


def test_processes_hold_the_mean_of_their_gradients_and_stop_together(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    path = os.pathsep.join([str(made.ROOT), os.environ.get("PYTHONPATH", "")])
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *start, str(tmp_path / "train.py")],
        capture_output=True, text=True, timeout=200, check=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    mean = [1.5, 1.5, 1.5]
    told = sorted(line for line in done.stdout.splitlines() if line.startswith("("))
    assert told == [str((0, True, mean, 0.0, 1.0)), str((1, False, mean, 0.0, 1.0))]


# -------------------------------------------------------------------------------------- archive


def test_the_same_model_makes_the_same_archive(tmp_path: Path) -> None:
    files = {"README.md": b"a card", "config.json": json.dumps({"a": 1}).encode()}
    for name in ("one", "two"):
        pack.write(files, "nano", tmp_path / name / "nano.tar.gz")
    one, two = ((tmp_path / n / "nano.tar.gz").read_bytes() for n in ("one", "two"))
    assert one == two
    with tarfile.open(tmp_path / "one" / "nano.tar.gz") as archive:
        assert archive.getnames() == ["nano/README.md", "nano/config.json"]


def test_every_file_of_the_shipped_model_is_packed_with_its_checksum(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("listen")
    files = pack.members(made.ROOT / "checkpoints" / "nano", tmp_path / "page.html")
    named = {line.split("  ")[1] for line in files["SHA256SUMS"].decode().splitlines()}
    assert named == set(files) - {"SHA256SUMS"} and {"LICENSE", "listen.html"} <= named


def test_a_model_without_a_card_is_not_packed(tmp_path: Path) -> None:
    shipped = made.ROOT / "checkpoints" / "nano"
    for path in shipped.iterdir():
        if path.name != "README.md":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(pack.UserError, match=r"no README\.md"):
        pack.members(tmp_path)
