"""What an attempt's failure was, in one line: of Ray's errors, of what the ranks have written about themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray.train
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from raydmd.serving.order import plain
from raydmd.training.restarts import MEMORY_ADVICE, Failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.training.watchdog import Post

SHORT = "out_of_memory"
"""Kind of event that a worker writes when an allocation failed."""
SHOWN = 4
"""Ranks that a message names."""
COLLATERAL = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "DistNetworkError", "gloo/")
"""What ranks say when another one has gone."""


def explain(
    error: BaseException, posts: Mapping[int, Post], stalled: Sequence[str], news: Sequence[Mapping[str, Any]]
) -> Failure:
    """The cause of an attempt's end.

    Args:
        error: that Ray Train raised.
        posts: what the ranks did, see :func:`raydmd.training.watchdog.posts`.
        stalled: what those did whom a watchdog has ended; the cause, if there are any.
        news: the attempt's events.
    """
    if stalled:
        others = [p.line() for p in posts.values() if not any(line.startswith(p.line()) for line in stalled)]
        message = f"no update in time, ended by the watchdog: {_some([*stalled, *others])}"
        last = min(posts.values(), key=lambda p: p.since, default=None)
        return _failure("stall", message, last.rank if last else None, posts)
    if short := next((e for e in news if e["event"] == SHORT), None):
        return _failure("memory", f"{short['message']}. {MEMORY_ADVICE}", short["rank"], posts)
    if isinstance(error, ray.train.WorkerGroupError):
        rank = min(error.worker_failures, key=lambda r: (_weight(error.worker_failures[r]), r))
        return _of_worker(rank, error.worker_failures[rank], posts)
    if isinstance(error, ray.train.ControllerError):
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return Failure(kind="room", message="the cluster has no room for the workers now")
        starting = isinstance(error.controller_failure, WorkerGroupStartupFailedError)
        who = "the workers did not start" if starting else "Ray Train's controller failed"
        message = f"{who}: {type(error.controller_failure).__name__}: {_first(error.controller_failure)}"
        if _low_on_memory(error.controller_failure):
            return Failure(kind="full_node", message=f"{message}. {MEMORY_ADVICE}")
        return Failure(kind="start", message=message)
    if isinstance(error, RayActorError):
        return Failure(kind="death", message="the process of Ray Train's controller is gone, on the driver's node")
    return Failure(kind="error", message=f"{type(error).__name__}: {_first(error)}")


def _of_worker(rank: int, error: Exception, posts: Mapping[int, Post]) -> Failure:
    post = posts.get(rank)
    who = post.line() if post else f"rank {rank}"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return _failure("stall", f"{who}: did not answer Ray: {_first(error)}", rank, posts)
    if not isinstance(error, WorkerHealthCheckFailedError):
        return _failure("error", f"{who}: {type(error).__name__}: {_first(error)}", rank, posts)
    cause = error.health_check_failure
    held = f"; {post.memory()}" if post else ""
    if _low_on_memory(cause):
        message = f"{who}: Ray ended its process, because its node ran out of memory{held}. {MEMORY_ADVICE}"
        return _failure("full_node", message, rank, posts)
    if not isinstance(cause, RayActorError):
        return _failure("error", f"{who}: {type(cause).__name__}: {_first(cause)}", rank, posts)
    why = "its node is gone" if "node has died" in str(cause) else "its process is gone"
    killed = "crashed, or killed from outside, e.g. by the kernel when memory runs out"
    return _failure("death", f"{who}: {why} ({killed}){held}", rank, posts)


def _low_on_memory(error: Exception) -> bool:
    """Whether Ray's memory monitor has ended a process."""
    return isinstance(error, OutOfMemoryError) or "low on memory" in str(error)


def _failure(kind: Any, message: str, rank: int | None, posts: Mapping[int, Post]) -> Failure:
    post = posts.get(rank) if rank is not None else None
    host, doing = (post.host, post.doing) if post else ("", "")
    return Failure(kind=kind, message=message, rank=rank, node=host, doing=doing)


def _weight(error: Exception) -> int:
    """Causes before what follows from them: the dead, then errors of their own, then who lost a peer."""
    if isinstance(error, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError):
        return 0
    return 2 if any(mark in f"{type(error).__name__} {error}" for mark in COLLATERAL) else 1


def _first(error: BaseException) -> str:
    """An error's own line; of a task's, whose text is a traceback, the last one."""
    lines = [line.strip() for line in plain(error).splitlines() if line.strip()] or [type(error).__name__]  # type: ignore[arg-type]
    return lines[-1] if "Traceback" in str(error) else lines[0]


def _some(lines: Sequence[str]) -> str:
    more = f" and {len(lines) - SHOWN} more ranks" if len(lines) > SHOWN else ""
    return " | ".join(lines[:SHOWN]) + more
