"""Batching: many clients with small requests against one replica.

    python benchmarks/serving/batching.py    three minutes

4 and 16 client processes keep four requests of 1 to 4 samples each under way. One replica answers them in batches of
16, another one by one. Both are compared to a loop over batches of 16 in a process of its own, which nobody asks over
any wire. A forward of this network mostly reads its 400 MB of weights, so that one of many samples takes little longer
than one of few: as on an accelerator, and unlike most networks on a CPU, which gain little from batches. It takes
0.1 s; what a request costs the replica beside it is about a millisecond, whatever the network. The threads that run
forwards, the replicas' and the loop's, have a core of their own, which other actors keep off. Must be at least 90% of
the loop's samples per second, and 2.5 times those of unbatched calls.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import pools
import ray
import torch

from raydmd.models.base import Conditions
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.pool import Pool
from raydmd.serving.pool_client import PoolClient

if TYPE_CHECKING:
    from raydmd.serving.messages import ScoreRequest
    from raydmd.serving.order import ClientSpec

BATCH = 16
SECONDS = 6.0
ROUNDS = 3
DEPTH = 4
LATENT = (4, 1, 1)
BLOCKS, WIDTH = 12, 1024


@ray.remote(num_cpus=0.01)
class Asker:
    """A client in a process of its own."""

    def __init__(self, specs: dict[str, ClientSpec], number: int) -> None:
        torch.set_num_threads(1)
        self._clients = {kind: PoolClient(spec, f"bench/{number}") for kind, spec in specs.items()}
        self._number = number

    def ask(self, kind: str, seconds: float) -> tuple[int, float]:
        """Ask a pool for some seconds; the samples it answered, and the seconds until the last of them."""
        under_way, answered, k = deque(), 0, 1
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            while len(under_way) < DEPTH:
                under_way.append(self._clients[kind].submit(self._ask(k)))
                k += 1
            answered += under_way.popleft().result().answer.value.shape[0]
        for pending in under_way:
            answered += pending.result().answer.value.shape[0]
        return answered, time.monotonic() - start

    def _ask(self, k: int) -> ScoreRequest:
        return pools.request(k, size=1 + (k + self._number) % 4, latent=LATENT, expert="high")


@ray.remote(num_cpus=0.01)
class Loop:
    """The same forwards without any wire."""

    def __init__(self, table: str) -> None:
        experts = pools.build(BLOCKS, WIDTH, torch.device("cpu"))
        for module in experts.modules.values():
            module.eval().requires_grad_(False)
        self._engine = TeacherEngine(experts, Conditions.read(Path(table)))
        self._requests = [pools.request(k, size=BATCH, latent=LATENT, expert="high") for k in range(20)]

    def run(self, seconds: float) -> float:
        """Samples per second."""
        torch.set_num_threads(1)
        start, done = time.monotonic(), 0
        while time.monotonic() < start + seconds:
            self._engine.answer([self._requests[done % len(self._requests)]])
            done += 1
        return BATCH * done / (time.monotonic() - start)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory(prefix="batching-") as folder, pools.cluster():
        path = Path(folder)
        loop = Loop.remote(pools.table(path, WIDTH))
        ray.get(loop.run.remote(1.0))
        batched = pools.teacher(path, blocks=BLOCKS, width=WIDTH, batch_items=BATCH)
        single = pools.teacher(path, blocks=BLOCKS, width=WIDTH, batch_items=1)
        with Pool.start(batched, "bench") as many, Pool.start(single, "bench") as one:
            specs = {"batched": many.client_spec(), "unbatched": one.client_spec()}
            everybody = [Asker.remote(specs, k) for k in range(16)]
            ray.get([a.ask.remote(kind, 1.0) for kind in specs for a in everybody])
            pools.set_apart("ReplicaActor", "Loop")
            for count in (4, 16):
                found: dict[str, list[float]] = {"loop": [], "batched": [], "unbatched": []}
                for _ in range(ROUNDS):  # side by side
                    found["loop"].append(ray.get(loop.run.remote(SECONDS)))
                    for kind in specs:
                        answered = ray.get([a.ask.remote(kind, SECONDS) for a in everybody[:count]])
                        found[kind].append(sum(a for a, _ in answered) / max(seconds for _, seconds in answered))
                medians = {kind: median(values) for kind, values in found.items()}
                rows.append(
                    {
                        "clients": count,
                        **medians,
                        "of_loop": medians["batched"] / medians["loop"],
                        "of_unbatched": medians["batched"] / medians["unbatched"],
                        "rounds": found,
                    }
                )
    pools.show(
        "batching",
        {
            "clients": "clients:d",
            "loop": "loop, samples/s:.0f",
            "batched": "pool, samples/s:.0f",
            "unbatched": "unbatched, samples/s:.0f",
            "of_loop": "of the loop:.2f",
            "of_unbatched": "times unbatched:.2f",
        },
        rows,
        {
            "batch": BATCH,
            "seconds": SECONDS,
            "rounds": ROUNDS,
            "depth": DEPTH,
            "latent": LATENT,
            "blocks": BLOCKS,
            "width": WIDTH,
        },
    )
    met = all(row["of_loop"] >= 0.9 and row["of_unbatched"] >= 2.5 for row in rows)
    print(f"{'met' if met else 'NOT MET'}: at least 0.9 of the loop, and 2.5 times unbatched")


if __name__ == "__main__":
    main()
