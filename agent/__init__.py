"""The conversation, and everything that touches the outside: files, configuration, command line."""

from __future__ import annotations
