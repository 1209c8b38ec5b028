"""What all commands share: their common options, and how an error reaches the user."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console

from agent.errors import UserError

P = ParamSpec("P")

ConfigName = Annotated[
    str,
    typer.Option(
        "--config", "-c", metavar="NAME|FILE", help="nano, base-7b, expressive-7b or a YAML file."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one setting; repeatable (see info --keys).",
    ),
]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines, for logs and screen readers.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


def mendable(command: Callable[P, None]) -> Callable[P, None]:
    """Turns errors that the user can mend into one sentence and exit code 2.

    With ``--debug`` the traceback is shown as well. Other errors are faults of the program and go
    through as they are. Ctrl-C ends with 130, as in a shell.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of a pipe has gone
            sys.stderr.close()
            raise typer.Exit(141) from None
        except Exception as error:
            if not _is_mendable(error):
                raise
            if kwargs.get("debug"):
                stderr().print_exception(show_locals=False)
            typer.echo(f"error: {_sentence(error)}", err=True)
            raise typer.Exit(UserError.exit_code) from None

    return guarded


def writable(path: Path) -> None:
    """Look whether a file can be made at ``path``, before the work that fills it.

    Raises:
        UserError: its folder is not there, or it is a folder itself.
    """
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"{path}: is a directory, expected a file name")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; create it, or write elsewhere")


def stderr() -> Console:
    """For what is not the command's result."""
    return Console(stderr=True, highlight=False, markup=False)


def _is_mendable(error: Exception) -> bool:
    if isinstance(error, UserError):
        return True
    from stages.checkpoint import CheckpointError
    from stages.lm import CacheFullError
    from stages.vocoder import VocoderError

    return isinstance(error, CheckpointError | CacheFullError | VocoderError)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
