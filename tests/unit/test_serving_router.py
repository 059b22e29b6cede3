from collections import Counter

import pytest

from raydmd.serving.router import Candidate, choose, stable_hash

pytestmark = pytest.mark.unit


def pick(candidates: list[Candidate], request: str = "r", client: str = "c") -> str | None:
    return choose(candidates, request=request, client=client, deterministic=False)


def hashed(names: dict[str, int | None], request: str) -> str | None:
    candidates = [Candidate(name=n, tier=t) for n, t in names.items()]
    return choose(candidates, request=request, client="c", deterministic=True)


def test_nobody_usable_is_nobody_chosen() -> None:
    assert pick([]) is None
    assert pick([Candidate(name="a", tier=None)]) is None
    assert hashed({"a": None}, "r") is None


def test_the_fewest_outstanding_wins_then_the_fewest_sent() -> None:
    a = Candidate(name="a", tier=0, outstanding=2, sent=0)
    b = Candidate(name="b", tier=0, outstanding=1, sent=9)
    c = Candidate(name="c", tier=0, outstanding=1, sent=8)
    assert pick([a, b, c]) == "c"
    assert pick([a, b]) == "b"


def test_a_better_tier_beats_a_shorter_queue() -> None:
    healthy = Candidate(name="healthy", tier=0, outstanding=5)
    suspect = Candidate(name="suspect", tier=1)
    dead = Candidate(name="dead", tier=None)
    assert pick([suspect, healthy, dead]) == "healthy"
    assert pick([suspect, dead]) == "suspect"


def test_first_requests_of_many_clients_spread() -> None:
    candidates = [Candidate(name=str(i), tier=0) for i in range(4)]
    chosen = Counter(pick(candidates, client=f"rank {i}") for i in range(200))
    assert set(chosen) == {"0", "1", "2", "3"}
    assert max(chosen.values()) < 100


def test_deterministic_choice_depends_on_the_name_alone() -> None:
    for i in range(20):
        busy = [Candidate(name=n, tier=0, outstanding=i, sent=7) for n in "abc"]
        chosen = choose(busy, request=f"r{i}", client=f"x{i}", deterministic=True)
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
