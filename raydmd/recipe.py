"""What a run is: one typed, strict record with one default per setting.

A recipe comes from Python, from YAML or from dotted overrides (``training.student.rate=1e-5``),
always as a small difference from a parent. Unknown keys are refused with the nearest right one;
combinations that cannot work are refused with the key and what is allowed.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raydmd import recipe_io as io
from raydmd.errors import InputError
from raydmd.process import step_grid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above1 = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Word = Annotated[str, Field(min_length=1)]


def _ordered(times: tuple[float, float]) -> None:
    if not times[0] < times[1]:
        raise ValueError(f"times must rise, given {list(times)}")


FLOOR = 1e-3


def _floor_is_used(normaliser: str, floor: float) -> None:
    if normaliser == "none" and floor != FLOOR:
        raise ValueError(f"normaliser_floor={floor} does nothing with normaliser=none; leave it out")


class Section(BaseModel):
    """A part of the recipe: frozen, no unknown keys, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class Model(Section):
    """The teacher and the shape of its samples."""

    path: Word = "wan22-tiny"
    """A zoo name, a folder in diffusers' format, or a hub id."""
    revision: str | None = None
    frames: Count | None = None
    """Pixel frames; default: the zoo's own, or the pipeline's."""
    height: Count | None = None
    width: Count | None = None
    text_length: Count | None = None
    """Tokens a prompt is padded to; default: the tokenizer's limit, at most 512."""
    negative_prompt: str = ""


class Data(Section):
    """Prompts. Distillation is data-free otherwise."""

    prompts: Path | None = None
    """A text file, one prompt a line; default: the zoo's own."""
    cache: Path | None = None
    """Where encoded prompts are kept; default: ``conditions`` beside the run."""


class Phased(Section):
    """Phased DMD (arXiv:2510.27684): one expert per phase, matched at the phase's end."""

    name: Literal["phased"] = "phased"
    steps: Count = 4
    shift: Positive = 5.0
    boundaries: tuple[float, ...] = (0.875,)
    """Noise levels that end each phase but the last, falling. Phase k renoises above its own."""
    guidance: NonNegative = 4.0
    """Of the teacher; ``uncond + scale * (cond - uncond)``."""
    times: tuple[Fraction, Fraction] = (0.02, 0.98)
    """Where distribution matching renoises, before the shift."""
    normaliser: Literal["distance", "none"] = "distance"
    """``distance``: over the sample's mean ``|x - D_real|`` (DMD2). ``none``: the paper's."""
    normaliser_floor: NonNegative = FLOOR
    fake_weight_cap: Positive = 10.0
    """Cap on ``1 / sigma_{t|s}^2`` in the fake score's loss (eq. 13)."""
    fake_shift: Positive | None = None
    """Shift of the fake score's times; default: ``shift``."""

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if any(not 0 < b < 1 for b in self.boundaries):
            raise ValueError(f"boundaries must lie strictly between 0 and 1, given {list(self.boundaries)}")
        if list(self.boundaries) != sorted(set(self.boundaries), reverse=True):
            raise ValueError(f"boundaries must fall, given {list(self.boundaries)}")
        grid = step_grid(self.steps, self.shift)[:-1]
        edges = (float("inf"), *self.boundaries, 0.0)
        for k, (upper, lower) in enumerate(pairwise(edges), start=1):
            if not any(lower <= t < upper for t in grid):
                times = ", ".join(f"{t:.4f}" for t in grid)
                raise ValueError(
                    f"steps={self.steps} at shift={self.shift} gives no step to phase {k} of "
                    f"{len(edges) - 1}: its times are {times}, "
                    f"boundaries are {list(self.boundaries)}. "
                    "Use more steps, another shift or fewer boundaries"
                )
        _ordered(self.times)
        _floor_is_used(self.normaliser, self.normaliser_floor)
        return self


class Dmd2(Section):
    """DMD2 without its GAN (arXiv:2405.14867): backward simulation, one exit step for all ranks."""

    name: Literal["dmd2"] = "dmd2"
    steps: Count = 4
    shift: Positive = 5.0
    guidance: NonNegative = 4.0
    times: tuple[Fraction, Fraction] = (0.02, 0.98)
    solver: Literal["renoise", "euler"] = "renoise"
    """Between steps, in training, in evaluation and in the exported scheduler: fresh noise on the predicted
    x0 (DMD2), or deterministic Euler."""
    normaliser: Literal["distance", "none"] = "distance"
    normaliser_floor: NonNegative = FLOOR
    fake_shift: Positive | None = None

    @model_validator(mode="after")
    def _times_rise(self) -> Self:
        _ordered(self.times)
        _floor_is_used(self.normaliser, self.normaliser_floor)
        return self


class Lora(Section):
    """Low-rank adapters (peft)."""

    rank: Count = 64
    alpha: Positive = 8.0
    targets: Annotated[tuple[Word, ...], Field(min_length=1)] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    )


class Role(Section):
    """A trainable network: its optimizer and what of it is trained."""

    rate: Positive
    betas: tuple[Below1, Below1] = (0.0, 0.999)
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


class Placement(Section):
    """Where roles run."""

    workers: Count = 1
    teachers: Count = 1
    teacher: Literal["remote", "local"] = "remote"
    worker_cpus: Positive = 0.5
    teacher_cpus: Positive = 0.5
    worker_gpus: NonNegative = 0.0
    teacher_gpus: NonNegative = 0.0
    worker_resources: dict[str, Positive] = {}
    """Custom resources of the trainers' nodes, e.g. ``{trainer: 1}``."""
    teacher_resources: dict[str, Positive] = {}
    threads: Count = 1
    """CPU threads of each worker and replica."""
    batch_items: Count = 64
    """Samples a replica puts into one forward, counted before guidance doubles them."""
    batch_wait: NonNegative = 0.003
    """Seconds a replica waits for company before it runs a batch that is not full."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        if self.teacher == "local":
            idle = {"teachers": 1, "teacher_gpus": 0.0, "teacher_resources": {}}
            for name, unused in idle.items():
                given = getattr(self, name)
                if given != unused:
                    raise ValueError(
                        f"{name}={given} does nothing with teacher=local, where each worker holds "
                        f"its own copy; set placement.{name}={unused} or placement.teacher=remote"
                    )
        return self


class Tracking(Section):
    """MLflow."""

    uri: Word | None = None
    """A tracking server; default: a SQLite file under ``output``."""
    experiment: Word = "raydmd"


class Evaluation(Section):
    """What is measured after training."""

    samples: Count = 256
    """Clips per method. Without a judge there are pictures, motion and timings only."""
    teacher_steps: Count = 40
    guidance: NonNegative | None = None
    """Of the teacher's clips that a student is compared with; default: ``method.guidance``."""
    grid: Count = 8
    """Rows of the contact sheet."""
    batch: Count = 64
    seed: int = 1_000_000
    timeout: Positive = 6 * 3600.0
    """Seconds that export and evaluation may take."""


class Monitor(Section):
    """The collapse monitor: what is watched in training, when it speaks, and what happens then.

    A limit of ``null`` switches its signal off. Rows are cycles; levels are medians over ``window`` rows.
    """

    action: Literal["warn", "stop", "rollback", "raise_ratio", "cut_rate"] = "warn"
    """On an alarm. ``warn`` says so; ``stop`` writes a checkpoint and stops, resumable, also with other monitor
    settings; ``rollback`` goes back to the last checkpoint from before the trouble and goes on from there with
    other draws, ``cut`` and ``ratio``; ``raise_ratio`` and ``cut_rate`` go on with one of the two."""
    gradient: Above1 | None = 5.0
    """Largest gradient norm of the student, over its own median in ``settle`` rows."""
    fake_error: Above1 | None = 3.0
    """Largest fake-score error in any noise band, over its own best level."""
    critic_lag: Above1 | None = 2.0
    """Largest fake-score error, as the geometric mean over noise bands, over its own best level."""
    brightness: Positive | None = 0.3
    """Largest drift of the samples' mean since the phase's start, in the teacher's standard deviations."""
    spread: Above1 | None = 2.0
    """Largest ratio, either way, of the samples' standard deviation to the teacher's answers'."""
    contrast: Above1 | None = 2.0
    """Largest ratio, either way, of the samples' standard deviation to its own at the phase's start."""
    saturation: Annotated[float, Field(gt=0, lt=1)] | None = 0.05
    """Largest rise in the share of latents beyond three of the teacher's standard deviations."""
    diversity: Annotated[float, Field(gt=0, lt=1)] | None = 0.4
    """Smallest distance between samples of one prompt, over that at the phase's start."""
    every: Count = 20
    """Cycles between measurements of diversity."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Per prompt, for diversity."""
    prompts: Count = 2
    """For diversity: the first so many."""
    settle: Count = 50
    """First rows of a phase, in which nothing fires; the levels at their end are the phase's start."""
    window: Annotated[int, Field(ge=2)] = 20
    patience: Count = 10
    """Rows in a row over a limit before it fires, and well below it before it may fire anew."""
    limit: Count = 2
    """Rollbacks, raises and cuts of a run; the next alarm stops it."""
    cut: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on both roles' rates, per action."""
    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5
    """Factor on ``training.fake_updates``, rounded up, per action."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        used = {
            "rollback": ("limit", "cut", "ratio"),
            "raise_ratio": ("limit", "ratio"),
            "cut_rate": ("limit", "cut"),
        }.get(self.action, ())
        idle = [(k, f"action={self.action}") for k in ("limit", "cut", "ratio") if k not in used]
        if self.diversity is None:
            idle += [(k, "diversity=null") for k in ("every", "samples", "prompts")]
        for key, reason in idle:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)} does nothing with {reason}; leave it out")
        if (self.action == "cut_rate" and self.cut == 1) or (self.action == "raise_ratio" and self.ratio == 1):
            raise ValueError(f"action={self.action} with a factor of 1 changes nothing")
        if self.action != "warn" and not any(getattr(self, k) is not None for k in SIGNALS):
            raise ValueError(f"action={self.action} never happens, since every limit is null")
        return self

    @property
    def probes(self) -> int:
        """Measurements of diversity that make a level."""
        return 3

    @property
    def lookback(self) -> int:
        """Cycles before an alarm in which its cause may lie."""
        return self.patience + max(self.window, 0 if self.diversity is None else self.probes * self.every)

    def raised(self, fake_updates: int) -> int:
        """Fake updates after one raise."""
        return ceil(fake_updates * self.ratio)


SIGNALS = ("gradient", "fake_error", "critic_lag", "brightness", "spread", "contrast", "saturation", "diversity")
"""The monitor's limits."""


def _monitor_can_act(m: Monitor, training: Training) -> None:
    if m.action == "warn":
        return
    if training.cycles < m.settle + m.patience:
        raise ValueError(
            f"monitor.action={m.action} can't happen within training.cycles={training.cycles}: no alarm comes before "
            f"{m.settle + m.patience} cycles (monitor.settle + monitor.patience)"
        )
    if m.action == "raise_ratio" and not training.fake_updates:
        raise ValueError("monitor.action=raise_ratio does nothing with training.fake_updates=0")
    if m.action == "rollback" and 2 * training.checkpoint_every < m.lookback:
        raise ValueError(
            f"monitor.action=rollback looks back {m.lookback} cycles, but of the checkpoints three are kept: "
            f"training.checkpoint_every={training.checkpoint_every} must be at least {ceil(m.lookback / 2)}"
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
    method: Annotated[Phased | Dmd2, Field(discriminator="name")] = Phased()
    training: Training = Training()
    monitor: Monitor = Monitor()
    placement: Placement = Placement()
    tracking: Tracking = Tracking()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.training.batch % self.placement.workers:
            raise ValueError(
                f"training.batch={self.training.batch} does not divide over placement.workers={self.placement.workers}"
            )
        phases = len(self.method.boundaries) + 1 if isinstance(self.method, Phased) else 1
        split = self.training.phase_split
        if split is not None and len(split) != phases:
            raise ValueError(f"training.phase_split has {len(split)} entries for {phases} phase(s)")
        if self.training.cycles < phases:
            raise ValueError(f"training.cycles={self.training.cycles} leaves some of {phases} phases none")
        _monitor_can_act(self.monitor, self.training)
        return self

    @property
    def folder(self) -> Path:
        """Where everything of this run is kept."""
        return self.output.expanduser().absolute() / self.name

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
    leaves = io.flatten(changes, whole=FREE)
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
    changes = io.read_changes(path, whole=FREE)
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


FREE = frozenset({"placement.worker_resources", "placement.teacher_resources"})
"""Keys whose values are mappings with the user's own names."""


@cache
def _all_keys() -> dict[str, bool]:
    return io.keys_of(Recipe)


@cache
def _method_keys() -> dict[str, dict[str, bool]]:
    """For each method by name: its dotted keys."""
    methods = io.members(Recipe.model_fields["method"].annotation)
    return {m.model_fields["name"].default: io.keys_of(m, "method.") for m in methods}


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    if key not in _all_keys():
        near = io.nearest(key, _all_keys())
        hint = f"did you mean '{near}'?" if near else "'raydmd recipe' lists all keys"
        raise InputError(f"unknown recipe key '{key}'; {hint}")
    if key == "method.name" and value != tree["method"]["name"]:
        # Another method starts from its own defaults; nothing of the same name is carried over.
        tree["method"] = {"name": value}
        return
    if key.startswith("method.") and isinstance(tree["method"], dict):
        ours, methods = tree["method"]["name"], _method_keys()
        if isinstance(ours, str) and ours in methods and key not in methods[ours]:
            owners = " and ".join(f"'{m}'" for m, keys in methods.items() if key in keys)
            raise InputError(f"key '{key}' belongs to method {owners}, this recipe's method is '{ours}'")
    io.put(tree, key, value, whole=FREE)
