"""Following a run: the controller writes each report to a file, the driver reads it into a terminal and MLflow."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from ray.train import Checkpoint
from ray.train import UserCallback as RayUserCallback
from rich.console import Console
from rich.live import Live
from rich.text import Text

from raydmd.redact import hidden
from raydmd.training.events import METRICS, EventLog, append, read_from
from raydmd.training.monitor import RAISED
from raydmd.training.ranks import over_ranks
from raydmd.training.restarts import COMMITTED
from raydmd.training.students import EVALUATIONS
from raydmd.training.tracked import track_evaluation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ray.train.v2._internal.execution.context import TrainRunContext

    from raydmd.recipe import Recipe
    from raydmd.tracking.tracker import Tracker


class MetricsFile(RayUserCallback):
    """Appends every report to ``metrics.jsonl``, and an event for each checkpoint that is safe.

    Runs in Ray Train's controller, beside the driver, once the controller has written its books.

    Args:
        path: of the file.
        events: the run's.
    """

    def __init__(self, path: Path, events: EventLog) -> None:
        self._path, self._events = path, events

    def after_report(
        self,
        run_context: TrainRunContext,
        metrics: list[dict[str, Any]],
        checkpoint: Checkpoint | None,
    ) -> None:
        """Write the mean over ranks of every number; counters are the same on all ranks or add up."""
        append(self._path, over_ranks(metrics) | {"time": time.time()})
        if checkpoint is not None:
            self._events.write(COMMITTED, checkpoint=checkpoint.path.rstrip("/").rpartition("/")[2])


class Follower:
    """Reads a run's metrics as they come: one progress line, alarms, and MLflow.

    Args:
        folder: of the run.
        recipe: the run.
        tracker: where metrics go.
        console: to write to; default: standard output.
    """

    def __init__(self, folder: Path, recipe: Recipe, tracker: Tracker, console: Console | None = None) -> None:
        self._path, self._evaluations = folder / METRICS, folder / EVALUATIONS
        self._recipe = recipe
        self._tracker = tracker
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        # From the first row, though most may be from before a resume: the tracker knows what it has.
        self._offset = self._evaluated = 0
        self._start = time.time()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="raydmd-follow", daemon=True)
        self._rates: list[tuple[float, float]] = []
        self._said = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Read what is left and stop."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def _follow(self) -> None:
        if not self._console.is_terminal:
            while not self._done.wait(1.0):
                self._read(None)
            self._read(None)
            return
        with Live(Text("starting ..."), console=self._console, refresh_per_second=4, transient=False) as live:
            while not self._done.wait(0.5):
                self._read(live)
            self._read(live)

    def _read(self, live: Live | None) -> None:
        before = self._offset, self._evaluated
        rows, self._offset = read_from(self._path, self._offset)
        evaluations, self._evaluated = read_from(self._evaluations, self._evaluated)
        shown = [r for r in rows if "fake/loss" in r and r["time"] >= self._start]
        for row in shown:
            if self._rates and row["cycle"] < self._rates[-1][1]:  # rolled back
                self._rates = []
            self._rates = [*self._rates[-20:], (row["time"], row["cycle"])]
        if shown:
            line = progress_line(shown[-1], self._recipe, self._rates)
            if live is not None:
                live.update(Text(line))
            elif time.monotonic() - self._said > 10 or self._done.is_set():
                self._said = time.monotonic()
                self._console.print(line)
        try:
            self._tracker.log(rows)
            for row in evaluations:
                track_evaluation(self._tracker, row)
        except Exception as error:  # the rows are kept in the file; the next reading tries again
            self._console.print(f"tracking: {type(error).__name__}: {hidden(str(error))}; will try again")
            self._offset, self._evaluated = before
            self._done.wait(5.0)


def progress_line(row: Mapping[str, float], recipe: Recipe, rates: list[tuple[float, float]]) -> str:
    """One line for people: where the run is, how fast, and whether something looks wrong."""
    cycle, total = int(row["cycle"]), int(row["cycles"])
    spent = {k: v for k, v in row.items() if k.startswith("time/")}
    wait = spent.get("time/teacher_wait", 0.0) / max(sum(spent.values()), 1e-9)
    (t0, c0), (t1, c1) = rates[0], rates[-1]
    rate = (c1 - c0) / (t1 - t0) if t1 > t0 else 0.0
    left = f"{(total - cycle) / rate / 60:.1f} min left" if rate else "..."
    parts = [
        f"cycle {cycle}/{total}",
        f"phase {int(row['phase']) + 1}",
        f"{rate:.2f} cycles/s",
        left,
        f"fake loss {row['fake/loss']:.3f}",
        f"gradient {row['student/gradient']:.3g}",
        f"teacher wait {wait:.0%}",
    ]
    return "  ".join(parts + alarms(row))


def alarms(row: Mapping[str, float]) -> list[str]:
    """What a person should look at now."""
    found = []
    if raised := [key.removeprefix(RAISED) for key in row if key.startswith(RAISED)]:
        found.append("ALARM " + ", ".join(_under(kind, row.get(f"monitor/{kind}", 0.0)) for kind in raised))
    if row["teacher/retries"]:
        found.append(f"{int(row['teacher/retries'])} teacher retries")
    return found


def _under(kind: str, pressure: float) -> str:
    """A raised signal; it stays raised until it was well below its limit for a while."""
    return f"{kind} at {pressure:.1f} of its limit" + (", calming down" if pressure < 1 else "")
