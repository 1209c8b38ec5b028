"""The turns that precede a conversation, so that a model which only continues knows how it goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agent.audio_files import check_audio, read_chunks
from agent.config import ExampleConfig, ReplyConfig
from agent.graphs import cache_dir, encoder_files, fingerprint
from stages.checkpoint import Layout
from stages.encoder import SpeechTokenizer
from stages.prompt import SPEECH_TAG, TEXT_TAG
from stages.units import interleave

_AUDIO = (".wav", ".flac", ".ogg", ".mp3")
_LONGEST = 60.0  # seconds of a recording in an example


def prompt(
    examples: Sequence[ExampleConfig],
    config: ReplyConfig,
    tokenizer: SpeechTokenizer,
    layout: Layout,
    folder: Path | None = None,
) -> str:
    """The prompt of ``examples``, in the form that the conversation goes on in.

    Recordings are tokenised once; their units are kept in the cache folder.

    Args:
        folder: where file names start from; the current folder by default.

    Raises:
        UserError: a recording is missing or no audio.
    """
    out, in_text = "", False

    def add(text: str, units: str = "") -> None:
        nonlocal out, in_text
        if text:
            out += text if in_text else TEXT_TAG + text
            in_text = True
        if units:
            out += (SPEECH_TAG if in_text or not out else "") + units
            in_text = False

    for example in examples:
        for tag, said in ((config.user_tag, example.user), (config.agent_tag, example.agent)):
            if Path(said).suffix.lower() in _AUDIO:
                add(tag, _units(Path(folder or "") / said, tokenizer, layout))
            else:
                add(tag + said)
    return out


def _units(path: Path, tokenizer: SpeechTokenizer, layout: Layout) -> str:
    check_audio(path, _LONGEST)
    name = fingerprint("units", [path, *encoder_files(layout)])
    cached = cache_dir() / "examples" / f"{name}.txt"
    if not cached.is_file():
        wave = np.concatenate(list(read_chunks(path)))
        units = "".join(map(str, interleave(tokenizer.encode(wave, allow_unvoiced=True))))
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(".partial")
        partial.write_text(units, encoding="utf-8")
        partial.replace(cached)
    return cached.read_text(encoding="utf-8")
