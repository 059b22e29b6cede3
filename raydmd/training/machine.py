"""What a worker and its machine spend, under the names that MLflow shows among a run's system metrics."""

from __future__ import annotations

import contextlib
import resource
from typing import TYPE_CHECKING

import psutil
import torch

from raydmd.serving.client import ReplicaFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

MEGA = 1e6


def usage(device: torch.device) -> dict[str, float]:
    """Now, and at peak since the last call; a GPU's load where ``nvidia-ml-py`` is installed.

    Returns:
        Megabytes and percentages.
    """
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": (memory.total - memory.available) / MEGA,
        "system/worker_memory_megabytes": psutil.Process().memory_info().rss / MEGA,
    }
    if device.type == "cuda":
        found["system/gpu_memory_peak_megabytes"] = torch.cuda.max_memory_allocated(device) / MEGA
        found["system/gpu_memory_reserved_megabytes"] = torch.cuda.max_memory_reserved(device) / MEGA
        torch.cuda.reset_peak_memory_stats(device)
        with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # no NVML, or not for this process
            found["system/gpu_utilization_percentage"] = float(torch.cuda.utilization(device))
    return found


def peaks(device: torch.device) -> str:
    """What this process has held at most, and what its device and its node have left, for people."""
    memory = psutil.virtual_memory()
    found = [
        f"its process has held {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB at most",
        f"its node has {memory.available / MEGA:.0f} of {memory.total / MEGA:.0f} MB left",
    ]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        found.insert(
            0,
            f"its GPU of {total / MEGA:.0f} MB has {free / MEGA:.0f} MB left, and since the last report this process "
            f"had {allocated / MEGA:.0f} MB of it in tensors and {reserved / MEGA:.0f} MB reserved at most",
        )
    return ", ".join(found)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error comes of an allocation that failed, in this process."""
    return any(
        isinstance(e, torch.OutOfMemoryError | MemoryError)
        or "can't allocate memory" in str(e)
        # A frozen model beside the trainer: what it raised is told as a pool's would be.
        or (isinstance(e, ReplicaFailed) and "OutOfMemoryError" in str(e))
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
