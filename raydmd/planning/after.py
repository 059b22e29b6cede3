"""How far off a plan was: its figures beside those of a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError
from raydmd.planning.planner import Planner
from raydmd.planning.show import table
from raydmd.recipe import Recipe, load
from raydmd.training.events import METRICS, read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from raydmd.planning.calibration import Calibration
    from raydmd.planning.hardware import Hardware

PARTS = ("rollout", "fake", "teacher_wait", "generator")
RECIPE = "recipe.yaml"
WARM = 2
"""Rows of a phase that are left out: the first cycles pay for what is made once."""


@dataclass(frozen=True)
class Off:
    """One figure.

    Attributes:
        what: it is.
        planned: before.
        measured: in the run.
    """

    what: str
    planned: float
    measured: float

    @property
    def by(self) -> float:
        """How far off the plan was, in what was measured."""
        return self.planned / self.measured - 1 if self.measured else 0.0


def after(folder: Path, hardware: Hardware, calibration: Calibration | None) -> list[Off]:
    """Compare a run with its plan.

    Args:
        folder: of the run.
        hardware: what it is planned for, where nothing was measured.
        calibration: of the machine, if it was measured.

    Returns:
        Seconds by part of a cycle, of each phase, and bytes where the run has counted them.

    Raises:
        InputError: if the folder holds no run, or one of too few cycles.
    """
    recipe, rows = read_run(folder)
    hardware = calibration.at(recipe) if calibration else hardware
    planner = Planner(recipe, hardware, calibration.of(recipe) if calibration else None)
    answer = planner.answer(planner.own)
    played = planner.simulated(answer)
    found: list[Off] = []
    for k, (phase, outcome) in enumerate(zip(answer.phases, played, strict=True)):
        own = [row for row in rows if int(row.get("phase", 0)) == k]
        own = own[WARM:] if len(own) > WARM else own
        if not own:
            continue
        slower = planner.crowd(answer.option)
        planned = {
            "rollout": phase.step.rollout * slower,
            "fake": sum(phase.step.fake_updates) * slower,
            "teacher_wait": outcome.wait * outcome.step,
            "generator": phase.step.generator * slower,
        }
        name = f"phase {k + 1} " if len(answer.phases) > 1 else ""
        for part in PARTS:
            measured = median(row.get(f"time/{part}", 0.0) for row in own)
            found.append(Off(f"{name}{part.replace('_', ' ')}, s", planned[part], measured))
        cycles = [sum(row.get(f"time/{part}", 0.0) for part in PARTS) for row in own]
        found.append(Off(f"{name}cycle, s", outcome.step, median(cycles)))
    peaks = [row["system/gpu_memory_peak_megabytes"] for row in rows if "system/gpu_memory_peak_megabytes" in row]
    if peaks:
        found.append(Off("a worker's GPU, GB", answer.peak / 1e9, max(peaks) / 1e3))
    return found


def read_run(folder: Path) -> tuple[Recipe, list[dict[str, Any]]]:
    """A run's recipe, and its rows of metrics that have times.

    Raises:
        InputError: if there is no such run, or it has none.
    """
    if not (folder / RECIPE).is_file():
        raise InputError(f"--after {folder}: no {RECIPE} there; give a run's folder, e.g. runs/NAME")
    rows = [row for row in read_lines(folder / METRICS) if "time/rollout" in row]
    if not rows:
        raise InputError(f"--after {folder}: the run has reported no cycles yet")
    return load(folder / RECIPE, Recipe()), rows


def text(found: Sequence[Off], source: str) -> str:
    """The comparison as a table.

    Args:
        found: figures.
        source: where the plan's times are from.
    """
    rows = [[o.what, f"{o.planned:.3g}", f"{o.measured:.3g}", f"{o.by:+.0%}" if o.measured else ""] for o in found]
    return f"The plan ({source}) beside the run\n" + table(["", "planned", "measured", "off by"], rows)


def summary(found: Sequence[Off]) -> str:
    """How far off cycles were, in a line."""
    cycles = [o for o in found if o.what.endswith("cycle, s")]
    said = ", ".join(f"{o.measured:.3g} s (planned {o.planned:.3g}, {o.by:+.0%})" for o in cycles)
    return f"a cycle took {said}"
