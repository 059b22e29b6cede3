"""How often a run starts its workers again, and what it says of the cause."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from raydmd.training.checkpoint import name_of
from raydmd.training.failures import explain
from raydmd.training.restarts import COMMITTED, PAUSES, Again, Budget, Failure, GiveUp, progress
from raydmd.training.watchdog import Post

pytestmark = pytest.mark.unit
DEATH = Failure(kind="death", message="rank 1 has died")


def short(doing: str) -> Failure:
    return Failure(kind="memory", message="too little memory", doing=doing)


def test_failures_are_counted_in_a_row_and_progress_begins_a_new_row():
    budget = Budget(2, "")
    for cycle in range(4, 40, 4):
        assert budget.decide(DEATH, name_of(cycle), 0.0) == Again(1, PAUSES[0])
    assert budget.decide(DEATH, name_of(36), 0.0) == Again(2, PAUSES[1])
    end = budget.decide(DEATH, name_of(36), 0.0)
    assert isinstance(end, GiveUp)
    assert not end.stopped
    assert "no new checkpoint since the last 3 failures" in end.why


def test_without_restarts_the_first_failure_is_the_last():
    assert Budget(0, "").decide(DEATH, name_of(8), 0.0) == GiveUp("training.max_failures=0")


def test_pauses_grow_and_stay():
    budget = Budget(10, name_of(4))
    pauses = [d.pause for d in (budget.decide(DEATH, name_of(4), 0.0) for _ in range(10)) if isinstance(d, Again)]
    assert pauses == sorted(pauses)
    assert pauses[0] == 0
    assert pauses[-3:] == [PAUSES[-1]] * 3


def test_a_checkpoint_that_was_there_before_is_no_progress():
    """Neither one from before this command, nor one that a restart wrote a second time."""
    budget = Budget(1, name_of(20))
    assert isinstance(budget.decide(DEATH, name_of(20), 0.0), Again)
    assert isinstance(budget.decide(DEATH, name_of(20), 0.0), GiveUp)


def test_too_little_memory_twice_at_one_place_is_final_and_elsewhere_it_is_not():
    budget = Budget(9, "")
    assert isinstance(budget.decide(short("cycle 12"), name_of(8), 0.0), Again)
    assert isinstance(budget.decide(short("cycle 14"), name_of(12), 0.0), Again)
    end = budget.decide(short("cycle 14"), name_of(12), 0.0)
    assert isinstance(end, GiveUp)
    assert "training.batch" in end.why
    full = Failure(kind="full_node", message="others may be to blame", doing="loads the model")
    assert all(isinstance(budget.decide(full, name_of(16), 0.0), Again) for _ in range(5))


def test_a_stall_ends_the_run_where_that_is_asked_for():
    stall = Failure(kind="stall", message="nothing moves")
    assert isinstance(Budget(3, "").decide(stall, name_of(4), 0.0), Again)
    end = Budget(3, "", stops=True).decide(stall, name_of(4), 0.0)
    assert isinstance(end, GiveUp)
    assert end.stopped
    assert isinstance(Budget(3, "", stops=True).decide(DEATH, name_of(4), 0.0), Again)


def test_no_room_is_waited_for_and_counts_for_nothing():
    room, budget = Failure(kind="room", message="no room"), Budget(1, "", patience=100)
    assert budget.decide(DEATH, "", 0.0) == Again(1, PAUSES[0])
    for now in (10.0, 70.0, 109.0):
        assert budget.decide(room, "", now) == Again(0, PAUSES[1])
    end = budget.decide(room, "", 111.0)
    assert isinstance(end, GiveUp)
    assert "placement.room_timeout=100 s" in end.why
    again = Budget(1, "", patience=100)
    assert again.decide(room, "", 0.0).pause
    again.decide(DEATH, "", 50.0)
    assert again.decide(room, "", 120.0) == Again(0, PAUSES[1]), "another wait"
    assert again.decide(room, name_of(4), 900.0) == Again(0, PAUSES[1]), "it had room in between"


def test_progress_is_the_furthest_checkpoint_and_a_rollback_goes_further():
    def seen(*names: str) -> str:
        return progress([{"event": "checkpoint", "cycle": 99}, *({"event": COMMITTED, "checkpoint": n} for n in names)])

    assert seen() == ""
    assert seen(name_of(4), name_of(8), name_of(4)) == name_of(8)
    assert seen(name_of(8), f"{name_of(8)}-phase") > seen(name_of(8))
    assert seen(name_of(100), name_of(4, 1)) == name_of(4, 1)


def test_a_run_that_fell_back_gets_on_from_there():
    events = [{"event": COMMITTED, "checkpoint": name_of(c)} for c in (2, 4, 10000)]
    events.append({"event": "fallback", "checkpoint": name_of(4)})
    assert progress(events) == name_of(4)
    assert progress([*events, {"event": COMMITTED, "checkpoint": name_of(6)}]) == name_of(6)
    assert progress([*events, {"event": "fallback", "checkpoint": ""}]) == ""


def test_memory_that_was_short_long_ago_is_not_short_twice_in_a_row():
    short = Failure(kind="memory", message="m", doing="loads the model")
    for between in ((DEATH, name_of(4)), (short, name_of(8))):
        budget = Budget(9, "")
        assert isinstance(budget.decide(short, "", 0.0), Again)
        assert isinstance(budget.decide(*between, 0.0), Again)
        if between[0] is DEATH:
            assert isinstance(budget.decide(short, name_of(4), 0.0), Again)
    assert isinstance(budget.decide(short, name_of(8), 0.0), GiveUp)


def post(rank: int, doing: str, since: float = 0.0, waits: str = "") -> Post:
    return Post(
        rank=rank, world=2, node="n", host=f"host{rank}", pid=10 + rank, since=since, doing=doing, waits=waits, peak=777
    )


POSTS = {0: post(0, "cycle 7"), 1: post(1, "cycle 7")}


def gone(cause: Exception) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", failure=cause)


def test_the_dead_are_the_cause_and_those_who_lost_them_are_not():
    error = WorkerGroupError(
        "several", {0: RuntimeError("[gloo/x.cc] Connection closed by peer"), 1: gone(ActorDiedError())}
    )
    failure = explain(error, POSTS, [], [])
    assert (failure.kind, failure.rank, failure.node, failure.doing) == ("death", 1, "host1", "cycle 7")
    for part in ("rank 1 of 2 on host1 (pid 11)", "cycle 7", "its process is gone", "777 MB at most"):
        assert part in failure.message
    assert "\n" not in failure.message


def test_an_error_of_its_own_goes_before_a_lost_peer():
    error = WorkerGroupError("x", {0: RuntimeError("Connection reset by peer"), 1: ImportError("no module\nnamed x")})
    failure = explain(error, POSTS, [], [])
    assert (failure.kind, failure.rank) == ("error", 1)
    assert failure.message.endswith("ImportError: no module")


def test_memory_is_named_with_what_to_change():
    ray_says = explain(WorkerGroupError("x", {1: gone(OutOfMemoryError("low"))}), POSTS, [], [])
    event = {"event": "out_of_memory", "rank": 0, "message": "rank 0 ...: asked for 3 GB"}
    torch_says = explain(WorkerGroupError("x", {0: RuntimeError("CUDA out of memory")}), POSTS, [], [event])
    for failure, kind, rank in ((ray_says, "full_node", 1), (torch_says, "memory", 0)):
        assert (failure.kind, failure.rank, failure.doing) == (kind, rank, "cycle 7")
        assert "training.gradient_checkpointing" in failure.message


def test_a_stall_names_all_ranks_and_what_they_wait_for():
    posts = {0: post(0, "cycle 9", 50.0, "waits for replica 'r-1'"), 1: post(1, "cycle 9", 40.0)}
    failure = explain(WorkerGroupError("x", {0: gone(ActorDiedError())}), posts, [posts[0].line()], [])
    assert (failure.kind, failure.rank) == ("stall", 1)
    assert "waits for replica 'r-1'" in failure.message
    assert "rank 1 of 2 on host1" in failure.message
    ended = explain(WorkerGroupError("x", {}), posts, [f"{posts[1].line()} (the process was stopped)"], [])
    assert ended.message.count("rank 1 of 2") == 1


def test_workers_that_never_came_and_a_controller_that_has_gone():
    late = explain(ControllerError(WorkerGroupStartupFailedError("no such module\nmore")), {}, [], []).message
    assert late == "the workers did not start: WorkerGroupStartupFailedError: no such module"
    later = explain(ControllerError(OSError(28, "No space left")), {}, [], []).message
    assert later == "Ray Train's controller failed: OSError: [Errno 28] No space left"
    full = "4 worker(s) were killed due to the node running low on memory. Memory on the node was"
    assert explain(ControllerError(RuntimeError(full)), {}, [], []).kind == "full_node"
    assert explain(ControllerError(WorkerGroupStartupTimeoutError(2)), {}, [], []).kind == "room"
    assert explain(ActorDiedError(), {}, [], []).kind == "death"
