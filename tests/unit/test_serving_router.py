from collections import Counter

import pytest

from raydmd.serving.router import Candidate, choose, seat, stable_hash

pytestmark = pytest.mark.unit


def pick(candidates: list[Candidate], request: str = "r", turn: int = 0) -> str | None:
    return choose(candidates, request=request, turn=turn, deterministic=False)


def hashed(names: dict[str, int | None], request: str) -> str | None:
    candidates = [Candidate(name=n, tier=t) for n, t in names.items()]
    return choose(candidates, request=request, turn=0, deterministic=True)


def test_nobody_usable_is_nobody_chosen() -> None:
    assert pick([]) is None
    assert pick([Candidate(name="a", tier=None)]) is None
    assert hashed({"a": None}, "r") is None


def test_the_fewest_outstanding_wins_then_the_next_in_turn() -> None:
    a = Candidate(name="a", tier=0, outstanding=2)
    b = Candidate(name="b", tier=0, outstanding=1)
    c = Candidate(name="c", tier=0, outstanding=1)
    assert {pick([a, b, c], turn=i) for i in range(3)} == {"b", "c"}
    assert {pick([a, b], turn=i) for i in range(2)} == {"b"}


@pytest.mark.parametrize("requests", [1, 2, 3])
@pytest.mark.parametrize(("workers", "replicas"), [(4, 2), (6, 3), (8, 4), (3, 2), (5, 4), (8, 8), (64, 16)])
def test_workers_that_ask_in_step_meet_no_more_than_they_must(workers: int, replicas: int, requests: int) -> None:
    for run in ("a", "phased-wan22", "sweep/7"):
        there = [str(i) for i in range(replicas)]
        for cycle in range(20):
            if cycle == 10:  # a newcomer to whom nobody ever sent anything
                there.append("late")
            asked = Counter[str]()
            for rank in range(workers):
                own = Counter[str]()
                for k in range(requests):
                    seen = [Candidate(name=name, tier=0, outstanding=own[name]) for name in there]
                    own[str(pick(seen, turn=seat(run, rank) + cycle * requests + k))] += 1
                asked += own
            even = (len(there) == replicas and replicas % requests == 0) or requests == 1
            assert max(asked.values()) <= -(-workers * requests // len(there)) + (0 if even else requests)


def test_a_worker_with_several_requests_in_a_cycle_goes_round() -> None:
    seen = [Candidate(name=str(i), tier=0) for i in range(3)]
    assert {pick(seen, turn=seat("run", 1) + turn) for turn in range(3)} == {"0", "1", "2"}


def test_a_better_tier_beats_a_shorter_queue() -> None:
    healthy = Candidate(name="healthy", tier=0, outstanding=5)
    suspect = Candidate(name="suspect", tier=1)
    dead = Candidate(name="dead", tier=None)
    assert pick([suspect, healthy, dead]) == "healthy"
    assert pick([suspect, dead]) == "suspect"


def test_deterministic_choice_depends_on_the_name_alone() -> None:
    for i in range(20):
        busy = [Candidate(name=n, tier=0, outstanding=i) for n in "abc"]
        chosen = choose(busy, request=f"r{i}", turn=i, deterministic=True)
        assert chosen == hashed({"a": 0, "b": 0, "c": 0}, f"r{i}")


def test_deterministic_choice_spreads_and_a_loss_moves_only_the_lost_ones_requests() -> None:
    names = [f"cycle {i} rank 0" for i in range(300)]
    before = {n: hashed({"a": 0, "b": 0, "c": 0}, n) for n in names}
    after = {n: hashed({"a": 0, "b": None, "c": 0}, n) for n in names}
    assert min(Counter(before.values()).values()) > 60
    assert all(after[n] == before[n] for n in names if before[n] != "b")
    assert "b" not in after.values()


def test_the_hash_is_the_same_in_every_process() -> None:
    assert stable_hash("raydmd") == 10182151392360572852
