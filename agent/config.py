"""Configuration: read from YAML files and ``--set key=value``, and checked.

A file in ``configs/`` says how one model is run; ``--set section.key=value`` changes single values.
A key that :mod:`agent.schema` does not know, or a value that cannot be, is refused with the file,
the key and what was expected.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from agent.errors import UserError
from agent.schema import (
    AudioConfig,
    ChannelsConfig,
    Config,
    ExampleConfig,
    ModelConfig,
    ReplyConfig,
    SamplingConfig,
    ThreadsConfig,
    VadConfig,
    VocoderConfig,
)

__all__ = [
    "SETTABLE",
    "AudioConfig",
    "ChannelsConfig",
    "Config",
    "ExampleConfig",
    "ModelConfig",
    "ReplyConfig",
    "SamplingConfig",
    "ThreadsConfig",
    "VadConfig",
    "VocoderConfig",
    "changed",
    "config_folder",
    "config_names",
    "describe",
    "keys",
    "load_config",
]

_SUFFIXES = (".yaml", ".yml")


def config_folder() -> Path:
    """The shipped configurations: of the repository, or of the installed package."""
    here = Path(__file__).resolve().parent
    places = [here.parent / "configs", here / "_data" / "configs"]
    return next((place for place in places if place.is_dir()), places[0])


def config_names() -> list[str]:
    """Names that :func:`load_config` knows."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def load_config(name_or_path: str | Path = "nano", overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        name_or_path: a name from :func:`config_names`, or a YAML file.
        overrides: ``section.key=value``, the value in YAML; later ones win.

    Raises:
        UserError: no such file, not YAML, an unknown key or an impossible value; names the file
            (or the override), the key, what was given and what is expected.
    """
    path = _find(name_or_path)
    values = _read(path)
    _refuse_unknown(values, str(path))
    origins: dict[str, str] = {}
    for override in overrides:
        key, value = _parse(override)
        source = f"--set {override}"
        if not describe(key):  # the whole key is shown, not only its first unknown part
            raise UserError(f"{source}: unknown key {key!r}" + _suggestion(key))
        _refuse_unknown(_nested(key, value), source)
        _merge(values, _nested(key, value))
        origins[key] = source
    _read_actions(values, Path() if "reply.actions" in origins else path.parent)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error.errors(), str(path), origins)) from None


SETTABLE = (
    "sampling.text.temperature", "sampling.text.top_p", "sampling.text.greedy",
    "sampling.speech.temperature", "sampling.speech.top_p", "sampling.speech.greedy",
    "reply.mode", "reply.max_seconds", "reply.max_text_tokens",
    "vocoder.speaker", "vocoder.style",
)  # fmt: skip
"""Keys that may change while a conversation goes on."""


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """``config`` with other values for keys of :data:`SETTABLE`.

    Raises:
        UserError: a key that cannot be set, with the nearest that can; or an impossible value.
    """
    values = config.model_dump()
    for key, value in settings.items():
        if key not in SETTABLE:
            why = "cannot be set during a conversation" if describe(key) else "is no setting"
            raise UserError(f"{key!r} {why}" + _nearest(key, SETTABLE))
        _merge(values, _nested(key, value))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error.errors(), "set", {})) from None


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """All dotted keys that hold a value."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from keys(section, f"{prefix}{name}.")


def describe(key: str) -> str:
    """What the dotted ``key`` means, with its unit; empty for a key that is not known."""
    model: type[BaseModel] | None = Config
    description = None
    for part in key.split("."):
        field = model.model_fields.get(part) if model else None
        if field is None:
            return ""
        description, model = field.description, _section(field.annotation)
    return description or ""


def _find(name_or_path: str | Path) -> Path:
    name, path = str(name_or_path), Path(name_or_path).expanduser()
    if path.suffix in _SUFFIXES or path.is_file():
        if not path.is_file():
            raise UserError(f"{path}: no such configuration file")
        return path
    shipped = config_folder() / f"{name}.yaml"
    if name in config_names():
        return shipped
    raise UserError(
        f"configuration {name!r}: neither a YAML file nor one of {', '.join(config_names())}"
        + _nearest(name, config_names(), shown=())
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {_yaml_problem(error)}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected sections such as 'vad:', found {reprlib.repr(value)}")
    # A section whose lines are all commented out is there, but empty.
    return {k: {} if v is None and _is_section(k) else v for k, v in value.items()}


def _read_actions(values: dict[str, Any], folder: Path) -> None:
    """Put the schema in the place of the name of the file that holds it."""
    reply = values.get("reply")
    name = reply.get("actions") if isinstance(reply, dict) else None
    if not isinstance(reply, dict) or not isinstance(name, str):
        return
    path = folder / Path(name).expanduser()
    try:
        reply["actions"] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"reply.actions: {path}: not a JSON file that can be read: {error}"
        ) from None


def _parse(override: str) -> tuple[str, Any]:
    key, found, text = override.partition("=")
    if not found or not key.strip():
        raise UserError(f"--set {override}: expected section.key=value, as in vad.hangover_ms=400")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: not a YAML value: {_yaml_problem(error)}") from None


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _refuse_unknown(values: Mapping[Any, Any], source: str) -> None:
    """Check that every key exists, before values are looked at."""
    for key in _unknown(values, Config, ""):
        raise UserError(f"{source}: unknown key {key!r}" + _suggestion(key))


def _unknown(values: Mapping[Any, Any], model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        field = model.model_fields.get(name) if isinstance(name, str) else None
        if field is None:
            # What is inside an unknown section tells best which one was meant.
            while isinstance(value, Mapping) and value:
                name, value = next(iter(value.items()))
                key = f"{key}.{name}"
            yield key
            continue
        section = _section(field.annotation)
        if isinstance(value, Mapping) and section is not None:
            yield from _unknown(value, section, f"{key}.")


def _suggestion(key: str) -> str:
    """The nearest known key: as a whole, or with the same last part in another section."""
    known = list(keys())
    last = key.rsplit(".", 1)[-1]
    elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if elsewhere:
        return _nearest(key, elsewhere, cutoff=0.0)
    section = key.rpartition(".")[0]
    siblings = [k for k in known if section and k.startswith(f"{section}.")]
    return _nearest(
        key, [*known, *Config.model_fields], shown=siblings or list(Config.model_fields)
    )


def _nearest(
    word: str, known: Sequence[str], cutoff: float = 0.6, shown: Sequence[str] | None = None
) -> str:
    """The known word next to ``word``; if none is near, all of ``shown``."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    if found:
        return f"; did you mean {found[0]!r}?"
    listed = known if shown is None else shown
    return f"; known are {', '.join(listed)}" if listed else ""


def _explain(errors: Sequence[ErrorDetails], path: str, origins: Mapping[str, str]) -> str:
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"])
    sources = [s for k, s in origins.items() if k == key or k.startswith(f"{key}.") or not key]
    expected = first["msg"].removeprefix("Value error, ")
    expected = expected.replace("Input should be", "expected", 1)
    if first["type"] == "model_type":
        expected = "expected a section with keys of its own"
    if first["type"] == "value_error":
        problem = f"{key}: {expected}"
    else:
        problem = f"{key} is {first['input']!r}, {expected}{_about(key)}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{', '.join(sources) or path}: {problem}{more}"


def _about(key: str) -> str:
    description = describe(key)
    return f" ({description})" if description else ""


def _section(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _is_section(name: object) -> bool:
    field = Config.model_fields.get(name) if isinstance(name, str) else None
    return field is not None and _section(field.annotation) is not None


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + str(getattr(error, "problem", None) or error)
