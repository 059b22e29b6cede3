"""Methods whose batches, weights or errors cross ranks: two ranks train what one does."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.untrained import write
from raydmd.recipe import Recipe, derive
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog, read_lines
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker
from tests.local.test_families import PROMPTS as FAMILY_PROMPTS
from tests.local.test_families import recipe as family_recipe
from tests.local.test_presets import build, recipe
from tests.pipelines import WORDS
from tests.ranks import OneOfSome

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local
RUNS: dict[str, tuple[dict, dict]] = {
    "amd": ({"name": "amd", "adapt": {"group": 2}}, {}),
    "dp_dmd, sharded": (
        {"name": "dp_dmd", "anchor": {"steps": 2, "of": 6, "weight": {"balance": 0.5}}},
        {"sharding": "fsdp"},
    ),
    "dmd": ({"name": "dmd", "regression": {"loss": "l2", "steps": 4, "resample": 0.5}}, {}),
}


def recipe_of(name: str, output: Path) -> Recipe:
    method, training = RUNS[name]
    return derive(recipe(output, method), {"training": training, "name": name.replace(", ", "-")})


def one_of_two(rank: int, where: int, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=rank, world_size=2)
    for name in RUNS:
        r = recipe_of(name, output / "two")
        worker = build(r, OneOfSome(r.folder, rank))
        assert worker.run() == "finished"
        state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in worker.state().items()}
        torch.save({k: v.clone() for k, v in state.items()}, r.folder / f"rank{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_ranks_train_what_one_does(tmp_path):
    torch.set_num_threads(1)
    alone = {}
    for name in RUNS:
        for ranks in ("one", "two"):  # pairs of two are made here, so that its ranks find them
            r = recipe_of(name, tmp_path / ranks)
            r.folder.mkdir(parents=True)
            worker = build(r, FolderSession(r.folder))
            if ranks == "one":
                assert worker.run() == "finished"
                alone[name] = worker.state()
    multiprocessing.spawn(one_of_two, (port(), tmp_path), nprocs=2)
    for name, expected in alone.items():
        folder = recipe_of(name, tmp_path / "two").folder
        ranks = [torch.load(folder / f"rank{k}.pt") for k in (0, 1)]
        for key, value in expected.items():
            where, theirs = f"{name}: {key}", ranks[0][key]
            assert torch.equal(theirs, ranks[1][key]), where
            # What tells a wrong sum or weight is the gradient: Adam's steps are of one size, whatever it is.
            if key.endswith((".exp_avg", ".exp_avg_sq")):
                assert (theirs - value).norm() <= 0.05 * value.norm() + 1e-12, where


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def long_recipe(kind: str, folder: Path, name: str) -> Recipe:
    r = family_recipe(kind, folder / kind, folder, {"name": "dmd2"}, None)
    # AdamW's usual eps lets gradients of rounding's size make whole steps, whose signs differ.
    role = {"rate": 1e-4, "eps": 1e-5}
    training = {"cycles": 10, "sharding": "fsdp", "ema": 0.9, "student": role, "fake": role}
    return derive(r, {"name": f"{kind}-{name}", "training": training})


def run(r: Recipe, session: FolderSession, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    r.folder.mkdir(parents=True, exist_ok=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(FAMILY_PROMPTS, r.output / f"conditions-{session.rank}"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
    job = Job(recipe=r, family=family, conditions=table, stop_at=stop_at)
    worker = Worker(job, teacher, session, EventLog(r.folder / "events.jsonl", enabled=session.rank == 0))
    assert worker.run() == ("stopped" if stop_at else "finished")
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in worker.state().items()}
    return {k: v.clone() for k, v in state.items()}


def sharded(rank: int, where: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=rank, world_size=2)
    for kind in KINDS:
        whole, parts = long_recipe(kind, folder, "two"), long_recipe(kind, folder, "parts")
        state = run(whole, OneOfSome(whole.folder, rank))
        if rank == 0:
            torch.save(state, folder / f"{kind}.pt")
        run(parts, OneOfSome(parts.folder, rank), stop_at=7)
    dist.destroy_process_group()


KINDS = ("sdxl", "sd3")
"""A U-Net, whose sharded blocks lie in each other, and a transformer."""


def test_sharded_on_two_ranks_is_one_rank_and_goes_on_across_world_sizes(tmp_path):
    """Ten cycles, and one run on 1, 2 and 1 ranks, both to 1e-5 of every weight."""
    torch.set_num_threads(1)
    alone = {}
    for kind in KINDS:
        write(kind, tmp_path / kind, WORDS)
        one, parts = long_recipe(kind, tmp_path, "one"), long_recipe(kind, tmp_path, "parts")
        alone[kind] = run(one, FolderSession(one.folder))
        run(parts, FolderSession(parts.folder), stop_at=3)
    multiprocessing.spawn(sharded, (port(), tmp_path), nprocs=2)
    for kind, expected in alone.items():
        begun = {
            f"student.{n}.{k}": v for n in ("unet", "transformer") for k, v in weights(tmp_path / kind / n).items()
        }
        moved = max(float((expected[key] - value).abs().max()) for key, value in begun.items() if key in expected)
        assert moved > 5e-4, "the bar below is a fiftieth of what training moved"
        parts = long_recipe(kind, tmp_path, "parts")
        resumed = run(parts, FolderSession(parts.folder))
        for name, found in (("two ranks", torch.load(tmp_path / f"{kind}.pt")), ("1, 2, 1 ranks", resumed)):
            for key, value in expected.items():
                where = f"{kind}, {name}: {key}"
                if ".optimizer." not in key:
                    apart = float((found[key] - value).abs().max())
                    assert apart < 1e-5, where
                elif key.endswith(".exp_avg"):
                    assert (found[key] - value).norm() <= 0.01 * value.norm() + 1e-9, where
        events = [e["world"] for e in read_lines(parts.folder / "events.jsonl") if e["event"] in ("start", "resume")]
        assert events == [1, 2, 1]
