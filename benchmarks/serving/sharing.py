"""Sharing: four trials at once on one pool, against four with a teacher each.

    python benchmarks/serving/sharing.py     four minutes

A trial is a run's worker in a process of its own, with a client of a pool; all train one recipe with seeds of their
own, deterministically. Memory is what the processes hold for themselves (USS), at its highest; results are compared bit
for bit. The teacher's memory must be paid once, and the results must be the same.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pools
import ray
import torch
from one_worker import conditions, cycles, dmd2

from raydmd.models import load_family
from raydmd.serving.pool_client import PoolClient
from raydmd.training.pools import teacher_pool

if TYPE_CHECKING:
    from raydmd.serving.order import ClientSpec

TRIALS = 4
CYCLES = 12
MIB = 1 << 20


@ray.remote(num_cpus=0.1)
class Trial:
    """A run's worker."""

    def __init__(self, folder: str, seed: int, spec: ClientSpec) -> None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        recipe = dmd2(Path(folder), name=f"trial-{seed}", seed=seed, deterministic=True)
        self._client = PoolClient(spec, f"trial-{seed}/rank0")
        self._train = cycles(recipe, self._client)

    def run(self, first: int, last: int) -> list[dict[str, float]]:
        """Figures of some cycles, without their times."""
        rows = [self._train(k) for k in range(first, last)]
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def main() -> None:
    rows: list[dict[str, Any]] = []
    results = []
    with tempfile.TemporaryDirectory(prefix="sharing-") as folder, pools.cluster():
        for kind in ("a teacher each", "shared"):
            results.append(measure(Path(folder) / kind.replace(" ", "-"), kind, rows))
    same = results[0] == results[1]
    pools.show(
        "sharing",
        {
            "kind": "teachers:",
            "replicas": "replicas:d",
            "memory": "memory in all, MiB:.0f",
            "teachers": "of it replicas, MiB:.0f",
            "rate": "trial-steps/s:.2f",
        },
        rows,
        {"trials": TRIALS, "cycles": CYCLES, "model": "sd35-tiny", "same_results": same},
    )
    once = rows[1]["teachers"] < 1.3 * rows[0]["teachers"] / TRIALS
    print(
        f"{'met' if same and once else 'NOT MET'}: results the same ({same}), the teacher's memory paid once ({once})"
    )


def measure(folder: Path, kind: str, rows: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """Train all trials; returns what came out."""
    settings = dmd2(folder, name="settings", deterministic=True)
    family = load_family(settings.model)
    table = conditions(settings, family)
    held = []
    try:
        for k in range(1 if kind == "shared" else TRIALS):
            # Another wait makes another key, and changes nothing where requests are not batched.
            own = dmd2(
                folder,
                name="settings",
                deterministic=True,
                placement={"batch_wait": 0.003 + 1e-6 * k, "teacher_cpus": 0.1},
            )
            held.append(teacher_pool(own, family, table, family.shape().latent, holder=f"bench-{k}"))
        for pool in held:
            pool.wait()
        trials = [Trial.remote(str(folder), k, held[k % len(held)].client_spec()) for k in range(TRIALS)]
        warm = ray.get([t.run.remote(0, 2) for t in trials])
        with Memory() as memory:
            start = time.monotonic()
            found = ray.get([t.run.remote(2, 2 + CYCLES) for t in trials])
            seconds = time.monotonic() - start
        rows.append(
            {
                "kind": kind,
                "replicas": len(held),
                "memory": memory.most / MIB,
                "teachers": memory.teachers / MIB,
                "rate": TRIALS * CYCLES / seconds,
            }
        )
        for trial in trials:
            ray.kill(trial)
    finally:
        for pool in held:
            pool.close()
    return [a + b for a, b in zip(warm, found, strict=True)]


class Memory:
    """The most that trials and replicas held meanwhile, and the most that replicas did, bytes."""

    def __init__(self) -> None:
        self.most = self.teachers = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=30)

    def _poll(self) -> None:
        while not self._over.wait(2.0):
            mine, theirs = pools.held_by("ray::Trial"), pools.held_by("ray::ReplicaActor")
            self.most, self.teachers = max(self.most, mine + theirs), max(self.teachers, theirs)


if __name__ == "__main__":
    main()
