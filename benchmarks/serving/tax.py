"""No tax: raydmd's step against a plain PyTorch loop (``plain_loop.py``) that does the same work.

    python benchmarks/serving/tax.py         six minutes

- One thread each: raydmd with a teacher in its own process. Must take at most 1.03 times the loop's time.
- Two cores: raydmd with one thread and a pool's replica with the other, the loop with two threads. Must be faster.

All distil ``sd35-tiny``, by DMD2 with two rhythms and by DP-DMD, whose teacher also walks. Each cycle is run by all in
turn, with rollouts that leave at the same steps; a cycle's floating point operations are counted to be the same. What a
replica can take over is the teacher's share of them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pools
import torch
from one_worker import conditions, cycles, dmd2
from plain_loop import Loop
from torch.utils.flop_counter import FlopCounterMode

from raydmd.draws import Draws
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.places import locate
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.pool_client import PoolClient
from raydmd.training.pools import teacher_pool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.methods.terms import Answer
    from raydmd.serving.messages import Request

ROUNDS = 25
CASES = (("dmd2", 5), ("dmd2", 1), ("dp_dmd", 5))
"""Methods, and fake updates per cycle."""
WARM = 3
MOST = 1.03
THREADS = {"loop": 1, "local": 1, "loop, two threads": 2, "remote": 1}


def main() -> None:
    rows, flops = [], {}
    with pools.cluster():
        for method, updates in CASES:
            found, flops[f"{method}, {updates}"] = measure(method, updates)
            rows += found
    pools.show(
        "tax",
        {
            "method": "method:",
            "updates": "fake updates:d",
            "step": "step:",
            "threads": "threads:",
            "seconds": "s:.3f",
            "ratio": "of the loop with as many:.3f",
            "share": "teacher's share:.1%",
        },
        rows,
        {"rounds": ROUNDS, "model": "sd35-tiny", "flops": flops},
    )
    for step, most in (("local", MOST), ("remote", 1.0)):
        for row in rows:
            if row["step"] == step:
                met = "met" if row["ratio"] <= most else "NOT MET"
                case = f"{row['method']}, {row['updates']} fake updates"
                print(f"{met}: {step}, {case}, at most {most:.2f}")


def measure(method: str, updates: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Steps of a method with so many fake updates; and the floating point operations of one, all and the teacher's."""
    with tempfile.TemporaryDirectory(prefix="tax-") as folder:
        path = Path(folder)
        changes = {"training.fake_updates": updates, "method.name": method}
        recipe = dmd2(path, **changes)
        family = load_family(recipe.model)
        latent, table = family.shape().latent, conditions(recipe, family)
        pipeline = Path(locate(recipe.model).settings.path)
        teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
        with teacher_pool(recipe, family, table, latent) as pool:
            pool.wait()
            plain = [
                Loop(pipeline, table, batch=8, steps=4, latent=latent, anchored=method == "dp_dmd") for _ in range(2)
            ]
            engine = Counted(teacher, Conditions.read(table))
            local = cycles(dmd2(path, name="local", **changes), LocalClient(engine))
            remote = cycles(dmd2(path, name="remote", **changes), PoolClient(pool.client_spec(), "tax/0"))
            run: dict[str, Callable[[int], object]] = {
                "loop": lambda k: plain[0].step(exits(recipe.seed, k, updates)),
                "local": local,
                "loop, two threads": lambda k: plain[1].step(exits(recipe.seed, k, updates)),
                "remote": remote,
            }
            flops = {name: counted(run[name]) for name in ("loop", "local")}
            if abs(flops["local"] / flops["loop"] - 1) > 1e-3:
                raise SystemExit(f"not the same work: {flops}")
            flops["teacher"], engine.counts = engine.flops, False
            found: dict[str, list[float]] = {name: [] for name in run}
            for k in range(1, ROUNDS + WARM + 1):
                for name, cycle in run.items():
                    torch.set_num_threads(THREADS[name])
                    start = time.perf_counter()
                    cycle(k)
                    if k > WARM:
                        found[name].append(time.perf_counter() - start)
    against = {"loop": "loop", "local": "loop", "loop, two threads": "loop, two threads", "remote": "loop, two threads"}
    rows: list[dict[str, Any]] = [
        {
            "method": method,
            "updates": updates,
            "share": flops["teacher"] / flops["local"],
            "step": name,
            "threads": "1 + 1" if name == "remote" else str(THREADS[name]),
            "seconds": median(found[name]),
            "ratio": median(a / b for a, b in zip(found[name], found[against[name]], strict=True)),
            "cycles": found[name],
        }
        for name in run
    ]
    return rows, flops


class Counted(TeacherEngine):
    """A teacher whose floating point operations are counted.

    Attributes:
        flops: of all requests while ``counts`` is set.
    """

    flops, counts = 0, True

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`~raydmd.serving.engine.Engine`."""
        if not self.counts:
            return super().answer(requests)
        with FlopCounterMode(display=False) as counter:
            found = super().answer(requests)
        self.flops += counter.get_total_flops()
        return found


def exits(seed: int, cycle: int, updates: int) -> list[int]:
    """Where raydmd's rollouts of a cycle leave, the student's first."""
    slots = ["student", *(f"fake.{k}" for k in range(updates))]
    return [int(Draws(seed, f"{cycle}/{slot}", ()).shared("exit") * 4) for slot in slots]


def counted(cycle: Callable[[int], object]) -> int:
    """Floating point operations of the first cycle."""
    with FlopCounterMode(display=False) as counter:
        cycle(0)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
