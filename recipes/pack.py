"""``python -m recipes pack``: a model in one archive, to be put where others get it from.

The archive holds the checkpoint in the official layout, its card, the licence, a page to listen to
where there is one, and the SHA-256 of every file. The same files make the same archive, byte for
byte.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Annotated

import typer

from agent.errors import UserError
from recipes.made import ROOT, UNFINISHED
from stages.checkpoint import find_layout


def members(checkpoint: Path, page: Path | None = None) -> dict[str, bytes]:
    """Every file of the archive by its name in it.

    Args:
        page: what `python -m recipes listen` has written.

    Raises:
        CheckpointError: the folder holds no model in the official layout.
        UserError: there is no card.
    """
    find_layout(checkpoint)
    if not (checkpoint / "README.md").is_file():
        raise UserError(f"{checkpoint}: no README.md; `python -m recipes evaluate` writes the card")
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.suffix not in UNFINISHED:
            found[path.relative_to(checkpoint).as_posix()] = path.read_bytes()
    if (ROOT / "LICENSE").is_file():
        found["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    if page is not None:
        found["listen.html"] = page.read_bytes()
    sums = "".join(f"{hashlib.sha256(b).hexdigest()}  {name}\n" for name, b in found.items())
    return found | {"SHA256SUMS": sums.encode()}


def write(files: dict[str, bytes], folder: str, out: Path) -> None:
    """A .tar.gz of ``files`` under ``folder``, without times and owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".part")
    draft.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    draft.replace(out)


def main(
    checkpoint: Annotated[Path, typer.Option(help="The model.")] = Path("checkpoints/nano"),
    page: Annotated[Path | None, typer.Option(help="A page to listen to.")] = None,
    out: Annotated[Path, typer.Option(help="The archive to write.")] = Path("work/nano.tar.gz"),
) -> None:
    """Pack a model with its card and checksums into one archive."""
    files = members(checkpoint, page)
    write(files, checkpoint.resolve().name, out)
    typer.echo(f"{out}: {len(files)} files, {out.stat().st_size / 1e6:.1f} MB")
