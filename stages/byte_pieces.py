"""Byte-level BPE vocabularies (Radford et al., 2019), from a ``tokenizer.json``.

The library is Hugging Face's ``tokenizers``; here its vocabulary gets the methods by which
:mod:`stages.text` reads one of sentencepiece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from stages.checkpoint import CheckpointError
from stages.pieces import SPACE, Utf8


class BytePieces:
    """A byte-level BPE as :class:`stages.pieces.Pieces`.

    Added tokens are found in any text, but for those marked as special: these are control tokens,
    which no text can contain.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, bos: str, eos: str) -> None:
        """``bos``, ``eos``: names of the tokens that begin and end a sequence. Raises
        :class:`ValueError` if there are none of these names."""
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        added = tokenizer.get_added_tokens_decoder()
        self._control = {i for i, token in added.items() if token.special}
        self._bytes = dict(self._raw(vocabulary, set(added)))
        self._names = [f"<unused {i}>" for i in range(size)]
        for i, raw in self._bytes.items():
            self._names[i] = _name(raw)
        for i, token in added.items():
            self._names[i] = token.content
        self._ids = {name: i for i, name in enumerate(self._names)}
        missing = [name for name in (bos, eos) if name not in vocabulary]
        if missing:
            raise ValueError(f"no token {missing[0]!r}")
        self._bos, self._eos = vocabulary[bos], vocabulary[eos]

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any]) -> BytePieces:
        """Load ``tokenizer.json``; ``settings`` are those of ``tokenizer_config.json``.

        Raises:
            CheckpointError: the file is damaged or no byte-level BPE, or does not have the
                ``bos_token`` and ``eos_token`` that the settings name.
        """
        try:
            text = path.read_text(encoding="utf-8")
            content, tokenizer = json.loads(text), tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more exact
            raise CheckpointError(
                f"{path}: cannot be read as a tokenizer; truncated or corrupt? ({error})"
            ) from error
        kinds = content["model"].get("type"), (content.get("decoder") or {}).get("type")
        if kinds != ("BPE", "ByteLevel") or content.get("normalizer"):
            raise CheckpointError(f"{path}: expected a byte-level BPE without a normalizer")
        names = [settings.get(key) for key in ("bos_token", "eos_token")]
        bos, eos = (n.get("content") if isinstance(n, Mapping) else n for n in names)
        if not isinstance(bos, str) or not isinstance(eos, str):
            raise CheckpointError(
                f"{path.with_name('tokenizer_config.json')}: expected bos_token and eos_token"
            )
        try:
            return cls(tokenizer, bos, eos)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @staticmethod
    def _raw(vocabulary: Mapping[str, int], added: set[int]) -> Iterator[tuple[int, bytes]]:
        """The bytes of every piece that is no added token."""
        byte_of = {character: byte for byte, character in enumerate(alphabet())}
        for piece, i in vocabulary.items():
            if i not in added:
                try:
                    yield i, bytes(byte_of[character] for character in piece)
                except KeyError:
                    raise ValueError(f"piece {piece!r} is not one of bytes") from None

    def get_piece_size(self) -> int:
        return len(self._names)

    def bos_id(self) -> int:
        return self._bos

    def eos_id(self) -> int:
        return self._eos

    def unk_id(self) -> int:
        """-1: every text has pieces."""
        return -1

    def id_to_piece(self, id: int) -> str:
        return self._names[id]

    def piece_to_id(self, piece: str) -> int:
        return self._ids.get(piece, self.unk_id())

    def is_byte(self, id: int) -> bool:
        """Whether it is not made of whole characters."""
        return id in self._bytes and _characters(self._bytes[id]) is None

    def is_control(self, id: int) -> bool:
        return id in self._control or self._names[id].startswith("<unused ")

    def encode(self, input: str) -> list[int]:
        """The ids of ``input``, without a beginning or an end. Raises :class:`UnicodeError` for
        half a surrogate pair."""
        input.encode()
        return list(self._tokenizer.encode(input, add_special_tokens=False).ids)

    def decode(self, input: list[int]) -> str:
        """The text of ids; control tokens say nothing."""
        utf8 = Utf8()
        kept = (i for i in input if i not in self._control)
        parts = (self._bytes.get(i, self._names[i].encode()) for i in kept)
        return "".join(utf8.push(part) for part in parts) + utf8.flush()


def alphabet() -> list[str]:
    """The characters by which byte-level BPE writes the 256 bytes: printable ones of Latin-1 as
    they are, the others as U+0100 and on (Radford et al., 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _name(raw: bytes) -> str:
    characters = _characters(raw)
    return f"<0x{raw.hex().upper()}>" if characters is None else characters.replace(" ", SPACE)


def _characters(raw: bytes) -> str | None:
    """The characters that ``raw`` stands for; None if they are not whole, or could be taken for a
    space in the name of a piece."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    return None if SPACE in text else text
