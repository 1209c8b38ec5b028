"""How much memory this process has."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def resident_mb() -> float:
    """What it has now, MB; where the system does not say, the most it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return peak_mb()
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 2)


def peak_mb() -> float:
    """The most it ever had, MB."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6, 2)
