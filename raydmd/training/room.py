"""Whether a cluster has room for a run, before anything starts and after a node has gone; asking and waiting for it."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raydmd.errors import InputError, RunFailed, RunStopped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.training.events import EventLog

EPSILON = 1e-9
MOST_WORKERS = 4096


def make_room(recipe: Recipe, stop: Path | None = None, log: EventLog | None = None, *, pause: float = 1.0) -> None:
    """Refuse a run that the cluster has no room for; where it may grow (``placement.autoscaled``) ask for it first.

    What nodes have is looked at, free or not, as in :func:`check_room`: a run waits its turn on nodes that are taken.

    Args:
        recipe: the run.
        stop: a file that ends the waiting.
        log: is told once what is lacking.
        pause: seconds between two looks.

    Raises:
        InputError: see :func:`check_room`.
        RunFailed: if there is still none when ``placement.room_timeout`` is over.
        RunStopped: if the run is stopped meanwhile.
    """
    if not grows(recipe):
        return check_room(recipe, living_nodes())
    bundles, copies = _processes(recipe)
    copies["worker"] = recipe.placement.workers_least or copies["worker"]  # Ray Train itself asks for the others
    patience, told = recipe.placement.room_timeout, False
    deadline = time.monotonic() + patience
    with Asked() as asked:
        while homeless := _homeless(bundles, copies, nodes := living_nodes()):
            groups = [asked.of(kind, bundles[kind], copies[kind]) for kind in homeless]
            if all(group.wait(0) for group in groups):  # Ray packs them otherwise than we do
                return
            lack = _lack(bundles, copies, nodes, homeless[0])
            if not told:
                told = True
                if log:
                    log.write("waiting", message=lack)
                print(
                    f"{lack}\nasked Ray's autoscaler; waiting for up to {patience:g} s (placement.room_timeout)",
                    flush=True,
                )
            if stop and stop.exists():
                raise RunStopped(f"run '{recipe.name}' stopped before it had room; the same command starts it")
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"run '{recipe.name}': {lack}\nRay's autoscaler was asked for it and did not bring it within "
                    f"placement.room_timeout={patience:g} s. If there is one, ray status says what keeps it: the most "
                    "nodes of a kind, what each has, or machines to be had. The same command asks again"
                )
            time.sleep(pause)


def grows(recipe: Recipe) -> bool:
    """Whether nodes may come for a run: it says so, and the cluster is not of this machine alone."""
    return recipe.placement.autoscaled and not ray.get_runtime_context().gcs_address.startswith("127.")


def untrained(recipe: Recipe, workers: int = 0) -> Recipe:
    """The recipe as far as room goes where nothing trains: its teachers, and so many places for an evaluation."""
    unused = {"workers": workers, "workers_least": 0, "samplers": 0}
    return recipe.model_copy(
        update={
            "placement": recipe.placement.model_copy(update=unused),
            "method": recipe.method.model_copy(update={"adapt": None}),
            "evaluation": recipe.evaluation.model_copy(update={"every": 0}),
        }
    )


class Asked(contextlib.AbstractContextManager["Asked"]):
    """What Ray's autoscaler is asked for, as long as the block lasts.

    It goes by placement groups that wait. These are never used: they end with the block, and the nodes that came for
    them stay for as long as the cluster keeps idle ones. Ray Train itself asks for workers while it runs.
    """

    def __init__(self) -> None:
        self._groups: dict[str, PlacementGroup] = {}

    def of(self, kind: str, bundle: Mapping[str, float], copies: int) -> PlacementGroup:
        """A kind's group, asked for once.

        Each kind has one of its own: of a group that can't be had whole the autoscaler brings nothing.
        """
        if kind not in self._groups:
            self._groups[kind] = placement_group([dict(bundle)] * copies)
        return self._groups[kind]

    def __exit__(self, *_: object) -> None:
        for group in self._groups.values():
            with contextlib.suppress(RayError):  # they end with the driver at the latest
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
    if not (homeless := _homeless(bundles, copies, nodes)):
        return
    kinds = [kind for kind in ("GPU", "CPU") if kind in _short(bundles, copies, nodes)] or ["CPU"]
    keys = [f"placement.{role}_{kind.lower()}s" for kind in kinds for role in bundles if role != "evaluation"]
    smaller = f"smaller {', '.join(keys)}" + (" (with 0 of GPUs it runs on CPUs)" if "GPU" in kinds else "")
    raise InputError(
        f"{_lack(bundles, copies, nodes, homeless[0])}\nuse fewer --workers or --teachers, {smaller}, or more nodes "
        "(placement.autoscaled=true waits for those that Ray's autoscaler brings)"
    )


def _short(
    bundles: Mapping[str, Mapping[str, float]], copies: Mapping[str, int], nodes: Sequence[Mapping[str, float]]
) -> list[str]:
    """Resources of which all nodes together have too little."""
    names = sorted({name for bundle in bundles.values() for name in bundle})
    asked = {n: sum(copies[kind] * bundle.get(n, 0.0) for kind, bundle in bundles.items()) for n in names}
    return [n for n in names if asked[n] > sum(node.get(n, 0.0) for node in nodes) + EPSILON]


def _lack(
    bundles: Mapping[str, Mapping[str, float]],
    copies: Mapping[str, int],
    nodes: Sequence[Mapping[str, float]],
    homeless: str,
) -> str:
    """What there is too little of, with the table of what is asked and what is there."""
    rows = {f"{n} x {kind}": {k: n * v for k, v in bundles[kind].items()} for kind, n in copies.items()}
    names = sorted({name for row in rows.values() for name in row})
    rows["asked in all"] = {n: sum(row.get(n, 0.0) for row in rows.values()) for n in names}
    rows["there is"] = {n: sum(node.get(n, 0.0) for node in nodes) for n in names}
    if len(nodes) > 1:
        rows["largest node"] = {n: max(node.get(n, 0.0) for node in nodes) for n in names}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{n:>12}" for n in names)]
    lines += [f"{title:<{width}}" + "".join(f"{row.get(n, 0.0):>12g}" for n in names) for title, row in rows.items()]
    short = _short(bundles, copies, nodes)
    what = f"too little {', '.join(short)}" if short else f"no node with room for another {homeless}"
    return f"the cluster has {what} for this run:\n" + "\n".join(lines)


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
    if not _homeless({"worker": bundle}, {"worker": workers}, nodes):
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
    while not _homeless(bundles, {k: n if k in shared else n * (count + 1) for k, n in copies.items()}, nodes):
        count += 1
        if count * p.workers >= MOST_WORKERS:
            break
    return count


def living_nodes() -> list[dict[str, float]]:
    """Resources of every living node of the cluster we are connected to."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _homeless(
    bundles: Mapping[str, Mapping[str, float]], copies: Mapping[str, int], nodes: Sequence[Mapping[str, float]]
) -> list[str]:
    """Place every process on a node, the greediest kind first; returns the kinds of which some found no place."""
    free, homeless = [dict(node) for node in nodes], []
    for kind in sorted(bundles, key=lambda k: (bundles[k].get("GPU", 0.0), bundles[k].get("CPU", 0.0)), reverse=True):
        for _ in range(copies[kind]):
            fits = (n for n in free if all(n.get(k, 0.0) >= v - EPSILON for k, v in bundles[kind].items()))
            # The tightest node first, or a large bundle later would find every node begun.
            node = min(fits, key=lambda n: (n.get("GPU", 0.0), n.get("CPU", 0.0)), default=None)
            if node is None:
                homeless.append(kind)
                break
            for k, v in bundles[kind].items():
                node[k] -= v
    return homeless


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
    with Asked() as asked:
        while (lack := lacks_room(recipe, nodes())) and time.monotonic() < deadline:
            if not told and grows(recipe):
                p = recipe.placement
                asked.of("worker", _processes(recipe)[0]["worker"], p.workers_least or p.workers)
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
