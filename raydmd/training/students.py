"""A student's weights in the run's folder, for those who look at it while it trains."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from raydmd.errors import RunFailed
from raydmd.training.checkpoint import STUDENT

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.training.cycle import Agree
    from raydmd.training.roles import TrainedRole

STUDENTS = "students"
"""Folder of a run with the students that are to be evaluated."""


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
