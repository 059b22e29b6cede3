"""Starting or joining Ray, and checking that a run fits before anything starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raydmd.recipe import Recipe


def connect() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names (a submitted job has it), or start one of our own here.

    A cluster that happens to run on this machine is never joined by accident.

    Raises:
        InputError: if the named cluster cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray lowers its workers' priority; here they are the work, and would starve beside anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A committed checkpoint is one the controller has seen: look often, so that little is redone.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {"num_cpus": os.cpu_count() or 1, "include_dashboard": False}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot join the Ray cluster at {address!r}: {error}") from error


def lasting(output: Path) -> Path:
    """An absolute output folder; a submitted job's own directory is deleted with the job, so home then."""
    output = output.expanduser()
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return output if output.is_absolute() else (Path.home() / "raydmd" if in_job else Path.cwd()) / output


def demands(recipe: Recipe) -> dict[str, dict[str, float]]:
    """What each kind of process asks for, summed over its copies."""
    p = recipe.placement
    wanted = {
        f"{p.workers} x worker": _sum(p.workers, p.worker_cpus, p.worker_gpus, p.worker_resources),
    }
    if p.teacher == "remote":
        wanted[f"{p.teachers} x teacher"] = _sum(p.teachers, p.teacher_cpus, p.teacher_gpus, p.teacher_resources)
    return wanted


def check_room(recipe: Recipe, available: Mapping[str, float]) -> None:
    """Refuse a run that the cluster has no room for.

    Args:
        recipe: the run.
        available: what the cluster has, as ``ray.cluster_resources()`` says.

    Raises:
        InputError: with the table of what is asked and what is there.
    """
    wanted = demands(recipe)
    names = sorted({name for row in wanted.values() for name in row})
    total = {n: sum(row.get(n, 0.0) for row in wanted.values()) for n in names}
    short = [n for n in names if total[n] > available.get(n, 0.0) + 1e-9]
    if not short:
        return
    width = max(len(r) for r in (*wanted, "asked in all", "there is"))
    lines = [" " * width + "".join(f"{n:>12}" for n in names)]
    for title, row in (*wanted.items(), ("asked in all", total), ("there is", dict(available))):
        lines.append(f"{title:<{width}}" + "".join(f"{row.get(n, 0.0):>12g}" for n in names))
    raise InputError(
        f"the cluster has too little {', '.join(short)} for this run:\n" + "\n".join(lines) + "\n"
        "use fewer --workers or --teachers, smaller placement.worker_cpus or placement.teacher_cpus, or more nodes"
    )


def _sum(count: int, cpus: float, gpus: float, resources: Mapping[str, float]) -> dict[str, float]:
    row = {"CPU": count * cpus, "GPU": count * gpus} | {n: count * v for n, v in resources.items()}
    return {n: v for n, v in row.items() if v}
