"""Who listens on the network: a process and all that it has started."""

from __future__ import annotations

import psutil

LOOPBACK = ("127.0.0.1", "::1")


def listening(pid: int) -> list[tuple[str, str, int]]:
    """Name, address and port of each listener."""
    top = psutil.Process(pid)
    found = []
    for process in [top, *top.children(recursive=True)]:
        try:
            found += [
                (process.name(), c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
                for c in process.net_connections("inet")
                if c.status == psutil.CONN_LISTEN
            ]
        except psutil.Error:
            continue
    return found


def far(found: list[tuple[str, str, int]], *, groups: int = 1) -> list[str]:
    """Names of those that other machines reach, but for one store of PyTorch's in each group of Train workers.

    That store, by which they find each other, listens to all: PyTorch can't be told otherwise (docs/security.md).
    """
    names = [name for name, address, _ in found if address not in LOOPBACK]
    for _ in range(groups):
        if "ray::RayTrainWorker" in names:
            names.remove("ray::RayTrainWorker")
    return names
