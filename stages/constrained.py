"""Decoding that cannot leave a JSON schema.

A language model that writes JSON freely gets it wrong now and then. Here every token is held to the
schema while it is chosen, and what the schema leaves no choice about is not decoded at all but
prefilled at once. The grammar itself is ``llguidance``'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import torch
from torch import Tensor

from stages.pieces import SPACE
from stages.text import Tokenizer

_GUARD = "\x02"  # sentencepiece puts a space before what it encodes; not where something precedes


class JsonGrammar:
    """The texts that are one JSON value of a schema, without any blanks.

    Args:
        schema: a JSON schema; of ``oneOf`` the first alternative that fits is taken.

    Raises:
        ValueError: the schema is none, or has something that cannot be decoded by.
    """

    def __init__(self, tokenizer: Tokenizer, schema: Mapping[str, Any]) -> None:
        self._vocabulary, self._rows = _Vocabulary(tokenizer), tokenizer.vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(self._vocabulary), n_vocab=tokenizer.vocab_size
        )
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
            dict(schema), overrides={"whitespace_flexible": False, "coerce_one_of": True}
        )
        if problem := llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer):
            raise ValueError(f"this JSON schema cannot be decoded by: {problem}")

    def begin(self) -> JsonText:
        """The empty text."""
        matcher = llguidance.LLMatcher(self._tokenizer, self._grammar, log_level=0)
        return JsonText(matcher, self._vocabulary.tokens, self._rows)


class JsonText:
    """A JSON value as its tokens come. Made by :meth:`JsonGrammar.begin`."""

    def __init__(self, matcher: llguidance.LLMatcher, tokens: Sequence[bytes], rows: int) -> None:
        self._matcher, self._tokens, self._rows = matcher, tokens, rows
        self._text = b""

    @property
    def complete(self) -> bool:
        """Whether the value is whole."""
        return bool(self._matcher.is_accepting())

    def forced(self) -> list[int]:
        """Tokens that have to come next whatever the model thinks; they are taken as read."""
        ids = list(self._matcher.compute_ff_tokens())
        for i in ids:
            self.push(i)
        return ids

    def mask(self) -> Tensor:
        """What may come next: bool ``[vocab_size]``, True = allowed; padding never is."""
        bias = bytearray(self._matcher.compute_logit_bias())
        allowed = torch.zeros(self._rows, dtype=torch.bool)
        allowed[: len(bias)] = torch.frombuffer(bias, dtype=torch.uint8) != 0
        return allowed

    def push(self, i: int) -> None:
        """Take the next token. Raises :class:`ValueError` if it is not allowed here."""
        if not self._matcher.consume_token(i):
            raise ValueError(f"token {i} does not fit: {self._matcher.get_error()}")
        self._text += self._tokens[i]

    @property
    def value(self) -> Any:
        """The value, once it is :attr:`complete`."""
        return json.loads(self._text)


class _Vocabulary:
    """What ``llguidance`` wants to know of a tokenizer: the bytes of each token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos, tokenizer.eos
        self.special_token_ids: list[int] = []
        pieces = tokenizer.pieces(range(tokenizer.size))
        self.tokens = [self._bytes(i, piece) for i, piece in enumerate(pieces)]

    def _bytes(self, i: int, piece: str) -> bytes:
        tokenizer = self._tokenizer
        if tokenizer.is_special(i) or tokenizer.id_to_unit(i) or tokenizer.id_to_tag(i):
            self.special_token_ids.append(i)
            return b"\xff" + piece.encode()  # no text has this byte
        if (part := tokenizer.id_to_bytes(i)) is not None:
            return part
        return piece.replace(SPACE, " ").encode()

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of ``text`` in the middle of a text."""
        if isinstance(text, bytes):
            text = text.decode()
        guard = len(self._tokenizer.encode(_GUARD, bos=False))
        return self._tokenizer.encode(_GUARD + text, bos=False)[guard:]
