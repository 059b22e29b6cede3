from __future__ import annotations

import math

import pytest

from raydmd.planning.simulate import Shape, Size, simulate

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


def test_each_update_draws_a_size() -> None:
    sizes = (
        Size(weight=3.0, rollout=0.5, fake=0.5, generator=0.5, answer=0.5),
        Size(weight=1.0, rollout=2.5, fake=2.5, generator=2.5, answer=2.5),
    )
    alone = simulate(Shape(workers=2, sizes=sizes, **CYCLE))
    assert alone.step == pytest.approx(8.0), "a mean over the counted cycles, each size as often as it weighs"
    assert alone.barrier == 0, "all workers draw the same"
    # On average 4 seconds hide behind 5. A large one's 10 hide behind five small updates' 2.5 as little as behind six.
    hidden = {"replicas": 1, "service": lambda n: 4.0, "batch_items": 1}
    assert simulate(Shape(workers=1, **hidden, **CYCLE)).wait == 0
    found = simulate(Shape(workers=1, sizes=sizes, **hidden, cycles=200, **CYCLE))
    chances = [math.comb(5, k) * 0.25**k * 0.75 ** (5 - k) for k in range(6)]  # of so many large fake updates
    expected = 0.25 * sum(c * max(0.0, 10 - (2.5 * k + 0.5 * (5 - k))) for k, c in enumerate(chances))
    assert found.wait * found.step == pytest.approx(expected, rel=0.15)


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
