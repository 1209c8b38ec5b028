"""How much memory a process has."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def resident_mb() -> float:
    """What this one has now, MB; where the system does not say, the most it ever had."""
    try:
        return round(resident_mb_of("self"), 2)
    except (OSError, IndexError, ValueError):
        return peak_mb()


def resident_mb_of(process: int | str) -> float:
    """What another one has now, MB. Raises OSError if there is none, or the system does not say."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_mb() -> float:
    """The most this one ever had, MB."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6, 2)
