"""Pools whose large tensors travel over NIXL. Needs ``pip install nixl``, which the tested versions do not name."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import helpers
import pytest
import ray
import torch

from raydmd.guidance import Guidance
from raydmd.serving.codec import INLINE
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.pool import Pool
from raydmd.serving.pool_client import PoolClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from raydmd.serving.messages import ScoreRequest

pytest.importorskip("nixl")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SIZE = 4096


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with helpers.own_cluster():
        yield


def ask(seed: int) -> ScoreRequest:
    request = helpers.ask(seed, SIZE)
    assert request.x_t.nbytes > INLINE
    return request


@ray.remote(num_cpus=0)
class Asker:
    """A worker in a process of its own: lends its questions, fetches the answers."""

    def __init__(self, spec: object, name: str) -> None:
        self._client = PoolClient(spec, name)

    def ask(self, seeds: list[int]) -> list[torch.Tensor]:
        pending = []
        for seed in seeds:
            request = ask(seed)
            pending.append(self._client.submit(request))
            request.x_t.zero_()  # it was lent as it was
        return [p.result().answer.value.numpy().copy() for p in pending]


def expected(folder: Path, seed: int) -> torch.Tensor:
    local = LocalClient(TeacherEngine(helpers.build(folder), helpers.CONDITIONS))
    return local.submit(ask(seed)).result().answer.value


def test_answers_are_the_same_and_a_killed_replica_costs_a_retry(tmp_path: Path) -> None:
    order, table = helpers.order(tmp_path, copies=1, deterministic=True, wire="nixl")
    with Pool.start(order, "run", start_timeout=220, request_timeout=200, attempt_timeout=60, table=table) as pool:
        askers = [Asker.remote(pool.client_spec(), f"run/{k}") for k in range(2)]
        for seeds in ([1, 2, 3], [4, 5]):
            answers = ray.get([a.ask.remote(seeds) for a in askers], timeout=200)
            for found in answers:
                for seed, value in zip(seeds, found, strict=True):
                    assert torch.equal(torch.from_numpy(value), expected(tmp_path, seed))
            [stats] = pool.stats().replicas.values()
            os.kill(stats["pid"], signal.SIGKILL)


def test_small_requests_travel_in_the_call(tmp_path: Path) -> None:
    order, table = helpers.order(tmp_path, copies=1, wire="nixl")
    with Pool.start(order, "run", start_timeout=220, request_timeout=60, table=table) as pool:
        request = helpers.ask(1)
        assert request.x_t.nbytes <= INLINE
        assert request.guidance != Guidance()
        answer = PoolClient(pool.client_spec(), "run/0").submit(request).result().answer.value
        local = LocalClient(TeacherEngine(helpers.build(tmp_path), helpers.CONDITIONS))
        assert torch.allclose(answer, local.submit(request).result().answer.value)
