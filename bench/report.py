"""What every report says about itself, and where it is kept."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def about(bench: str, packages: Iterable[str]) -> dict[str, Any]:
    """Date, command, machine and versions of a run of ``python -m bench.{bench}``."""
    return {
        "date": date.today().isoformat(),
        "command": " ".join([f"python -m bench.{bench}", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "load_average": load_average(),
    }


def load_average() -> float:
    """Of the last minute; 0 where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def save(bench: str, report: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``report`` as ``{date}-{bench}.json``; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['date']}-{bench}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path
