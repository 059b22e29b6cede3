"""The machine at hand as plans know it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil
import torch

from raydmd.planning.hardware import GIB, TERA, Hardware, table

if TYPE_CHECKING:
    from raydmd.planning.calibration import Entry
    from raydmd.recipe import Recipe

COPIED = 1 << 27
"""Bytes that are copied to see how fast memory is."""
Clock = Callable[[], float]
"""Seconds."""


def hardware(recipe: Recipe, entry: Entry) -> Hardware:
    """This machine as plans know it, at the rates that were measured."""
    forward, train = entry.rates["forward"], entry.rates["train"]
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        alike = next((h for short, h in table().items() if short in name.lower().replace(" ", "")), None)
        memory = torch.cuda.mem_get_info()[1] / GIB
        base = alike or Hardware(name=name, memory_gib=memory, bf16=1, fp32=1, hbm=_memory_speed(), link=25, network=25)
        peak = base.bf16 if recipe.training.precision == "bf16" else base.fp32
        if alike is None:
            peak = max(forward, train) / TERA
            base = base.model_copy(update={"bf16": peak, "fp32": peak})
        shares = {"forward": min(forward / TERA / peak, 1.0), "train": min(train / TERA / peak, 1.0)}
        return base.model_copy(update={"name": name, "memory_gib": memory, **shares})
    peak = max(forward, train)
    return Hardware(
        name=machine(),
        per_node=1,
        memory_gib=psutil.virtual_memory().total / GIB,
        bf16=peak / TERA,
        fp32=peak / TERA,
        hbm=_memory_speed(),
        link=1.0,
        network=1.0,
        forward=forward / peak,
        train=train / peak,
        reserved_gib=1.0,
        cores=os.cpu_count() or 1,
    )


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
