"""What a benchmark leaves behind: one JSON file with the machine, the seed and every turn."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from agent.errors import UserError
from agent.inventory import about as machine
from bench.memory import peak_mb
from bench.report import load_average
from stages.checkpoint import Layout

Row = dict[str, Any]
Document = dict[str, Any]
FORMAT, VERSION = "spiritlm-agent bench", 1
PACKAGES = ("numpy", "transformers", "soxr", "webrtcvad-wheels")

FIGURES: dict[str, str] = {
    "end_to_endpoint": "end of speech → endpoint",
    "endpoint_to_token": "endpoint → first token",
    "endpoint_to_unit": "endpoint → first unit",
    "endpoint_to_sample": "endpoint → first sample",
    "end_to_sample": "end of speech → first sample",
    "end_to_sound": "end of speech → first sound heard",
    "barge_in_to_silence": "barge-in decided → silence",
    "speech_to_silence": "speech over a reply → silence",
    "inter_token": "inter-token time",
    "real_time_factor": "real-time factor",
}
"""What has percentiles, in order; all but the last in ms. Less is better."""

COUNTERS: dict[str, str] = {
    "lost": "requests without a turn",
    "no_answer": "turns without sound",
    "early": "answers before the end of speech",
    "false_endpoints": "false endpoints",
    "glitches": "glitches in the playback",
    "dropped": "dropped in channels",
}
"""What should be 0."""

TALLIES = ("speculations", "speculation_hits", "refuted", "wasted_tokens")


def values(rows: Iterable[Row], figure: str) -> list[float]:
    """One figure of every turn that has it; ``inter_token`` of every token."""
    if figure == "inter_token":
        return [step for row in rows for step in row.get("inter_token_ms", ())]
    if figure == "real_time_factor":
        return [row[figure] for row in rows if row.get(figure) is not None]
    return [row["ms"][figure] for row in rows if figure in row.get("ms", {})]


def percentiles(several: Sequence[float]) -> dict[str, float]:
    """How many, p50, p95 and p99 (linear between the nearest two)."""
    found = np.percentile(several, [50, 95, 99])
    names = ("p50", "p95", "p99")
    return {"n": len(several), **{k: round(float(v), 4) for k, v in zip(names, found, strict=True)}}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures, the counters, what speculation did, memory, and the trend of the cost."""
    spreads = {name: values(rows, name) for name in FIGURES}
    outcomes = [row["outcome"] for row in rows]
    counted = {name: sum(int(row.get(name, 0)) for row in rows) for name in (*COUNTERS, *TALLIES)}
    counted |= {"lost": outcomes.count("lost"), "no_answer": outcomes.count("silent")}
    memory = [row["memory_mb"] for row in rows if "memory_mb" in row]
    found: dict[str, Any] = {
        "turns": len(rows),
        "figures": {name: percentiles(several) for name, several in spreads.items() if several},
        "counters": {name: counted[name] for name in COUNTERS},
        "speculation": {name: counted[name] for name in TALLIES},
    }
    if memory:
        settled = memory[min(10, len(memory) - 1)]
        found["memory"] = {"first_mb": memory[0], "after_10_turns_mb": settled,
                           "last_mb": memory[-1], "most_mb": max(memory)}  # fmt: skip
    trend = cost_trend(rows)
    return {**found, "cost_trend": trend} if trend else found


def cost(row: Row) -> float | None:
    """Work of a turn, ms, for each second of speech in it: the request's and the reply's."""
    seconds = row.get("request_seconds", 0) + row.get("reply_seconds", 0)
    work = sum(row.get("work_ms", {}).values())
    return work / seconds if seconds and work else None


def cost_trend(rows: Sequence[Row]) -> dict[str, float] | None:
    """Where a straight line through the cost begins and ends, and the ratio of the two."""
    points = [(row["turn"], c) for row in rows if (c := cost(row)) is not None]
    if len(points) < 8:
        return None
    turns, costs = np.array(points).T
    # Theil and Sen's: the median slope, which one slow turn does not move.
    pairs = np.triu_indices(len(turns), 1)
    slope = float(
        np.median((costs[pairs[1]] - costs[pairs[0]]) / (turns[pairs[1]] - turns[pairs[0]]))
    )
    middle = float(np.median(costs - slope * turns))
    first, last = (middle + slope * float(turn) for turn in (turns[0], turns[-1]))
    if min(first, last) <= 0:  # no straight line: the machine became busy, or idle
        return None
    return {"first_ms": round(first, 2), "last_ms": round(last, 2), "ratio": round(last / first, 3)}


def ratios(systems: Mapping[str, Any]) -> dict[str, float]:
    """How many times sooner the agent is than the other system: medians of the same run."""
    if not {"agent", "reference-flow"} <= set(systems):
        return {}
    mine, other = (systems[name]["summary"]["figures"] for name in ("agent", "reference-flow"))
    names = [n for n in ("end_to_sample", "endpoint_to_sample") if n in mine and n in other]
    return {n: round(other[n]["p50"] / max(mine[n]["p50"], 0.01), 2) for n in names}


def build(
    config: str,
    layout: Layout | None,
    plan: Mapping[str, Any],
    settings: Mapping[str, Any],
    systems: Mapping[str, Sequence[Row]],
    load: float,
) -> Document:
    """The whole document.

    Args:
        config: name of the configuration; ``layout`` its model, ``settings`` all of it.
        plan: what was asked for.
        systems: the turns of each.
        load: the machine's load average before the run.
    """
    found = {n: {"summary": summary(rows), "turns": list(rows)} for n, rows in systems.items()}
    about: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "agent", "bench", *_arguments()]),
        "commit": commit(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": {"before": load, "after": load_average()},
        "peak_memory_mb": peak_mb(),
    }
    if layout is not None:
        about |= machine(config, layout)
        about["model"] = layout.lm.name  # a path says nothing elsewhere
    about["packages"] = {**about.get("packages", {}), **{name: _version(name) for name in PACKAGES}}
    return {
        "format": FORMAT,
        "version": VERSION,
        "about": about,
        "plan": dict(plan),
        "settings": dict(settings),
        "ratios": ratios(found),
        "systems": found,
    }


def _arguments() -> list[str]:
    """What was given, but for where the results went."""
    given = sys.argv[2:] if sys.argv[1:2] == ["bench"] else sys.argv[1:]
    where = {n + k for n, word in enumerate(given) if word == "--out" for k in (0, 1)}
    return [word for n, word in enumerate(given) if n not in where]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit of the source, with ``+`` if it was changed since; None outside a repository.

    Looked up once: call it before a run, in which the source may be changed.
    """
    folder = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        ours = ("agent", "stages", "bench")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *ours)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write(document: Document, path: Path) -> None:
    """Write ``document``, every turn on a line of its own.

    Raises:
        UserError: ``path`` cannot be written.
    """
    lines: dict[str, str] = {}

    def line(row: Row) -> str:
        lines[key := f"@{len(lines)}@"] = json.dumps(row, ensure_ascii=False)
        return key

    systems = {
        name: {**system, "turns": [line(row) for row in system["turns"]]}
        for name, system in document["systems"].items()
    }
    text = json.dumps({**document, "systems": systems}, indent=1, ensure_ascii=False)
    for key, row in lines.items():
        text = text.replace(f'"{key}"', row, 1)
    save(path, text + "\n")


def save(path: Path, text: str) -> None:
    """Write a file, its folder too.

    Raises:
        UserError: that cannot be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another --out"
        ) from None


def read(path: Path) -> Document:
    """A document as :func:`write` left it.

    Raises:
        UserError: the file is missing, no such document, damaged, or of another version.
    """
    try:
        found = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise UserError(
            f"{path}: is damaged or no JSON ({error}); run the benchmark again"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: is no result of `python -m agent bench`; give its JSON file")
    if found.get("version") != VERSION:
        raise UserError(
            f"{path}: is of version {found.get('version')!r}, this program reads {VERSION}; run "
            "the benchmark again, or compare with the program that wrote it"
        )
    _check(path, found)
    return found


def _check(path: Path, found: Document) -> None:
    def need(what: bool, name: str) -> None:
        if not what:
            raise UserError(f"{path}: {name} is missing or damaged; run the benchmark again")

    need(isinstance(found.get("about"), dict), "'about'")
    need(isinstance(found.get("plan"), dict), "'plan'")
    systems = found.get("systems")
    need(isinstance(systems, dict) and bool(systems), "'systems'")
    for name, system in systems.items():  # type: ignore[union-attr]
        turns = system.get("turns") if isinstance(system, dict) else None
        whole = isinstance(turns, list) and all(_is_row(row) for row in turns)
        need(whole, f"'systems.{name}.turns'")
        system["summary"] = summary(turns or [])


def _is_row(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("turn"), int):
        return False
    ms, outcome = row.get("ms", {}), row.get("outcome")
    numbers = isinstance(ms, dict) and all(isinstance(v, int | float) for v in ms.values())
    return numbers and isinstance(outcome, str)


Progress = Callable[[int], None]
