"""Whether a lease is alive: what is judged from two readings and a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raydmd.training.lease import SECONDS, SIZE, Lease, Reading, Verdict, judge, parse

pytestmark = pytest.mark.unit

LEASE = Lease(
    host="there", lock="kernel-1 50", processes="kernel-1 pids", pid=7, begun=100, token="a", since=0.0, beat=3
)


def judged(
    first: Lease | str | None,
    last: Lease | str | None,
    *,
    watched: float = 0.0,
    age: float = 0.0,
    lock: str | None = "kernel-2 50",
    processes: str = "kernel-2 pids",
    alive: bool = False,
) -> Verdict:
    def reading(given: Lease | str | None) -> Reading | None:
        return None if given is None else Reading(given if isinstance(given, str) else given.text(), age)

    return judge(reading(first), reading(last), watched=watched, lock=lock, processes=processes, alive=alive)


def test_a_lease_reads_back_and_its_size_is_the_same_whatever_it_says() -> None:
    for lease in (LEASE, replace(LEASE, beat=10**9, host="h" * 253)):
        assert len(lease.text().encode()) == SIZE
        assert parse(lease.text()) == lease


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": "a"}', LEASE.text()[:100], "\x00" * SIZE])
def test_what_is_no_lease_is_none(text: str) -> None:
    assert parse(text) is None


def test_no_lease_is_free_and_one_that_comes_or_changes_is_held() -> None:
    assert judged(None, None) == Verdict.FREE
    assert judged(LEASE, None) == Verdict.FREE
    assert judged(None, LEASE) == Verdict.HELD
    assert judged(LEASE, replace(LEASE, beat=4)) == Verdict.HELD
    # However late, and whatever the file server says of its age: it was renewed.
    assert judged(LEASE, replace(LEASE, beat=4), watched=10 * SECONDS, age=10 * SECONDS) == Verdict.HELD
    assert judged("torn", "torn apart") == Verdict.HELD


def test_another_machines_lease_is_over_once_it_has_stood_still_for_as_long_as_it_runs() -> None:
    assert judged(LEASE, LEASE, watched=SECONDS - 1) == Verdict.WAIT
    assert judged(LEASE, LEASE, watched=SECONDS) == Verdict.STALE
    short = replace(LEASE, seconds=8.0)
    assert judged(short, short, watched=7.0) == Verdict.WAIT
    assert judged(short, short, watched=8.0) == Verdict.STALE


def test_one_that_the_file_server_calls_old_is_looked_at_all_the_same() -> None:
    assert judged(LEASE, LEASE, watched=0.0, age=1e6) == Verdict.WAIT
    assert judged(LEASE, LEASE, watched=SECONDS / 4, age=SECONDS - 1) == Verdict.WAIT
    assert judged(LEASE, LEASE, watched=SECONDS / 4, age=SECONDS) == Verdict.STALE
    assert judged(LEASE, LEASE, watched=SECONDS / 4, age=-1e6) == Verdict.WAIT


def test_what_cannot_be_read_runs_as_long_as_any() -> None:
    assert judged("torn", "torn", watched=SECONDS - 1) == Verdict.WAIT
    assert judged("torn", "torn", watched=SECONDS) == Verdict.STALE


def test_who_has_the_lock_of_this_kernel_and_file_system_knows_that_its_holder_here_is_dead() -> None:
    assert judged(LEASE, LEASE, lock=LEASE.lock) == Verdict.DEAD
    assert judged(LEASE, LEASE, lock=LEASE.lock, processes=LEASE.processes, alive=True) == Verdict.DEAD
    # Another mount of it, which locks may not reach: not known.
    assert judged(LEASE, LEASE, lock="kernel-1 51") == Verdict.WAIT


def test_where_there_are_no_locks_the_process_is_looked_for() -> None:
    assert judged(LEASE, LEASE, lock=None, processes=LEASE.processes, alive=True) == Verdict.HELD
    assert judged(LEASE, LEASE, lock=None, processes=LEASE.processes, alive=False) == Verdict.DEAD
    # Process ids of another container say nothing.
    assert judged(LEASE, LEASE, lock=None, processes="kernel-1 other", alive=False) == Verdict.WAIT
