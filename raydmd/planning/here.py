"""The machine at hand as plans know it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from raydmd.planning.hardware import GIB, TERA, Hardware, table

COPIED = 1 << 27
"""Bytes that are copied to see how fast memory is."""
SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows of the matrices that are multiplied to see what a device reaches."""
Clock = Callable[[], float]
"""Seconds."""


def hardware() -> Hardware:
    """This machine as plans know it: as the table has it, or else at the peak of its own products of matrices."""
    cuda = torch.cuda.is_available()
    if not cuda:
        return Hardware(
            name=machine(),
            per_node=1,
            memory_gib=psutil.virtual_memory().total / GIB,
            **_peaks(torch.device("cpu")),
            hbm=_memory_speed(),
            link=1.0,
            network=1.0,
            reserved_gib=1.0,
            cores=os.cpu_count() or 1,
        )
    name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / GIB
    alike = next((h for short, h in table().items() if short in name.lower().replace(" ", "")), None)
    if alike:
        return alike.model_copy(update={"name": name, "memory_gib": memory})
    peaks = _peaks(torch.device("cuda"))
    return Hardware(name=name, memory_gib=memory, **peaks, hbm=_memory_speed(), link=25, network=25)


def _peaks(device: torch.device) -> dict[str, Any]:
    """TFLOPS of a product of matrices, by precision."""
    size, found = SIDE[device.type], {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, taken = torch.ones(size, size, dtype=dtype, device=device), []
        for _ in range(4):
            start = now(device, time.perf_counter)
            a @ a
            taken.append(now(device, time.perf_counter) - start)
        found[name] = 2 * size**3 / min(taken) / TERA
    return found


def _memory_speed() -> float:
    """GB/s that this process reads and writes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here, there = (torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    taken = []
    for _ in range(4):
        start = now(device, time.perf_counter)
        there.copy_(here)
        taken.append(now(device, time.perf_counter) - start)
    return 2 * COPIED / min(taken) / 1e9


def machine() -> str:
    """What it is called."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{platform.node()}, {device}"


def now(device: torch.device, clock: Clock) -> float:
    """The time at which all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock()
