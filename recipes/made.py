"""What was made of what: why a step may be skipped, or has to be done again.

A step depends on its settings, the content of the files that it reads, and the code that it runs.
{work}/made.json keeps these and the content of what came out. Times of files mean nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from agent.errors import UserError
from stages.hashes import file_sha256

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("agent", "recipes", "stages")  # whose code counts
UNFINISHED = (".partial", ".part", ".tmp")


@dataclass
class Entry:
    """A step as it was last run. ``outputs`` is empty until it has ended; times in seconds."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    code: str
    outputs: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    ended: str = ""

    def changes(self, now: Entry) -> dict[str, str]:
        """What is different in ``now``, by name, and how."""
        told: dict[str, str] = {}
        for name in {**self.settings, **now.settings}:
            before, after = self.settings.get(name), now.settings.get(name)
            if before != after:
                told[name] = f"{name} {before} → {after}"
        for name in {**self.inputs, **now.inputs}:
            if self.inputs.get(name) != now.inputs.get(name):
                told[name] = f"{name} changed"
        if self.code != now.code:
            told["code"] = "its code changed"
        return told


class Made:
    """The entries of {work}/made.json, written at every change.

    Raises:
        UserError: the file is not one of these.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / "made.json"
        self.entries: dict[str, Entry] = {}
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self.entries = {name: Entry(**entry) for name, entry in content.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.path}: cannot be read ({error}); remove it, and every step runs again"
                ) from error

    def __setitem__(self, step: str, entry: Entry) -> None:
        self.entries[step] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        content = {name: asdict(entry) for name, entry in self.entries.items()}
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)

    def get(self, step: str) -> Entry | None:
        return self.entries.get(step)


def content(path: Path) -> str:
    """A short name for the content of a file, or of all files in a folder; "" for nothing."""
    if path.is_file():
        return file_sha256(path)[:16]
    digest = hashlib.sha256()
    found = False
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix not in UNFINISHED:
            found = True
            digest.update(f"{file.relative_to(path).as_posix()} {content(file)}\n".encode())
    return digest.hexdigest()[:16] if found else ""


def code(module: str, apart: Collection[str] = ()) -> str:
    """A short name for the code of ``module`` and all that it imports of this repository.

    Comments, docstrings and layout do not count, the minor version of Python does: the name is of
    the syntax tree.

    Args:
        apart: modules that do not count, nor what only they import.
    """
    digest = hashlib.sha256()
    for path in sorted(_imported(module, apart)):
        digest.update(f"{path.relative_to(ROOT).as_posix()} {_tree(path)}\n".encode())
    return digest.hexdigest()[:16]


def _imported(module: str, apart: Collection[str]) -> Iterator[Path]:
    todo, seen = [module], set(apart)
    while todo:
        name = todo.pop()
        path = _file(name)
        if name in seen or path is None:
            continue
        seen.add(name)
        yield path
        todo += _imports(path)


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """Names of modules that a file imports, and of what may be modules."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)


def _file(module: str) -> Path | None:
    if module.split(".")[0] not in PACKAGES:
        return None
    path = ROOT.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _tree(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            body.pop(0)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
