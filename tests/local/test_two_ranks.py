"""Methods whose batches, weights or errors cross ranks: two ranks train what one does."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from raydmd.recipe import Recipe, derive
from raydmd.training.session import FolderSession
from tests.local.test_gan import TwoRanks
from tests.local.test_presets import build, recipe

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local
RUNS: dict[str, tuple[dict, dict]] = {
    "amd": ({"name": "amd", "adapt": {"group": 2}}, {}),
    "dp_dmd": ({"name": "dp_dmd", "anchor": {"steps": 2, "of": 6}}, {}),
    "dp_dmd, sharded": (
        {"name": "dp_dmd", "anchor": {"steps": 2, "of": 6, "weight": {"balance": 0.5}}},
        {"sharding": "fsdp"},
    ),
    "dmd": ({"name": "dmd", "regression": {"loss": "l2", "steps": 4, "resample": 0.5}}, {}),
}


def recipe_of(name: str, output: Path) -> Recipe:
    method, training = RUNS[name]
    return derive(recipe(output, method), {"training": training, "name": name.replace(", ", "-")})


def one_of_two(rank: int, port: int, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in RUNS:
        r = recipe_of(name, output / "two")
        worker = build(r, TwoRanks(r.folder, rank))
        assert worker.run() == "finished"
        state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in worker.state().items()}
        torch.save({k: v.clone() for k, v in state.items()}, r.folder / f"rank{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.spawn(one_of_two, (port, tmp_path), nprocs=2)
    for name, expected in alone.items():
        folder = recipe_of(name, tmp_path / "two").folder
        ranks = [torch.load(folder / f"rank{k}.pt") for k in (0, 1)]
        for key, value in expected.items():
            where, theirs = f"{name}: {key}", ranks[0][key]
            assert torch.equal(theirs, ranks[1][key]), where
            # What tells a wrong sum or weight is the gradient: Adam's steps are of one size, whatever it is.
            if key.endswith((".exp_avg", ".exp_avg_sq")):
                assert (theirs - value).norm() <= 0.05 * value.norm() + 1e-12, where
