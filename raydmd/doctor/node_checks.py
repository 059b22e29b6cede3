"""Checks of each node by itself: facts in, findings out."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from raydmd.doctor.facts import Finding

if TYPE_CHECKING:
    from raydmd.doctor.facts import Facts, Folder, Level, Need, NodeFacts

FULL, NEARLY = 0.95, 0.85
"""Of Ray's disk: at the first it writes no more (RAY_local_fs_capacity_threshold)."""
FILES, FEW_FILES = 65536, 4096
"""Open files that Ray asks for, and with which runs of some workers fail."""
MEMORY = 0.95
"""Of a node's memory: from there on Ray kills workers (RAY_memory_usage_threshold)."""
SMALL_STORE, SMALL_SHM = 1.0, 0.25
"""GiB."""
LITTLE, TIGHT = 1.0, 20.0
"""GiB on storage: too little for anything, and for a few checkpoints of a large model, where its size is not known."""
GPU_USED = 1.0
"""GiB of a GPU in somebody's hands."""
LOST = {48, 64, 74, 79, 92, 95, 119, 120}
"""Xids that mean memory errors, a broken NVLink, a GPU or its controller gone; not those of a fault that was dealt with
(63, 94): docs.nvidia.com/deploy/xid-errors."""
LOOPBACK = "127."


def check_answers(facts: Facts) -> list[Finding]:
    """Every node answers."""
    found = [
        Finding(
            "nodes",
            "bad",
            node.error,
            "see that the node is up and not overloaded (`ray status`; raylet.out below its Ray temp folder), or take "
            "it out of the cluster",
            node.name,
        )
        for node in facts.nodes
        if node.error
    ]
    return found or ([_ok("nodes", _count(facts.nodes, "node") + " answered")] if facts.nodes else [])


def check_gpus(facts: Facts) -> list[Finding]:
    """GPUs are well, free, and seen by PyTorch and Ray."""
    found = []
    for node in facts.seen:
        found += _gpus(node)
    kinds = {(g.name, g.driver) for node in facts.seen for g in node.gpus}
    if len(kinds) > 1:
        found.append(
            Finding(
                "gpus",
                "warn",
                "not all alike: " + ", ".join(sorted(f"{name} (driver {driver})" for name, driver in kinds)),
                "workers wait for the slowest: keep trainers on one kind (placement.worker_resources)",
            )
        )
    count = sum(len(node.gpus) for node in facts.seen)
    if not count and not found and facts.seen:
        return [_ok("gpus", "none; runs use CPUs")]
    return found or ([_ok("gpus", f"{count} x {next(iter(kinds))[0]}")] if kinds else [])


def _gpus(node: NodeFacts) -> list[Finding]:
    found = []
    if node.gpu_error:
        found.append(_gpu(node, "bad", node.gpu_error, "reload or reinstall the driver there, or restart the machine"))
    if errors := [i for i, g in enumerate(node.gpus) if g.uncorrected]:
        found.append(
            _gpu(
                node,
                "bad",
                f"uncorrected memory errors on GPU {_list(errors)}",
                "results can't be trusted: drain the node, reset the GPU (nvidia-smi -r) and have it replaced if they "
                "come back",
            )
        )
    if serious := sorted(set(node.xids) & LOST):
        found.append(
            _gpu(
                node,
                "bad",
                f"the kernel's log has Xid {_list(serious)}",
                "a GPU or its link has failed: drain the node and restart it; replace what fails again",
            )
        )
    elif node.xids:
        found.append(_gpu(node, "warn", f"the kernel's log has Xid {_list(node.xids)}", "look at dmesg there"))
    if node.gpus and node.torch_gpus is not None and node.torch_gpus < len(node.gpus):
        found.append(
            _gpu(
                node,
                "bad",
                f"the driver lists {len(node.gpus)}, PyTorch sees {node.torch_gpus}",
                "install a PyTorch that is built for CUDA and for this driver (`python -c 'import torch; "
                "print(torch.version.cuda)'`), in the environment that Ray was started from",
            )
        )
    if node.gpus and node.object_store is not None and node.ray_gpus < len(node.gpus):
        found.append(
            _gpu(
                node,
                "warn",
                f"{len(node.gpus)} are there, Ray gives out {node.ray_gpus:g}",
                f"ray start --num-gpus={len(node.gpus)} there, unless the others are kept free on purpose",
            )
        )
    if held := [i for i, g in enumerate(node.gpus) if g.used > GPU_USED]:
        used = max(g.used for g in node.gpus)
        found.append(
            _gpu(
                node,
                "warn",
                f"GPU {_list(held)} held, up to {used:.1f} GiB",
                "fine if it is your own run; otherwise see who it is with nvidia-smi",
            )
        )
    return found


def _gpu(node: NodeFacts, level: Level, said: str, cure: str) -> Finding:
    return Finding("gpus", level, said, cure, node.name)


def check_object_store(facts: Facts) -> list[Finding]:
    """Ray's shared memory is there, and large enough for what is sent through it."""
    found = []
    for node in facts.seen:
        if node.shm is not None and node.shm < SMALL_SHM:
            found.append(
                Finding(
                    "object store",
                    "bad",
                    f"/dev/shm has {_gib(node.shm)}",
                    "give the container shared memory: docker run --shm-size=16g, or an emptyDir of medium Memory at "
                    "/dev/shm",
                    node.name,
                )
            )
        elif node.object_store and node.shm and node.object_store > node.shm:
            found.append(
                Finding(
                    "object store",
                    "bad",
                    f"{_gib(node.object_store)} asked of a /dev/shm of {_gib(node.shm)}: it is on a disk",
                    f"ray start --object-store-memory={int(node.shm * 0.9 * (1 << 30))} there, or a larger /dev/shm",
                    node.name,
                )
            )
        elif node.object_store is not None and node.object_store < SMALL_STORE:
            found.append(
                Finding(
                    "object store",
                    "warn",
                    f"{_gib(node.object_store)}",
                    "enough for small models; ray start --object-store-memory=4000000000 for real ones",
                    node.name,
                )
            )
    sizes = [node.object_store for node in facts.seen if node.object_store is not None]
    return found or ([_ok("object store", f"{_gib(min(sizes))} on each node, or more")] if sizes else [])


def check_memory(facts: Facts) -> list[Finding]:
    """There is memory left on every node."""
    found = []
    for node in facts.seen:
        most = node.memory_limit or node.memory
        if not most or node.memory_free is None:
            continue
        said = f"{_gib(node.memory_free)} of {_gib(most)} left"
        if node.memory_limit and node.memory:
            said += f" in the container, the machine has {_gib(node.memory)}"
        if node.memory_free / most < 1 - MEMORY:
            cure = "Ray kills workers from 95% on: end what else runs there, or take a node with more memory"
            found.append(Finding("memory", "bad", said, cure, node.name))
        elif node.memory_free / most < 0.2:
            found.append(Finding("memory", "warn", said, "see what else runs there", node.name))
    left = [node.memory_free for node in facts.seen if node.memory_free is not None]
    return found or ([_ok("memory", f"{_gib(min(left))} free on each node, or more")] if left else [])


def check_files(facts: Facts) -> list[Finding]:
    """Processes may have enough files open."""
    found = [
        Finding(
            "open files",
            "bad" if node.files < FEW_FILES else "warn",
            f"a process may have {node.files}",
            "before ray start: ulimit -n 65536 (nofile in /etc/security/limits.conf, LimitNOFILE= of a service, "
            "--ulimit nofile=65536:65536 of a container)",
            node.name,
        )
        for node in facts.seen
        if node.files is not None and 0 <= node.files < FILES
    ]
    return found or ([_ok("open files", "enough on each node")] if facts.seen else [])


def check_disk(facts: Facts) -> list[Finding]:
    """Ray's own disk has room for logs and objects that are spilled."""
    found = []
    for node in facts.seen:
        disk = node.temporary
        if not disk or not disk.total or disk.free is None:
            continue
        used = 1 - disk.free / disk.total
        if used > NEARLY:
            level: Level = "bad" if used > FULL else "warn"
            said = f"{used:.0%} of the disk at {disk.path} used, {_gib(disk.free)} left"
            cure = "make room there, or ray start --temp-dir on another disk: from 95% on Ray stores nothing"
            found.append(Finding("Ray's disk", level, said, cure, node.name))
    free = [n.temporary.free for n in facts.seen if n.temporary and n.temporary.free is not None]
    return found or ([_ok("Ray's disk", f"{_gib(min(free))} free on each node, or more")] if free else [])


def check_storage(facts: Facts) -> list[Finding]:
    """All nodes see one storage, may write to it, and find room on it."""
    if not any(node.folders for node in facts.seen):
        if not facts.seen:
            return []
        said = "not looked at: no recipe, and no output=DIR"
        return [Finding("storage", "skipped", said, "raydmd doctor output=/shared/runs, or raydmd doctor RECIPE.yaml")]
    found: list[Finding] = []
    writers = {
        path: {n.name for n in facts.seen for f in n.folders if f.path == path and not f.error}
        for path in {f.path for n in facts.seen for f in n.folders}
    }
    for node in facts.seen:
        for folder in node.folders:
            need = facts.need if facts.need and facts.need.path == folder.path else None
            found += _folder(node, folder, writers[folder.path], need)
    if found:
        return found
    free = min(f.free for n in facts.seen for f in n.folders if f.free is not None)
    seen_by = "" if len(facts.seen) == 1 else f", one and the same on {len(facts.seen)} nodes"
    said = f"{_list(sorted(writers))}: {_gib(free)} free{seen_by}"
    return [_ok("storage", f"{said}; a checkpoint has {_gib(facts.need.each)}" if facts.need else said)]


def check_inputs(facts: Facts) -> list[Finding]:
    """Model, rewards and prompts are on all nodes."""
    return [
        Finding(
            "inputs",
            "bad",
            f"not there: {_list(node.missing)}",
            "put them on storage that all nodes see, at the same path, and mount it there",
            node.name,
        )
        for node in facts.seen
        if node.missing
    ]


def _folder(node: NodeFacts, folder: Folder, writers: set[str], need: Need | None) -> list[Finding]:
    if folder.error:
        full = "No space left" in folder.error or "quota" in folder.error.lower()
        cure = (
            "make room on it: older runs' checkpoints, or checkpoints.keep"
            if full
            else "mount it there and let this user write to it, or choose another --output"
        )
        return [Finding("storage", "bad", f"{folder.path} can't be written: {folder.error}", cure, node.name)]
    if missing := sorted(writers - set(folder.sees)):
        return [
            Finding(
                "storage",
                "bad",
                f"{folder.path} is not the one of {_list(missing)}: files written there are not seen here",
                "mount the same shared storage (NFS, Lustre, FSx, Filestore, a ReadWriteMany volume) at this path on "
                "every node, or choose an --output that is on it",
                node.name,
            )
        ]
    if folder.free is not None and folder.free < LITTLE:
        cure = "make room on it: older runs' checkpoints, or checkpoints.keep"
        return [Finding("storage", "bad", f"{folder.path} has {_gib(folder.free)} free", cure, node.name)]
    if folder.free is not None and need and folder.free < need.size:
        said = (
            f"{folder.path} has {_gib(folder.free)} free, and this run's checkpoints need {_gib(need.size)} more: up "
            f"to {need.count} of {_gib(need.each)} at once"
        )
        cure = (
            "make room on it, let fewer stay (checkpoints.keep, 2 at least), train adapters (training.fake.lora, "
            "training.student.lora), or write them elsewhere (output, or checkpoints.storage=s3://BUCKET/FOLDER)"
        )
        return [Finding("storage", "bad", said, cure, node.name)]
    if folder.made not in ("", folder.path):
        said = f"{folder.made} was not there: {folder.path} would be on the disk of {os.path.dirname(folder.made)}"
        return [Finding("storage", "warn", said, "mount the shared storage there, if it is to be on that", node.name)]
    if folder.free is not None and folder.free < TIGHT:
        cure = "enough for small models; a checkpoint of a large one is hundreds of GiB"
        return [Finding("storage", "warn", f"{folder.path} has {_gib(folder.free)} free", cure, node.name)]
    return []


def check_checkpoints(facts: Facts) -> list[Finding]:
    """Object storage answers every node."""
    asked = [node for node in facts.seen if node.checkpoints is not None]
    found = [
        Finding(
            "checkpoints",
            "bad",
            node.checkpoints,
            "set credentials and AWS_ENDPOINT_URL in the environment of `ray start` on that node (or its role or "
            "~/.aws), and let its network reach the endpoint",
            node.name,
        )
        for node in asked
        if node.checkpoints
    ]
    return found or ([_ok("checkpoints", "object storage is read and written by each node")] if asked else [])


def check_hostnames(facts: Facts) -> list[Finding]:
    """A node's name stands for an address of its own that others reach, or gloo is told its interface."""
    found: list[Finding] = []
    if len(facts.nodes) < 2:
        return found
    for node in facts.seen:
        address = node.name.partition("#")[0]
        if address.startswith(LOOPBACK):
            continue  # several nodes of one machine
        right = next((name for name, known in node.addresses.items() if known == address), "eth0")
        cure = f"export GLOO_SOCKET_IFNAME={right} before ray start there (and NCCL_SOCKET_IFNAME={right} for GPUs)"
        if node.gloo:
            if node.addresses and node.gloo not in node.addresses:
                said = f"GLOO_SOCKET_IFNAME={node.gloo}, and there is no such interface"
                found.append(Finding("hostname", "bad", said, cure, node.name))
            continue
        own = set(node.addresses.values())
        wrong = [a for a in node.resolves if a.startswith(LOOPBACK) or (own and a not in own)]
        if wrong or not node.resolves:
            what = (
                f"the loopback address {wrong[0]}"
                if wrong and wrong[0].startswith(LOOPBACK)
                else (f"{wrong[0]}, which is not its own" if wrong else "no address")
            )
            said = f"its name, {node.hostname}, stands for {what}: workers on CPUs can't find each other"
            found.append(Finding("hostname", "bad", said, cure, node.name))
    return found or [_ok("hostname", "gloo finds each node's address")]


def check_metrics(facts: Facts) -> list[Finding]:
    """Prometheus can ask each node."""
    asked = [node for node in facts.seen if node.metrics is not None]
    found = [
        Finding(
            "metrics",
            "warn",
            node.metrics,
            "dashboards stay empty for this node: ray start --metrics-export-port=8080 there, and open it to the head",
            node.name,
        )
        for node in asked
        if node.metrics
    ]
    return found or ([_ok("metrics", "each node answers Prometheus")] if asked else [])


def _ok(check: str, said: str) -> Finding:
    return Finding(check, "ok", said)


def _count(things: tuple[object, ...], word: str) -> str:
    return f"{len(things)} {word}" + "s" * (len(things) != 1)


def _gib(size: float) -> str:
    return f"{size:.1f} GiB" if size < 100 else f"{size:.0f} GiB"


def _list(things: object) -> str:
    return ", ".join(str(thing) for thing in things)  # type: ignore[attr-defined]
