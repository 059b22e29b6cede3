"""Places that a dead controller has reserved."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from raydmd.training.groups import free_orphans

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_places_of_a_dead_actor_are_freed_and_no_others() -> None:
    class Reserves:
        def __init__(self) -> None:
            self.group = placement_group([{"CPU": 1}])
            ray.get(self.group.ready(), timeout=30)

        def name(self) -> str:
            return str(self.group.id.hex())

        def die(self) -> None:
            os._exit(1)

    own = placement_group([{"CPU": 1}])
    ray.get(own.ready(), timeout=30)
    lives, dies = (ray.remote(Reserves).options(num_cpus=0).remote() for _ in range(2))
    alive, dead = ray.get([lives.name.remote(), dies.name.remote()], timeout=60)
    assert free_orphans() == 0
    dies.die.remote()
    deadline = time.monotonic() + 30
    while not free_orphans():
        assert time.monotonic() < deadline, "nobody frees it"
        time.sleep(0.2)
    states = {name: about["state"] for name, about in placement_group_table().items()}
    assert states.pop(dead) == "REMOVED"
    assert states == {own.id.hex(): "CREATED", alive: "CREATED"}
    again = placement_group([{"CPU": 1}])
    ray.get(again.ready(), timeout=30)
    assert free_orphans() == 0
