"""The wire: a tensor of 64 MB in bf16 to a replica and back, against numpy through Ray's object store.

    python benchmarks/serving/wire.py        one minute

Both go to an actor that gives back what it got: ``numpy`` is a plain actor, ``pool`` a client, a replica and all that
is between. Rounds alternate; the figure is the median's ratio. Must be at most 1.3.
"""

from __future__ import annotations

import functools
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pools
import ray
import torch

from raydmd.serving.messages import RewardRequest
from raydmd.serving.order import Order, Packed, Replicas
from raydmd.serving.pool import Pool
from raydmd.serving.pool_client import PoolClient

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEGABYTES = 64
ROUNDS = 25
MOST = 1.3


@ray.remote(num_cpus=0.1)
class Plain:
    """Gives back what it got."""

    def same(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array."""
        return array


def main() -> None:
    tensor = torch.randn(1, MEGABYTES * 500_000).to(torch.bfloat16)
    array = np.ascontiguousarray(tensor.view(torch.uint16).numpy())
    seconds: dict[str, list[float]] = {"numpy": [], "pool": []}
    build = Packed.of(functools.partial(pools.sleeper, 0.0))
    order = Order(key="echo", build=build, asked=Replicas(copies=1, cpus=0.1, batch_items=1))
    with pools.cluster(object_store_memory=2_000_000_000), Pool.start(order, "wire") as pool:
        plain, client = Plain.remote(), PoolClient(pool.client_spec(), "wire")
        for turn in range(ROUNDS + 3):
            start = time.perf_counter()
            back = ray.get(plain.same.remote(ray.put(array)))
            middle = time.perf_counter()
            answer = client.submit(RewardRequest(x_t=tensor, conditions=(0,), name=f"round {turn}")).result().answer
            end = time.perf_counter()
            if not (np.array_equal(back, array) and torch.equal(answer.value, tensor)):
                raise SystemExit("what came back is not what was sent")
            if turn >= 3:  # the store's pages are new at first
                seconds["numpy"].append(middle - start)
                seconds["pool"].append(end - middle)
            del back, answer
    base = median(seconds["numpy"])
    rows = [{"wire": k, "ms": 1000 * median(v), "ratio": median(v) / base, "seconds": v} for k, v in seconds.items()]
    pools.show(
        "wire",
        {"wire": "wire:", "ms": "there and back, ms:.1f", "ratio": "of numpy's:.2f"},
        rows,
        {"megabytes": MEGABYTES, "rounds": ROUNDS},
    )
    print(f"{'met' if rows[1]['ratio'] <= MOST else 'NOT MET'}: at most {MOST} of numpy's time")


if __name__ == "__main__":
    main()
