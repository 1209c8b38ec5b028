"""Fixtures for all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Time is not what is tested: a busy machine must not fail a property. The same examples each run;
# new ones are looked for with `--hypothesis-profile explore`, and by `python -m bench.fuzz`.
_HOUSE: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("house", max_examples=50, derandomize=True, **_HOUSE)
settings.register_profile("explore", max_examples=2000, print_blob=True, **_HOUSE)
settings.load_profile("house")

# Tests share their cores with each other; more threads than that only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


def kit_folder() -> Path:
    """Where the conformance kit should be."""
    default = REPOSITORY.parent / "shared" / "conformance"
    return Path(os.environ.get("SPIRIT_CONFORMANCE_DIR", default))


@pytest.fixture(scope="session")
def kit() -> Path:
    """The conformance kit. Skips where it is absent, or fails if SPIRIT_CONFORMANCE_REQUIRED=1."""
    folder = kit_folder()
    if (folder / "expected").is_dir():
        return folder
    message = f"no conformance kit in {folder}: set SPIRIT_CONFORMANCE_DIR to its folder"
    if os.environ.get("SPIRIT_CONFORMANCE_REQUIRED") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def expected(kit: Path) -> Callable[..., Any]:
    """Reads ``expected/NAME.json``. Where a kit lacks it: the default, or else the test skips."""

    def read(name: str, default: Any = None) -> Any:
        path = kit / "expected" / f"{name}.json"
        if not path.is_file() and default is not None:
            return default
        if not path.is_file():
            pytest.skip(f"this kit has no {path.name}")
        return json.loads(path.read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="session")
def lm_folder(kit: Path) -> Callable[[str], Path]:
    """The kit's language model of a version ("base" or "expressive")."""

    def find(version: str) -> Path:
        found = sorted((kit / "checkpoints" / "spiritlm_model").glob(f"*{version}*"))
        if not found:
            pytest.skip(f"this kit has no {version} language model")
        return found[0]

    return find


_LM_CASES = {"lm_run": ("runs", ""), "lm_inputs": ("runs", "inputs"), "lm_decode": ("decode", "")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of ``lm_*.json``: a pair of version and case.

    ``lm_run`` are greedy generations, ``lm_inputs`` those of them that start from text and clips,
    ``lm_decode`` the reading of constructed generations.
    """
    for fixture, (section, key) in _LM_CASES.items():
        if fixture in metafunc.fixturenames:
            cases = []
            for path in sorted((kit_folder() / "expected").glob("lm_*.json")):
                version = path.stem.removeprefix("lm_")
                for case in json.loads(path.read_text(encoding="utf-8"))[section]:
                    if not key or key in case:
                        cases.append(pytest.param((version, case), id=f"{version}-{case['name']}"))
            # Without a kit one test is left, which asks for it and so skips or fails.
            metafunc.parametrize(fixture, cases or [pytest.param(("", {}), id="no-kit")])
