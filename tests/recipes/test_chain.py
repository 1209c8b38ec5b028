"""The chain of all steps: what is done, what is left out and why, in whose folders."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from agent.config import config_folder
from recipes import __main__ as chain
from recipes import recipe, steps
from recipes.steps import STEPS, Folders

FIRST = ["corpus", "hearing", "units"]


@pytest.mark.parametrize("step", list(STEPS))
def test_every_step_knows_the_places_it_is_given(step: str) -> None:
    command = typer.Typer()
    command.command()(importlib.import_module(f"recipes.{step}").main)
    known = {p.name for p in typer.main.get_command(command).params}
    assert set(Folders(Path("work"), Path("out"), "nano").places(step)) <= known
    assert STEPS[step].goes_on - set(STEPS[step].reads) <= known
    assert set(STEPS[step].timed) <= known
    assert all(importlib.util.find_spec(module) for module in STEPS[step].apart)


def test_a_step_reads_only_what_an_earlier_one_has_written() -> None:
    folders = Folders(Path("work"), Path("out"), "nano")
    written: list[Path] = []
    for step in STEPS.values():
        for place in step.reads.values():
            for path in folders.paths(place):
                own = path.parent in (steps.PACKAGE, config_folder())
                assert own or any(path in (w, *w.parents) or w in path.parents for w in written)
        written += [path for place in step.writes.values() for path in folders.paths(place)]


class Works:
    """Steps whose ``main`` writes one small file and notes that it was called."""

    def __init__(self, tmp_path: Path) -> None:
        self.work, self.called = tmp_path / "work", list[str]()
        self.stop_in = ""
        self.text = tmp_path / "texts.txt"
        self.text.write_text("hello")

    def module(self, name: str) -> ModuleType:
        def main(
            work: Annotated[Path, typer.Option()],
            minutes: Annotated[float, typer.Option()] = 1,
            seed: Annotated[int, typer.Option()] = 0,
        ) -> None:
            self.called.append(name)
            if name == self.stop_in:
                raise KeyboardInterrupt
            before = self.work / f"{FIRST[FIRST.index(name) - 1]}.txt"
            read = self.text if name == "corpus" else before
            trained = self.work / name / "state"
            trained.parent.mkdir(parents=True, exist_ok=True)
            with trained.open("a") as file:
                file.write("x")
            (work / f"{name}.txt").write_text(f"{name} {seed} of {read.read_text()}"[:14])

        module = ModuleType(name)
        module.main = main  # type: ignore[attr-defined]
        return module

    def state(self, step: str) -> str:
        return (self.work / step / "state").read_text()

    def __call__(self, *arguments: str) -> Result:
        self.called.clear()
        path = self.work.parent / "tiny.yaml"
        path.write_text("model: tiny\nshares: {corpus: 1, hearing: 1, units: 2}\n"
                        "steps: [corpus, hearing, units]\n")  # fmt: skip
        options = ["all", str(path), "--work", str(self.work), *arguments]
        return CliRunner().invoke(chain.app, options)


@pytest.fixture
def works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Works:
    made = Works(tmp_path)
    tiny = {}
    for number, name in enumerate(FIRST):
        before = {"read": "{work}/" + f"{FIRST[number - 1]}.txt"}
        tiny[name] = steps.Step(
            name,
            reads=before if number else {"texts": str(made.text)},
            writes={name: "{work}/" + f"{name}.txt"},
            state=("{work}/" + name,),
            goes_on=frozenset({"minutes"}),
            timed=("minutes",),
        )
    modules = {name: made.module(name) for name in FIRST}
    for where in (steps, recipe, chain):
        monkeypatch.setattr(where, "STEPS", tiny)
    for where in (steps, recipe):
        monkeypatch.setattr(where, "module", modules.__getitem__)
    return made


def test_what_is_up_to_date_is_left_out(works: Works) -> None:
    assert works().exit_code == 0 and works.called == FIRST
    again = works()
    assert works.called == [] and again.output.count("up to date") == 3


def test_a_change_is_told_and_reaches_as_far_as_contents_differ(works: Works) -> None:
    works()
    works.text.write_text("hello again")  # of which corpus.txt keeps the first
    told = works()
    assert works.called == ["corpus"] and "texts changed" in told.output
    works.text.write_text("good day")
    works()
    assert works.called == ["corpus", "hearing"]


def test_a_lost_output_is_made_again(works: Works) -> None:
    works()
    (works.work / "hearing.txt").unlink()
    assert "hearing changed or gone" in works().output and works.called == ["hearing"]


def test_more_minutes_go_on_and_another_seed_begins_anew(works: Works) -> None:
    works()
    works("--set", "hearing.minutes=2")
    assert works.called == ["hearing"] and works.state("hearing") == "xx"
    told = works("--set", "hearing.minutes=2", "--set", "hearing.seed=1")
    assert "seed 0 → 1" in told.output and works.state("hearing") == "x"
    assert works.state("before/hearing/hearing") == "xx", "no training is lost by an edit"


def test_what_cores_there_are_changes_nothing(works: Works) -> None:
    assert "processes" in steps.FREE and "device" in steps.FREE


def test_a_dry_run_tells_what_follows_from_what_and_does_nothing(works: Works) -> None:
    works()
    works.text.write_text("other")
    told = works("--dry-run")
    assert works.called == [] and "texts changed" in told.output
    assert works("--dry-run", "--since", "hearing").output.count("up to date") == 2


def test_touching_takes_what_is_there_for_up_to_date(works: Works) -> None:
    works()
    works.text.write_text("other")
    works("--touch")
    assert works.called == [] and works().output.count("up to date") == 3


def test_touching_what_is_not_there_is_refused(works: Works) -> None:
    assert "no corpus" in str(works("--touch").exception)


def test_an_interrupted_step_ends_the_chain_and_is_resumed(
    works: Works, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes after would learn from half of what it needs."""
    works.stop_in = "hearing"
    path = works.work.parent / "tiny.yaml"
    works("--dry-run")
    monkeypatch.setattr(sys, "argv", ["recipes", "all", str(path), "--work", str(works.work)])
    with pytest.raises(SystemExit) as stop:
        chain.main()
    assert stop.value.code == 130 and works.called == ["corpus", "hearing"]
    works.stop_in = ""
    assert "not finished" in works().output and works.called == ["hearing", "units"]


def test_a_budget_is_shared_and_what_was_spent_is_taken_off(works: Works) -> None:
    works("--budget", "40", "--dry-run")
    tiny = recipe.load(works.work.parent / "tiny.yaml", ["budget=40"])
    assert tiny.minutes("corpus", {}) == {"minutes": 10}
    assert tiny.minutes("hearing", {"corpus": 10}) == {"minutes": 10}
    assert tiny.minutes("hearing", {"corpus": 4}) == {"minutes": 12}
    assert tiny.minutes("units", {"corpus": 10, "hearing": 50}) == {"minutes": 0}


def test_a_damaged_note_of_what_was_made_is_named(works: Works) -> None:
    works()
    (works.work / "made.json").write_text("{")
    assert "made.json" in str(works().exception)


# -------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", sorted(p.stem for p in recipe.FOLDER.glob("*.yaml")))
def test_every_recipe_is_valid(name: str) -> None:
    found = recipe.load(name, ["seed=7"])
    drawn = [found.settings(step) for step in found.steps]
    assert all(options["seed"] == 7 for options in drawn if "seed" in options)


def test_a_budget_keeps_the_proportions_of_phases() -> None:
    nano = recipe.load("nano", ["budget=100", "vocoder.mel_minutes=30", "vocoder.minutes=60"])
    given = nano.minutes("vocoder", {})
    assert given["minutes"] == pytest.approx(2 * given["mel_minutes"], abs=0.02)
    left_out = recipe.load("nano", ["budget=100", "vocoder.sharpen_minutes=0"])
    assert left_out.minutes("vocoder", {})["sharpen_minutes"] == 0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lm.hiden=3", "unknown key 'lm.hiden'; did you mean 'lm.hidden'?"),
        ("lmm.hidden=3", "unknown key 'lmm'; did you mean 'lm'?"),
        ("lm.hidden=wide", "lm.hidden is 'wide'"),
        ("hearing.clusters=900", "hearing.clusters is 900, expected less than or equal to 500"),
        ("steps=[corpus, bake]", "no step 'bake'"),
        ("steps=[units, corpus]", "expected the order corpus, hearing"),
        ("model=../nano", "model is '../nano'"),
        ("budget=9", "budget: shares of corpus"),
        ("lm.minutes", "expected step.option=value"),
        ("lm.minutes=[", "not valid YAML"),
    ],
)
def test_what_cannot_be_is_named(override: str, told: str) -> None:
    with pytest.raises(recipe.UserError) as error:
        recipe.load("smoke", [override])
    assert told in str(error.value)


def test_an_empty_section_has_the_defaults_of_its_step(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("model: own\nlm:\n  # minutes: 3\n")
    own = recipe.load(tmp_path / "own.yaml", ["lm.rows=2"])
    assert own.settings("lm")["minutes"] == 100 and own.settings("lm")["rows"] == 2


def test_a_step_that_is_none_is_named() -> None:
    run = CliRunner().invoke(chain.app, ["all", "--since", "bake"])
    assert run.exit_code == 2 and "no step 'bake'" in run.output


def test_options_become_a_command_line() -> None:
    options: dict[str, Any] = {"mel_minutes": 0.5, "card": False, "limit": None, "work": Path("w")}
    assert chain.arguments(options) == ["--mel-minutes", "0.5", "--no-card", "--work", "w"]


def test_the_shipped_model_is_not_touched_unless_asked() -> None:
    folders: Callable[[str], Path] = Folders(Path("w"), Path("w/nano"), "nano").path
    written = [folders(p) for s in STEPS.values() for p in s.places.values()]
    assert all(Path("w") in path.parents for path in written)
