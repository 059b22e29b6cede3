"""What a worker and its machine spend, under the names that MLflow shows among a run's system metrics."""

from __future__ import annotations

import contextlib

import psutil
import torch

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
