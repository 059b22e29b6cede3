"""Two workers, then one, then three: the same samples in the same order as with two throughout, and the same losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog, read_lines
from raydmd.training.worker import Job, Worker
from tests.courses import CURVES, same_course
from tests.local.test_two_ranks import port
from tests.local.test_worker import PROMPTS, recipe, two_experts
from tests.ranks import OneOfSome

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.recipe import Recipe

pytestmark = pytest.mark.local
__all__ = ["two_experts"]
CYCLES, BATCH = 12, 6
CHANGES = ((2, 5), (1, 9), (3, None))
"""Numbers of workers, and the cycle that each stops after: within the first phase, and within the second."""


def part(rank: int, world: int, where: int, runs: list[Recipe], stop_at: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=rank, world_size=world)
    for r in runs:
        r.folder.mkdir(parents=True, exist_ok=True)
        family = load_family(r.model)
        table = Conditions.read(family.encode(PROMPTS, r.output / f"conditions-{rank}"))
        teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
        job = Job(recipe=r, family=family, conditions=table, stop_at=stop_at)
        events = EventLog(r.folder / "events.jsonl", enabled=rank == 0)
        assert Worker(job, teacher, OneOfSome(r.folder, rank, world), events).run() == (
            "stopped" if stop_at else "finished"
        )
    dist.destroy_process_group()


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """Each cycle's last row, as the mean over the ranks that were there."""
    ranks: list[dict[int, dict[str, float]]] = []
    for rank in range(3):
        rows = read_lines(folder / f"reports-{rank}.jsonl")
        ranks.append({int(row["cycle"]): row for row in rows if "fake/loss" in row})
    found = {}
    for cycle in ranks[0]:
        there = [rows[cycle] for rows in ranks if cycle in rows]
        found[cycle] = {k: sum(row[k] for row in there) / len(there) for k in CURVES}
    return found


def test_two_workers_then_one_then_three(two_experts: Path, tmp_path: Path) -> None:
    runs: dict[str, list[Recipe]] = {}
    for which in ("fixed", "changing"):
        runs[which] = [
            recipe(
                two_experts,
                tmp_path,
                name=f"{which}-{sharding}",
                method={"name": "phased", "normaliser": "distance"},
                training={
                    "cycles": CYCLES,
                    "batch": BATCH,
                    "sharding": sharding,
                    "sample_log": True,
                    "student": {"rate": 1e-4, "eps": 1e-5},
                    "fake": {"rate": 1e-4, "eps": 1e-5},
                },
            )
            for sharding in ("ddp", "fsdp")
        ]
    multiprocessing.spawn(part, (2, port(), runs["fixed"], None), nprocs=2)
    for workers, until in CHANGES:
        multiprocessing.spawn(part, (workers, port(), runs["changing"], until), nprocs=workers)
    for fixed, changing in zip(runs["fixed"], runs["changing"], strict=True):
        resumed = [e for e in read_lines(changing.folder / "events.jsonl") if e["event"] == "resume"]
        assert [(e["cycle"], e["world"]) for e in resumed] == [(5, 1), (9, 3)]
        slots = {"student": 0, "fake.0": 1, "fake.1": 2}
        worlds = same_course(
            (changing.folder, losses(changing.folder)), (fixed.folder, losses(fixed.folder)), CYCLES, BATCH, slots
        )
        assert worlds == {1, 2, 3}
