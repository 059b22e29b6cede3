"""Memory and step time by placement of the teacher: tied, local and remote, one worker on one device.

    python benchmarks/placements.py                 a Wan of 100 million random parameters on a CPU: 10 minutes
    python benchmarks/placements.py --size 1.3b     Wan2.1's 1.3 billion, bf16, where there is a GPU

The same work everywhere: DMD2, student and fake score with adapters of rank 64, a guided teacher. Memory is the peak of
the whole device (a CPU's: of the worker's and the replica's own pages) above what was used before; step time is the
median over cycles after the first two. Prints a table and writes the same figures as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench import code, keep
from diffusers import WanTransformer3DModel
from serving.pools import held_by

from raydmd.errors import RunStopped
from raydmd.models.untrained import write
from raydmd.models.untrained_parts import WIDTH
from raydmd.recipe import Recipe, derive
from raydmd.training.events import read_lines
from raydmd.training.run import run

HERE = Path(__file__).parent
NETWORKS: dict[str, dict[str, int]] = {
    "100m": {"num_attention_heads": 6, "ffn_dim": 3072, "num_layers": 12},
    "1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
}
CLIPS = {"100m": {"frames": 9, "height": 64, "width": 64}, "1.3b": {"frames": 81, "height": 480, "width": 832}}
PLACEMENTS = ("tied", "local", "remote")
WARM = 2
POLL = 0.1
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=NETWORKS, default="1.3b" if torch.cuda.is_available() else "100m")
    parser.add_argument("--cycles", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    output = args.output or HERE / "results" / f"placements-{args.size}-{device.lower().replace(' ', '-')}.json"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="placements-") as folder:
        model = pipeline(Path(folder) / "wan", args.size)
        print(f"\nWan of {args.size} random parameters, clips {CLIPS[args.size]}, {device}\n")
        print("| placement | peak memory, GiB | step, s | of it waiting for the teacher, s |\n|---|---|---|---|")
        for placement in PLACEMENTS:
            row = measure(recipe(model, args.size, placement, args.cycles))
            rows.append(row)
            print("| {placement} | {memory:.2f} | {step:.3f} | {wait:.3f} |".format(**row), flush=True)
    keep(
        output, {"settings": {"size": args.size, "device": device, "cycles": args.cycles, "code": code()}, "rows": rows}
    )
    print(f"\n{output}")


def pipeline(folder: Path, size: str) -> Path:
    """A Wan pipeline whose transformer has the size and random weights."""
    write("wan21", folder, ["a", "cat", "runs"])
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=256,
        **NETWORKS[size],
    )
    # As hubs have it: and each copy is converted, else a CPU's copies would all be the file's pages in memory.
    network.to(torch.bfloat16).save_pretrained(folder / "transformer")
    (folder / "prompts.txt").write_text("a cat runs\na cat\n", encoding="utf-8")
    return folder


def recipe(model: Path, size: str, placement: str, cycles: int) -> Recipe:
    """The same training for every placement."""
    gpu = 1.0 if torch.cuda.is_available() else 0.0
    shared = {"worker_gpus": gpu / 2, "teacher_gpus": gpu / 2} if placement == "remote" else {"worker_gpus": gpu}
    role = {"rate": 1e-5, "lora": {"rank": 64, "alpha": 64.0}}
    return derive(
        Recipe(name=placement, output=model.parent),
        {
            "model": {"path": str(model), **CLIPS[size]},
            "data.prompts": str(model / "prompts.txt"),
            "method": {"name": "dmd2", "steps": 4, "shift": 3.0, "guidance": 5.0},
            "checkpoints.every": cycles + 1,
            "training": {
                "cycles": cycles + 1,
                "batch": 1,
                "fake_updates": 5,
                "report_every": 1,
                "student": role,
                "fake": role,
                "ema": 0.0,
                "precision": "bf16" if gpu else "fp32",
                "sharding": "ddp",
                "gradient_checkpointing": True,
            },
            "monitor.diversity": None,
            "placement": {"teacher": placement, "worker_cpus": 1.0, **shared},
        },
    )


def measure(settings: Recipe) -> dict[str, Any]:
    """Train some cycles and say what they took."""
    with Peak() as peak, contextlib.suppress(RunStopped):  # before it would be evaluated
        run(settings, max_cycles=settings.training.cycles - 1)
    rows = [r for r in read_lines(settings.folder / "metrics.jsonl") if "time/rollout" in r][WARM:]
    steps = [sum(v for k, v in r.items() if k.startswith("time/")) for r in rows]
    return {
        "placement": settings.name,
        "memory": peak.most / GIB,
        "step": median(steps),
        "steps": steps,
        "wait": median(r["time/teacher_wait"] for r in rows),
    }


class Peak:
    """The most memory that was in use meanwhile, in bytes, above what was at the start."""

    def __init__(self) -> None:
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Peak:
        self._start = used()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=10)

    def _poll(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, used() - self._start)
            time.sleep(POLL)


def used() -> int:
    """Bytes: of the GPU, or of the processes of Ray that hold networks."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    return held_by("ray::RayTrainWorker", "ray::Replica")


if __name__ == "__main__":
    main()
