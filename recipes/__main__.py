"""``python -m recipes STEP``: the steps that make nano, each needing those before.

A step is imported when it is called, so that ``--help`` is instant and a missing package is named
in one sentence. ``all`` runs every step with its own defaults; each resumes where it stopped.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

STEPS = {
    "corpus": "Synthesise the corpus: requests, replies and varied sentences, aligned.",
    "hearing": "Construct nano's ears from Whisper's blocks and fit the phonetic units.",
    "units": "Encode the corpus to phonetic units, as the stream will give them.",
    "tokenizers": "Train the pitch and style tokenizers and encode the corpus with them.",
    "vocoder": "Train the unit vocoder of the reply voice.",
    "text_tokenizer": "Train the text tokenizer and add the speech tokens to it.",
    "lm": "Train the language model on speech, text and mixed streams.",
    "evaluate": "Measure the checkpoint with an independent recognizer; write the model card.",
    "listen": "Write a page of questions and answers to listen to.",
}
# Arguments with which a step takes seconds: what comes out runs, and knows nothing.
SMALL = {
    "corpus": ["--limit", "160"],
    "hearing": ["--clusters", "60", "--dims", "20"],
    "tokenizers": ["--share", "0.02"],
    "vocoder": [
        *("--mel-minutes", "0.2", "--unit-minutes", "0.1", "--minutes", "0.2"),
        *("--sharpen-minutes", "0.1"),
        *("--duration-steps", "30", "--evaluate", "2"),
    ],
    "text_tokenizer": ["--text-pieces", "300"],
    "lm": ["--minutes", "0.5"],
    "evaluate": ["--limit", "2", "--spoken", "1"],
    "listen": ["--count", "1"],
}
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
        main = importlib.import_module(f"recipes.{step}").main
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


for _step, _summary in STEPS.items():
    _register(_step, _summary)


def arguments(step: str, work: Path, out: Path, small: bool = False) -> list[str]:
    """The command line of one step of the whole: files in ``work``, the model in ``out``."""
    ears, lm = out / "speech_tokenizer", out / "spiritlm_model" / "spirit-lm-nano"
    places = {
        "hearing": ["--out", ears / "hubert_25hz"],
        "units": ["--checkpoint", ears / "hubert_25hz"],
        "tokenizers": ["--out", ears],
        "vocoder": ["--ship", ears / "hifigan_spiritlm_expressive_w2v2"],
        "text_tokenizer": ["--out", lm],
        "lm": ["--out", lm],
        "evaluate": ["--checkpoint", out],
        "listen": ["--checkpoint", out, "--out", work / "listen.html"],
    }
    found = ["--work", work, *places.get(step, []), *(SMALL.get(step, []) if small else [])]
    return [str(argument) for argument in found]


@app.command("all")
def every(
    work: Annotated[Path, typer.Option(help="Folder for what the recipes make.")] = Path("work"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model, by default WORK/nano; checkpoints/nano is the shipped one."
        ),
    ] = None,
    since: Annotated[str, typer.Option(help="Begin with this step.")] = "corpus",
    small: Annotated[
        bool, typer.Option(help="Try the chain out on a few recordings, in some minutes.")
    ] = False,
) -> None:
    """Run every step, from text to the model card: about five hours on two CPU cores."""
    names = list(STEPS)
    if since not in names:
        raise typer.BadParameter(f"no step {since!r}: choose one of {', '.join(names)}")
    for number, step in enumerate(names[names.index(since) :], names.index(since) + 1):
        typer.echo(f"[{number}/{len(names)}] {step}: {STEPS[step]}")
        run_step(step, arguments(step, work, out or work / "nano", small))


def main() -> None:
    """The command line; an error that the user can mend is one line and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "show"):  # click's usage errors, under whatever name typer has them
            error.show()
        elif isinstance(error, OSError) or type(error).__name__ == "CheckpointError":
            typer.echo(f"error: {error}", err=True)
        else:
            raise
        sys.exit(getattr(error, "exit_code", 2))
    if code == INTERRUPTED:
        typer.echo("stopped; the next run resumes", err=True)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
