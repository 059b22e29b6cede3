"""``raydmd top``: what the pools of a cluster are doing, in a terminal."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raydmd.errors import InputError
from raydmd.serving.joining import loopback, on_loopback, reachable
from raydmd.serving.order import find_keeper, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from raydmd.serving.order import Look, ReplicaLook

EVERY = 1.0
TIMEOUT = 10.0
PATIENCE = 45.0


def top(address: str | None, *, once: bool = False, as_json: bool = False) -> None:
    """Show a cluster's pools until interrupted.

    Args:
        address: of the cluster, ``auto`` for the newest of this machine; default: what ``RAY_ADDRESS`` names.
        once: show them once.
        as_json: print them as JSON, once.

    Raises:
        InputError: if no cluster is named, or it cannot be joined.
    """
    join(address)
    try:
        if as_json:
            print(json.dumps([dataclasses.asdict(look) for look in looks()], indent=1, default=str))
            return
        console = Console(highlight=False)
        if once:
            console.print(render(looks(), {}))
            return
        before: dict[str, tuple[float, int]] = {}
        with Live(console=console, screen=console.is_terminal, refresh_per_second=4) as live:
            while True:
                live.update(render(looks(), before))
                time.sleep(EVERY)
    finally:
        ray.shutdown()


def join(address: str | None) -> None:
    """Join the named cluster; see :func:`top`.

    Raises:
        InputError: if none is named, or it cannot be joined within :data:`PATIENCE`.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        raise InputError("which cluster? Name it by --address HOST:PORT, or 'auto' for this machine's newest")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    reachable(address)
    failed: list[Exception] = []

    def init() -> None:
        try:
            with loopback(on_loopback(address)):
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # raised in the thread that waits
            failed.append(error)

    # Ray itself waits for minutes for a cluster that is no more, or that speaks another protocol.
    thread = threading.Thread(target=init, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise InputError(
            f"the Ray cluster at {address!r} did not take us in within {PATIENCE:g} s: is it the head's address and "
            "port, and is RAY_AUTH_MODE=token set as there?"
        )
    if failed:
        raise InputError(
            f"cannot join the Ray cluster at {address!r}: {failed[0]}; if it runs, is its token this user's "
            "(~/.ray/auth_token, RAY_AUTH_MODE=token)?"
        ) from failed[0]


def looks() -> list[Look]:
    """The cluster's pools, as their keeper sees them; none if there is no keeper."""
    try:
        found: list[Look] = ray.get(find_keeper().looks.remote(), timeout=TIMEOUT)
    except ValueError:
        return []
    except RayError as error:
        raise InputError(f"the keeper of pools does not answer: {plain(error)}") from error
    return found


def render(pools: list[Look], before: dict[str, tuple[float, int]], now: float | None = None) -> RenderableType:
    """A table for each pool: its replicas, and who asks them.

    Args:
        pools: to show.
        before: time and samples at each replica's last showing, brought up to date here.
        now: clock reading, seconds.
    """
    if not pools:
        return Text("no pools; runs with placement.teacher=remote start some")
    now = time.monotonic() if now is None else now
    parts: list[RenderableType] = []
    for pool in pools:
        table = Table(title=f"{pool.key}   held by {', '.join(pool.holders) or 'nobody'}", title_justify="left")
        for title in ("replica", "state", "experts", "busy", "queue", "samples/s", "mean batch", "memory", "node"):
            left = title in ("replica", "state", "experts", "node")
            table.add_column(title, justify="left" if left else "right", overflow="fold")
        for name, replica in pool.replicas.items():
            table.add_row(*_cells(name, replica, before, now))
        asked: dict[str, int] = {}
        for replica in pool.replicas.values():
            for run, items in (replica.stats["clients"] if replica.stats else {}).items():
                asked[run] = asked.get(run, 0) + items
        total = sum(asked.values()) or 1
        by = "   ".join(f"{who} {items} ({items / total:.0%})" for who, items in sorted(asked.items()))
        parts += [table, Text(f"samples by run: {by or 'none yet'}"), Text("")]
        if trouble := pool.broken or pool.last_error:
            parts.insert(-1, Text(f"last error: {trouble.splitlines()[-1]}"))
    return Group(*parts)


def _cells(name: str, replica: ReplicaLook, before: dict[str, tuple[float, int]], now: float) -> list[str]:
    experts = ", ".join(replica.experts) or "all"
    stats = replica.stats
    if stats is None:
        return [name.rpartition("/")[2], replica.stage, experts, *([""] * 6)]
    then, items = before.get(name, (now - stats["uptime"], 0))
    rate = (stats["items"] - items) / max(now - then, 1e-9)
    before[name] = (now, stats["items"])
    batches = stats["batches"]
    return [
        name.rpartition("/")[2],
        replica.stage,
        experts,
        f"{replica.busy or stats['busy']:.0%}",
        str(stats["queue"]),
        f"{rate:.1f}",
        f"{stats['items'] / batches:.1f}" if batches else "",
        f"{stats['rss'] / (1 << 30):.2f} GiB",
        stats["node"],
    ]
