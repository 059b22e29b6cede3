"""A soak: 10,000 requests of random shapes, experts and sizes from 16 clients, while replicas are killed at random.

    python benchmarks/serving/soak.py        three minutes

Every answer is compared, bit for bit, with that of a teacher in the client's own process; each replica's memory is
followed. All answers must be equal, and the memory of a replica that has served for a while must not grow.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pools
import ray
import torch

from raydmd.models.base import Conditions
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.pool import Pool
from raydmd.serving.pool_client import PoolClient

if TYPE_CHECKING:
    from raydmd.serving.order import ClientSpec

CLIENTS = 16
BLOCKS = 4
DEPTH = 4
KILL_EVERY = (4.0, 8.0)
SHAPES = [(4, 8, 8), (4, 4, 16), (4, 16, 8), (4, 3, 8, 8), (4, 5)]
MIB = 1 << 20


@ray.remote(num_cpus=0.01)
class Asker:
    """A client in a process of its own, which knows every answer."""

    def __init__(self, spec: ClientSpec, table: str, number: int) -> None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        self._client = PoolClient(spec, f"bench/{number}")
        experts = pools.build(BLOCKS, pools.WIDTH, torch.device("cpu"))
        for module in experts.modules.values():
            module.eval().requires_grad_(False)
        self._local = LocalClient(TeacherEngine(experts, Conditions.read(Path(table))))
        self._number = number

    def ask(self, count: int) -> dict[str, int]:
        """Ask, compare, and say how often it was sent again."""
        rng, equal, under_way = random.Random(self._number), 0, []
        for k in range(count + DEPTH):
            if k < count:
                seed = self._number * 100_000 + k
                request = pools.request(seed, size=rng.randint(1, 8), latent=rng.choice(SHAPES))
                under_way.append((request, self._client.submit(request)))
            if len(under_way) >= DEPTH or k >= count:
                if not under_way:
                    break
                asked, pending = under_way.pop(0)
                right = self._local.submit(asked).result().answer.value
                equal += torch.equal(pending.result().answer.value, right)
        return {"equal": equal, "retries": self._client.retries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    args = parser.parse_args()
    rng = random.Random(0)
    memory: dict[int, list[float]] = defaultdict(list)
    kills = 0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, pools.cluster():
        path = Path(folder)
        order = pools.teacher(path, blocks=BLOCKS, deterministic=True, copies=2)
        with Pool.start(order, "bench", request_timeout=120.0, attempt_timeout=10.0) as pool:
            askers = [Asker.remote(pool.client_spec(), pools.table(path), k) for k in range(CLIENTS)]
            share = args.requests // CLIENTS
            start = time.monotonic()
            waiting = [a.ask.remote(share) for a in askers]
            kill_at = start + rng.uniform(*KILL_EVERY)
            while ray.wait(waiting, num_returns=CLIENTS, timeout=0.5)[1]:
                replicas = pool.stats(2.0).replicas
                for stats in replicas.values():
                    memory[stats["pid"]].append(stats["rss"] / MIB)
                if replicas and time.monotonic() > kill_at:
                    os.kill(rng.choice(list(replicas.values()))["pid"], signal.SIGKILL)
                    kills += 1
                    kill_at = time.monotonic() + rng.uniform(*KILL_EVERY)
            seconds = time.monotonic() - start
            said = ray.get(waiting)
            # The rest without kills, so that one process serves long enough to leak.
            for _ in range(20):
                ray.get([a.ask.remote(25) for a in askers])
                for stats in pool.stats(5.0).replicas.values():
                    memory[stats["pid"]].append(stats["rss"] / MIB)
    longest = max(memory.values(), key=len)
    settled = longest[len(longest) // 3 :]
    row: dict[str, Any] = {
        "requests": share * CLIENTS,
        "equal": sum(s["equal"] for s in said),
        "kills": kills,
        "retries": sum(s["retries"] for s in said),
        "rate": share * CLIENTS / seconds,
        "first": settled[0],
        "last": settled[-1],
        "growth": settled[-1] / settled[0] - 1,
        "memory": longest,
    }
    pools.show(
        "soak",
        {
            "requests": "requests:d",
            "equal": "equal:d",
            "kills": "kills:d",
            "retries": "sent again:d",
            "rate": "requests/s:.0f",
            "first": "replica's memory at a third, MiB:.0f",
            "last": "at the end, MiB:.0f",
        },
        [row],
        {"clients": CLIENTS, "depth": DEPTH, "shapes": SHAPES},
    )
    met = row["equal"] == row["requests"] and kills > 0 and row["growth"] < 0.05
    print(f"{'met' if met else 'NOT MET'}: all answers equal, replicas were killed, memory within 5%")


if __name__ == "__main__":
    main()
