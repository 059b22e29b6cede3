from __future__ import annotations

import pytest

from raydmd.planning.simulate import Shape, simulate

pytestmark = pytest.mark.unit

CYCLE = {"rollout": 1.0, "fake_updates": (1.0,) * 5, "generator": 2.0}


def test_a_hidden_teacher_costs_nothing() -> None:
    found = simulate(Shape(workers=1, replicas=1, service=lambda n: 4.0, batch_items=1, **CYCLE))
    assert found.step == pytest.approx(8.0)
    assert found.wait == 0
    assert found.replica_idle == pytest.approx(0.5)


def test_a_longer_teacher_is_waited_for() -> None:
    found = simulate(Shape(workers=1, replicas=1, service=lambda n: 7.0, batch_items=1, **CYCLE))
    assert found.step == pytest.approx(1 + 7 + 2)
    assert found.wait == pytest.approx(2 / 10)


def test_workers_that_ask_at_once_share_a_batch_or_wait_in_turn() -> None:
    batched = simulate(Shape(workers=4, replicas=1, service=lambda n: 4.0, batch_items=4, batch_wait=0.1, **CYCLE))
    assert batched.batch == 4
    assert batched.wait == 0
    one_by_one = simulate(Shape(workers=4, replicas=1, service=lambda n: 4.0, batch_items=1, **CYCLE))
    assert one_by_one.step == pytest.approx(1 + 16 + 2)  # all go on when the last one is answered
    two = simulate(Shape(workers=4, replicas=2, service=lambda n: 4.0, batch_items=1, **CYCLE))
    assert one_by_one.step > two.step >= 8.0 + 3


def test_a_partial_batch_waits_for_company_once() -> None:
    found = simulate(Shape(workers=1, replicas=1, service=lambda n: 6.0, batch_items=2, batch_wait=0.5, **CYCLE))
    assert found.step == pytest.approx(1 + 6.5 + 2)


def test_jitter_costs_more_with_more_workers_and_repeats_by_seed() -> None:
    few, many = (simulate(Shape(workers=n, jitter=0.05, **CYCLE)) for n in (2, 64))
    assert 0 < few.barrier < many.barrier
    assert simulate(Shape(workers=64, jitter=0.05, **CYCLE)) == many
    assert simulate(Shape(workers=64, jitter=0.05, seed=1, **CYCLE)) != many


def test_runs_fill_a_shared_pool() -> None:
    def pool(runs: int) -> float:
        return simulate(
            Shape(workers=1, runs=runs, replicas=1, service=lambda n: 2.0, batch_items=1, **CYCLE)
        ).replica_idle

    assert pool(1) == pytest.approx(0.75)
    assert pool(3) == pytest.approx(0.25, abs=0.05)


def test_processes_on_the_same_cores_are_slower() -> None:
    assert simulate(Shape(workers=4, slower=2.0, **CYCLE)).step == pytest.approx(16.0)


def test_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to simulate"):
        simulate(Shape(workers=0, **CYCLE))
