"""The house plan holds: who may import whom, and what the README shows works."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "stages": set(),
    "agent": {"stages"},
    "onnx": {"stages"},
    "recipes": {"stages", "agent"},
    "bench": {"stages", "agent", "recipes"},
}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder: str) -> None:
    ours = set(MAY_IMPORT) - {"onnx"}  # `import onnx` is the library
    for path in (REPOSITORY / folder).rglob("*.py"):
        wrong = (set(imports(path)) & ours) - MAY_IMPORT[folder] - {folder}
        assert not wrong, f"{path.relative_to(REPOSITORY)} imports {', '.join(sorted(wrong))}"


def test_asyncio_lives_in_the_agent_only() -> None:
    for path in (REPOSITORY / "stages").rglob("*.py"):
        assert "asyncio" not in set(imports(path)), path.name


def test_the_folder_of_graphs_does_not_hide_the_onnx_library() -> None:
    assert not (REPOSITORY / "onnx" / "__init__.py").exists()
    found = subprocess.run(
        [sys.executable, "-c", "import onnx; print(onnx.__version__)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_the_shipped_model_is_small_enough_to_ship() -> None:
    files = [p for p in (REPOSITORY / "checkpoints").rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in files) <= 45e6


@pytest.mark.slow
@pytest.mark.parametrize("file", ["README.md"])
def test_the_python_in_the_documentation_runs(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks, f"{file} shows no Python"
    monkeypatch.chdir(REPOSITORY)
    for block in blocks:
        exec(compile(block, file, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
