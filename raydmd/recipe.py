"""What a run is: one typed, strict record with one default per setting.

A recipe comes from Python, from YAML or from dotted overrides (``training.student.rate=1e-5``),
always as a small difference from a parent. Unknown keys are refused with the nearest right one;
combinations that cannot work are refused with the key and what is allowed.
"""

from __future__ import annotations

import copy
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from raydmd import recipe_io as io
from raydmd.errors import InputError
from raydmd.recipe_checkpoints import Checkpoints
from raydmd.recipe_data import Data
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_fits import fit, no_secrets
from raydmd.recipe_method import PRESETS, Method
from raydmd.recipe_monitor import Monitor
from raydmd.recipe_placement import Placement
from raydmd.recipe_training import Lora as Lora
from raydmd.recipe_training import Role as Role
from raydmd.recipe_training import Training
from raydmd.recipe_types import Count, Section, Word

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Model(Section):
    """The teacher and the shape of its samples."""

    path: Word = "wan22-tiny"
    """A zoo name, a folder in diffusers' format, or a hub id."""
    revision: str | None = None
    """Of the hub id: a branch, a tag or a commit."""
    lora: dict[Word, Word] = Field(default_factory=dict)
    """LoRA files that belong to the teacher, by the name of the network, e.g. ``{transformer: style.safetensors}``."""
    frames: Count | None = None
    """Pixel frames; default: the zoo's own, or the pipeline's."""
    height: Count | None = None
    """Pixels; default: as for ``frames``."""
    width: Count | None = None
    """Pixels; default: as for ``frames``."""
    text_length: Count | None = None
    """Tokens a prompt is padded to; default: the tokenizer's limit, at most 512."""
    negative_prompt: str = ""
    """What guidance leads away from."""


class Tracking(Section):
    """MLflow."""

    uri: Word | None = None
    """A tracking server; default: a SQLite file under ``output``."""
    experiment: Word = "raydmd"
    """That runs are kept in."""
    weights: Literal["all", "best", "none"] | None = None
    """Whose students MLflow gets; the best one's is that of a sweep. Default: all runs', of a sweep the best one's."""


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """Of its folder; the same name resumes."""
    output: Path = Path("runs")
    """The folder of all runs; on a cluster on storage that all nodes see."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of every random draw."""
    deterministic: bool = False
    """Bit-identical repeats: requests not batched, deterministic kernels, routing by hash."""
    model: Model = Model()
    data: Data = Data()
    method: Method = Method()
    training: Training = Training()
    checkpoints: Checkpoints = Checkpoints()
    monitor: Monitor = Monitor()
    placement: Placement = Placement()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        no_secrets(self.model_dump(mode="json"))
        fit(
            self.training,
            self.method,
            self.placement,
            self.checkpoints,
            self.evaluation,
            self.data,
            self.monitor,
            deterministic=self.deterministic,
        )
        return self

    @property
    def folder(self) -> Path:
        """Where everything of this run is kept."""
        return self.output.expanduser().absolute() / self.name

    @property
    def checkpoints_kept(self) -> int:
        """How many of the last checkpoints stay: as asked, or what a rollback looks back to and some of stops."""
        if self.monitor.action != "rollback":
            return self.checkpoints.keep
        return max(self.checkpoints.keep, ceil(self.monitor.lookback / self.checkpoints.every) + 5)

    def to_yaml(self) -> str:
        """The recipe, resolved, as YAML that :func:`load` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def derive(parent: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe that differs from ``parent`` by nested or dotted ``changes``.

    An empty mapping switches an optional section on, with its defaults: ``training.fake.lora={}``.

    Raises:
        InputError: for unknown keys (with the nearest right one), keys of another method, and
            values that cannot work.
    """
    tree = parent.model_dump(mode="python")
    leaves = io.flatten(changes, whole=_whole())
    # A method's name decides which of its keys exist, so it is set before them.
    for key in sorted(leaves, key=lambda k: k != "method.name"):
        _set(tree, key, leaves[key])
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError(io.explain(error)) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``a.b.c=value``; a text or path is taken as it stands, any other value is read as YAML.

    Raises:
        InputError: if there is no ``=``, no value, or the value is no YAML.
    """
    key, value = io.split_override(text)
    return key, io.read_value(key, value, text=_all_keys().get(key, False))


def load(path: Path, parent: Recipe) -> Recipe:
    """A recipe that differs from ``parent`` by the keys of a YAML file.

    Raises:
        InputError: if the file is missing, no YAML mapping, or not a valid change.
    """
    changes = io.read_changes(path, whole=_whole())
    try:
        return derive(parent, changes)
    except InputError as error:
        raise InputError(f"recipe file {path}: {error}") from None


def combine(parent: Recipe, *, file: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Parent, then a YAML file, then dotted overrides, each winning over what came before.

    Raises:
        InputError: see :func:`load` and :func:`parse_override`; also if an override is given twice.
    """
    recipe = load(file, parent) if file else parent
    changes: dict[str, Any] = {}
    for key, value in map(parse_override, overrides):
        if key in changes:
            raise InputError(f"recipe key '{key}' is given twice")
        changes[key] = value
    return derive(recipe, changes) if changes else recipe


def known_keys() -> list[str]:
    """Every dotted key a recipe of any method can have."""
    return sorted(_all_keys())


FREE = frozenset(
    {
        "model.lora",
        "placement.worker_resources",
        "placement.teacher_resources",
        "placement.reward_resources",
    }
)
"""Keys whose values are mappings with the user's own names."""


@cache
def _whole() -> frozenset[str]:
    """Keys whose value may be a mapping as well as a number: it is read as one value."""
    return FREE | io.mixed_keys(Recipe)


@cache
def _all_keys() -> dict[str, bool]:
    return io.keys_of(Recipe)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    if key not in _all_keys():
        near = io.nearest(key, _all_keys())
        hint = f"did you mean '{near}'?" if near else "'raydmd recipe' lists all keys"
        raise InputError(f"unknown recipe key '{key}'; {hint}")
    if key == "method.name" and value != tree["method"]["name"]:
        # Another preset starts from its own settings; nothing of the same name is carried over.
        tree["method"] = {"name": value, **copy.deepcopy(PRESETS.get(str(value), {}))}
        return
    io.put(tree, key, value, whole=_whole())
