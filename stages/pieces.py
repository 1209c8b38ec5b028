"""The pieces of a vocabulary: reading its file, and turning pieces back to characters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import sentencepiece

from stages.checkpoint import CheckpointError

SPACE = "\u2581"
"""Stands for a space inside pieces."""

_USER_DEFINED, _UNUSED = 4, 5  # piece types of sentencepiece_model.proto


class Pieces(Protocol):
    """What is used of a sentencepiece processor, and what any other vocabulary must offer.

    A byte piece stands for bytes that are no whole characters; its name is ``<0x`` hexadecimal
    ``>``. In the other names "\u2581" stands for a space.
    """

    def get_piece_size(self) -> int: ...
    def bos_id(self) -> int: ...
    def eos_id(self) -> int: ...
    def unk_id(self) -> int: ...
    def id_to_piece(self, id: int) -> str: ...
    def piece_to_id(self, piece: str) -> int: ...
    def is_byte(self, id: int) -> bool: ...
    def is_control(self, id: int) -> bool: ...
    def encode(self, input: str) -> list[int]: ...
    def decode(self, input: list[int]) -> str: ...


class Utf8:
    """Puts bytes that come piece by piece together to characters, as sentencepiece does."""

    def __init__(self) -> None:
        self._pending = b""

    def push(self, part: str | bytes) -> str:
        """A piece, or the bytes of a byte piece; the text that is complete with it."""
        if isinstance(part, str):
            return self.flush() + part.replace(SPACE, " ")
        self._pending += part
        text = ""
        while self._pending:
            try:
                text += self._pending.decode()
                self._pending = b""
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                # The first byte starts no character; those after it may.
                text += "\ufffd"
                self._pending = self._pending[1:]
        return text

    def flush(self) -> str:
        text, self._pending = "\ufffd" * len(self._pending), b""
        return text


def load_pieces(path: Path, added: Mapping[str, int]) -> sentencepiece.SentencePieceProcessor:
    """``tokenizer.model`` with ``added`` tokens put in as user-defined pieces.

    Args:
        added: tokens that the file lacks, with their ids; ids between them stay unused.

    Raises:
        CheckpointError: the file is damaged, or an id is taken by another piece.
    """
    model = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a sentencepiece model; truncated or corrupt?"
        ) from error
    size = processor.get_piece_size()
    for token, i in sorted(added.items(), key=lambda item: item[1]):
        if i < size:
            have = sentencepiece.SentencePieceProcessor(model_proto=model).id_to_piece(i)
            if have == token:
                continue
            raise CheckpointError(
                f"{path.parent}: {token!r} is added as id {i}, which already stands for {have!r}"
            )
        while size < i:
            model += _piece(f"<unused {size}>", _UNUSED)
            size += 1
        model += _piece(token, _USER_DEFINED)
        size += 1
    if size == processor.get_piece_size():
        return processor
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _piece(piece: str, kind: int) -> bytes:
    """One entry of the repeated field ``pieces`` of a serialised ModelProto.

    Protocol buffers read fields in any order, so appending entries to the file adds pieces.
    """
    name = piece.encode()
    body = b"\x0a" + _varint(len(name)) + name + b"\x18" + _varint(kind)
    return b"\x0a" + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes((value & 0x7F | 0x80,))
        value >>= 7
    return encoded + bytes((value,))
