"""The chain of all steps: where each one reads and writes, and that its options exist."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from recipes import __main__ as chain


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("step", list(chain.STEPS))
def test_every_step_knows_the_options_it_is_given(step: str, small: bool) -> None:
    command = typer.Typer()
    command.command()(importlib.import_module(f"recipes.{step}").main)
    arguments = chain.arguments(step, Path("work"), Path("out"), small)
    known = {o for p in typer.main.get_command(command).params for o in p.opts}
    assert {a for a in arguments if a.startswith("--")} <= known


def test_the_shipped_model_is_replaced_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, list[str]] = {}
    monkeypatch.setattr(chain, "run_step", called.__setitem__)
    run = CliRunner().invoke(chain.app, ["all", "--work", str(tmp_path)])
    assert run.exit_code == 0 and list(called) == list(chain.STEPS)
    shipped = set(called) - {"corpus", "listen"}
    written = [a for step in shipped for a in called[step][2:]]
    assert all(str(tmp_path / "nano") in a for a in written if "/" in a)
    CliRunner().invoke(chain.app, ["all", "--out", "checkpoints/nano", "--since", "evaluate"])
    assert called["evaluate"] == ["--work", "work", "--checkpoint", "checkpoints/nano"]


def test_an_interrupted_step_ends_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after would learn from half of what it needs."""
    begun: list[str] = []

    def step(name: str) -> ModuleType:
        def main(work: Annotated[Path, typer.Option()]) -> None:
            begun.append(name)
            if name == "units":
                raise KeyboardInterrupt

        module = ModuleType(name)
        module.main = main  # type: ignore[attr-defined]
        return module

    for name in chain.STEPS:
        monkeypatch.setitem(sys.modules, f"recipes.{name}", step(name))
    monkeypatch.setattr(chain, "arguments", lambda *_: ["--work", "w"])
    monkeypatch.setattr(sys, "argv", ["recipes", "all"])
    with pytest.raises(SystemExit) as stop:
        chain.main()
    assert stop.value.code == 130 and begun == ["corpus", "hearing", "units"]


def test_a_step_that_is_none_is_named() -> None:
    run = CliRunner().invoke(chain.app, ["all", "--since", "bake"])
    assert run.exit_code == 2 and "no step 'bake'" in run.output
