"""Fairness: a client that floods the pool, and one that sends garbage, beside one that behaves.

    python benchmarks/serving/fairness.py    one minute

The well-behaved client keeps one request under way and is timed alone, beside a client that keeps 600, more than the
queue holds, and beside one that asks for what is not finite, or of the wrong expert. With two clients its fair share is
half of the replica: it must get at least 45% of what it has alone, and beside garbage too.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pools
import ray

from raydmd.errors import RaydmdError
from raydmd.serving.pool import Pool
from raydmd.serving.pool_client import PoolClient

if TYPE_CHECKING:
    from raydmd.serving.order import ClientSpec

SECONDS = 8.0
LATENT = (4, 16, 16)
FLOOD = 600
Kind = Literal["behaves", "floods", "garbage"]


@ray.remote(num_cpus=0.01)
class Asker:
    """A client in a process of its own."""

    def __init__(self, spec: ClientSpec, kind: Kind) -> None:
        self._kind = kind
        self._client = PoolClient(spec, f"{kind}/0")
        self._client.submit(pools.request(0, size=1, latent=LATENT, expert="high")).result()

    def ask(self, seconds: float) -> tuple[int, int]:
        """Requests answered and failed within some seconds."""
        under_way, answered, failed, k = deque(), 0, 0, 1
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while len(under_way) < (FLOOD if self._kind == "floods" else 1):
                under_way.append(self._client.submit(self._request(k)))
                k += 1
            try:
                under_way.popleft().result()
                answered += 1
            except RaydmdError:
                failed += 1
        return answered, failed

    def _request(self, k: int) -> Any:
        request = pools.request(k, size=4, latent=LATENT, expert="high")
        if self._kind == "garbage":
            if k % 2:
                request.x_t.fill_(float("nan"))
            else:
                request.t.fill_(0.1)  # another expert's
        return request


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fairness-") as folder, pools.cluster():
        order = pools.teacher(Path(folder), batch_items=4)
        with Pool.start(order, "bench") as pool:
            spec = pool.client_spec()
            good, flood, bad = (Asker.remote(spec, kind) for kind in ("behaves", "floods", "garbage"))
            ray.get([a.ask.remote(0.5) for a in (flood, bad)])
            ray.get(good.ask.remote(3.0))
            for beside, other in (("nobody", None), ("a flood", flood), ("garbage", bad)):
                theirs = other.ask.remote(SECONDS) if other else None
                answered, failed = ray.get(good.ask.remote(SECONDS))
                done, refused = ray.get(theirs) if theirs else (0, 0)
                rows.append(
                    {
                        "beside": beside,
                        "rate": answered / SECONDS,
                        "share": answered / SECONDS / (rows[0]["rate"] if rows else answered / SECONDS),
                        "failed": failed,
                        "others": done / SECONDS,
                        "others_failed": refused / SECONDS,
                    }
                )
    pools.show(
        "fairness",
        {
            "beside": "beside:",
            "rate": "requests/s:.1f",
            "share": "of alone:.2f",
            "failed": "failed:d",
            "others": "the other's/s:.1f",
            "others_failed": "the other's failures/s:.1f",
        },
        rows,
        {"seconds": SECONDS, "flood": FLOOD},
    )
    met = rows[1]["share"] >= 0.45 and rows[2]["share"] >= 0.45 and not any(row["failed"] for row in rows)
    print(f"{'met' if met else 'NOT MET'}: at least 0.45 of alone, beside a flood and beside garbage, and no failure")


if __name__ == "__main__":
    main()
