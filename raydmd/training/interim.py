"""Evaluations while a run trains: the worker leaves its student in the run's folder, the driver has it measured.

Training does not wait for them. Each is a task of its own, one at a time; what it found is a line of
``evaluations.jsonl``, which outlives the attempt, and which the follower hands to MLflow as it does metrics.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from raydmd.errors import RunFailed
from raydmd.serving.order import ANYWHERE
from raydmd.training.checkpoint import cycle_of
from raydmd.training.events import append, read_lines
from raydmd.training.students import EVALUATIONS, STUDENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.serving.order import ClientSpec


class Interim:
    """Has a run's students measured as they come; does nothing where ``evaluation.every`` is 0.

    Args:
        recipe: the run.
        prompts: the training prompts.
        pool: of the teacher, as far as the evaluation asks it.
        tell: is called with the figures of each evaluation, those of earlier attempts first.
    """

    def __init__(
        self,
        recipe: Recipe,
        prompts: list[str],
        pool: ClientSpec | None,
        tell: Callable[[dict[str, float]], None],
    ) -> None:
        self._recipe, self._prompts, self._pool, self._tell = recipe, prompts, pool, tell
        self._file = recipe.folder / EVALUATIONS
        self._started = False
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._running: tuple[Path, Any] | None = None

    def look(self) -> None:
        """Take in what is ready and start what has come; cheap, to be called every second."""
        if not self._recipe.evaluation.every:
            return
        if not self._started:
            self._started = True
            for row in read_lines(self._file):
                self._done.add(str(row["student"]))
                self._tell({k: v for k, v in row.items() if k not in ("student", "time")})
        if self._running and ray.wait([self._running[1]], timeout=0)[0]:
            self._collect(*self._running)
            self._running = None
        if self._running is None and (folder := next(self._waiting(), None)):
            self._running = folder, self._task().remote(self._recipe, str(folder), self._prompts, self._pool)

    def finish(self) -> None:
        """Wait for what is under way.

        Raises:
            RunFailed: if it takes longer than ``evaluation.timeout``.
        """
        deadline = time.monotonic() + self._recipe.evaluation.timeout
        self.look()
        while self._running:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"the evaluation of {self._running[0]} took more than evaluation.timeout="
                    f"{self._recipe.evaluation.timeout:g} s; the same command goes on"
                )
            ray.wait([self._running[1]], timeout=1.0)
            self.look()

    def _waiting(self) -> Iterator[Path]:
        for folder in sorted((self._recipe.folder / STUDENTS).glob("cycle-*")):
            if folder.name in self._done:  # a resumed worker has come past it again
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.suffix != ".partial" and folder.name not in self._failed:
                yield folder

    def _collect(self, folder: Path, reference: Any) -> None:
        cycle = float(cycle_of(folder.name))
        try:
            figures: dict[str, float] = ray.get(reference)
        except RayError as error:  # training is none the worse for it; the next attempt of the run tries again
            self._failed.add(folder.name)
            print(f"the evaluation of cycle {cycle:g} failed: {str(error).strip().splitlines()[-1]}", flush=True)
            return
        self._done.add(folder.name)
        row = {"cycle": cycle, **figures}
        append(self._file, {"student": folder.name, "time": time.time(), **row})
        shutil.rmtree(folder, ignore_errors=True)
        self._tell(row)

    def _task(self) -> Any:
        from raydmd.training.finish import interim_figures

        p = self._recipe.placement
        return ray.remote(interim_figures).options(
            num_cpus=min(p.teacher_cpus, p.worker_cpus),
            num_gpus=p.worker_gpus if self._pool else p.teacher_gpus or p.worker_gpus,
            max_retries=1,
            scheduling_strategy=ANYWHERE,
        )
