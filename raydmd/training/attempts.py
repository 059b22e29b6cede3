"""Starting the workers as often as it takes: Ray Train makes each attempt, and what follows a failure is decided here.

Ray Train's own restarts count all failures of a run, however much it has gained in between, and tell nobody.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydmd.errors import RunFailed, RunStopped
from raydmd.redact import hidden
from raydmd.training.checkpoint import cycle_of
from raydmd.training.events import EventLog, read_lines
from raydmd.training.failures import explain
from raydmd.training.groups import controller, free_orphans, give_back
from raydmd.training.mending import catch_up, check_books, clear, patiently
from raydmd.training.restarts import Budget, GiveUp, progress
from raydmd.training.room import wait_for_room
from raydmd.training.stopping import fit
from raydmd.training.watchdog import Post, kept, posts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ray.train.torch import TorchTrainer

    from raydmd.recipe import Recipe
    from raydmd.serving.pool import Pool

LATE = 30.0
"""Seconds after its deadline that a worker's own watchdog has, before the driver ends it."""
ANSWER = 60.0
"""Seconds that a node has to do so."""
WORKER, CONTROLLER = "RayTrainWorker", "TrainController"
LOOKS = 5.0
"""Seconds between two looks at what the ranks do."""


def attempts(
    recipe: Recipe, make: Callable[[], TorchTrainer], pools: Sequence[Pool], meanwhile: Callable[[], None]
) -> None:
    """Run workers until they have finished.

    Args:
        recipe: the run.
        make: a trainer for one attempt; it goes on from the last checkpoint.
        pools: that the workers ask.
        meanwhile: is called every second.

    Raises:
        RunFailed: where no restart helps; names the cause.
        DamagedCheckpoint: if what a restart would go on from is damaged.
        RunStopped: if the run is to stop, or ``training.on_stall`` has it stop.
        PoolError: if a pool does not load.
    """
    folder, t = recipe.folder, recipe.training
    log = EventLog(folder / "events.jsonl")
    stop, path = folder / "STOP", folder / "events.jsonl"
    patience, stops = recipe.placement.room_timeout, t.on_stall == "stop"
    budget = Budget(t.max_failures, progress(read_lines(path)), patience=patience, stops=stops)
    _put_away(folder, log)
    while True:
        stalls = Stalls(folder, t.stall_timeout + LATE)
        seen = sum(1 for _ in read_lines(path))

        def look(stalls: Stalls = stalls) -> None:
            meanwhile()
            stalls.look()

        patiently(functools.partial(catch_up, recipe), recipe, meanwhile)
        patiently(functools.partial(clear, recipe), recipe, meanwhile)
        try:
            fit(make(), pools, look)
            return
        except (ray.train.TrainingFailedError, RayError) as error:
            give_back(folder)
            free_orphans()
            ranks = posts(folder)
            stalled = [*stalls.ended.values(), *_put_away(folder, log)]
            for line in stalls.ended.values():
                log.write("stalled", doing=line, stacks="")
            events = list(read_lines(path))
            # Its controller may have died as it wrote them.
            patiently(functools.partial(check_books, recipe), recipe, meanwhile)
            failure = explain(error, ranks, stalled, _since_start(events[seen:]))
            decision = budget.decide(failure, progress(events), time.monotonic())
            cause: BaseException = error
        if isinstance(decision, GiveUp) and not decision.stopped:
            raise RunFailed(
                f"run '{recipe.name}' failed: {failure.message}\nNo further restart: {decision.why}. Its last "
                f"checkpoint is kept; the same command resumes. Log: {path}"
            ) from cause
        if isinstance(decision, GiveUp) or stop.exists():
            asked = f" ({decision.why})" if isinstance(decision, GiveUp) else ""
            raise RunStopped(
                f"run '{recipe.name}' stopped{asked}: {failure.message}\nIts last checkpoint is kept; the same "
                "command resumes it"
            ) from cause
        log.write(
            "restart",
            message=failure.message,
            failure=failure.kind,
            rank=failure.rank,
            node=failure.node,
            count=decision.count,
            most=t.max_failures,
            pause=decision.pause,
        )
        newest = progress(events)
        where = f"cycle {cycle_of(newest)}" if newest else "where it began"
        wait = f" in {decision.pause:g} s" if decision.pause else ""
        counted = f" ({decision.count} of at most {t.max_failures} without a new checkpoint)" if decision.count else ""
        print(f"{hidden(failure.message)}\nrestarting from {where}{wait}{counted}", flush=True)
        _wait(decision.pause, stop, meanwhile)
        wait_for_room(recipe, log, meanwhile)


class Stalls:
    """Ends workers whose own watchdog cannot: a process that is stopped, or whose machine has frozen.

    Args:
        folder: of the run.
        seconds: without a sign of life.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._seen: dict[int, tuple[Post, float]] = {}
        self._looked = time.monotonic()
        self._gone: set[int] = set()
        self.ended: dict[int, str] = {}
        """What those did who were ended, by rank."""

    def look(self) -> None:
        """See whether every rank has written anything in time, by this process's clock."""
        now = time.monotonic()
        if now - self._looked < LOOKS:
            return
        self._looked = now
        for rank, post in posts(self._folder).items():
            before, since = self._seen.get(rank, (None, now))
            if before is None or (before.pid, before.since) != (post.pid, post.since):
                since = now
            self._seen[rank] = post, since
            if now - since > self._seconds:
                self._seen[rank] = post, now  # another try, should this one fail
                if status := end_process(post.pid, post.node, WORKER):
                    line = f"{post.line()} (the process was {status})"
                    self.ended[rank] = line
                    print(f"{line}: no sign of life for {self._seconds:g} s, ended", flush=True)
                elif rank in self._gone and (found := controller(self._folder)):
                    # It was gone a whole limit ago, and Ray Train, which looks every few seconds, has not noticed.
                    print(f"{post.line()}: long gone, and Ray Train's controller (pid {found[0]}) is ended", flush=True)
                    end_process(*found, CONTROLLER)
                else:
                    self._gone.add(rank)


def end_process(pid: int, node: str, title: str) -> str:
    """Kill a process of Ray Train, from its own node.

    Args:
        pid: its number.
        node: that it is on.
        title: what Ray calls such a process: another one may have its number now.

    Returns:
        What state its process was in; empty if it is not there.
    """
    where = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
    try:
        return str(ray.get(task.remote(pid, title), timeout=ANSWER))
    except RayError:  # it may still come to it; and Ray itself notices a node that is gone
        return "on a node that does not answer"


def _kill(pid: int, title: str) -> str:
    import psutil

    try:
        process = psutil.Process(pid)
        if not any(title in part for part in process.cmdline()[:1]):
            return ""
        status = process.status()
        process.kill()
    except psutil.Error:
        return ""
    return str(status)


def _since_start(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """An attempt's events of its last group: Ray Train itself begins anew after a preemption, or with more workers."""
    begun = max((n for n, e in enumerate(events) if e["event"] in ("start", "resume")), default=-1)
    return events[begun + 1 :]


def _put_away(folder: Path, log: EventLog) -> list[str]:
    """Tell of the workers that their watchdogs have ended; returns what they did."""
    found = kept(folder)
    for file, doing in found.items():
        log.write("stalled", doing=doing, stacks=str(file))
    return list(found.values())


def _wait(seconds: float, stop: Path, meanwhile: Callable[[], Any]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stop.exists():
        meanwhile()
        time.sleep(0.5)
