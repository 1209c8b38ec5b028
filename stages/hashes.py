"""The hash of a file."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_BLOCK = 1 << 22  # bytes read at a time


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits; read again only once it has changed.

    Raises:
        OSError: it cannot be read.
    """
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns)


@cache
def _hash_of(path: Path, size: int, mtime: int) -> str:
    """Size and time are there so that a changed file is hashed again."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
