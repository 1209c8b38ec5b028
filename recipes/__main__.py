"""``python -m recipes STEP``: the steps that make a model, each needing those before.

A step is imported when it is called, so that ``--help`` is instant and a missing package is named
in one sentence. ``all`` runs the steps of a recipe, each where it stopped, and leaves out those of
which nothing changed (see steps.py).
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.errors import UserError
from recipes import steps
from recipes.clock import Stopwatch
from recipes.made import Entry, Made
from recipes.steps import STEPS, Folders

if TYPE_CHECKING:
    from recipes.recipe import Recipe

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

INTERRUPTED = 130

app = typer.Typer(
    help="How nano is made. Every step has its own --help, is seeded, and resumes.",
    no_args_is_help=True,
    add_completion=False,
)


def run_step(step: str, arguments: list[str]) -> None:
    """Run one step with its own command line.

    Raises SystemExit with code 2 and one sentence when a package of the extra [train] is missing,
    and typer.Exit with the step's code when it ends with one, as it does when interrupted.
    """
    try:
        main = steps.module(step).main
    except ModuleNotFoundError as error:
        _explain(step, error)
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(main)
    try:
        code = command(arguments, prog_name=f"python -m recipes {step}", standalone_mode=False)
    except ModuleNotFoundError as error:
        _explain(step, error)
    if code:  # without standalone mode an exit is no exception but what is returned
        raise typer.Exit(code)


def _explain(step: str, error: ModuleNotFoundError) -> None:
    name = error.name or str(error)
    if name.split(".")[0] in ("recipes", "stages"):
        raise error
    typer.echo(
        f"recipes {step} needs the package {name!r}: pip install 'spiritlm-agent[train]'", err=True
    )
    raise SystemExit(2) from error


def _register(step: str, summary: str) -> None:
    def command(context: typer.Context) -> None:
        run_step(step, context.args)

    app.command(step, help=summary, context_settings=PASSED_ON)(command)


for _name, _step in STEPS.items():
    _register(_name, _step.summary)
# No step of a recipe: it goes on from nano's corpus and units, and its base is another package.
_register("smol", "Extend SmolLM2-135M with speech: the language model of smol.")


class Chain:
    """The steps of a recipe in its folders, and what was made of them."""

    def __init__(self, recipe: Recipe, folders: Folders) -> None:
        self.recipe, self.folders = recipe, folders
        self.made = Made(folders.work)

    def settings(self, step: str) -> dict[str, Any]:
        """The options of ``step``, its minutes as the budget gives them."""
        spent = {name: entry.seconds / 60 for name, entry in self.made.entries.items()}
        return self.recipe.settings(step) | self.recipe.minutes(step, spent)

    def why(self, step: str) -> str:
        """Why ``step`` has to run; "" where it has not."""
        now = steps.entry(step, self.settings(step), self.folders)
        return steps.why(step, self.made.get(step), now, self.folders)

    def run(self, step: str) -> None:
        """Run ``step``, from where it stopped or from the beginning, and note what came out."""
        settings = self.settings(step)
        before, now = self.made.get(step), steps.entry(step, settings, self.folders)
        anew = before is not None and steps.clear(step, before.changes(now), self.folders)
        now.seconds = 0.0 if before is None or anew else before.seconds
        self.made[step] = now
        watch = Stopwatch()
        try:
            self._call(step, settings)
        finally:
            now.seconds += watch.lap()
            self.made[step] = now
        self.touch(step, now)

    def touch(self, step: str, entry: Entry | None = None) -> None:
        """Note that what is there was made of what is there."""
        if entry is None:
            before = self.made.get(step)
            entry = steps.entry(step, self.settings(step), self.folders)
            entry.seconds = before.seconds if before else 0.0
        entry.outputs = self.folders.contents(STEPS[step].writes)
        lost = [name for name, content in entry.outputs.items() if not content.strip("+")]
        if lost:
            raise UserError(f"recipes {step}: no {', '.join(lost)} in {self.folders.work}")
        entry.ended = datetime.now().isoformat(timespec="seconds")
        self.made[step] = entry

    def _call(self, step: str, settings: Mapping[str, Any]) -> None:
        options = {**settings, **self.folders.places(step)}
        if self.recipe.gpus > 1 and "device" in options:
            start = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
            command = [*start, str(self.recipe.gpus), "-m", "recipes", step, *arguments(options)]
            done = subprocess.run([sys.executable, "-m", *command], check=False)
            if done.returncode:  # it has said why
                raise typer.Exit(2)
            return
        try:
            steps.module(step).main(**options)
        except ModuleNotFoundError as error:
            _explain(step, error)


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line."""
    found: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            found += [f"--{flag}", str(value)]
    return found


@app.command("all")
def every(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a YAML file.")] = "nano",
    work: Annotated[
        Path | None, typer.Option(help="Folder for what is made, by default work/MODEL.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the model, by default WORK/MODEL; of nano's, the shipped one "
                     "is checkpoints/nano."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="STEP.OPTION=VALUE instead of the recipe's.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Minutes for all steps together, by the recipe's shares.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="Leave out the steps before this one.")] = None,
    until: Annotated[str | None, typer.Option(help="Leave out the steps after this one.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only tell what would be done, and why.")] = False,
    touch: Annotated[
        bool, typer.Option(help="Run nothing: take what is there for up to date.")
    ] = False,
) -> None:  # fmt: skip
    """Run the steps of a recipe that something changed for; nano takes hours on two CPU cores."""
    from recipes.recipe import load

    overrides = [*(set_ or []), *([f"budget={budget}"] if budget is not None else [])]
    try:
        chosen = load(recipe, overrides)
    except ModuleNotFoundError as error:
        _explain("all", error)
    work = work or Path("work") / chosen.model
    chain = Chain(chosen, Folders(work, out or work / chosen.model, chosen.model))
    names = _between(chosen.steps, since, until)
    if dry_run:
        _tell(chain, names)
        return
    for number, step in enumerate(names, 1):
        if touch:
            chain.touch(step)
            continue
        reason = chain.why(step)
        told = f"{reason}. {STEPS[step].summary}" if reason else "up to date"
        typer.echo(f"[{number}/{len(names)}] {step}: {told}")
        if reason:
            chain.run(step)


def _between(names: list[str], since: str | None, until: str | None) -> list[str]:
    for name in (since, until):
        if name is not None and name not in names:
            raise typer.BadParameter(f"no step {name!r}: choose one of {', '.join(names)}")
    first = names.index(since) if since else 0
    last = names.index(until) if until else len(names) - 1
    return names[first : last + 1]


def _tell(chain: Chain, names: list[str]) -> None:
    """A table of the steps: up to date, or why not, and how long they took."""
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "state", "minutes", "made", box=None)
    stale: dict[str, str] = {}  # what a step to be run writes -> the step
    for step in names:
        reason = chain.why(step)
        after = dict.fromkeys(stale[name] for name in STEPS[step].reads if name in stale)
        if not reason and after:
            reason = f"depends on {', '.join(after)}"
        if reason:
            stale |= dict.fromkeys(STEPS[step].writes, step)
        entry = chain.made.get(step)
        minutes = f"{entry.seconds / 60:.1f}" if entry else ""
        table.add_row(step, reason or "up to date", minutes, entry.ended if entry else "")
    Console().print(table)


def main() -> None:
    """The command line; an error that the user can mend is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "show"):  # click's usage errors, under whatever name typer has them
            error.show()
        elif isinstance(error, (OSError, UserError)) or type(error).__name__ == "CheckpointError":
            typer.echo(f"error: {error}", err=True)
        else:
            raise
        sys.exit(getattr(error, "exit_code", 2))
    if code == INTERRUPTED:
        typer.echo("stopped; the next run resumes", err=True)
    sys.exit(code or 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was done is noted
    main()
