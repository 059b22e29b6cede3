"""What is known of a cluster, as plain records, and what follows from it: checks take the first and make the second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

GIB = float(1 << 30)
Level = Literal["ok", "warn", "bad", "skipped"]


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its driver tells.

    Attributes:
        name: of its kind.
        driver: version of it.
        memory: GiB.
        used: GiB of it that something holds now.
        uncorrected: memory errors since the driver was loaded that it could not correct; ``None`` without ECC.
    """

    name: str
    driver: str
    memory: float
    used: float
    uncorrected: int | None


@dataclass(frozen=True)
class Folder:
    """A folder as one node sees it.

    Attributes:
        path: of it.
        error: why it can't be used there; empty if it can.
        free: GiB that may be written.
        total: GiB of its disk.
        sees: nodes whose files are seen there, of those that could write one.
        made: the uppermost folder that was not there, and was made for this look alone.
    """

    path: str
    error: str = ""
    free: float | None = None
    total: float | None = None
    sees: tuple[str, ...] = ()
    made: str = ""


@dataclass(frozen=True)
class Need:
    """Room that a run's checkpoints will ask of a folder.

    Attributes:
        path: of the folder.
        each: GiB of the largest of them.
        count: that are yet to be there at once: those that stay, and one that is being written.
    """

    path: str
    each: float
    count: int

    @property
    def size(self) -> float:
        """GiB of all of them."""
        return self.each * self.count


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node. Sizes are GiB; what could not be told is ``None``, empty, or not in a mapping.

    Attributes:
        name: its address.
        head: whether the cluster's head runs on it.
        error: why it did not answer; then nothing else is known.
        versions: of Python and packages, by name; empty for one that is not installed.
        gpus: that its driver lists.
        gpu_error: what ``nvidia-smi`` said instead.
        xids: numbers of the errors that the driver wrote into the kernel's log.
        torch_gpus: how many PyTorch sees there.
        ray_gpus: how many Ray gives out.
        object_store: room of Ray's shared memory.
        shm: size of ``/dev/shm``.
        memory: of the machine.
        memory_limit: what its processes may have of that, where a container sets a limit.
        memory_free: what is left of the smaller one.
        files: files that a process may have open.
        clock: seconds that its clock is ahead of this process's.
        clock_error: seconds that ``clock`` may be wrong by.
        hostname: what it calls itself.
        resolves: addresses that this name stands for there.
        addresses: its addresses, by interface.
        gloo: its ``GLOO_SOCKET_IFNAME``.
        auth: its ``RAY_AUTH_MODE``.
        temporary: the folder of Ray's session.
        folders: of a recipe, as seen there.
        missing: files and folders that the recipe names, and that are here and not there.
        checkpoints: what object storage said to it; empty if all is well, ``None`` if it was not asked.
        metrics: what came of asking its Prometheus endpoint; empty if all is well, ``None`` if it was not asked.
    """

    name: str
    head: bool = False
    error: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str = ""
    xids: tuple[int, ...] = ()
    torch_gpus: int | None = None
    ray_gpus: float = 0.0
    object_store: float | None = None
    shm: float | None = None
    memory: float | None = None
    memory_limit: float | None = None
    memory_free: float | None = None
    files: int | None = None
    clock: float | None = None
    clock_error: float = 0.0
    hostname: str = ""
    resolves: tuple[str, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    gloo: str = ""
    auth: str = ""
    temporary: Folder | None = None
    folders: tuple[Folder, ...] = ()
    missing: tuple[str, ...] = ()
    checkpoints: str | None = None
    metrics: str | None = None


@dataclass(frozen=True)
class Link:
    """What came of sending tensors around, by ``gloo`` between all nodes, by ``nccl`` between all GPUs.

    Attributes:
        backend: ``gloo`` or ``nccl``.
        errors: by node; none if all went well.
        milliseconds: of one sum of a few bytes over all of them.
        gigabytes: a second that each of them sent and received, in a sum of many megabytes.
        skipped: why it was not tried.
        over: what took part, for people; empty for all nodes.
    """

    backend: str
    errors: Mapping[str, str] = field(default_factory=dict)
    milliseconds: float | None = None
    gigabytes: float | None = None
    skipped: str = ""
    over: str = ""


@dataclass(frozen=True)
class Service:
    """Something that answers over HTTP, or a tracking store.

    Attributes:
        name: for people.
        address: of it; empty if there is none.
        error: why it can't be used; empty if it can.
    """

    name: str
    address: str
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that checks go by.

    Attributes:
        address: of the cluster; empty for this machine alone.
        joined: why the cluster could not be joined; empty if it was, or if there is none to join.
        asks_token: whether the cluster refuses who has no token; ``None`` if that can't be told.
        nodes: the head first.
        blocked: pairs of nodes of which the first can't reach the second.
        links: see there.
        dashboard: Ray's; ``None`` if it was not looked at.
        services: Prometheus and Grafana, where they are named.
        tracking: the recipe's tracking server; ``None`` without a recipe.
        room: why a recipe has no room; empty if it has, ``None`` without a recipe.
        grows: whether the recipe asks Ray's autoscaler for room that it lacks.
        need: of its checkpoints; ``None`` without a recipe, and where it can't be told.
    """

    address: str = ""
    joined: str = ""
    asks_token: bool | None = None
    nodes: tuple[NodeFacts, ...] = ()
    blocked: tuple[tuple[str, str], ...] = ()
    links: tuple[Link, ...] = ()
    dashboard: Service | None = None
    services: tuple[Service, ...] = ()
    tracking: Service | None = None
    room: str | None = None
    grows: bool = False
    need: Need | None = None

    @property
    def seen(self) -> tuple[NodeFacts, ...]:
        """Nodes that answered."""
        return tuple(node for node in self.nodes if not node.error)


@dataclass(frozen=True)
class Finding:
    """A line of the table.

    Attributes:
        check: that it comes from.
        level: ``bad`` ends a run sooner or later, ``warn`` may be meant, ``skipped`` could not be looked at.
        said: what is there.
        cure: what to do about it; empty for what is well.
        where: the node, or nodes; empty for the cluster.
    """

    check: str
    level: Level
    said: str
    cure: str = ""
    where: str = ""
