"""Fixtures for the tests of the benchmarks: the virtual sound card."""

from __future__ import annotations

from pulse import pulse, sound_server

__all__ = ["pulse", "sound_server"]
