"""The simulator against real runs of 1 to 4 workers and 1 to 2 replicas, then what it says of 8 to 1024 GPUs.

    python benchmarks/scaling.py      eight minutes

The real runs are DMD2's cycles (one step, three fake updates) in Ray actors: the real worker, its collectives
(gloo), client, keeper, pool and batcher, on an untrained network of a few thousand parameters. This machine has
fewer cores than a run has processes, so what a GPU would do is a sleep: every forward and backward pass of a worker
sleeps for a set time, and a replica for a set time a sample. What is compared is therefore who waits for whom, and
not how fast anything computes. The simulator gets the stages of one worker, and each teacher's time; idle shares
must agree within 10 points.

The table after it plans papers' recipes on H100s: no such cluster was to be had, its rates are those of the
hardware table.
"""

from __future__ import annotations

import argparse
import functools
import json
import runpy
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import ray
import torch

sys.path.insert(0, str(Path(__file__).parent / "serving"))
import pools
from bench import code, keep

from raydmd.planning.hardware import read_hardware
from raydmd.planning.planner import Planner
from raydmd.planning.scaling import pools as pool_sizes
from raydmd.planning.scaling import said, sizes, text
from raydmd.planning.show import table
from raydmd.planning.simulate import Shape, simulate
from raydmd.recipe import Recipe, derive
from raydmd.serving.order import Order, Packed, Replicas
from raydmd.serving.pool import Pool
from raydmd.training.prepare import quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.serving.order import ClientSpec

HERE = Path(__file__).parent
FORWARD, BACKWARD = 0.08, 0.16
"""Seconds of a worker's passes."""
UPDATES, SHARE = 3, 2
SERVICES = (0.15, 0.5)
"""Seconds of a teacher for each sample."""
WORKERS, REPLICAS = (1, 2, 4), (1, 2)
TOGETHER = 4
"""Samples in a replica's forward."""
CYCLES = 6
BOUND = 0.10
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "Phased DMD, Wan2.2-T2V-A14B, 81 frames of 480x832": ("phased_wan22", {"data.sizes": ()}),
    "DMD2 with its GAN, SDXL": ("dmd2_sdxl", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=("real", "table"), help="Half of it; the other half stays as it was measured."
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scaling.json")
    args = parser.parse_args()
    quiet()
    before: dict[str, Any] = json.loads(args.output.read_text()) if args.only and args.output.is_file() else {}
    found = dict(before)
    if args.only != "table":
        found["real"] = real()
    if args.only != "real":
        found["plans"] = plans()
    found["code"] = code()
    keep(args.output, found)
    lead = (__doc__ or "").strip().replace("    python benchmarks/scaling.py ", "`python benchmarks/scaling.py`,")
    parts = [lead]
    if "real" in found:
        parts.append(shown(found["real"]))
    for name, about in found.get("plans", {}).items():
        parts += [f"## {name}", *(f"{title}\n\n{body}" for title, body in about["text"].items())]
    args.output.with_suffix(".md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts[1:]))
    raise SystemExit(not all(row["met"] for row in found.get("real", {}).get("rows", [])))


def real() -> dict[str, Any]:
    """Real runs beside simulated ones."""
    rows: list[dict[str, Any]] = []
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder, pools.cluster():
        held = {(service, copies): start(service, copies) for service in SERVICES for copies in REPLICAS}
        try:
            for (_, copies), pool in held.items():
                while not pool.loaded(60.0, enough=copies):
                    time.sleep(0.2)
            specs = [pool.client_spec() for pool in held.values()]
            for workers in WORKERS:
                make: Any = ray.remote(num_cpus=0.01)(Member)
                port = 29500 + time.time_ns() // 1000 % 2000
                members = [make.remote(folder, specs, rank, workers, port) for rank in range(workers)]
                ray.get([m.begin.remote() for m in members], timeout=300)
                for which, ((service, copies), pool) in enumerate(held.items()):
                    seen = run(members, pool, which, copies)
                    # Stages of one worker, which waits for no other: what all cases are told from.
                    stages = stages or {k: seen[k] for k in ("rollout", "fake", "generator")}
                    rows.append(beside(seen, stages, workers, copies, service))
                    print(shown({"rows": rows[-1:]}), flush=True)
                for member in members:
                    ray.kill(member)
        finally:
            for pool in held.values():
                pool.close()
    return {"rows": rows, "stages": stages, "forward": FORWARD, "backward": BACKWARD, "cycles": CYCLES}


def start(service: float, copies: int) -> Pool:
    """A pool that takes so long for each sample."""
    # Of this file, which replicas and workers do not import: it is sent to them by value.
    build = Packed.of(functools.partial(_slow, service))
    asked = Replicas(copies=copies, cpus=0.01, batch_items=TOGETHER)
    return Pool.start(Order(key=f"slow-{copies}-{service:g}", build=build, asked=asked), "scaling")


def run(members: list[Any], pool: Pool, which: int, copies: int) -> dict[str, float]:
    """Cycles of a real run: seconds by stage, and shares of idle time."""
    ray.get([m.cycles.remote(which, 1) for m in members], timeout=300)
    busy, since = _busy(pool), time.monotonic()
    seen = ray.get([m.cycles.remote(which, CYCLES) for m in members], timeout=500)
    idle = 1 - (_busy(pool) - busy) / copies / (time.monotonic() - since)
    rows = [row for own in seen for row in own]
    parts = {k: fmean(row[f"time/{k}"] for row in rows) for k in ("rollout", "fake", "teacher_wait", "generator")}
    step = sum(parts.values())
    return {**parts, "step": step, "wait": parts["teacher_wait"] / step, "replica_idle": idle}


def beside(
    seen: dict[str, float], stages: dict[str, float], workers: int, copies: int, service: float
) -> dict[str, Any]:
    """A real run's figures, and the simulator's."""
    told = simulate(
        Shape(
            workers=workers,
            replicas=copies,
            rollout=stages["rollout"],
            fake_updates=(stages["fake"] / UPDATES,) * UPDATES,
            generator=stages["generator"],
            items=SHARE,
            service=functools.partial(_times, service),
            batch_items=TOGETHER,
            cycles=CYCLES,
            name=f"run{workers}",  # as the real one's, which decides between equal replicas
        )
    )
    off = [told.wait - seen["wait"], told.replica_idle - seen["replica_idle"]]
    return {
        "service": service,
        "workers": workers,
        "replicas": copies,
        "step": seen["step"],
        "step_told": told.step,
        "wait": seen["wait"],
        "wait_told": told.wait,
        "replica_idle": seen["replica_idle"],
        "replica_idle_told": told.replica_idle,
        "met": all(abs(o) <= BOUND for o in off),
    }


class Member:
    """A worker of a run, whose networks sleep."""

    def __init__(self, folder: str, specs: list[ClientSpec], rank: int, world: int, port: int) -> None:
        self.folder, self.specs, self.rank, self.world, self.port = Path(folder), specs, rank, world, port
        self.cycle = 0

    def begin(self) -> None:
        """Build it, with the others."""
        import torch.distributed as dist
        from one_worker import conditions, dmd2

        from raydmd.models import load_family
        from raydmd.models.base import Conditions
        from raydmd.serving.pool_client import PoolClient
        from raydmd.serving.router import seat
        from raydmd.training.events import EventLog
        from raydmd.training.session import FolderSession
        from raydmd.training.worker import Job, Worker

        torch.set_num_threads(1)
        if self.world > 1:
            dist.init_process_group(
                "gloo", init_method=f"tcp://127.0.0.1:{self.port}", rank=self.rank, world_size=self.world
            )
        recipe = dmd2(
            self.folder,
            **{
                "model.path": "sd3-untrained",
                "method.steps": 1,
                "training.batch": SHARE * self.world,
                "training.fake_updates": UPDATES,
                "placement.workers": self.world,
            },
        )
        family = load_family(recipe.model)
        recipe = derive(recipe, {"output": self.folder / f"{self.world}-{self.rank}"})
        job = Job(recipe=recipe, family=family, conditions=Conditions.read(conditions(recipe, family)))
        session = FolderSession(recipe.folder)
        session.rank, session.world = self.rank, self.world
        run = f"run{self.world}"
        own = seat(run, self.rank)
        self.clients = [PoolClient(spec, f"{run}/rank{self.rank}", seat=own) for spec in self.specs]
        worker = Worker(job, self.clients[0], session, EventLog(recipe.folder / "events.jsonl", enabled=False))
        self.actors = worker.begin()
        for role in (self.actors.student, self.actors.fake):
            for network in role.experts.modules.values():
                network.register_forward_hook(_sleeps)

    def cycles(self, which: int, count: int) -> list[dict[str, float]]:
        """Run some with one of the pools."""
        from dataclasses import replace

        from raydmd.training.cycle import train_cycle

        actors, self.cycle = replace(self.actors, teacher=self.clients[which]), self.cycle + count
        return [train_cycle(actors, self.cycle - count + k) for k in range(count)]


def _sleeps(module: Any, inputs: Any, output: torch.Tensor) -> None:
    time.sleep(FORWARD)
    if output.requires_grad:
        output.register_hook(lambda _: time.sleep(BACKWARD))


def _slow(service: float, device: str, experts: tuple[str, ...]) -> Any:
    """A teacher that sleeps for each sample."""
    del device, experts

    class Slow(pools.Sleeper):
        def answer(self, requests: Sequence[Any]) -> list[Any]:
            self._seconds = service * sum(len(r.x_t) for r in requests)
            return super().answer(requests)

    return Slow(0.0)


def _times(service: float, samples: int) -> float:
    return service * samples


def _busy(pool: Pool) -> float:
    return sum(stats["busy_seconds"] for stats in pool.stats(30.0).replicas.values())


def shown(found: dict[str, Any]) -> str:
    """The real runs as a table."""
    head = [
        "teacher, s a sample",
        "workers",
        "replicas",
        "cycle, s",
        "told",
        "worker waits",
        "told",
        "teachers idle",
        "told",
    ]
    rows = [
        [
            f"{r['service']:g}",
            str(r["workers"]),
            str(r["replicas"]),
            f"{r['step']:.2f}",
            f"{r['step_told']:.2f}",
            f"{r['wait']:.0%}",
            f"{r['wait_told']:.0%}",
            f"{r['replica_idle']:.0%}",
            f"{r['replica_idle_told']:.0%}",
        ]
        for r in found["rows"]
    ]
    met = all(r["met"] for r in found["rows"])
    return f"{table(head, rows)}\n\n{'met' if met else 'NOT MET'}: idle shares within {BOUND * 100:.0f} points"


def plans() -> dict[str, Any]:
    """Papers' recipes on more and more H100s."""
    sys.path.insert(0, str(HERE.parent / "experiments"))
    found: dict[str, Any] = {}
    for name, (script, changes) in RUNS.items():
        recipe: Recipe = runpy.run_path(str(HERE.parent / "experiments" / f"{script}.py"))["PAPER"]
        planner = Planner(derive(recipe, changes), read_hardware("h100"))
        about: dict[str, Any] = {"text": {}, "rows": {}, "knee": {}}
        for grow in (False, True):
            how = "A worker's share of samples kept" if grow else f"The recipe's batch of {recipe.training.batch}"
            rows = sizes(planner, grow=grow)
            about["text"][how] = text(rows)
            about["rows"][how] = [
                {"gpus": s.gpus, "option": str(s.answer.option), "batch": s.batch, "step": s.step, "speed": s.speed}
                | {k: s.idle(k) for k in ("wait", "barrier", "replica_idle")}
                for s in rows
            ]
            about["knee"][how] = said(rows)
        rows = pool_sizes(planner, planner.own.workers, (1, 2, 4, 8, 16))
        about["text"][f"{planner.own.workers} workers and pools of several sizes"] = text(rows).rpartition("\n")[0]
        found[name] = about
        print(name, *about["text"].values(), sep="\n", flush=True)
    return found


if __name__ == "__main__":
    main()
