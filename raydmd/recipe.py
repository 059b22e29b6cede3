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
from raydmd.recipe_data import Data
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import PRESETS, Method
from raydmd.recipe_monitor import Monitor
from raydmd.recipe_placement import Placement
from raydmd.recipe_types import Below1, Count, Fraction, NonNegative, Positive, Section, Word, ever_positive

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.recipe_gan import Gan


class Model(Section):
    """The teacher and the shape of its samples."""

    path: Word = "wan22-tiny"
    """A zoo name, a folder in diffusers' format, or a hub id."""
    revision: str | None = None
    lora: dict[Word, Word] = Field(default_factory=dict)
    """LoRA files that belong to the teacher, by the name of the network, e.g. ``{transformer: style.safetensors}``."""
    frames: Count | None = None
    """Pixel frames; default: the zoo's own, or the pipeline's."""
    height: Count | None = None
    width: Count | None = None
    text_length: Count | None = None
    """Tokens a prompt is padded to; default: the tokenizer's limit, at most 512."""
    negative_prompt: str = ""


class Lora(Section):
    """Low-rank adapters (peft)."""

    rank: Count = 64
    alpha: Positive = 8.0
    targets: Annotated[tuple[Word, ...], Field(min_length=1)] | None = None
    """Ends of module names; default: the family's attention and feed-forward projections."""


class Role(Section):
    """A trainable network: its optimizer and what of it is trained."""

    rate: Positive
    betas: tuple[Below1, Below1] = (0.0, 0.999)
    eps: Positive = 1e-8
    """AdamW's: a gradient much smaller is not scaled up to a whole step, so that rounding does not train."""
    weight_decay: NonNegative = 0.0
    clip: Positive = 1.0
    """Largest gradient norm."""
    lora: Lora | None = None
    """Adapters; ``null`` trains all parameters."""


class Training(Section):
    """The loop."""

    cycles: Count = 1000
    """Student updates, over all phases."""
    phase_split: tuple[Positive, ...] | None = None
    """Relative cycles per phase; default: equal."""
    batch: Count = 64
    """Samples per student update, over all workers."""
    fake_updates: Annotated[int, Field(ge=0)] = 5
    """Fake-score updates per student update."""
    fake_warmup: Annotated[int, Field(ge=0)] = 0
    """Fake-score updates before a phase's first student update."""
    student: Role = Role(rate=5e-5, lora=Lora())
    fake: Role = Role(rate=4e-7)
    warmup: Annotated[int, Field(ge=0)] = 0
    """Cycles of a phase over which rates rise."""
    decay: Fraction = 0.0
    """Last fraction of a phase over which rates fall linearly to zero."""
    ema: Below1 = 0.0
    """Decay of the student's moving average, which is what is exported; 0 switches it off."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the forward passes; master weights and optimizer states stay fp32."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 200
    report_every: Count = 10
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of the worker group before the run gives up."""
    step_timeout: Positive = 1800.0
    """Seconds that collectives, teacher requests and a checkpoint may each take."""
    stall_timeout: Positive = 7200.0
    """Seconds for a cycle, a phase's start or a checkpoint, after which a worker leaves its stacks and restarts."""


class Tracking(Section):
    """MLflow."""

    uri: Word | None = None
    """A tracking server; default: a SQLite file under ``output``."""
    experiment: Word = "raydmd"
    weights: Literal["all", "best", "none"] | None = None
    """Whose students MLflow gets; the best one's is that of a sweep. Default: all runs', of a sweep the best one's."""

    @model_validator(mode="after")
    def _no_password(self) -> Self:
        # Recipes lie in folders, reports and logs.
        head, at, _ = (self.uri or "").partition("://")[2].partition("/")[0].rpartition("@")
        if at and ":" in head:
            raise ValueError(
                "tracking.uri holds a password, and recipes are kept and shown: leave it out. MLflow takes it from "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PostgreSQL from PGPASSWORD or ~/.pgpass"
            )
        return self


def _batch_divides(training: Training, method: Method, placement: Placement) -> None:
    workers, group = placement.workers, placement.sequence
    if workers % group:
        raise ValueError(f"placement.workers={workers} does not divide into groups of placement.sequence={group}")
    shares, over = workers // group, f"placement.workers={workers}"
    if group > 1:
        over = f"the {shares} groups of placement.sequence={group} in {over}"
        for key in ("gan", "regression"):
            if getattr(method, key):
                raise ValueError(f"placement.sequence={group} does not go with method.{key}, which needs samples apart")
        for role in ("student", "fake"):
            if (training.precision, training.sharding, getattr(training, role).lora) == ("bf16", "ddp", None):
                raise ValueError(
                    f"placement.sequence={group} with bf16 over fp32 weights has attention compute again, backward, in "
                    f"other dtypes than forward: set training.sharding=fsdp, or training.{role}.lora={{}}"
                )
    if training.batch % shares:
        raise ValueError(f"training.batch={training.batch} does not divide over {over}")
    if method.adapt and training.batch // shares % method.adapt.group:
        raise ValueError(
            f"method.adapt.group={method.adapt.group} does not divide the {training.batch // shares} samples that each "
            f"of {over} has of training.batch={training.batch}"
        )


def _gan_can_train(gan: Gan | None, training: Training) -> None:
    if gan is None:
        return
    if not training.fake_updates:
        raise ValueError("method.gan needs training.fake_updates: its discriminator learns in the fake score's updates")
    sharded = "sharding=fsdp" if training.sharding == "fsdp" else None
    obstacle = "gradient_checkpointing" if training.gradient_checkpointing else sharded
    if obstacle and gan.r1 and gan.r1.kind == "exact":
        raise ValueError(
            f"method.gan.r1.kind=exact differentiates twice, which training.{obstacle} does not allow; "
            "use kind=approximate"
        )


def _fake_is_asked(method: Method, training: Training) -> None:
    if method.gan or method.decouple is None or ever_positive(method.decouple.match):
        return
    for key in ("fake_updates", "fake_warmup"):
        if getattr(training, key):
            raise ValueError(
                f"training.{key}={getattr(training, key)} does nothing with method.decouple.match=0, which never asks "
                f"the fake score; set training.{key}=0"
            )


def _monitor_can_act(m: Monitor, training: Training, phases: int) -> None:
    if m.action == "warn":
        return
    split = training.phase_split or (1.0,) * phases
    longest = ceil(training.cycles * max(split) / sum(split))
    if longest < m.settle + m.patience:
        raise ValueError(
            f"monitor.action={m.action} can't happen: the longest phase has {longest} cycles and no alarm comes before "
            f"{m.settle + m.patience} cycles of one (monitor.settle + monitor.patience)"
        )
    if m.action == "raise_ratio" and not training.fake_updates:
        raise ValueError("monitor.action=raise_ratio does nothing with training.fake_updates=0")


def _tied_are_adapters(placement: Placement, training: Training) -> None:
    full = [role for role in ("student", "fake") if getattr(training, role).lora is None]
    if placement.teacher == "tied" and full:
        raise ValueError(
            "placement.teacher=tied holds student, fake score and teacher in one frozen network, so that both must be "
            f"adapters on it: set {' and '.join(f'training.{role}.lora={{}}' for role in full)}, or "
            "placement.teacher=local"
        )


def _rewards_are_asked(method: Method, placement: Placement) -> None:
    for key in ("rewards", "reward", "reward_cpus", "reward_gpus"):
        if method.adapt is None and getattr(placement, key) != Placement.model_fields[key].default:
            raise ValueError(f"placement.{key} does nothing without method.adapt, which asks the rewards")


def _wire_is_used(method: Method, p: Placement) -> None:
    if p.wire != "plasma" and p.teacher != "remote" and not p.samplers and not (method.adapt and p.reward == "remote"):
        raise ValueError(f"placement.wire={p.wire} does nothing with teacher={p.teacher}, where nothing goes to a pool")


def _samplers_are_asked(placement: Placement, training: Training, *, deterministic: bool) -> None:
    if not placement.samplers:
        return
    if not training.fake_updates:
        raise ValueError("placement.samplers does nothing with training.fake_updates=0")
    if deterministic:
        raise ValueError(
            "placement.samplers does not go with deterministic=true: after a resume, samples are of another age"
        )


def _sizes_can_differ(data: Data, method: Method) -> None:
    if not data.sizes:
        return
    for key, what in (("gan", "real samples"), ("regression", "noise-image pairs")):
        if getattr(method, key):
            raise ValueError(
                f"data.sizes does not fit method.{key}, whose {what} are of the model's one size; set data.sizes=[] or "
                f"method.{key}=null"
            )
    if method.adapt and any(reward.kind == "zoo" for reward in method.adapt.rewards):
        raise ValueError(
            "data.sizes does not fit method.adapt.rewards of kind zoo, whose judge knows one size; set data.sizes=[] "
            "or take another kind"
        )


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    output: Path = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    deterministic: bool = False
    """Bit-identical repeats: requests not batched, deterministic kernels, routing by hash."""
    model: Model = Model()
    data: Data = Data()
    method: Method = Method()
    training: Training = Training()
    monitor: Monitor = Monitor()
    placement: Placement = Placement()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _batch_divides(self.training, self.method, self.placement)
        pairs = self.method.regression and self.method.regression.batch
        if pairs and pairs % self.placement.workers:
            raise ValueError(
                f"method.regression.batch={pairs} does not divide over placement.workers={self.placement.workers}"
            )
        phases = len(self.method.boundaries) + 1
        split = self.training.phase_split
        if split is not None and len(split) != phases:
            raise ValueError(f"training.phase_split has {len(split)} entries for {phases} phase(s)")
        if self.training.stall_timeout <= self.training.step_timeout:
            raise ValueError(
                "training.stall_timeout must be more than training.step_timeout, which is told more exactly"
            )
        if self.training.cycles < phases:
            raise ValueError(f"training.cycles={self.training.cycles} leaves some of {phases} phases none")
        _gan_can_train(self.method.gan, self.training)
        _fake_is_asked(self.method, self.training)
        _monitor_can_act(self.monitor, self.training, phases)
        _tied_are_adapters(self.placement, self.training)
        _rewards_are_asked(self.method, self.placement)
        _wire_is_used(self.method, self.placement)
        _sizes_can_differ(self.data, self.method)
        _samplers_are_asked(self.placement, self.training, deterministic=self.deterministic)
        return self

    @property
    def folder(self) -> Path:
        """Where everything of this run is kept."""
        return self.output.expanduser().absolute() / self.name

    @property
    def checkpoints_kept(self) -> int:
        """How many of the last checkpoints stay: three, or what a rollback looks back to and some of stops."""
        if self.monitor.action != "rollback":
            return 3
        return ceil(self.monitor.lookback / self.training.checkpoint_every) + 5

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


FREE = frozenset({"model.lora", "placement.worker_resources", "placement.teacher_resources"})
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
