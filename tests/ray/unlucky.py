"""Workers with misfortunes: files in a run's folder say what happens to which rank in which cycle, and how often."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from raydmd.training import worker
from raydmd.training.ray_worker import LoopConfig, train_loop

ALWAYS = 1000


def plan(folder: Path, *misfortunes: tuple[int, int, str, int]) -> None:
    """Say what happens: rank, cycle, what, how often."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "misfortunes.json").write_text(json.dumps(misfortunes))


def unlucky_loop(config: LoopConfig) -> None:
    """Ray Train's worker function, with what is planned."""
    folder = Path(config["worker"].folder)
    planned = json.loads((folder / "misfortunes.json").read_text())
    healthy, rank = worker.train_cycle, int(os.environ["RANK"])

    def cycle(actors: Any, number: int) -> dict[str, float]:
        for who, when, what, times in planned:
            if (who, when) == (rank, number) and _still(folder / f"met-{who}-{when}-{what}", times):
                meet(what)
        return healthy(actors, number)

    worker.train_cycle = cycle
    try:
        train_loop(config)
    finally:
        worker.train_cycle = healthy


def meet(what: str) -> None:
    """Have it happen to this process."""
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "controller":
        beside = psutil.Process(os.getppid()).children()
        [controller] = [p for p in beside if "ray::TrainController" in " ".join(p.cmdline()[:1])]
        controller.kill()
        time.sleep(60)
    if what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore of that")
    if what == "error":
        raise ImportError("no module named nowhere\nmore of that")
    time.sleep(60)


def _still(file: Path, times: int) -> bool:
    met = len(file.read_text()) if file.exists() else 0
    if met >= times:
        return False
    file.write_text("x" * (met + 1))
    return True
