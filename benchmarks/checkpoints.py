"""What training waits for a checkpoint, written in the background or not: python benchmarks/checkpoints.py.

Two processes hold a sharded state of ``--gigabytes`` in all and do matrix products meanwhile, as training would. The
table goes to the terminal, its figures to benchmarks/results/checkpoints.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from raydmd.training.checkpoint import Progress, save, writers

WORLD = 2
TENSORS = 16
PRODUCTS = 20
"""Per step; each of 512 by 512."""
STEPS = 40


def rank(number: int, port: int, folder: Path, gigabytes: float, repeats: int, results: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=WORLD)
    mesh, group = init_device_mesh("cpu", (WORLD,)), writers(timedelta(minutes=5))
    rows = int(gigabytes * 1e9 / 4 / TENSORS / 1024) // WORLD * WORLD
    tensors = {f"w{k}": distribute_tensor(torch.randn(rows, 1024), mesh, [Shard(0)]) for k in range(TENSORS)}
    progress = Progress(cycle=0, phase=0, monitor={}, recipe="")
    alone = statistics.median(step() for _ in range(STEPS))
    found = []
    for repeat in range(repeats):
        for background in (False, True):  # side by side: the disk is not the same from one minute to the next
            target = folder / f"{repeat}-{background}"
            if number == 0:
                target.mkdir(parents=True)
            dist.barrier()
            begun = time.perf_counter()
            written = save(target, dict(tensors), progress, rank=number, group=group, background=background)
            waited = time.perf_counter() - begun
            steps = [step() for _ in range(STEPS)]
            written()
            there = time.perf_counter() - begun
            found.append({"background": background, "waits": waited, "there": there, "step": statistics.median(steps)})
            dist.barrier()
            if number == 0:
                shutil.rmtree(target)
    if number == 0:
        results.write_text(json.dumps({"alone": alone, "rows": found}))
    dist.destroy_process_group()


def step() -> float:
    """Seconds of a step of work."""
    begun, a = time.perf_counter(), torch.ones(512, 512)
    for _ in range(PRODUCTS):
        a = a @ a / 512
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the state, in all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "checkpoints.json")
    args = parser.parse_args()
    with socket.socket() as free, tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        free.bind(("127.0.0.1", 0))
        port, results = free.getsockname()[1], Path(temporary) / "results.json"
        free.close()
        given = (port, Path(temporary), args.gigabytes, args.repeats, results)
        multiprocessing.spawn(rank, args=given, nprocs=WORLD)
        measured = json.loads(results.read_text())
    found = {"gigabytes": args.gigabytes, "machine": f"{platform.machine()}, {os.cpu_count()} cores", **measured}
    print(f"| a state of {args.gigabytes:g} GB on {WORLD} ranks | training waits | there after | step meanwhile |")
    print("|---|---|---|---|")
    for background in (False, True):
        rows = [r for r in measured["rows"] if r["background"] is background]
        middle = {k: statistics.median(r[k] for r in rows) for k in ("waits", "there", "step")}
        name = "in the background" if background else "waiting for it"
        slower = middle["step"] / measured["alone"]
        print(f"| {name} | {middle['waits']:.2f} s | {middle['there']:.2f} s | {slower:.2f} of one without |")
        found["background" if background else "waiting"] = middle
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
