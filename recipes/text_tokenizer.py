"""``python -m recipes text-tokenizer``: nano's sentencepiece model, in the official form.

A byte-fallback BPE trained on the corpus's texts, normalised as Llama's (identity: nothing is
changed, no whitespace is lost), followed by the speech tokens as user-defined pieces. Their numbers
are nobody's business: whoever needs an id asks for it by name (DESIGN.md section 6).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import sentencepiece
import typer
from rich.console import Console
from sentencepiece import sentencepiece_model_pb2 as _pb2

TEXT_PIECES = 990
TAGS = ("[Text]", "[Speech]")
UNITS = {"Hu": 501, "Pi": 64, "St": 100}
SEPARATOR = " | "  # between what was heard and what is answered
DEFAULT_OUT = Path("checkpoints/nano/spiritlm_model/spirit-lm-nano")

_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    **_SPECIAL,
    "pad_token": None,
    "clean_up_tokenization_spaces": False,
    "model_max_length": int(1e30),
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
}


def speech_tokens() -> list[str]:
    """The tags and units, in the order of the official vocabulary."""
    return [*TAGS, *(f"[{kind}{i}]" for kind, count in UNITS.items() for i in range(count))]


def training_texts(corpus: Path) -> Iterator[str]:
    """The texts of the train split as they stand in a token stream.

    Args:
        corpus: directory with ``manifest.jsonl`` and ``dialogs.jsonl``.
    """
    for row in read_jsonl(corpus / "manifest.jsonl"):
        if row["split"] == "train":
            yield TAGS[0] + row["transcript"] + SEPARATOR + row["text"] + TAGS[1]
    transcripts = {row["text"]: row["transcript"] for row in read_jsonl(corpus / "manifest.jsonl")}
    for row in read_jsonl(corpus / "dialogs.jsonl"):
        request = transcripts.get(row["request_text"])
        if row["split"] == "train" and request is not None:
            yield TAGS[0] + request + SEPARATOR + row["reply_text"] + TAGS[1]


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. Raises FileNotFoundError with the recipe that makes it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run the recipes that come before this one")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def train(texts: Iterable[str], text_pieces: int = TEXT_PIECES) -> bytes:
    """Train the model; returns the content of ``tokenizer.model``.

    Args:
        text_pieces: pieces besides unk, bos, eos and the 256 bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=3 + 256 + len(TAGS) + text_pieces,
        user_defined_symbols=list(TAGS),
        byte_fallback=True,
        character_coverage=0.9999,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return with_speech_tokens(model.getvalue())


def with_speech_tokens(model: bytes) -> bytes:
    """``model`` with all speech tokens as user-defined pieces after the text pieces."""
    model_proto: Any = _pb2.ModelProto  # type: ignore[attr-defined]  # made at run time
    proto = model_proto()
    proto.ParseFromString(model)
    piece_type = model_proto.SentencePiece.Type
    kept = [p for p in proto.pieces if p.type != piece_type.USER_DEFINED]
    pieces = [(p.piece, p.score, p.type) for p in kept]
    pieces += [(token, 0.0, piece_type.USER_DEFINED) for token in speech_tokens()]
    del proto.pieces[:]
    for piece, score, kind in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.vocab_size = len(pieces)
    del proto.trainer_spec.user_defined_symbols[:]
    return bytes(proto.SerializeToString())


def write_folder(model: bytes, out: Path) -> None:
    """Write ``tokenizer.model`` and the two JSON files of the official folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(model)
    for name, content in (("tokenizer_config", _CONFIG), ("special_tokens_map", _SPECIAL)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(
    work: Annotated[Path, typer.Option(help="Directory with the corpus.")] = Path("work"),
    out: Annotated[Path, typer.Option(help="Folder of the language model.")] = DEFAULT_OUT,
    text_pieces: Annotated[int, typer.Option(help="Pieces learnt from text.")] = TEXT_PIECES,
) -> None:
    """Train nano's text tokenizer on the corpus and write it in the official form."""
    texts = list(training_texts(work / "corpus"))
    write_folder(train(texts, text_pieces), out)
    processor = sentencepiece.SentencePieceProcessor(str(out / "tokenizer.model"))
    tokens = sum(len(processor.EncodeAsIds(text)) for text in texts)
    words = sum(len(text.split()) for text in texts)
    Console().print(
        f"{out / 'tokenizer.model'}: {len(processor)} pieces, "
        f"{tokens / max(words, 1):.2f} tokens a word on {len(texts)} texts"
    )
