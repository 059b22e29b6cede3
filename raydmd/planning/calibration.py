"""What was measured on a machine, kept in a file, and used in plans in place of what is on paper."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError
from raydmd.planning.hardware import TERA, Hardware

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.planning.calls import Kind
    from raydmd.planning.timing import Seconds
    from raydmd.recipe import Recipe

Points = list[tuple[float, float]]
"""Rows and seconds."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One recipe's networks, timed.

    Attributes:
        what: was timed, for people.
        model: whose networks, in which precision; see :func:`model_key`.
        passes: points by ``role kind``.
        updates: seconds of an optimizer's step, by role.
        beside: by stage, points of a cycle's seconds that are no network's.
        rates: operations a second by kind of pass, ``forward`` or ``train``, where there were most of them.
        held: bytes of parameters, optimizer states and averages, with the teacher's.
        peak: the most bytes of tensors at once in a cycle, beside those.
    """

    what: str
    model: str
    passes: dict[str, Points]
    updates: dict[str, float]
    beside: dict[str, Points]
    rates: dict[str, float]
    held: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A machine.

    Attributes:
        machine: its name and device.
        hardware: as plans know it, at assumed shares of its peak.
        entries: by :func:`key`.
    """

    machine: str
    hardware: Hardware
    entries: dict[str, Entry] = field(default_factory=dict)

    def of(self, recipe: Recipe) -> Measured | None:
        """What was measured of a recipe's networks, if they were."""
        if recipe.data.sizes:  # timed at one size alone; its rates hold for others
            return None
        found = self.entries.get(key(recipe))
        return Measured(self.machine, found) if found else None

    def at(self, recipe: Recipe) -> Hardware:
        """The machine at the rates of a recipe's model in its precision; of another model they say nothing.

        A small network's time goes into launching it: the share of the peak that it reaches is not a large one's.
        """
        entry, hardware = self._rated(recipe), self.hardware
        if entry is None:
            return hardware
        name = "bf16" if recipe.training.precision == "bf16" else "fp32"
        rates = {kind: rate / TERA for kind, rate in entry.rates.items()}
        peak = max(getattr(hardware, name), *rates.values())
        return hardware.model_copy(update={name: peak, **{kind: rate / peak for kind, rate in rates.items()}})

    def source(self, recipe: Recipe) -> str:
        """Where a plan's times for a recipe come from, in a few words."""
        if self.of(recipe):
            return f"times measured on {self.machine}"
        entry = self._rated(recipe)
        if entry is None:
            return f"times on paper: of {recipe.model.path} in {recipe.training.precision} nothing was measured here"
        why = "; passes are timed at one size, data.sizes has several" if recipe.data.sizes else ""
        return f"times on paper, at the rates of {entry.what}, measured on {self.machine}{why}"

    def _rated(self, recipe: Recipe) -> Entry | None:
        """What was measured last of a recipe's model in its precision, if anything was."""
        wanted = model_key(recipe)
        return next((e for e in reversed(self.entries.values()) if e.model == wanted), None)


@dataclass(frozen=True)
class Measured:
    """An entry as a plan uses it.

    Attributes:
        machine: where it was taken.
        entry: what was.
    """

    machine: str
    entry: Entry

    def seconds(self, else_: Seconds, share: int) -> Seconds:
        """Passes as measured; what was not is taken from elsewhere.

        Args:
            else_: says what was not measured.
            share: samples of a worker's update.
        """

        def seconds(role: str, kind: Kind, rows: float) -> float:
            points = self.entry.passes.get(f"{role} {kind}")
            return line(points, rows * share) if points else else_(role, kind, rows)

        return seconds

    def updates(self, else_: dict[str, float]) -> dict[str, float]:
        """Seconds of the optimizers' steps."""
        return else_ | self.entry.updates

    def beside(self, share: int) -> dict[str, float]:
        """Seconds by stage that are no network's."""
        return {stage: line(points, share) for stage, points in self.entry.beside.items()}


def line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Seconds for so many rows: on the line between the two measured next to it, or through the last two."""
    ordered = sorted(points)
    if len(ordered) == 1:
        rows, seconds = ordered[0]
        return seconds * at / rows
    low = max((i for i, (rows, _) in enumerate(ordered[:-1]) if rows <= at), default=0)
    (x0, y0), (x1, y1) = ordered[low], ordered[low + 1]
    return max(y0 + (y1 - y0) * (at - x0) / (x1 - x0), 0.0)


def model_key(recipe: Recipe) -> str:
    """What decides at which rate a network computes: the model with its size, and the precision."""
    facts = [recipe.model.model_dump(mode="json", exclude={"negative_prompt"}), recipe.training.precision]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def key(recipe: Recipe) -> str:
    """What decides how long passes take for a number of rows: not the batch, the placement or the method's weights."""
    t, m = recipe.training, recipe.method
    facts = [
        recipe.model.model_dump(mode="json", exclude={"negative_prompt"}),
        [size.model_dump(mode="json") for size in recipe.data.sizes],
        [[role.lora.model_dump(mode="json") if role.lora else None for role in (t.student, t.fake)]],
        [t.precision, t.gradient_checkpointing, t.ema > 0, recipe.placement.threads, t.fake_updates],
        [m.name, m.steps, m.rollout, m.solver, len(m.boundaries), recipe.placement.teacher == "tied"],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def default_file() -> Path:
    """Where this machine's calibration is kept unless it is said otherwise."""
    root = Path(os.environ.get("RAYDMD_CACHE") or Path.home() / ".cache" / "raydmd")
    return root / "calibration.json"


def read(file: Path) -> Calibration | None:
    """A calibration, or ``None`` if there is no such file.

    Raises:
        InputError: if it can't be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Calibration(
            machine=found["machine"],
            hardware=Hardware.model_validate(found["hardware"]),
            entries={k: _entry(v) for k, v in found["entries"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"calibration {file} is not readable: {error}; 'raydmd plan FILE --measure' makes it anew"
        ) from None


def _entry(found: dict[str, Any]) -> Entry:
    """JSON knows no tuples."""
    points = {k: {name: [(x, y) for x, y in v] for name, v in found[k].items()} for k in ("passes", "beside")}
    return Entry(**(found | points))


def write(file: Path, calibration: Calibration) -> None:
    """Write it at once or not at all."""
    found: dict[str, Any] = {
        "machine": calibration.machine,
        "hardware": calibration.hardware.model_dump(),
        "entries": {k: asdict(v) for k, v in calibration.entries.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    partial.replace(file)
