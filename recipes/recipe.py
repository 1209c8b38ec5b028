"""A recipe: one YAML file for each model, with what every step gets.

A section holds options of its step, the same as on its command line. What it leaves out has the
step's own default.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    ValidationError,
    create_model,
)

from agent.errors import UserError
from recipes.steps import STEPS, Folders, module

FOLDER = Path(__file__).parent


class Section(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Recipe(Section):
    """What is the same for all steps. The sections of the steps come with :func:`schema`."""

    model: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="its name, that of folders")
    seed: int = Field(default=0, description="of every step that draws something")
    gpus: int = Field(default=1, ge=1, description="processes that train together, one for each")
    budget: float | None = Field(default=None, gt=0, description="minutes for all steps together")
    shares: dict[str, NonNegativeFloat] = Field(
        default_factory=dict, description="of the budget, by step"
    )
    steps: list[str] = Field(default_factory=lambda: list(STEPS), description="that are run")

    def settings(self, step: str) -> dict[str, Any]:
        """Every option of ``step``, places left out."""
        found = dict(getattr(self, step))
        if "seed" in found and "seed" not in getattr(self, step).model_fields_set:
            found["seed"] = self.seed
        return found

    def minutes(self, step: str, spent: Mapping[str, float]) -> dict[str, float]:
        """What the budget gives the timed options of ``step``; {} where there is no budget.

        A step gets its share of what those before it left over, so that one which took longer
        than planned takes from all after it. Phases keep their proportions.

        Args:
            spent: minutes that each step has taken.
        """
        timed = STEPS[step].timed
        if self.budget is None or not timed:
            return {}
        later = self.steps[self.steps.index(step) :]
        left = self.budget - sum(spent.get(s, 0.0) for s in self.steps if s not in later)
        share = self.shares.get(step, 0.0) / sum(self.shares.get(s, 0.0) for s in later)
        planned = self.settings(step)
        parts = {name: 1.0 if planned[name] is None else planned[name] for name in timed}
        scale = max(0.0, left) * share / (sum(parts.values()) or 1.0)
        return {name: round(part * scale, 2) for name, part in parts.items()}


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: the name of a file beside this module, or a YAML file.
        overrides: ``step.option=value`` or ``key=value``, the value in YAML.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known) or an impossible
            value.
        ModuleNotFoundError: a package that a step needs is missing.
    """
    path = _find(str(name_or_path))
    values = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys such as 'model:', found {values!r}")
    # A section whose lines are all commented out is there, but empty.
    values = {key: {} if value is None and key in STEPS else value for key, value in values.items()}
    for override in overrides:
        key, found, text = override.partition("=")
        if not found:
            raise UserError(f"--set {override}: expected step.option=value, as in lm.minutes=5")
        _put(values, key.strip().split("."), _yaml(text, f"--set {override}"), override)
    try:
        recipe: Recipe = schema().model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None
    _check(recipe, path)
    return recipe


def schema() -> type[Recipe]:
    """:class:`Recipe` with a section for each step, whose keys are the options of its ``main``."""
    sections = {step: _section(step) for step in STEPS}
    return create_model(
        "WholeRecipe",
        __base__=Recipe,
        **{step: (section, Field(default_factory=section)) for step, section in sections.items()},
    )  # type: ignore[call-overload]


def _section(step: str) -> type[Section]:
    main = module(step).main
    hints = get_type_hints(main, include_extras=True)
    places = Folders(Path(), Path(), "").places(step)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(main).parameters.items():
        if name not in places:
            option = hints[name].__metadata__[0]
            fields[name] = (hints[name], Field(parameter.default, ge=option.min, le=option.max))
    return create_model(step, __base__=Section, **fields)


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: no such recipe")
        return path
    known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
    if name not in known:
        raise UserError(f"recipe {name!r}: neither a YAML file nor one of {', '.join(known)}")
    return FOLDER / f"{name}.yaml"


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None


def _put(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {key} has no keys of its own")
    values[keys[-1]] = value


def _check(recipe: Recipe, path: Path) -> None:
    for key, names in (("steps", recipe.steps), ("shares", list(recipe.shares))):
        for name in names:
            if name not in STEPS:
                raise UserError(f"{path}: {key}: no step {name!r}{_nearest(name, list(STEPS))}")
    if sorted(recipe.steps, key=list(STEPS).index) != recipe.steps:
        raise UserError(f"{path}: steps: expected the order {', '.join(STEPS)}")
    timed = [step for step in recipe.steps if STEPS[step].timed]
    without = [step for step in timed if recipe.shares.get(step, 0) <= 0]
    if recipe.budget is not None and without:
        raise UserError(f"{path}: budget: shares of {', '.join(without)} are missing")


def _explain(error: ValidationError) -> str:
    first, *more = error.errors()
    key = ".".join(map(str, first["loc"]))
    also = f" (and {len(more)} more)" if more else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_nearest(key, list(_keys()))}{also}"
    if first["type"] == "missing":
        return f"{key} is missing{also}"
    expected = first["msg"].replace("Input should be", "expected", 1)
    return f"{key} is {first['input']!r}, {expected}{also}"


def _keys() -> Iterator[str]:
    for name, field in schema().model_fields.items():
        yield name
        if name in STEPS and isinstance(field.annotation, type):
            yield from (f"{name}.{option}" for option in field.annotation.model_fields)


def _nearest(word: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    if found:
        return f"; did you mean {found[0]!r}?"
    section = word.partition(".")[0]
    own = [k for k in known if k.startswith(f"{section}.")] or [k for k in known if "." not in k]
    return f"; known are {', '.join(own)}"
