import pytest

from raydmd.serving.health import Health, Limits, State

pytestmark = pytest.mark.unit

LIMITS = Limits(
    dead_after_requests=3,
    dead_after_probes=2,
    probe_first=0.2,
    probe_longest=0.5,
    cool_down=10.0,
    cool_down_longest=25.0,
)


def health() -> Health:
    return Health(LIMITS)


def test_a_new_replica_is_healthy_and_needs_no_probe() -> None:
    h = health()
    assert h.state is State.HEALTHY
    assert h.tier(0.0) == 0
    assert not h.probe_due(1e9)


def test_a_failed_request_makes_it_second_choice_until_the_cool_down_is_over() -> None:
    h = health()
    h.request_failed(100.0, "slow")
    assert h.state is State.SUSPECT
    assert h.tier(109.9) == 1
    assert h.tier(110.0) == 0
    h.request_succeeded()
    assert h.state is State.HEALTHY
    assert h.request_failures == 0


def test_failed_requests_in_a_row_make_it_dead_and_cool_downs_grow_to_a_bound() -> None:
    h = health()
    for _ in range(3):
        h.request_failed(0.0, "cuda error")
    assert h.state is State.DEAD
    assert h.tier(1e9) is None
    assert not h.gone
    assert not h.probe_due(24.9)
    assert h.probe_due(25.0)
    assert h.last_error == "cuda error"


def test_probes_answered_by_a_wedged_process_do_not_clear_its_failed_requests() -> None:
    h = health()
    h.request_failed(0.0, "hung")
    h.probe_succeeded(1.0, "process 1")
    assert h.state is State.SUSPECT
    assert h.request_failures == 1
    h.request_failed(2.0, "hung")
    h.request_failed(3.0, "hung")
    h.probe_succeeded(4.0, "process 1")
    assert h.state is State.DEAD
    assert not h.probe_due(5.0)
    h.probe_succeeded(30.0, "process 1")
    assert h.state is State.SUSPECT
    assert h.tier(30.0) == 0
    h.request_failed(31.0, "hung")
    assert h.state is State.DEAD


def test_a_new_process_has_forgotten_the_old_ones_troubles() -> None:
    h = health()
    h.probe_succeeded(0.0, "process 1")
    for _ in range(3):
        h.request_failed(0.0, "hung")
    h.probe_succeeded(1.0, "process 2")
    assert h.state is State.HEALTHY
    assert h.request_failures == 0


def test_a_lost_process_is_probed_at_once_then_ever_more_rarely_until_it_is_back() -> None:
    h = health()
    h.process_lost(100.0, "killed")
    assert h.state is State.RESTARTING
    assert h.tier(1e9) is None
    assert h.probe_due(100.0)
    h.probe_failed(100.0, "loading")
    assert h.state is State.RESTARTING
    assert not h.probe_due(100.19)
    assert h.probe_due(100.21)
    h.probe_failed(100.2, "loading")
    assert h.state is State.DEAD
    assert not h.probe_due(100.58)
    assert h.probe_due(100.61)
    h.probe_failed(100.6, "loading")
    assert h.probe_due(101.11)
    h.probe_succeeded(101.1, "process 2")
    assert h.state is State.HEALTHY
    assert h.probe_failures == 0


def test_request_and_probe_failures_are_counted_apart() -> None:
    h = health()
    h.request_failed(0.0, "x")
    h.probe_failed(0.0, "y")
    assert (h.request_failures, h.probe_failures) == (1, 1)
    assert h.state is State.SUSPECT


def test_losing_it_twice_counts_once_and_an_answer_proves_life() -> None:
    h = health()
    h.process_lost(0.0, "killed")
    h.probe_failed(0.0, "loading")
    h.process_lost(0.1, "killed again")
    assert h.probe_failures == 1
    h.request_succeeded()
    assert h.state is State.HEALTHY


def test_gone_is_final() -> None:
    h = health()
    h.process_lost(0.0, "killed")
    h.probe_failed(0.0, "cannot load", gone=True)
    assert h.state is State.DEAD
    assert h.gone
    assert not h.probe_due(1e9)
    h.probe_succeeded(1.0, "process 2")
    h.request_succeeded()
    h.process_lost(2.0, "again")
    assert h.state is State.DEAD
    assert h.tier(1e9) is None
