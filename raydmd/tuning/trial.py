"""A trial: a run like any other, driven from one of Ray Tune's processes, that reports its evaluations as they come."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from raydmd.errors import RunFailed, RunStopped
from raydmd.recipe import derive
from raydmd.redact import hidden
from raydmd.training.cluster import settle
from raydmd.training.folder import finished, same_run
from raydmd.training.lock import PATIENCE, Held, leave, locked
from raydmd.training.prepare import prepare
from raydmd.training.run import Surroundings, conduct
from raydmd.training.students import EVALUATION
from raydmd.training.takeover import LEG, end_leg, release

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raydmd.recipe import Recipe

LEAVE = 300.0
"""Seconds that a run has to stop in, with a checkpoint."""
HELD = "held"
"""Of the last result of a trial that somebody else trains: still, who was taken for dead, or since this one was."""
TOLD = 5.0
"""Seconds in which Tune hears of a trial that somebody else has taken over, before its process ends."""
STOPPED = "stopped"
"""Of the last result of a trial that is gone on with when the sweep is."""


@dataclass(frozen=True)
class Common:
    """What all trials of a sweep share.

    Attributes:
        base: the recipe that they differ from; its output is the trials' folder.
        tags: of their MLflow runs.
        stop: the file that stops the sweep.
    """

    base: Recipe
    tags: Mapping[str, str]
    stop: Path | None = None


class RunTrial(tune.Trainable):
    """Runs a recipe in a thread; each step of Tune's is an evaluation, the last one that of the finished run.

    Configured by ``number``, ``root`` and ``changes`` of a :class:`~raydmd.tuning.study.Claim`, and ``common``; for a
    member of a population also by ``until``, the cycle that this leg of its run ends at, with a checkpoint and all its
    processes gone.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """See :class:`ray.tune.Trainable`."""
        settle()
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation, or for what ended the run; hand the sweep's stop on meanwhile.

        Tune could not: it asks for one thing at a time, and at the end it waits for seconds, not for a checkpoint.
        """
        while True:
            with contextlib.suppress(queue.Empty):
                return {**self._news.get(timeout=1.0), "gpu_seconds": self.gpu_seconds()}
            if self._told_to_stop() and not self._lost.is_set():
                self._stop.parent.mkdir(parents=True, exist_ok=True)
                self._stop.touch()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Tune's note of a trial that pauses: the run keeps its own checkpoints, where it is."""
        (Path(checkpoint_dir) / "run.txt").write_text(str(self._recipe.folder), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """The run goes on from its own."""

    def cleanup(self) -> None:
        """Stop the run where it can go on from, and wait until its processes have gone."""
        if self._lost.is_set():  # it is somebody else's, who must not be stopped
            return
        self._stop.parent.mkdir(parents=True, exist_ok=True)
        if self._thread.is_alive():
            self._stop.touch()
            self._thread.join(LEAVE)

    def gpu_seconds(self) -> float:
        """That the run's workers have held so far."""
        p = self._recipe.placement
        return (time.monotonic() - self._begun) * p.workers * p.worker_gpus

    def _begin(self, config: dict[str, Any]) -> None:
        common: Common = config["common"]
        name, self._begun = f"{config['root']:04d}", time.monotonic()
        self._recipe = derive(common.base, {**config["changes"], "name": name})
        self._tags = {**common.tags, "raydmd.trial": name}
        self._stop = self._recipe.folder / "STOP"
        self._stop.unlink(missing_ok=True)  # an earlier attempt's; from here on it is this one's
        self._sweeps_stop = common.stop
        self._until: int | None = config.get("until")
        self._lost = threading.Event()
        self._news: queue.Queue[dict[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"trial {name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            prepared = prepare(self._recipe)
            with locked(self._recipe.folder, patience=PATIENCE, lost=self._leave) as hold:
                if finished(self._recipe.folder):
                    self._tell(figures_kept(self._recipe))
                    return
                same_run(self._recipe, self._recipe.folder)
                around = Surroundings(hold.token, self._tags, tracked=True, placed=self._placed, tell=self._tell)
                conduct(prepared, self._stop, max_cycles=self._until, surroundings=around)
                release(self._recipe.folder)
        except Held:
            self._tell_held()
        except (RunStopped, RunFailed) as error:  # stopped by cleanup, where nobody listens, or by its own monitor
            leg = self._until is not None and isinstance(error, RunStopped) and not self._stop.exists()
            if leg and end_leg(self._recipe.folder, int(self._until or 0)):
                self._news.put({"cycle": self._until, LEG: True, "finished": False, "done": True})
            elif isinstance(error, RunStopped) and self._told_to_stop():
                self._news.put({"cycle": 0, STOPPED: True, "finished": False, "done": True})
            else:
                self._fail(str(error))
        except BaseException as error:
            self._recipe.folder.mkdir(parents=True, exist_ok=True)
            with (self._recipe.folder / "error.log").open("a", encoding="utf-8") as log:
                log.write(hidden(traceback.format_exc()) + "\n")
            self._fail(f"{type(error).__name__}: {error} (traceback in error.log)")

    def _placed(self) -> None:
        self._begun = time.monotonic()  # to wait for nodes costs none

    def _leave(self, why: str) -> None:
        self._lost.set()
        self._tell_held()
        time.sleep(TOLD)
        leave(why)

    def _tell_held(self) -> None:
        self._news.put({"cycle": 0, HELD: True, "finished": False, "done": True})

    def _told_to_stop(self) -> bool:
        return self._sweeps_stop is not None and self._sweeps_stop.exists()

    def _fail(self, why: str) -> None:
        self._news.put({"cycle": 0, "error": hidden(why.strip().splitlines()[0]), "finished": False, "done": True})

    def _tell(self, figures: dict[str, float]) -> None:
        found = {k.removeprefix(EVALUATION): v for k, v in figures.items()}
        last = int(found["cycle"]) >= self._recipe.training.cycles
        self._news.put({**found, "finished": last, "done": last})


def figures_kept(recipe: Recipe) -> dict[str, float]:
    """The figures of a finished run's student.

    Raises:
        RunFailed: if its folder has none.
    """
    file = recipe.folder / "result.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        row = next(r for r in rows if r["name"] == "student")
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise RunFailed(f"{file} holds no student's figures: {error}") from None
    figures = {f"{EVALUATION}{k}": float(v) for k, v in row.items() if isinstance(v, int | float)}
    return {"cycle": float(recipe.training.cycles), **figures}


def folder_of(base: Recipe, root: int) -> Path:
    """Where a trial's run is."""
    return base.output / f"{root:04d}"
