"""A student's weights in the run's folder, for those who look at it while it trains."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from raydmd.errors import RunFailed
from raydmd.training.checkpoint import STUDENT, name_of

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.training.cycle import Agree
    from raydmd.training.roles import TrainedRole

STUDENTS = "students"
"""Folder of a run with the students that are to be evaluated."""
EVALUATIONS = "evaluations.jsonl"
"""File of a run with what they measured, a line each."""
EVALUATION = "evaluation/"
"""Before the names of a student's figures."""


def due(recipe: Recipe, cycle: int, attempt: int) -> Path | None:
    """Where a run's student is left for an evaluation after ``cycle`` cycles and ``attempt`` rollbacks, if it is."""
    every = recipe.evaluation.every
    if not every or cycle % every or cycle >= recipe.training.cycles:
        return None
    return recipe.folder / STUDENTS / name_of(cycle, attempt)


def write_student(student: TrainedRole, folder: Path, *, rank: int, agree: Agree, average: bool = False) -> None:
    """Write a student's weights; the folder is there when all of them are.

    Args:
        student: all ranks call this, since sharded weights are gathered.
        folder: is replaced, if it is there.
        rank: of this process; rank 0 writes.
        agree: of all ranks, so that none goes on alone.
        average: the moving average, where there is one.

    Raises:
        RunFailed: on all ranks, if it can't be written.
    """
    error: Exception | None = None
    try:
        partial = folder.with_suffix(".partial")
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        student.write(partial / STUDENT, rank=rank, average=average)
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    except Exception as e:  # a full disk is safetensors' own kind of error
        error = RunFailed(f"the student's weights can't be written to {folder}: {e}")
    agree(error)
