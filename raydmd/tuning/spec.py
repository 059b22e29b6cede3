"""A sweep as its user writes it: what to search, by what, for how long, and what counts."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from raydmd.errors import InputError
from raydmd.recipe import derive, known_keys
from raydmd.recipe_io import explain, nearest
from raydmd.recipe_types import Count, Positive, Section, Word
from raydmd.tuning.population import Population, check_space
from raydmd.tuning.repeats import SEED
from raydmd.tuning.space import Choice, Dimension, Explorer, Ordered, Phases, Range, Tumbler, ends, points

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.tuning.space import Chooser

CORNERS = 4096
"""Combinations of the ends of all ranges that are looked at before a sweep starts; of more, as many are drawn too."""
GRID = 10_000
"""Points that a grid may have."""
KINDS: tuple[tuple[str, type[Dimension]], ...] = (
    ("of", Choice),
    ("ordered", Ordered),
    ("phases", Phases),
    ("low", Range),
)
"""Kinds of dimensions, by the key that only they have; a plain list is a :class:`~raydmd.tuning.space.Choice`."""
Goal = Literal["min", "max"]
AnyDimension = Choice | Ordered | Phases | Range
RESERVED = ("name", "output", "tracking.", "placement.", "evaluation.", "data.cache")
"""Keys that are the sweep's own, or would make trials incomparable."""


class Search(Section):
    """Who proposes the trials."""

    kind: Literal["tpe", "random", "grid"] = "tpe"
    """Optuna's tree-structured Parzen estimator (several objectives too), chance, or every combination."""
    seed: Annotated[int, Field(ge=0)] = 0
    startup: Count = 8
    """Random trials before the estimator."""


class Stopping(Section):
    """Asynchronous successive halving: at each rung the best of those that came there go on (arXiv:1810.05934)."""

    reduction: Annotated[float, Field(gt=1)] = 3.0
    """One in so many goes on."""
    grace: Count = 1
    """Evaluations before the first rung."""


class Budget(Section):
    """When no new trial starts; whichever comes first."""

    trials: Count = 20
    """Settings; each is run ``repeats`` times."""
    hours: Positive | None = None
    """Of this cluster, since the command."""
    gpu_hours: Positive | None = None
    """That all clusters' trials hold for their workers."""


CLUSTER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def cluster_folder(folder: Path, cluster: str) -> Path:
    """What a cluster keeps of a sweep for itself.

    Args:
        folder: of the sweep.
        cluster: its name.

    Raises:
        InputError: if the name is no name of a folder.
    """
    if not CLUSTER.fullmatch(cluster):
        raise InputError(
            f"--cluster {cluster!r}: letters, digits, dots, dashes and underscores, and at most 100 of them"
        )
    return folder / "clusters" / cluster


class Versus(Section):
    """At the end the recipe is trained as it is, and compared with the best trial on seeds that no trial has seen."""

    seeds: Count = 3
    """Evaluations of each, with noise of their own, and prompts where a judge brings them."""


class Sweep(Section):
    """A sweep over recipes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")] = "sweep"
    objectives: Annotated[dict[Word, Goal], Field(min_length=1)] = {"frechet": "min"}  # noqa: RUF012  # pydantic copies it
    """Figures of the student's evaluation; the first decides who goes on."""
    space: Annotated[dict[Word, AnyDimension], Field(min_length=1)]
    search: Search = Search()
    stopping: Stopping | None = None
    """Needs ``evaluation.every`` in the recipe."""
    population: Population | None = None
    """Instead of ``stopping``; needs ``evaluation.every`` too."""
    budget: Budget = Budget()
    repeats: Count = 1
    """Runs of each setting, with training seeds of their own; it counts by their mean."""
    verdict: Versus | None = None
    """Whether what was found beats the recipe that the sweep began from; costs one more run."""
    parallel: Annotated[int, Field(ge=0)] = 0
    """Trials at once; 0: as many as the cluster has room for."""
    storage: Word | None = None
    """Of the study, as Optuna names it, e.g. ``postgresql://host/sweeps``; default: SQLite in the sweep's folder."""

    @field_validator("space", mode="before")
    @classmethod
    def _kinds(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: _dimension(str(key), value) for key, value in given.items()}

    @model_validator(mode="after")
    def _keys_are_known(self) -> Self:
        keys = known_keys()
        seen: set[str] = set()
        for key, dimension in self.space.items():
            if key not in keys:
                near = nearest(key, keys)
                raise ValueError(f"space: unknown key {key!r}{f'; did you mean {near!r}?' if near else ''}")
            if key == SEED and self.repeats > 1:
                raise ValueError("space: 'seed' is not searched where repeats give each run its own")
            if key.startswith(RESERVED):
                raise ValueError(f"space: {key!r} is not searched: trials would not be comparable, or collide")
            if isinstance(dimension, Phases) and key != "method.boundaries":
                raise ValueError(f"space: 'phases' makes boundaries, for method.boundaries alone, not {key!r}")
            if late := [k for k in dimension.when if k not in seen]:
                raise ValueError(f"space: {key!r} depends on {', '.join(late)}, which must come before it in the space")
            seen.add(key)
        return self

    @model_validator(mode="after")
    def _repeats_are_whole(self) -> Self:
        if self.repeats > 1 and self.stopping:
            raise ValueError(
                "repeats and stopping exclude each other: a setting counts once all its runs have come to their end"
            )
        return self

    @model_validator(mode="after")
    def _population_has_members(self) -> Self:
        if self.population is None:
            return self
        if self.stopping:
            raise ValueError("stopping and population exclude each other: one ends bad trials, the other replaces them")
        if self.budget.trials < 2:
            raise ValueError("population: budget.trials are its members, of which it needs two")
        for key in ("hours", "gpu_hours"):
            if getattr(self.budget, key) is not None:
                raise ValueError(f"budget.{key} does nothing with a population, whose members start together")
        if self.search.kind == "grid":
            raise ValueError("search.kind=grid has points of its own; a population draws its first ones at random")
        if self.repeats > 1:
            raise ValueError("repeats do nothing for a population, whose members change their settings as they go")
        check_space(self.space)
        return self

    def pick(self, base: Recipe, chooser: Chooser) -> dict[str, Any]:
        """A trial's changes of a recipe, by dotted key."""
        found: dict[str, Any] = {}
        for key, dimension in self.space.items():
            if all(found.get(k) in allowed for k, allowed in dimension.when.items()):
                student = {
                    "steps": found.get("method.steps", base.method.steps),
                    "shift": found.get("method.shift", base.method.shift),
                }
                found[key] = dimension.pick(key, chooser, student)
        return found

    def corners(self, base: Recipe) -> Iterator[tuple[dict[str, Any], Recipe]]:
        """The combinations of the ends of all ranges, and their recipes.

        Raises:
            InputError: at one that is no recipe, with the reason.
        """
        for changes in self._ends(base):
            try:
                yield changes, derive(base, changes)
            except InputError as error:
                raise InputError(
                    f"sweep {self.name!r} can come to a recipe that is refused: {_said(changes)}: {error}. Narrow the "
                    "space, or say where a key holds by 'when'"
                ) from None

    def _ends(self, base: Recipe) -> Iterator[dict[str, Any]]:
        explorer = Explorer(ends)
        for count, _ in enumerate(explorer.rounds()):
            if count == CORNERS:  # too many: these were all of the first keys' low ends
                tumbler = Tumbler(0)
                yield from (self.changes(base, tumbler) for _ in range(CORNERS))
                return
            yield self.changes(base, explorer)

    def grid(self, base: Recipe) -> list[dict[str, Any]]:
        """Every point of a grid, as an Optuna trial's parameters.

        Raises:
            InputError: if a range has no step, or there are more than :data:`GRID`.
        """
        explorer, found = Explorer(points), list[dict[str, Any]]()
        for _ in explorer.rounds():
            self.changes(base, explorer)
            found.append(dict(explorer.chosen))
            if len(found) > GRID:
                raise InputError(f"sweep {self.name!r}: its grid has more than {GRID} points")
        return found

    def changes(self, base: Recipe, chooser: Chooser) -> dict[str, Any]:
        """As :meth:`pick`.

        Raises:
            InputError: if a structure can't be had with the values before it.
        """
        try:
            return self.pick(base, chooser)
        except ValueError as error:
            raise InputError(f"sweep {self.name!r}: {error}") from None

    def facts(self, base: Recipe) -> dict[str, Any]:
        """What two clusters' sweeps must agree on to be one study."""
        recipe = base.model_dump(mode="json", exclude={"name", "output", "placement", "tracking"})
        recipe["data"].pop("cache", None)
        keys = {"objectives", "space", "stopping", "repeats", "population"}
        own = self.model_dump(mode="json", include=keys)
        return {"recipe": recipe, **own, "search": {"kind": self.search.kind}}


def read_sweep(given: Mapping[str, Any]) -> Sweep:
    """A sweep from plain values.

    Raises:
        InputError: for unknown keys and values that cannot work.
    """
    for key in given:
        if key not in Sweep.model_fields:
            near = nearest(str(key), list(Sweep.model_fields))
            known = ", ".join(Sweep.model_fields)
            raise InputError(f"sweep: unknown key {key!r}; {f'did you mean {near!r}?' if near else f'it has {known}'}")
    try:
        return Sweep.model_validate(dict(given))
    except ValidationError as error:
        raise InputError(f"sweep: {explain(error)}") from None


def _dimension(key: str, value: Any) -> Any:
    if isinstance(value, Dimension):
        return value
    if isinstance(value, list | tuple):
        return Choice(of=tuple(value))
    if not isinstance(value, dict):
        raise ValueError(f"{key}: give a list of values, or a mapping such as {{low: 1, high: 8}}, not {value!r}")
    for mark, kind in KINDS:
        if mark in value:
            try:
                return kind.model_validate(value)
            except ValidationError as error:
                raise ValueError(f"{key}: {explain(error)}") from None
    raise ValueError(f"{key}: a mapping needs one of {', '.join(mark for mark, _ in KINDS)}, given {sorted(value)}")


def _said(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={json.dumps(v)}" for k, v in changes.items())
