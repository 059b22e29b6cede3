"""What a node can tell of itself. Sent to every node by value: it needs Python and Ray there, and nothing of raydmd."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "diffusers", "raydmd")
ASKED_GPU = "name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
GIB = float(1 << 30)
QUICK = 10.0
"""Seconds for a command or an address to answer."""
SLOW = 90.0
"""Seconds for a Python that imports PyTorch."""
BYTES = 32 << 20
"""Of the tensor that measures bandwidth."""
ROUNDS = 10


class Probe:
    """Looks around on one node; an actor on a cluster, a plain object on this machine alone."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def look(self) -> dict[str, Any]:
        """What :class:`raydmd.doctor.facts.NodeFacts` has, as far as the node itself can tell."""
        gpus, gpu_error = nvidia_smi()
        memory, limit, free = read_memory()
        return {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "gpus": gpus,
            "gpu_error": gpu_error,
            "xids": read_xids() if gpus or gpu_error else [],
            "torch_gpus": count_torch_gpus() if gpus else None,
            "shm": size_of("/dev/shm"),
            "memory": memory,
            "memory_limit": limit,
            "memory_free": free,
            "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "hostname": socket.gethostname(),
            "resolves": resolve(socket.gethostname()),
            "addresses": own_addresses(),
            "gloo": os.environ.get("GLOO_SOCKET_IFNAME", ""),
            "auth": os.environ.get("RAY_AUTH_MODE", ""),
            "temporary": look_at(session_folder()),
        }

    def now(self) -> float:
        """Its clock."""
        return time.time()

    def write(self, folder: str, mark: str, name: str) -> dict[str, Any]:
        """Leave a file in a folder that others should see.

        Args:
            folder: made if it is not there.
            mark: of this examination.
            name: of this node.

        Returns:
            The folder as :class:`raydmd.doctor.facts.Folder` has it, and ``made``, the uppermost folder that was not
            there before.
        """
        path, made = Path(folder), ""
        for parent in [path, *path.parents]:
            if parent.exists():
                break
            made = str(parent)
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = path / f".raydmd-doctor-{mark}-{name}"
            with file.open("wb") as out:
                out.write(b"raydmd" * 4096)  # more than a full disk has left for metadata
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            return {**look_at(folder), "error": f"{type(error).__name__}: {error}", "made": made}
        return {**look_at(folder), "made": made}

    def sees(self, folder: str, mark: str, count: int, patience: float) -> list[str]:
        """Nodes whose files are in a folder, waiting for a count of them: file servers have their news late."""
        prefix, deadline = f".raydmd-doctor-{mark}-", time.monotonic() + patience
        while True:
            try:
                found = sorted(n.removeprefix(prefix) for n in os.listdir(folder) if n.startswith(prefix))
            except OSError:
                found = []
            if len(found) >= count or time.monotonic() > deadline:
                return found
            time.sleep(0.5)

    def erase(self, folder: str, mark: str, name: str) -> None:
        """Take away the file of :meth:`write`."""
        with contextlib.suppress(OSError):
            (Path(folder) / f".raydmd-doctor-{mark}-{name}").unlink()

    def tidy(self, folder: str, made: str) -> None:
        """Take away the folders that :meth:`write` has made, once they are empty."""
        path = Path(folder)
        with contextlib.suppress(OSError):
            while made and len(str(path)) >= len(made):
                path.rmdir()
                path = path.parent

    def missing(self, paths: list[str]) -> list[str]:
        """Which of these files and folders are not there."""
        return [path for path in paths if not os.path.exists(path)]

    def listen(self, address: str) -> int:
        """Wait for others to connect, until :meth:`hang_up`; returns the port."""
        self._listener = listener = socket.create_server((address, 0))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        threading.Thread(target=accept, daemon=True).start()
        return int(listener.getsockname()[1])

    def reach(self, others: dict[str, tuple[str, int]], patience: float) -> dict[str, str]:
        """Which of others' ``(address, port)`` can't be connected to, by name, with the error."""
        failed = {}
        for name, where in others.items():
            try:
                socket.create_connection(where, timeout=patience).close()
            except OSError as error:
                failed[name] = str(error)
        return failed

    def hang_up(self) -> None:
        """Undo :meth:`listen`."""
        if self._listener:
            self._listener.close()

    def fetch(self, url: str, headers: dict[str, str]) -> tuple[str, str]:
        """What an address answers, up to a megabyte, and why it does not."""
        try:
            # No proxy: these are addresses of the cluster.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(urllib.request.Request(url, headers=headers), timeout=QUICK) as answer:
                return answer.read(1 << 20).decode(errors="replace"), ""
        except OSError as error:
            return "", str(error)

    def environment(self, *names: str) -> dict[str, str]:
        """Values of variables; only those that are set."""
        return {name: os.environ[name] for name in names if name in os.environ}

    def free_port(self, address: str) -> int:
        """A port that nobody listens on."""
        with socket.create_server((address, 0)) as server:
            return int(server.getsockname()[1])

    def exchange(
        self, backend: str, rank: int, world: int, store: tuple[str, int], patience: float
    ) -> tuple[float, float]:
        """Sum tensors with the other nodes.

        Args:
            backend: of ``torch.distributed``.
            rank: of this node.
            world: how many there are.
            store: address and port at which rank 0 brings them together.
            patience: seconds for each step.

        Returns:
            Milliseconds of a small sum, and gigabytes a second of a large one, by each node.
        """
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        limit = timedelta(seconds=patience)
        meeting = dist.TCPStore(  # type: ignore[attr-defined]
            store[0], store[1], world, rank == 0, timeout=limit
        )
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=world, timeout=limit)
        try:
            device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
            small, large = torch.ones(1, device=device), torch.ones(BYTES // 4, device=device)
            times = []
            for tensor in (small, large):
                dist.all_reduce(tensor)  # connections are made by the first
                _settle(tensor)
                began = time.perf_counter()
                for _ in range(ROUNDS if tensor is small else 2):
                    dist.all_reduce(tensor)
                _settle(tensor)
                times.append((time.perf_counter() - began) / (ROUNDS if tensor is small else 2))
            # A ring sends and receives 2 (n - 1) / n of a tensor at every node.
            return times[0] * 1e3, 2 * (world - 1) / world * BYTES / times[1] / 1e9
        finally:
            dist.destroy_process_group()


def _settle(tensor: Any) -> None:
    float(tensor[0])


def version(package: str) -> str:
    """An installed package's version; empty if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    # Sent with a job, not installed.
    with contextlib.suppress(ImportError, ValueError, OSError):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            found = re.search(r"__version__ *= *[\"']([^\"']+)", Path(spec.origin).read_text(encoding="utf-8"))
            return found[1] if found else "unknown"
    return ""


def nvidia_smi() -> tuple[list[dict[str, Any]], str]:
    """GPUs as the driver lists them, and what it said instead where it failed; neither where there is no driver."""
    if not (tool := shutil.which("nvidia-smi")):
        return [], ""
    try:
        command = [tool, f"--query-gpu={ASKED_GPU}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUICK * 3, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {error}"
    if done.returncode:
        return [], f"nvidia-smi: {(done.stdout + done.stderr).strip()[:300]}"
    return parse_gpus(done.stdout), ""


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Lines of ``nvidia-smi --query-gpu`` of :data:`ASKED_GPU`, without header and units."""
    found = []
    for line in text.strip().splitlines():
        name, driver, memory, used, errors = (part.strip() for part in line.split(",", 4))
        found.append(
            {
                "name": name,
                "driver": driver,
                "memory": _number(memory) / 1024,
                "used": _number(used) / 1024,
                "uncorrected": int(errors) if errors.isdigit() else None,  # [N/A] where it has no ECC
            }
        )
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return 0.0


def read_xids() -> list[int]:
    """Numbers of the driver's errors in the kernel's log, where this user may read it."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=QUICK, errors="replace", check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_xids(done.stdout)


def parse_xids(text: str) -> list[int]:
    """Numbers in lines such as ``NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus``."""
    return sorted({int(number) for number in re.findall(r"NVRM: Xid \([^)]*\): (\d+)", text)})


def count_torch_gpus() -> int | None:
    """GPUs that PyTorch sees, by a process that may see all: Ray hides those that were not asked for."""
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    code = "import torch; print(torch.cuda.device_count())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=SLOW, env=env, check=False
        )
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def read_memory(root: str = "/") -> tuple[float | None, float | None, float | None]:
    """GiB of the machine, of this process's part of it where that has a limit, and what is free of the smaller.

    Args:
        root: of the file system.
    """
    try:
        lines = Path(root, "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None, None, None
    known = {line.split(":")[0]: float(line.split()[1]) * 1024 / GIB for line in lines if line.endswith("kB")}
    total, free = known.get("MemTotal"), known.get("MemAvailable")
    least: float | None = None
    for folder, most, now in control_groups(root):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limit = float((folder / most).read_text(encoding="ascii")) / GIB
            if not total or limit >= total:
                continue
            # Files that the kernel keeps are given back when they are in the way.
            stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            kept = float(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            left = limit - (float((folder / now).read_text(encoding="ascii")) - kept) / GIB
            least = limit if least is None else min(least, limit)
            free = left if free is None else min(free, left)
    return total, least, free


def control_groups(root: str) -> list[tuple[Path, str, str]]:
    """Control groups that bound this process's memory, and the files in them that say its limit and its use.

    Its own and all above it: on Slurm a job's limit is far below the uppermost one, where a container has its own.
    """
    own = {"": "/", "memory": "/"}
    with contextlib.suppress(OSError):
        for line in Path(root, "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            own |= {name: path for name in controllers.split(",") if name in own}
    found = []
    for name, most, now in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        top = Path(root, "sys/fs/cgroup", name)
        # A container may see its path on the machine, and not the folders on the way; those are left out later.
        group = top / own[name].lstrip("/")
        found += [(folder, most, now) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return found


def size_of(folder: str) -> float | None:
    """GiB of a folder's disk."""
    try:
        return shutil.disk_usage(folder).total / GIB
    except OSError:
        return None


def look_at(folder: str) -> dict[str, Any]:
    """A folder, or the next one above it that is there, as :class:`raydmd.doctor.facts.Folder` has it."""
    path = Path(folder)
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return {"path": folder, "error": str(error)}
    return {"path": folder, "free": usage.free / GIB, "total": usage.total / GIB}


def session_folder() -> str:
    """Where Ray keeps this node's sockets, logs, and objects that found no room in memory."""
    with contextlib.suppress(Exception):  # not connected
        from ray._private import worker

        node: Any = worker._global_node
        return str(node.get_session_dir_path())
    return os.environ.get("RAY_TMPDIR", "/tmp")


def resolve(name: str) -> list[str]:
    """IPv4 addresses that a name stands for here; none if it stands for nothing."""
    try:
        return sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)})
    except OSError:
        return []


def own_addresses() -> dict[str, str]:
    """This node's first IPv4 address, by interface."""
    try:
        import psutil
    except ImportError:
        return {}
    return {
        name: str(known.address)
        for name, all_known in psutil.net_if_addrs().items()
        for known in reversed(all_known)
        if known.family == socket.AF_INET
    }
