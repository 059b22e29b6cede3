"""Stops one process of a run at one moment, until the harness has done its damage there.

Python imports this file by itself in every process whose ``PYTHONPATH`` has its folder, so raydmd has no hooks for
faults. ``RAYDMD_CHAOS`` is a JSON object: ``folder`` for the files below, and for each of ``moments`` its ``cycle``
(from 0) and ``rank``. Without it nothing happens. The function that is the moment is wrapped as its module is imported.
The first process that comes to it there leaves ``MOMENT.at.json`` and waits for the file ``MOMENT.released``. Processes
of each kind leave ``pids/*.json``.
"""

from __future__ import annotations

import functools
import importlib.abc
import json
import os
import sys
import time

PLAN = json.loads(os.environ.get("RAYDMD_CHAOS") or "{}")
PATIENCE = 600.0
"""Seconds that a process waits to be released; it ends itself then, so that nothing lasts for ever."""
WAITING = "waiting for teacher"
NOW = {"cycle": -1, "rank": -1}
BORN = time.time()


def claim(name):
    """Whether this process is the first to come here."""
    try:
        os.close(os.open(os.path.join(PLAN["folder"], name), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def leave(file_name, **facts):
    """Write a file that appears whole."""
    path = os.path.join(PLAN["folder"], file_name)
    with open(f"{path}.{os.getpid()}", "w") as file:
        json.dump({"pid": os.getpid(), "rank": NOW["rank"], "time": time.time(), **facts}, file)
    os.rename(f"{path}.{os.getpid()}", path)


def until_released(moment):
    """Stand still."""
    deadline = time.monotonic() + PATIENCE
    while not os.path.exists(os.path.join(PLAN["folder"], f"{moment}.released")):
        if time.monotonic() > deadline:
            os._exit(97)
        time.sleep(0.01)


def hold(moment):
    """The moment, for the first process that comes to it."""
    if claim(f"{moment}.claimed"):
        leave(f"{moment}.at.json")
        until_released(moment)


def doomed():
    """Whether this process is from before the last fault, which has taken its run from it; it may live on a little."""
    try:
        return os.path.getmtime(os.path.join(PLAN["folder"], "struck")) > BORN
    except FileNotFoundError:
        return False


def here(moment, *, cycle=True, rank=True):
    """Whether this is a moment that is planned."""
    planned = PLAN["moments"].get(moment)
    return (
        planned is not None
        and (moment == "export" or not doomed())  # an idle process may be asked to export, however old it is
        and (not cycle or NOW["cycle"] == planned["cycle"])
        and (not rank or NOW["rank"] == planned["rank"])
    )


def before(owner, name, look):
    """Have ``look`` called with a function's arguments before the function."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def outer(*args, **kwargs):
        look(*args, **kwargs)
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def in_worker(module):
    """Of a Train worker: its start and its phases."""

    def run(worker):
        NOW["rank"] = worker.session.rank
        leave(f"pids/worker-{os.getpid()}.json")
        if here("start", cycle=False):
            hold("start")

    def enter(worker, phase, students):
        del worker, students
        if here("phase change", cycle=False) and phase.index == 1:
            hold("phase change")

    before(module.Worker, "run", run)
    before(module.Worker, "_enter", enter)


def in_cycle(module):
    """Of a Train worker: fake updates, and which cycle it is in."""

    def cycle(actors, number):
        del actors
        NOW["cycle"] = number

    def fake(actors, drawn):
        del actors
        if here("fake update") and drawn.purpose == "fake.1":
            hold("fake update")

    before(module, "train_cycle", cycle)
    before(module, "update_fake", fake)


def in_rollout(module):
    """Of a Train worker: the rollout that is differentiated."""

    def rollout(*args, grad, **kwargs):
        del args, kwargs
        if here("rollout") and grad:
            hold("rollout")

    before(module.Rollout, "__call__", rollout)


def in_session(module):
    """Of a Train worker: a report without a checkpoint."""

    def report(session, metrics, writing=None, **how):
        del session, metrics, how
        if here("reporting") and writing is None:
            hold("reporting")

    before(module.RaySession, "report", report)


def in_manifest(module):
    """Of a Train worker: a checkpoint whose tensors are written and whose manifest is not."""

    def seal(folder, **how):
        del how
        planned = PLAN["moments"].get("checkpointing", {})
        # In a thread of its own, while training is in the next cycle.
        if folder.name == f"cycle-{planned.get('cycle', -2) + 1:08d}" and here("checkpointing", cycle=False):
            hold("checkpointing")

    before(module, "seal", seal)


def in_client(module):
    """Of a Train worker: it waits for an answer that a replica keeps back, see :func:`in_engine`."""

    def result(pending):
        if here(WAITING) and pending.name.startswith(f"cycle {NOW['cycle']} 0") and claim(f"{WAITING}.claimed"):
            deadline = time.monotonic() + PATIENCE
            while not os.path.exists(os.path.join(PLAN["folder"], "kept.json")) and time.monotonic() < deadline:
                time.sleep(0.01)
            leave(f"{WAITING}.at.json", request=pending.name)

    before(module.PoolPending, "result", result)


def in_engine(module):
    """Of the teacher's replica: it keeps back the answers that the planned rank's cycle waits for."""

    def answer(engine, requests):
        del engine
        planned = PLAN["moments"].get(WAITING)
        asked = [r.name for r in requests if planned and r.name.startswith(f"cycle {planned['cycle']} 0")]
        if asked and claim(f"keeping {asked[0]}"):
            leave("kept.json", requests=asked)
            until_released(WAITING)

    before(module.TeacherEngine, "answer", answer)


def in_replica(module):
    """Of a pool's replica: who it is."""

    def init(replica, build, settings, **kwargs):
        del replica, build, kwargs
        leave(f"pids/replica-{os.getpid()}.json", pool=settings.pool, name=settings.name)

    before(module.Replica, "__init__", init)


def in_export(module):
    """Of the process that exports: the pipeline's files are there, nothing is measured."""

    def readable(path):
        del path
        if here("export", cycle=False, rank=False):
            hold("export")

    before(module, "readable", readable)


WRAPPED = {
    "raydmd.training.worker": in_worker,
    "raydmd.training.cycle": in_cycle,
    "raydmd.methods.rollout": in_rollout,
    "raydmd.training.ray_worker": in_session,
    "raydmd.training.manifest": in_manifest,
    "raydmd.serving.pool_client": in_client,
    "raydmd.serving.engine": in_engine,
    "raydmd.serving.replica": in_replica,
    "raydmd.training.export": in_export,
}
"""What is done to a module once it is imported, before anybody takes a function out of it."""


def imported(run, module):
    """Import a module, and wrap it."""
    run(module)
    WRAPPED[module.__name__](module)


class Finder(importlib.abc.MetaPathFinder):
    """Lets the others find the modules above, and wraps them."""

    def find_spec(self, name, path, target=None):
        """See the base class."""
        if name not in WRAPPED:
            return None
        for other in sys.meta_path:
            found = None if other is self else other.find_spec(name, path, target)
            if found is not None:
                found.loader.exec_module = functools.partial(imported, found.loader.exec_module)
                return found
        return None


if PLAN:
    sys.meta_path.insert(0, Finder())
