"""Deaths: what a client waits for when replicas go, in seconds to the right answer or a typed error.

    python benchmarks/serving/deaths.py      four minutes

Two replicas on two nodes (processes of Ray's cluster utility). A request is under way, or comes right after; attempts
count as silent after 4 s, requests end after 40 s. Every answer must equal that of a teacher in this process bit for
bit, and nothing may take longer than the deadline.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pools
import torch
from ray.cluster_utils import Cluster

from raydmd.errors import InputError, RaydmdError
from raydmd.models.base import Conditions
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.order import Order, Packed, Replicas
from raydmd.serving.pool import Pool
from raydmd.serving.pool_client import PoolClient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.methods.terms import Answer
    from raydmd.serving.messages import Request

ATTEMPT, DEADLINE, HANG = 4.0, 40.0, 12.0
ROUNDS = 3


class Steered(TeacherEngine):
    """A teacher whose misfortunes are files: ``hang`` stops one forward for a while, ``slow`` makes all take 2 s."""

    folder: Path

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`TeacherEngine`."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "hang").unlink()
            time.sleep(HANG)
        if (self.folder / "slow").exists():
            time.sleep(2)
        return super().answer(requests)


def steered(folder: str, device: str, experts: tuple[str, ...] = ()) -> Steered:
    """Build one; with a file ``broken`` it cannot be loaded."""
    if (Path(folder) / "broken").exists():
        raise InputError("the weights are gone")
    loaded = pools.build(4, pools.WIDTH, torch.device(device), experts)
    for module in loaded.modules.values():
        module.eval().requires_grad_(False)
    engine = Steered(loaded, Conditions.read(Path(pools.table(Path(folder)))))
    engine.folder = Path(folder)
    return engine


class Deaths:
    """A pool whose replicas die, and a client that asks it."""

    def __init__(self, pool: Pool, folder: Path, cluster: Cluster) -> None:
        self.pool, self.folder, self.cluster = pool, folder, cluster
        untroubled = folder / "untroubled"
        untroubled.mkdir()
        self.local = LocalClient(steered(str(untroubled), "cpu"))
        self.number = 0

    def none(self, client: PoolClient) -> float:
        """Nobody dies."""
        return self._time(client, lambda: None)

    def idle(self, client: PoolClient) -> float:
        """A replica is killed while idle; the request comes right after."""
        kill(self._pid(0))
        return self._time(client, lambda: None)

    def serving(self, client: PoolClient) -> float:
        """The replica that serves the request is killed."""
        (self.folder / "slow").touch()

        def strike() -> None:
            time.sleep(0.5)
            kill(self._stats()[self.asked]["pid"])
            (self.folder / "slow").unlink()

        return self._time(client, strike)

    def hung(self, client: PoolClient) -> float:
        """The replica that serves the request stops for longer than it is waited for, and lives."""
        (self.folder / "hang").touch()
        seconds = self._time(client, lambda: None)
        time.sleep(HANG)  # or the next round would find both hung
        return seconds

    def node(self, client: PoolClient) -> float:
        """The node of the replica that serves the request is gone."""
        (self.folder / "slow").touch()

        def strike() -> None:
            time.sleep(0.5)
            where = self._node_of(self.asked)
            self.cluster.remove_node(where, allow_graceful=False)
            (self.folder / "slow").unlink()
            self.cluster.add_node(num_cpus=1, resources={"teacher": 1})

        return self._time(client, strike)

    def both(self, client: PoolClient) -> float:
        """Both replicas are killed while one serves the request, and come back."""
        pids = [stats["pid"] for stats in self._stats().values()]
        (self.folder / "slow").touch()

        def strike() -> None:
            time.sleep(0.5)
            for pid in pids:
                kill(pid)
            (self.folder / "slow").unlink()

        return self._time(client, strike)

    def all_gone(self, client: PoolClient) -> float:
        """Both replicas are killed, and their weights are gone: an error has to come."""
        pids = [stats["pid"] for stats in self._stats().values()]
        (self.folder / "broken").touch()
        for pid in pids:
            kill(pid)
        start = time.monotonic()
        try:
            client.submit(pools.request(10_000, size=2)).result()
        except RaydmdError as error:
            print(f"    {type(error).__name__}: {str(error).splitlines()[0][:180]} ...")
            return time.monotonic() - start
        raise SystemExit("an answer came from nobody")

    def _time(self, client: PoolClient, strike: Callable[[], None]) -> float:
        self.number += 1
        request = pools.request(self.number, size=2)
        right = self.local.submit(request).result().answer.value
        start = time.monotonic()
        pending = client.submit(request)
        self.asked = pending.attempts[-1].replica if pending.attempts else ""
        strike()
        struck = time.monotonic() if strike.__name__ == "strike" else start
        answer = pending.result().answer.value
        seconds = time.monotonic() - struck
        if not torch.equal(answer, right):
            raise SystemExit(f"a wrong answer to {request.name}")
        return seconds

    def _stats(self) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            stats = self.pool.stats().replicas
            if len(stats) == 2:
                return dict(stats)
            time.sleep(0.3)
        raise SystemExit("replicas stay away")

    def _pid(self, which: int) -> int:
        return int(self._stats()[sorted(self._stats())[which]]["pid"])

    def _node_of(self, replica: str) -> Any:
        pid = self._stats()[replica]["pid"]
        for node in self.cluster.worker_nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            if parent_of(pid) == raylet:
                return node
        raise SystemExit(f"no node has {replica}")


def parent_of(pid: int) -> int:
    """The process that started it."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int) -> None:
    """End a process without a word."""
    os.kill(pid, signal.SIGKILL)


def main() -> None:
    os.environ |= {
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_initial_delay_ms": "0",
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="deaths-") as name:
        folder = Path(name)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        for _ in range(2):
            cluster.add_node(num_cpus=1, resources={"teacher": 1})
        try:
            with pools.cluster(address=cluster.address, num_cpus=None, include_dashboard=None):
                asked = Replicas(copies=2, cpus=0.1, resources={"teacher": 1.0})
                build = Packed.of(functools.partial(steered, str(folder)))
                order = Order(key="deaths", build=build, asked=asked, deterministic=True)
                with Pool.start(order, "bench", request_timeout=DEADLINE, attempt_timeout=ATTEMPT) as pool:
                    deaths = Deaths(pool, folder, cluster)
                    kinds = (deaths.none, deaths.idle, deaths.serving, deaths.hung, deaths.node, deaths.both)
                    for kind in (*kinds, deaths.all_gone):
                        found = []
                        for turn in range(1 if kind.__name__ == "all_gone" else ROUNDS):
                            client = PoolClient(pool.client_spec(), f"bench/{turn}")
                            deaths._stats()
                            client.submit(pools.request(0, size=1)).result()
                            found.append(kind(client))
                            print(f"  {kind.__name__}: {found[-1]:.2f} s", flush=True)
                        what = (kind.__doc__ or "").removesuffix(".")
                        rows.append({"death": what, "seconds": median(found), "worst": max(found), "rounds": found})
        finally:
            cluster.shutdown()
    pools.show(
        "deaths",
        {"death": "death:", "seconds": "answer after, s:.2f", "worst": "worst, s:.2f"},
        rows,
        {"rounds": ROUNDS, "attempt": ATTEMPT, "deadline": DEADLINE},
    )
    met = all(row["worst"] <= DEADLINE + 2 for row in rows)
    print(f"{'met' if met else 'NOT MET'}: right answers or a typed error, none after the deadline")


if __name__ == "__main__":
    main()
