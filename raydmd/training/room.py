"""Whether a cluster has room for a run, before anything starts and after a node has gone; asking and waiting for it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raydmd.errors import InputError, RunFailed, RunStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.training.events import EventLog

EPSILON = 1e-9
MOST_WORKERS = 4096


def make_room(recipe: Recipe, stop: Path | None = None, *, pause: float = 1.0) -> None:
    """Refuse a run that the cluster has no room for; of one that grows (``placement.autoscaled``) ask for it first.

    Args:
        recipe: the run.
        stop: a file that ends the waiting.
        pause: seconds between two looks.

    Raises:
        InputError: see :func:`check_room`.
        RunFailed: if there is still none when ``placement.room_timeout`` is over.
        RunStopped: if the run is stopped meanwhile.
    """
    patience = recipe.placement.room_timeout
    deadline = time.monotonic() + patience
    with contextlib.ExitStack() as stack:
        asked = False
        while True:
            try:
                return check_room(recipe, living_nodes())
            except InputError as error:
                if not recipe.placement.autoscaled:
                    raise
                lack, _, _ = str(error).rpartition("\n")
            if not asked:
                asked = True
                stack.enter_context(asking(recipe))
                print(f"{lack}\nasked Ray's autoscaler for it; waiting for up to {patience:g} s", flush=True)
            if stop and stop.exists():
                raise RunStopped(f"run '{recipe.name}' stopped before it had room; the same command starts it")
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"run '{recipe.name}': {lack}\nRay's autoscaler was asked for it and did not bring it within "
                    f"placement.room_timeout={patience:g} s. ray status says what it lacks: its nodes' most, their "
                    "resources, or machines to be had. The same command asks again"
                )
            time.sleep(pause)


@contextlib.contextmanager
def asking(recipe: Recipe, *, workers_alone: bool = False) -> Iterator[None]:
    """Ray's autoscaler sees what a run lacks for as long as the block lasts, if it has one.

    It goes by placement groups that wait. This one is never used: it ends with the block, and the nodes that came for
    it stay for as long as the cluster keeps idle ones. Ray Train itself asks for workers while it runs.

    Args:
        recipe: the run; without ``placement.autoscaled`` nothing is asked for.
        workers_alone: since its pools live.
    """
    if not recipe.placement.autoscaled:
        yield
        return
    bundles, copies = _processes(recipe)
    copies["worker"] = recipe.placement.workers_least or copies["worker"]
    kinds = ["worker"] if workers_alone else list(bundles)
    group = placement_group([bundles[kind] for kind in kinds if bundles[kind] for _ in range(copies[kind])])
    try:
        yield
    finally:
        remove_placement_group(group)


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
        f"use fewer --workers or --teachers, {smaller}, or more nodes (placement.autoscaled=true waits for those that "
        "Ray's autoscaler brings)"
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


def wait_for_room(
    recipe: Recipe,
    log: EventLog,
    meanwhile: Callable[[], Any],
    nodes: Callable[[], Sequence[Mapping[str, float]]] = living_nodes,
    pause: float = 1.0,
) -> None:
    """Wait until the cluster has nodes for the workers again, which is no failure of theirs.

    Args:
        recipe: the run.
        log: is told once what there is too little of.
        meanwhile: is called between two looks.
        nodes: the living ones' resources.
        pause: seconds between two looks.

    Raises:
        RunFailed: if it has none in time.
        RunStopped: if the run is stopped meanwhile.
    """
    stop = recipe.folder / "STOP"
    patience, told = recipe.placement.room_timeout, ""
    deadline = time.monotonic() + patience
    with contextlib.ExitStack() as stack:
        while (lack := lacks_room(recipe, nodes())) and time.monotonic() < deadline:
            if not told:
                stack.enter_context(asking(recipe, workers_alone=True))
            if lack != told:
                told = lack
                log.write("waiting", message=lack)
                print(f"{lack}; waiting for up to {patience:g} s (placement.room_timeout)", flush=True)
            if stop.exists():
                raise RunStopped(f"run '{recipe.name}' stopped while there was {lack}; the same command resumes it")
            meanwhile()
            time.sleep(pause)
    if lack:
        raise RunFailed(
            f"run '{recipe.name}': {lack}, for placement.room_timeout={patience:g} s. Its last checkpoint is kept: "
            "bring nodes back and give the same command, or one with fewer --workers"
        )
