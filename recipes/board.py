"""Figures of a training for TensorBoard, where tensorboardX is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes import together


class Board:
    """Writes to ``folder``; does nothing without the package (extra ``[train]``), nor in any but
    the first of several processes.

    The log in JSON lines that every training keeps has the same figures.
    """

    def __init__(self, folder: Path) -> None:
        self._writer: Any = None
        if not together.first():
            return
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            return
        self._writer = SummaryWriter(str(folder), write_to_disk=True)

    def add(self, step: int, values: Mapping[str, Any], group: str = "") -> None:
        """The numbers among ``values``, of nested ones too, under ``group/name`` at ``step``."""
        if self._writer is None:
            return
        for name, value in numbers(values, group):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file. It can be read before that too."""
        if self._writer is not None:
            self._writer.close()


def numbers(values: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested mappings with its path: ``{"a": {"b": 1}}`` is ``("a/b", 1.0)``."""
    for key, value in values.items():
        name = f"{group}/{key}" if group else str(key)
        if isinstance(value, Mapping):
            yield from numbers(value, name)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, float(value)
