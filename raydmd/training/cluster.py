"""Starting or joining Ray."""

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
    from raydmd.recipe import Recipe


START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
SHRINKING = 30.0
"""Seconds that Ray Train waits for as many workers as it has decided on. Where it may take fewer that is no longer than
its news of nodes are old, for it may have counted one that has just gone."""


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
