"""Starting or joining Ray, and checking that a run fits before anything starts."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from raydmd.errors import InputError, RunFailed
from raydmd.serving.joining import loopback, on_loopback, reachable
from raydmd.training.access import warning

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.recipe import Recipe


START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
SHRINKING = 30.0
"""Seconds that Ray Train waits for as many workers as it has decided on. Where it may take fewer that is no longer than
its news of nodes are old, for it may have counted one that has just gone."""
EPSILON = 1e-9
MOST_WORKERS = 4096


def connect() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names (a submitted job has it), or start one of our own here.

    A cluster that happens to run on this machine is never joined by accident. One of our own listens on this machine
    alone; one that asks for no token is told.

    Raises:
        InputError: if the named cluster cannot be joined.
        RunFailed: if one of our own does not start.
    """
    settle()
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {"num_cpus": os.cpu_count() or 1, "include_dashboard": False}
    else:
        reachable(address)
    try:
        with loopback(not address or on_loopback(address)):
            ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot join the Ray cluster at {address!r}: {error}") from error
    except Exception as error:  # what Ray raises over a node of its own that starts too slowly
        raise RunFailed(
            f"Ray did not start: {error} Is this machine overloaded, or out of memory or disk? Nothing was lost; the "
            "same command tries again"
        ) from error
    if said := warning(ray.get_runtime_context().gcs_address, own=not address):
        print(said, flush=True)


def settle() -> None:
    """Settings of Ray that this process, and what it starts, go by unless told otherwise."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray lowers its workers' priority; here they are the work, and would starve beside anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A committed checkpoint is one the controller has seen: look often, so that little is redone.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def wait_briefly(recipe: Recipe) -> None:
    """Have Ray Train decide anew soon, in a run that may shrink; a value that is set from outside stays."""
    if recipe.placement.workers_least:
        os.environ.setdefault(START_TIMEOUT, f"{SHRINKING:g}")


def lasting(output: Path) -> Path:
    """An absolute output folder; a submitted job's own directory is deleted with the job, so home then."""
    output = output.expanduser()
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return output if output.is_absolute() else (Path.home() / "raydmd" if in_job else Path.cwd()) / output


def check_room(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse a run that the cluster has no room for.

    Args:
        recipe: the run.
        nodes: resources of each living node, see :func:`living_nodes`.

    Raises:
        InputError: with the table of what is asked and what is there; also where the sum would do and no node
            is large enough for one of the processes.
    """
    bundles, copies = _processes(recipe)
    if recipe.placement.workers_least:
        copies["worker"] = _begun_with(recipe, bundles["worker"], nodes)
    if (homeless := _pack(bundles, copies, nodes)) is None:
        return
    rows = {f"{n} x {kind}": {k: n * v for k, v in bundles[kind].items()} for kind, n in copies.items()}
    names = sorted({name for row in rows.values() for name in row})
    rows["asked in all"] = {n: sum(row.get(n, 0.0) for row in rows.values()) for n in names}
    rows["there is"] = {n: sum(node.get(n, 0.0) for node in nodes) for n in names}
    if len(nodes) > 1:
        rows["largest node"] = {n: max(node.get(n, 0.0) for node in nodes) for n in names}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{n:>12}" for n in names)]
    lines += [f"{title:<{width}}" + "".join(f"{row.get(n, 0.0):>12g}" for n in names) for title, row in rows.items()]
    short = [n for n in names if rows["asked in all"][n] > rows["there is"][n] + EPSILON]
    kinds = [kind for kind in ("GPU", "CPU") if kind in short] or ["CPU"]
    keys = [f"placement.{role}_{kind.lower()}s" for kind in kinds for role in bundles if role != "evaluation"]
    smaller = f"smaller {', '.join(keys)}" + (" (with 0 of GPUs it runs on CPUs)" if "GPU" in kinds else "")
    what = f"too little {', '.join(short)}" if short else f"no node with room for another {homeless}"
    raise InputError(
        f"the cluster has {what} for this run:\n" + "\n".join(lines) + "\n"
        f"use fewer --workers or --teachers, {smaller}, or more nodes"
    )


def _processes(recipe: Recipe) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """What a run's processes ask, and how many there are of each kind."""
    p = recipe.placement
    bundles = {"worker": _bundle(p.worker_cpus, p.worker_gpus, p.worker_resources)}
    copies = {"worker": p.workers}
    if p.teacher == "remote":
        bundles["teacher"] = _bundle(p.teacher_cpus, p.teacher_gpus, p.teacher_resources)
        copies["teacher"] = p.teachers
    if recipe.method.adapt and p.reward == "remote":
        bundles["reward"] = _bundle(p.reward_cpus, p.reward_gpus, p.reward_resources)
        copies["reward"] = p.rewards
    if p.samplers:
        bundles["sampler"] = _bundle(p.sampler_cpus, p.sampler_gpus, {})
        copies["sampler"] = p.samplers
    if recipe.evaluation.every:
        bundles["evaluation"] = _bundle(min(p.teacher_cpus, p.worker_cpus), p.worker_gpus, {})
        copies["evaluation"] = 1
    return bundles, copies


def lacks_room(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> str:
    """What nodes have too little of for a run's workers, or for as few as it may shrink to; empty if they have room.

    Pools go on with what they get, so that they are not looked at.
    """
    p = recipe.placement
    bundle, workers = _processes(recipe)[0]["worker"], p.workers_least or p.workers
    if _pack({"worker": bundle}, {"worker": workers}, nodes) is None:
        return ""
    asked = ", ".join(f"{k} {v:g}" for k, v in bundle.items())
    there = ", ".join(f"{k} {sum(node.get(k, 0.0) for node in nodes):g}" for k in bundle)
    count = f"{len(nodes)} node" + "s" * (len(nodes) != 1)
    return f"no room for {workers} worker{'s' * (workers != 1)} of {asked} each: {count} with {there} in all"


def _begun_with(recipe: Recipe, bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """Workers that Ray Train starts on these nodes: as many as they have resources for, free or not."""
    room = sum(min(int(node.get(k, 0.0) // v) for k, v in bundle.items()) for node in nodes)
    return max(recipe.placement.workers_least, min(room, recipe.placement.workers))


def parallel_runs(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many such runs fit side by side, with one pool of the teacher for all of them."""
    p, count = recipe.placement, 0
    bundles, copies = _processes(recipe)
    shared = {"teacher", "reward"}
    while _pack(bundles, {k: n if k in shared else n * (count + 1) for k, n in copies.items()}, nodes) is None:
        count += 1
        if count * p.workers >= MOST_WORKERS:
            break
    return count


def living_nodes() -> list[dict[str, float]]:
    """Resources of every living node of the cluster we are connected to."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _pack(
    bundles: Mapping[str, Mapping[str, float]], copies: Mapping[str, int], nodes: Sequence[Mapping[str, float]]
) -> str | None:
    """Place every process on a node, the greediest kind first; returns the kind that found no place."""
    free = [dict(node) for node in nodes]
    for kind in sorted(bundles, key=lambda k: (bundles[k].get("GPU", 0.0), bundles[k].get("CPU", 0.0)), reverse=True):
        for _ in range(copies[kind]):
            fits = (n for n in free if all(n.get(k, 0.0) >= v - EPSILON for k, v in bundles[kind].items()))
            # The tightest node first, or a large bundle later would find every node begun.
            node = min(fits, key=lambda n: (n.get("GPU", 0.0), n.get("CPU", 0.0)), default=None)
            if node is None:
                return kind
            for k, v in bundles[kind].items():
                node[k] -= v
    return None


def _bundle(cpus: float, gpus: float, resources: Mapping[str, float]) -> dict[str, float]:
    return {n: v for n, v in {"CPU": cpus, "GPU": gpus, **resources}.items() if v}
