"""``python -m recipes units``: the corpus in phonetic units, as the stream will give them.

Writes {work}/units/units.jsonl, one ``{"id", "hu"}`` a line: 25 units a second, repeats included,
int 0 to 499. An interrupted run goes on where it stopped; other weights begin anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from recipes.manifest import PROCESSES, recordings
from recipes.windows import HUBERT, OUT, QUANTIZER, cache_stamp, encode_many


def units_done(path: Path, stamp: str) -> set[str]:
    """Ids already in ``path``; it is emptied if it was made by other weights than ``stamp``'s.

    A last line cut short by an interruption is dropped.
    """
    mark = path.with_suffix(".stamp")
    if not path.is_file() or not mark.is_file() or mark.read_text() != stamp:
        path.write_text("", encoding="utf-8")
        mark.write_text(stamp)
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return {json.loads(line)["id"] for line in whole.splitlines()}


def main(
    work: Annotated[Path, typer.Option(help="Folder of the corpus and the units.")] = Path("work"),
    checkpoint: Annotated[Path, typer.Option(help="Folder of nano's hearing.")] = OUT,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = PROCESSES,
) -> None:
    """Encode every recording of the corpus to phonetic units."""
    hubert, quantizer = checkpoint / HUBERT, checkpoint / QUANTIZER
    path = work / "units" / "units.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = recordings(work)
    done = units_done(path, cache_stamp(hubert, quantizer))
    todo = {
        row["id"]: (work / "corpus" / row["wav"], 0) for row in manifest if row["id"] not in done
    }
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar, path.open("a", encoding="utf-8") as out:
        task = bar.add_task("listening", total=len(manifest), completed=len(done))
        for name, codes in encode_many(hubert, todo, jobs, quantizer) if todo else ():
            out.write(json.dumps({"id": name, "hu": codes.tolist()}) + "\n")
            out.flush()
            bar.advance(task)
    console.print(f"{path}: {len(done) + len(todo)} recordings, {len(todo)} of them new")


if __name__ == "__main__":
    typer.run(main)
