"""Every family served by a pool: bit by bit the teacher in this process, whatever dies on the way."""

from __future__ import annotations

import itertools
import os
import signal
from typing import TYPE_CHECKING

import helpers
import pytest
import torch

from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.untrained import PIPELINES
from raydmd.recipe import Recipe, derive
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.messages import ScoreRequest, WalkRequest
from raydmd.serving.pool_client import PoolClient
from raydmd.training.encoding import training_prompts
from raydmd.training.pools import teacher_pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from raydmd.models.family import Family
    from raydmd.serving.messages import Request

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with helpers.own_cluster(deterministic=True):
        yield


def requests(family: Family) -> list[Request]:
    draw = torch.Generator().manual_seed(0)
    shape, routing = family.shape().latent, family.routing()
    edges = (1.0, *routing.boundaries, 0.0)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    asked: list[Request] = [
        ScoreRequest(
            x_t=torch.randn(2, *shape, generator=draw),
            t=torch.full((2,), t),
            conditions=(1, 2),
            guidance=Guidance(scale),
            expert=expert,
            split=split,
            name=f"{expert} {scale}",
        )
        for expert, t in zip(routing.experts, middles, strict=True)
        for scale, split in ((1.0, False), (3.5, False), (3.5, True))
    ]
    noise = torch.randn(1, *shape, generator=draw)
    return [*asked, WalkRequest(x_t=noise, grid=(1.0, *middles, 0.0), conditions=(2,), guidance=Guidance(3.0))]


@pytest.mark.parametrize("kind", list(PIPELINES))
def test_a_pool_answers_as_a_teacher_here(kind: str, tmp_path: Path) -> None:
    recipe = derive(
        Recipe(output=tmp_path, deterministic=True),
        {
            "model.path": f"{kind}-untrained",
            "training.precision": "bf16" if kind in ("wan22", "sdxl") else "fp32",
            "placement.teacher_cpus": 0.1,
        },
    )
    family = load_family(recipe.model)
    table = family.encode(training_prompts(recipe, family)[:4], tmp_path)
    experts = load_teacher(family, recipe.training.precision, device=torch.device("cpu"))
    local = LocalClient(TeacherEngine(experts, Conditions.read(table)))
    with teacher_pool(recipe, family, table, family.shape().latent) as pool:
        client = PoolClient(pool.client_spec(), "run/rank0")
        asked = requests(family)
        right = [local.submit(request).result().answer for request in asked]
        for k in range(2):
            pending = [client.submit(request) for request in asked]
            if k:  # and once more while the replica dies, so that all is asked for again
                os.kill(next(iter(pool.stats().replicas.values()))["pid"], signal.SIGKILL)
            for answer, p in zip(right, pending, strict=True):
                found = p.result().answer
                assert torch.equal(found.value, answer.value)
                assert (found.uncond is None) is (answer.uncond is None)
                assert answer.uncond is None or torch.equal(found.uncond, answer.uncond)
