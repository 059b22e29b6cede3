"""Giving back the places of workers whose controller is gone.

Ray Train's controller reserves them. If it dies, they stay reserved for as long as the driver lives: Ray's own cleaner
learns of the death from the dashboard, which a Ray of our own does not have, and of the places only once all workers
have started. The next workers would wait for room.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

import ray
from ray import PlacementGroupID
from ray._private.state import state
from ray.core.generated import gcs_pb2
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

if TYPE_CHECKING:
    from pathlib import Path

    from ray.train.v2._internal.execution.worker_group import WorkerGroup

TABLE: Any = vars(gcs_pb2)["PlacementGroupTableData"]
RESERVED = "reserved.json"
"""File of a run with the id of its workers' placement group, and which process holds it."""


class Reserved(WorkerGroupCallback):
    """Writes down what the workers' places are called; runs in Ray Train's controller.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / RESERVED

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """See the base class."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        here = ray.get_runtime_context().get_node_id()
        self._file.write_text(json.dumps({"group": group.id.hex(), "pid": os.getpid(), "node": here}), encoding="utf-8")


def give_back(folder: Path) -> None:
    """Free what the last attempt's workers had; they are gone, and nothing happens if it is free already."""
    with contextlib.suppress(FileNotFoundError, ValueError, RayError):
        held = json.loads((folder / RESERVED).read_text(encoding="utf-8"))
        (folder / RESERVED).unlink()
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(held["group"]))))


def free_orphans() -> int:
    """Free places that were reserved by actors of this driver that are dead; returns how many.

    A controller that dies while its workers start has told nobody of them.
    """
    freed, job = 0, ray.get_runtime_context().get_job_id()
    with contextlib.suppress(RayError):
        for packed in state._connect_and_get_accessor().get_placement_group_table():
            group = TABLE.FromString(packed)
            gone = group.creator_actor_dead and any(byte != 0xFF for byte in group.creator_actor_id)
            if group.creator_job_id.hex() != job or not gone or group.is_detached:
                continue
            if group.state != TABLE.REMOVED:
                remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
                freed += 1
    return freed


def controller(folder: Path) -> tuple[int, str] | None:
    """Process id and node of the controller whose workers have places; ``None`` if there is none."""
    try:
        held = json.loads((folder / RESERVED).read_text(encoding="utf-8"))
        return int(held["pid"]), str(held["node"])
    except (OSError, ValueError, KeyError):
        return None
