"""Token ids: text pieces, tags and units of one vocabulary.

It is a sentencepiece model, ``tokenizer.model``, or a byte-level BPE, ``tokenizer.json``
(:mod:`stages.byte_pieces`). The speech tokens (``[Text]``, ``[Speech]``, ``[Hu0]``...) are
user-defined pieces of ``tokenizer.model``, or listed in ``added_tokens.json`` (or
``added_tokens_decoder`` of ``tokenizer_config.json``), which is brought to the first form; or added
tokens of ``tokenizer.json``. They are found by name, never by number. Control tokens never come out
of text: ``<s>`` typed by somebody stays four characters (DESIGN.md section 6).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stages.byte_pieces import BytePieces
from stages.checkpoint import CheckpointError, Layout, load_json
from stages.pieces import SPACE, Pieces, Utf8, load_pieces
from stages.prompt import SPEECH_TAG, TEXT_TAG, Modality
from stages.units import HUBERT, KINDS, Unit, UnitFrame

_UNIT = re.compile(r"\[(Hu|Pi|St)([0-9]+)\]")


class Tokenizer:
    """Text, tags and units to ids and back.

    Attributes:
        bos, eos, unk: ids of ``<s>``, ``</s>`` and ``<unk>``.
        text_tag, speech_tag: ids of ``[Text]`` and ``[Speech]``.
        size: ids that have a piece.
        vocab_size: rows of the embedding; those from ``size`` on are padding.
        spaced: a string is encoded with a space before it, which decoding takes away.
        legacy: the flag of ``tokenizer_config.json``; it only changes the spaces that
            :meth:`decode` gives.
    """

    def __init__(
        self,
        processor: Pieces,
        *,
        rows: int | None = None,
        legacy: bool = True,
        source: str | Path = "tokenizer.model",
    ) -> None:
        """``rows``: embedding rows, by default one per piece; ``source`` is for messages.

        Raises:
            CheckpointError: the vocabulary lacks a tag, a control token or phonetic units, or has
                more pieces than ``rows``.
        """
        self._sp = processor
        self.size = processor.get_piece_size()
        self.vocab_size = self.size if rows is None else rows
        self.legacy = legacy
        self.bos, self.eos = processor.bos_id(), processor.eos_id()
        self.unk = processor.unk_id()
        self._pieces: list[str] = [processor.id_to_piece(i) for i in range(self.size)]
        self._bytes = {
            i: bytes.fromhex(piece[3:-1])
            for i, piece in enumerate(self._pieces)
            if processor.is_byte(i)
        }
        controls = {i for i in range(self.size) if processor.is_control(i)}
        self._special = {self.unk, self.bos, self.eos, *controls}
        # Sentencepiece puts a space before what it encodes, and takes one away when it decodes.
        self.spaced = not isinstance(processor, BytePieces)
        self._units: dict[int, Unit] = {}
        for i, piece in enumerate(self._pieces):
            if match := _UNIT.fullmatch(piece):
                self._units[i] = Unit(match[1], int(match[2]))
        self._unit_ids = {unit: i for i, unit in self._units.items()}
        names = {piece: i for i, piece in enumerate(self._pieces)}
        self.text_tag = names.get(TEXT_TAG, -1)
        self.speech_tag = names.get(SPEECH_TAG, -1)
        self._check(source)

    @classmethod
    def load(cls, source: Layout | str | Path) -> Tokenizer:
        """Load from a language model's folder.

        Raises:
            CheckpointError: ``tokenizer.model`` is missing or damaged, or the vocabulary is not
                that of a Spirit LM.
        """
        folder = source.lm if isinstance(source, Layout) else Path(source)
        path = folder / "tokenizer.model"
        byte_level = folder / "tokenizer.json"
        if not path.is_file() and not byte_level.is_file():
            raise CheckpointError(
                f"{path}: no such file, nor is there a {byte_level.name}. Is the checkpoint "
                "complete?"
            )
        optional = {}
        for name in ("config", "tokenizer_config", "added_tokens"):
            file = folder / f"{name}.json"
            optional[name] = load_json(file) if file.is_file() else {}
        settings, rows = optional["tokenizer_config"], optional["config"].get("vocab_size")
        if not path.is_file():
            pieces = BytePieces.load(byte_level, settings)
            return cls(pieces, rows=rows, legacy=False, source=byte_level)
        added = dict(optional["added_tokens"])
        for number, token in settings.get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(number)
        legacy = settings.get("legacy")
        return cls(
            load_pieces(path, added),
            rows=rows,
            legacy=True if legacy is None else bool(legacy),
            source=path,
        )

    def _check(self, source: str | Path) -> None:
        needed = {"<s>": self.bos, "</s>": self.eos, TEXT_TAG: self.text_tag,
                  SPEECH_TAG: self.speech_tag}  # fmt: skip
        missing = [name for name, i in needed.items() if i < 0]
        if not any(unit.kind == HUBERT for unit in self._unit_ids):
            missing.append("[Hu0]...")
        if missing:
            raise CheckpointError(
                f"{source}: no piece {', '.join(missing)}. The speech tokens must be user-defined "
                "pieces of tokenizer.model, stand in added_tokens.json beside it, or be added "
                "tokens of tokenizer.json"
            )
        if self.vocab_size < self.size:
            raise CheckpointError(
                f"{source}: {self.size} pieces, but the model has {self.vocab_size} rows "
                "(vocab_size in config.json): these files do not belong together"
            )

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a prompt string, tags and speech tokens included.

        Raises:
            ValueError: ``text`` has half a surrogate pair, which is no text.
        """
        try:
            ids = self._sp.encode(text)
        except (RuntimeError, UnicodeError) as error:
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise
            raise ValueError(
                f"character {at} of the text is half a surrogate pair ({text[at]!r}): decode the "
                "text properly, or encode it with errors='replace' first"
            ) from error
        return [self.bos, *ids] if bos else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The string of ``ids``, spaces as the reference's tokenizer gives them.

        Padding ids have no piece and are left out.

        Args:
            skip_special_tokens: leave out ``<s>``, ``</s>`` and ``<unk>``.
        """
        kept = [i for i in ids if 0 <= i < self.size]
        if skip_special_tokens:
            kept = [i for i in kept if i not in self._special]
        string = ""
        run: list[str | bytes] = []
        after_special = False
        for position, i in enumerate(kept):
            piece = self._pieces[i]
            if i in self._special:
                gap = " " if self.legacy and position > 0 and not after_special else ""
                string += gap + self._join(run) + piece
                run = []
            elif self.spaced and position == 1 and after_special and not piece.startswith(SPACE):
                string += " "
                run.append(self._bytes.get(i, piece))
            else:
                bare = piece.removeprefix(SPACE) if self.spaced and position == 0 else piece
                run.append(self._bytes.get(i, bare))
            after_special = i in self._special
        return string + self._join(run)

    def _join(self, run: Sequence[str | bytes]) -> str:
        """Pieces and bytes to text; with ``legacy``, without the word-boundary piece's space."""
        utf8 = Utf8()
        text = "".join(utf8.push(part) for part in run) + utf8.flush()
        if self.legacy:
            first = next((part for part in run if part != ""), None)
            if isinstance(first, str) and first.startswith(SPACE):
                return text[1:]
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The pieces of ``ids``, "\u2581" for a space, ``<0x0A>`` for a byte."""
        return [self._pieces[i] for i in ids]

    def unit_id(self, kind: str, index: int) -> int:
        """The id of a unit. Raises :class:`ValueError` if the vocabulary does not have it."""
        try:
            return self._unit_ids[Unit(kind, index)]
        except KeyError:
            known = sorted(unit.index for unit in self._unit_ids if unit.kind == kind)
            has = f"{kind}{known[0]} to {kind}{known[-1]}" if known else f"no {kind} units"
            raise ValueError(f"[{kind}{index}]: this vocabulary has {has}") from None

    def unit_ids(self, units: Iterable[Unit | UnitFrame]) -> list[int]:
        """:meth:`unit_id` of each."""
        return [self.unit_id(unit.kind, unit.index) for unit in units]

    def id_to_unit(self, i: int) -> Unit | None:
        """The unit that has the id ``i``; None for everything else."""
        return self._units.get(i)

    def id_to_tag(self, i: int) -> Modality | None:
        """``TEXT`` or ``SPEECH`` for the id of a tag; None for everything else."""
        return {self.text_tag: Modality.TEXT, self.speech_tag: Modality.SPEECH}.get(i)

    def id_to_bytes(self, i: int) -> bytes | None:
        """The bytes that the id ``i`` stands for; None if it stands for whole characters."""
        return self._bytes.get(i)

    def is_special(self, i: int) -> bool:
        """Whether ``i`` is ``<s>``, ``</s>``, ``<unk>`` or a padding row."""
        return i in self._special or not 0 <= i < self.size

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units the vocabulary has."""
        have = {unit.kind for unit in self._unit_ids}
        return tuple(kind for kind in KINDS if kind in have)

    def mask(
        self, modality: str | Modality, *, compat: bool = False, also: Iterable[int] = ()
    ) -> Tensor:
        """What may be sampled: bool ``[vocab_size]``, True = allowed.

        ``TEXT`` bans units and both tags, ``SPEECH`` all but units, ``ANY`` nothing; the end of
        the sequence stays possible. Padding rows and further control tokens are banned, except
        with ``compat``, which reproduces the reference.

        Args:
            also: ids allowed besides, such as the tag that ends a stretch of the modality.
        """
        modality = Modality.parse(modality)
        units = list(self._units)
        if modality is Modality.SPEECH:
            allowed = torch.zeros(self.vocab_size, dtype=torch.bool)
            allowed[units] = True
            allowed[self.size :] = True
        else:
            allowed = torch.ones(self.vocab_size, dtype=torch.bool)
            if modality is Modality.TEXT:
                allowed[[*units, self.text_tag, self.speech_tag]] = False
        allowed[[self.eos, *also]] = True
        if not compat:
            allowed[self.size :] = False
            allowed[list(self._special - {self.bos, self.eos, self.unk})] = False
        return allowed


class IncrementalEncoder:
    """Ids of a string that grows.

    After every push the ids are those of the whole string so far. More text may change the last
    ones (pieces merge), so a push says how many of the ids before it stay: rewind there first.
    Everything up to the last complete tag or unit is settled.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: bool = True) -> None:
        self._tokenizer = tokenizer
        self._bos = bos
        self.reset()

    def reset(self) -> None:
        """An empty string."""
        self._ids = self._tokenizer.encode("", bos=self._bos)
        self._settled = len(self._ids)
        self._tail = ""  # the text since the last symbol, after that symbol
        self._symbol = ""

    @property
    def ids(self) -> list[int]:
        """The ids of everything pushed."""
        return list(self._ids)

    def push(self, text: str) -> tuple[int, list[int]]:
        """Append ``text``.

        Returns:
            how many ids from the start stay as they were, and the ids that follow them now.
        """
        tail = self._tail + text
        encoded = self._encode(self._symbol, tail)
        old = self._ids[self._settled :]
        same = next(
            (n for n, (a, b) in enumerate(zip(old, encoded, strict=False)) if a != b),
            min(len(old), len(encoded)),
        )
        keep = self._settled + same
        self._ids[keep:] = encoded[same:]
        self._settle(tail, encoded)
        return keep, self._ids[keep:]

    def _encode(self, symbol: str, tail: str) -> list[int]:
        ids = self._tokenizer.encode(symbol + tail, bos=False)
        if not symbol:
            return ids
        # The word-boundary piece, where there is one, and the symbol itself come first.
        return ids[ids.index(self._symbol_id(symbol)) + 1 :]

    def _symbol_id(self, symbol: str) -> int:
        if match := _UNIT.fullmatch(symbol):
            return self._tokenizer.unit_id(match[1], int(match[2]))
        tags = {TEXT_TAG: self._tokenizer.text_tag, SPEECH_TAG: self._tokenizer.speech_tag}
        return tags[symbol]

    def _settle(self, tail: str, encoded: list[int]) -> None:
        """Forget the text up to the last tag or unit: nothing merges across it."""
        tokenizer = self._tokenizer
        for back, i in enumerate(reversed(encoded)):
            if tokenizer.id_to_unit(i) is not None or tokenizer.id_to_tag(i) is not None:
                self._symbol = tokenizer.pieces([i])[0]
                self._tail = tail[tail.rindex(self._symbol) + len(self._symbol) :]
                self._settled = len(self._ids) - back
                return
        self._tail = tail


Decoded = str | Unit | Modality
"""What ids stand for: text, a unit, or a tag."""


class IncrementalDecoder:
    """Ids to text, units and tags, as they come.

    A character whose bytes come as several ids is given when it is complete; bytes that are no
    UTF-8 become U+FFFD. Special and padding ids say nothing. The text of all pushes and of
    :meth:`flush` is what :meth:`Tokenizer.decode` gives for the whole, for a start that the
    legacy flag does not touch.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuing: bool = True) -> None:
        """``continuing``: the ids follow others, so a space in front belongs to the text."""
        self._tokenizer = tokenizer
        self._continuing = continuing
        self.reset()

    def reset(self) -> None:
        """A new stream."""
        self._utf8 = Utf8()
        self._first = self._tokenizer.spaced and not self._continuing

    def push(self, i: int) -> list[Decoded]:
        """What the id ``i`` adds; often nothing or one item, text in front of a unit before it."""
        tokenizer = self._tokenizer
        if tokenizer.is_special(i):
            return []
        said: Decoded | None = tokenizer.id_to_unit(i) or tokenizer.id_to_tag(i)
        if said is not None:
            text = self._utf8.flush()
            self._first = False
            return [text, said] if text else [said]
        piece: str | bytes = tokenizer._bytes.get(i, tokenizer._pieces[i])
        if self._first and isinstance(piece, str):
            piece = piece.removeprefix(SPACE)
        self._first = False
        text = self._utf8.push(piece)
        return [text] if text else []

    def flush(self) -> list[Decoded]:
        """The stream has ended: bytes of an unfinished character, as U+FFFD."""
        text = self._utf8.flush()
        self.reset()
        return [text] if text else []
