"""Asking all nodes of the cluster that this process has joined, each by an actor that stays there meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from typing import TYPE_CHECKING, Any

import ray
import ray.cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydmd.doctor import probe
from raydmd.doctor.facts import GIB, Facts, Folder, Gpu, Link, NodeFacts
from raydmd.doctor.services import ask_dashboard, ask_named
from raydmd.errors import InputError
from raydmd.serving.order import plain
from raydmd.training.access import is_open
from raydmd.training.store import check_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LATE_NEWS = 15.0
"""Seconds that a file server may take to tell a node of another's file."""
CONNECT = 5.0
"""Seconds for one node to connect to another."""
LOOKS = 5
"""At each clock, of which the quickest counts."""
HEAD = "node:__internal_head__"


class Cluster:
    """The cluster that this process has joined.

    Args:
        deadline: seconds for each question.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        self._nodes: dict[str, dict[str, Any]] = {}
        for node in sorted(alive, key=lambda n: HEAD not in n["Resources"]):
            address = node["NodeManagerAddress"]
            same = sum(n["NodeManagerAddress"] == address for n in self._nodes.values())
            self._nodes[f"{address}#{same + 1}" if same else address] = node

    def look(self, folders: Sequence[str], inputs: Sequence[str], storage: str | None) -> Facts:
        """What all its nodes tell.

        Args:
            folders: that all should see.
            inputs: files and folders that all should find.
            storage: address of object storage that all should reach.
        """
        probes = self._start(list(self._nodes))
        told, silent = self._ask(probes, lambda _, p: p.look.remote(), self._deadline + probe.SLOW)
        probes = {name: probes[name] for name in told}
        seen = self._folders(probes, folders)
        missing, _ = self._ask(probes, lambda _, p: p.missing.remote(list(inputs)))
        stored = self._storage(list(told), storage) if storage else {}
        metrics = self._metrics(probes)
        nodes = []
        for name, node in self._nodes.items():
            resources = node["Resources"]
            if name in silent:
                error = f"it could not be looked at: {silent[name]}"
                nodes.append(NodeFacts(name=name, head=HEAD in resources, error=error))
                continue
            clock, within = self._clock(probes[name])
            size = resources.get("object_store_memory")
            more = {
                "head": HEAD in resources,
                "ray_gpus": resources.get("GPU", 0.0),
                "object_store": None if size is None else size / GIB,
                "clock": clock,
                "clock_error": within,
                "folders": seen.get(name, ()),
                "missing": tuple(missing.get(name, ())),
                "checkpoints": stored.get(name),
                "metrics": metrics.get(name),
            }
            nodes.append(node_facts(name, told[name], **more))
        return Facts(
            asks_token=refuses(ray.get_runtime_context().gcs_address),
            nodes=tuple(nodes),
            blocked=self._blocked(probes),
            dashboard=self._at_head(probes, ask_dashboard),
            services=tuple(self._at_head(probes, ask_named) or ()),
            links=self._links(probes, nodes),  # last: it ends actors that hang
        )

    def _start(self, names: Sequence[str], **options: Any) -> dict[str, Any]:
        # By value: nodes may have another raydmd, or none.
        ray.cloudpickle.register_pickle_by_value(probe)  # type: ignore[no-untyped-call]
        try:
            actor = ray.remote(probe.Probe)
            return {
                name: actor.options(num_cpus=0, scheduling_strategy=self._on(name), **options).remote()
                for name in names
            }
        finally:
            ray.cloudpickle.unregister_pickle_by_value(probe)  # type: ignore[no-untyped-call]

    def _on(self, name: str) -> NodeAffinitySchedulingStrategy:
        return NodeAffinitySchedulingStrategy(self._nodes[_node(name)]["NodeID"], soft=False)

    def _address(self, name: str) -> str:
        return str(self._nodes[_node(name)]["NodeManagerAddress"])

    def _ask(
        self, probes: Mapping[str, Any], call: Callable[[str, Any], Any], seconds: float | None = None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Answers of nodes to one question, by name, and what kept the others from answering."""
        seconds = seconds or self._deadline
        until = time.monotonic() + seconds
        asked = {name: call(name, actor) for name, actor in probes.items()}
        found, errors = {}, {}
        for name, ref in asked.items():
            try:
                found[name] = ray.get(ref, timeout=max(until - time.monotonic(), 0.1))
            except GetTimeoutError:
                errors[name] = f"no answer within {seconds:g} s"
            except RayError as error:
                errors[name] = _last(error)
        return found, errors

    def _clock(self, actor: Any) -> tuple[float | None, float]:
        """Seconds that a node is ahead, by the quickest of some looks, and half of what that one took."""
        clock, least = None, float("inf")
        for _ in range(LOOKS):
            began = time.time()
            told, _late = self._ask({"": actor}, lambda _, p: p.now.remote())
            half = (time.time() - began) / 2
            if told and half < least:
                clock, least = told[""] - began - half, half
        return clock, 0.0 if clock is None else least

    def _folders(self, probes: Mapping[str, Any], folders: Sequence[str]) -> dict[str, tuple[Folder, ...]]:
        """What each node sees of folders into which all of them write a file."""
        found: dict[str, list[Folder]] = {name: [] for name in probes}
        for path in folders:
            mark = uuid.uuid4().hex[:8]
            told, silent = self._ask(probes, lambda n, p, at=path, m=mark: p.write.remote(at, m, n))  # type: ignore[misc]
            count = sum(not one.get("error") for one in told.values())
            sees, _ = self._ask(
                {name: probes[name] for name in told},
                lambda _, p, at=path, m=mark, c=count: p.sees.remote(at, m, c, LATE_NEWS),  # type: ignore[misc]
                self._deadline + LATE_NEWS,
            )
            made = {name: one.pop("made") for name, one in told.items()}
            for name in probes:
                if name in silent:
                    found[name].append(Folder(path, error=silent[name]))
                else:
                    found[name].append(Folder(**told[name], made=made[name], sees=tuple(sees.get(name, ()))))
            # One after the other: a folder goes when all files in it are gone.
            self._ask(probes, lambda n, p, at=path, m=mark: p.erase.remote(at, m, n))  # type: ignore[misc]
            self._ask(probes, lambda n, p, at=path, m=made: p.tidy.remote(at, m.get(n, "")))  # type: ignore[misc]
        return {name: tuple(those) for name, those in found.items()}

    def _storage(self, names: Sequence[str], storage: str) -> dict[str, str]:
        task = ray.remote(num_cpus=0)(try_storage)
        found, errors = self._ask(
            dict.fromkeys(names),
            lambda name, _: task.options(scheduling_strategy=self._on(name)).remote(storage),
            self._deadline + probe.SLOW,
        )
        return {**found, **errors}

    def _metrics(self, probes: Mapping[str, Any]) -> dict[str, str]:
        """What came of asking each node's metrics from the head, where Prometheus usually runs."""
        found = {}
        for name in probes:
            url = f"http://{self._address(name)}:{self._nodes[name]['MetricsExportPort']}/metrics"
            text, error = self._at_head(probes, lambda on_head, at=url: on_head("fetch", at, {})) or ("", "no answer")  # type: ignore[misc]
            found[name] = f"{url}: {error}" if error else "" if "ray_" in text else f"{url}: no metrics of Ray"
        return found

    def _at_head(self, probes: Mapping[str, Any], ask: Callable[[Callable[..., Any]], Any]) -> Any:
        """Let the first node's probe find something out; ``None`` if it does not answer."""
        if not probes:
            return None
        actor = next(iter(probes.values()))

        def on_head(method: str, *args: Any) -> Any:
            return ray.get(getattr(actor, method).remote(*args), timeout=self._deadline)

        with contextlib.suppress(RayError):
            return ask(on_head)
        return None

    def _blocked(self, probes: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        """Pairs of nodes of which the first can't connect to the second."""
        ports, _ = self._ask(probes, lambda name, p: p.listen.remote(self._address(name)))
        targets = {name: (self._address(name), port) for name, port in ports.items()}
        patience = self._deadline + CONNECT * len(targets)
        failed, _ = self._ask(probes, lambda _, p: p.reach.remote(targets, CONNECT), patience)
        self._ask(probes, lambda _, p: p.hang_up.remote())
        return tuple((name, other) for name, others in failed.items() for other in others)

    def _links(self, probes: Mapping[str, Any], nodes: Sequence[NodeFacts]) -> tuple[Link, ...]:
        links = [self._exchange("gloo", probes)] if len(probes) > 1 else []
        gpus = [
            f"{node.name} {i}"
            for node in nodes
            for i in range(min(int(node.ray_gpus), node.torch_gpus or 0))  # whole ones
        ]
        if len(gpus) > 1:
            links.append(self._gpus(gpus))
        return tuple(links)

    def _gpus(self, gpus: Sequence[str]) -> Link:
        """An exchange between all GPUs that are free, of a node or of several.

        Args:
            gpus: a name for each, which begins with its node's.
        """
        holding = self._start(gpus, num_gpus=1)
        free, busy = self._ask(holding, lambda _, p: p.now.remote())
        for name in busy:  # one that got its GPU later would hold it
            ray.kill(holding[name])
        without = {_node(n) for n in gpus} - {_node(n) for n in free}
        if without or len(free) < 2:
            link = Link("nccl", skipped=f"no free GPU on {', '.join(sorted(without))}" if without else "one free GPU")
        else:
            link = self._exchange("nccl", {name: holding[name] for name in free})
            errors = {_node(name): error for name, error in link.errors.items()}
            over = f"{len(free)} of {len(gpus)} GPUs, the others were not free" if busy else f"{len(free)} GPUs"
            link = dataclasses.replace(link, errors=errors, over=over)
        for name in free:
            ray.kill(holding[name])
        return link

    def _exchange(self, backend: str, probes: Mapping[str, Any]) -> Link:
        names = list(probes)
        address = self._address(names[0])
        port, failed = self._ask({names[0]: probes[names[0]]}, lambda _, p: p.free_port.remote(address))
        if failed:
            return Link(backend, errors=failed)
        store = (address, port[names[0]])
        told, errors = self._ask(
            probes,
            lambda name, p: p.exchange.remote(backend, names.index(name), len(names), store, self._deadline),
            3 * self._deadline + probe.SLOW,
        )
        if errors:
            for actor in probes.values():
                ray.kill(actor)  # one that hangs in there would stay for ever
            return Link(backend, errors=errors)
        return Link(
            backend,
            milliseconds=max(small for small, _ in told.values()),
            gigabytes=min(large for _, large in told.values()),
        )


def _node(name: str) -> str:
    """The node of a probe, of which one may have several."""
    return name.partition(" ")[0]


def node_facts(name: str, told: Mapping[str, Any], **more: Any) -> NodeFacts:
    """What a probe has told, as a record.

    Args:
        name: of the node.
        told: by :meth:`raydmd.doctor.probe.Probe.look`.
        **more: that is known of it.
    """
    read: dict[str, Any] = dict(told)
    read["gpus"] = tuple(Gpu(**gpu) for gpu in read["gpus"])
    read["xids"], read["resolves"] = tuple(read["xids"]), tuple(read["resolves"])
    read["temporary"] = Folder(**read["temporary"])
    return NodeFacts(name=name, **{**read, **more})


def refuses(address: str, header: str | None = None) -> bool | None:
    """Whether a cluster refuses who has no token, or shows a header; ``None`` if that can't be told."""
    if "://" in address or not address.rpartition(":")[2].isdigit():
        return None
    answer = is_open(address, header)
    return None if answer is None else not answer


def own_header() -> str | None:
    """By which Ray shows this process's token; ``None`` if it has none, or does not show it."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    try:
        return {k.lower(): v for k, v in get_auth_headers_if_auth_enabled({}).items()}.get("authorization")
    except RuntimeError:  # RAY_AUTH_MODE=token, and no token anywhere
        return None


def try_storage(storage: str) -> str:
    """Why object storage can't be used from here; empty if it can."""
    try:
        check_storage(storage)
    except InputError as error:
        return str(error)
    return ""


def _last(error: Exception) -> str:
    """The last line of what an actor raised: the others are its traceback."""
    lines = [line.strip() for line in plain(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
