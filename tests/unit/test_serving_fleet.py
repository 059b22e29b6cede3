"""Leases, scaling and the fleet's decisions, with a clock of our own."""

import random

import pytest

from raydmd.serving.attendance import Attendance, News
from raydmd.serving.fleet import DRAIN, GIVE_UP, NOTICE, WINDOW, Fleet, Move, Stage, Start, Stop
from raydmd.serving.leases import Leases
from raydmd.serving.order import Look, ReplicaLook
from raydmd.serving.scaling import Pace, Scaler, assign

pytestmark = pytest.mark.unit

EXPERTS = ("high", "low")


def test_a_lease_lasts_as_long_as_it_is_renewed() -> None:
    leases = Leases(10.0)
    first, second = leases.take("pool", "a", 0.0, least=2, most=1), leases.take("pool", "b", 0.0)
    assert first.name != second.name
    assert (first.least, first.most) == (2, 2)
    assert leases.renew(first.name, 9.0)
    assert leases.expire(9.9) == []
    assert leases.expire(10.0) == [second]
    assert leases.of("pool") == [first]
    assert not leases.renew(second.name, 11.0)
    leases.drop(first.name)
    leases.drop(first.name)
    assert len(leases) == 0
    with pytest.raises(ValueError, match="a lease of 0 s is none"):
        Leases(0.0)


def test_a_pool_grows_under_load_and_shrinks_without() -> None:
    scaler = Scaler(Pace(grow_after=10, shrink_after=60))

    def at(now: float, busy: list[float], waiting: int) -> int:
        return scaler.target(now, least=1, most=3, busy=busy, waiting=waiting)

    assert at(0, [], 0) == 1
    assert at(1, [1.0], 5) == 1
    assert at(10, [1.0], 5) == 1
    assert at(11, [1.0], 5) == 2
    assert at(30, [1.0], 5) == 2  # the second has not come yet: no third is asked for
    assert at(31, [0.95, 0.95], 1) == 2
    assert at(36, [0.95, 0.95], 0) == 2  # nothing waits: the load is met
    assert at(37, [0.95, 0.95], 1) == 2
    assert at(46.9, [0.95, 0.95], 1) == 2
    assert at(47, [0.95, 0.95], 1) == 3
    assert at(100, [0.9, 0.9, 0.9], 9) == 3  # no more than most
    assert at(200, [0.9, 0.9, 0.9], 9) == 3
    assert at(300, [0.4, 0.4, 0.4], 0) == 3
    assert at(360, [0.4, 0.4, 0.4], 0) == 2
    assert at(500, [0.6, 0.6], 0) == 2  # one alone could not carry it
    assert at(600, [0.6, 0.6], 0) == 2
    assert scaler.target(601, least=3, most=3, busy=[0.0, 0.0], waiting=0) == 3  # bounds move with leases


@pytest.mark.parametrize(
    ("held", "wants", "each", "expected"),
    [
        ({"a": (), "b": ()}, [], 1, {"a": ("high",), "b": ("high",)}),
        ({"a": ("high",), "b": ("high",)}, ["high"], 1, {"a": ("high",), "b": ("high",)}),
        ({"a": ("high",), "b": ("high",)}, ["low", "low"], 1, {"a": ("low",), "b": ("low",)}),
        ({"a": ("high",), "b": ("high",)}, ["low", "high"], 1, {"a": ("high",), "b": ("low",)}),
        ({"a": ("low",), "b": ("high",)}, ["low", "high"], 1, {"a": ("low",), "b": ("high",)}),
        ({"a": ("low",), "b": ("high",), "c": ("high",)}, ["low", "low", "high"], 1, None),
        ({"a": ("high",)}, ["low", "high"], 1, {"a": ("high",)}),
        ({"a": ("high",)}, ["low", "low", "high"], 1, {"a": ("low",)}),
        ({"a": ("high",)}, ["other"], 1, {"a": ("high",)}),
    ],
)
def test_experts_go_where_they_are_wanted(held, wants, each, expected):
    result = assign(held, wants, each, EXPERTS)
    if expected is None:
        assert sorted(e for v in result.values() for e in v) == ["high", "low", "low"]
        assert result["a"] == ("low",)
    else:
        assert result == expected


@pytest.mark.parametrize("seed", range(200))
def test_assignments_serve_every_wanted_expert_and_are_stable(seed: int) -> None:
    rng = random.Random(seed)
    experts = tuple("abcd"[: rng.randint(1, 4)])
    each = rng.randint(1, len(experts))
    held = {f"r{i}": tuple(sorted(rng.sample(experts, rng.randint(0, each)))) for i in range(rng.randint(1, 5))}
    wants = [rng.choice(experts) for _ in range(rng.randint(0, 6))]
    result = assign(held, wants, each, experts)
    assert result.keys() == held.keys()
    assert all(len(v) <= each and len(set(v)) == len(v) for v in result.values())
    served = {e for v in result.values() for e in v}
    if len(set(wants)) <= len(held) * each:
        assert set(wants) <= served
    assert assign(result, wants, each, experts) == result


class Driven:
    """A fleet whose actions are carried out at once, but for loading."""

    def __init__(self, **settings) -> None:
        self.fleet = Fleet("pool", **settings)
        self.now = 0.0
        self.log: list[object] = []

    def step(self, seconds: float = 1.0, *, least: int = 1, most: int = 0, wants: tuple[str, ...] = ()):
        self.now += seconds
        actions = self.fleet.step(self.now, least=least, most=max(least, most), wants=wants)
        self.log += actions
        return actions

    def load(self, *names: str) -> None:
        for name in names:
            self.fleet.loaded(name, self.fleet.slots[name].experts, self.now)

    def hear(self, name: str, *, open_requests: int, busy: float) -> None:
        self.fleet.heard(name, open_requests=open_requests, queued=max(open_requests - 1, 0), busy=busy, now=self.now)


def test_replicas_are_members_from_when_they_have_loaded_until_they_leave() -> None:
    d = Driven()
    assert d.step(least=2) == [Start("pool/0", ()), Start("pool/1", ())]
    assert d.fleet.members() == {}
    d.load("pool/0")
    assert d.fleet.members() == {"pool/0": ()}
    before = d.fleet.version
    d.load("pool/1", "pool/0")
    assert d.fleet.version == before + 1
    assert d.step(least=2) == []
    # One holder less: the younger leaves, first the membership, then, once it is empty, the cluster.
    d.hear("pool/1", open_requests=2, busy=0.0)
    d.step(least=1)
    d.step(200, least=1)  # it was to be spare for a while first
    d.step(1, least=1)
    assert d.fleet.members() == {"pool/0": ()}
    assert d.fleet.slots["pool/1"].stage is Stage.LEAVING
    assert d.step(NOTICE + 1, least=1) == []  # it still answers two
    d.hear("pool/1", open_requests=0, busy=0.0)
    assert d.step(least=1) == [Stop("pool/1")]
    assert d.step(least=2) == [Start("pool/2", ())]


def test_a_replica_that_never_empties_is_ended_all_the_same() -> None:
    d = Driven()
    d.step(least=2)
    d.load("pool/0", "pool/1")
    d.hear("pool/1", open_requests=3, busy=0.0)
    for _ in range(4):
        d.step(100, least=1)
    assert d.fleet.slots["pool/1"].stage is Stage.LEAVING
    assert d.step(DRAIN, least=1) == [Stop("pool/1")]


def test_a_lost_process_loads_again_and_one_that_cannot_is_replaced_with_pauses() -> None:
    d = Driven()
    d.step()
    d.load("pool/0")
    d.fleet.lost("pool/0", "killed", d.now)
    assert d.fleet.members() == {}
    assert d.step() == []  # Ray restarts it
    d.load("pool/0")
    assert d.fleet.members() == {"pool/0": ()}
    d.fleet.lost("pool/0", "killed", d.now)
    starts = []
    for k in range(GIVE_UP):
        name = f"pool/{k}"
        d.fleet.failed(name, f"weights are gone {k}", d.now)
        assert bool(d.fleet.broken) is (k == GIVE_UP - 1)
        assert d.step(0.5) == []  # too soon
        starts += d.step(100)
    assert starts == [Start(f"pool/{k}", ()) for k in (1, 2, 3)]  # broken, it goes on trying
    assert d.fleet.broken == f"weights are gone {GIVE_UP - 1}"
    d.load("pool/3")
    assert not d.fleet.broken


def test_replicas_that_fail_together_count_once_and_one_that_loads_may_still_come() -> None:
    d = Driven()
    d.step(least=4)
    for k in range(3):
        d.fleet.failed(f"pool/{k}", "no memory", d.now)
    assert not d.fleet.broken
    d.fleet.failed("pool/3", "no memory", d.now)
    assert not d.fleet.broken  # the first attempt of three


def test_requests_in_a_forward_do_not_wait_and_a_replica_that_cannot_be_placed_is_given_up() -> None:
    d = Driven(pace=Pace(grow_after=5, shrink_after=20))
    d.step(least=1, most=3)
    d.load("pool/0")
    busy = 0.0

    def second(share: float, queued: int) -> None:
        nonlocal busy
        busy += share
        d.now += 1
        d.fleet.heard("pool/0", open_requests=queued + 4, queued=queued, busy=busy, now=d.now)
        d.step(0, least=1, most=3)

    for _ in range(40):
        second(0.95, 0)
    assert set(d.fleet.slots) == {"pool/0"}  # full, and keeping up
    for _ in range(40):
        second(0.95, 5)
    assert set(d.fleet.slots) == {"pool/0", "pool/1"}  # the second finds no place, so no third is asked for
    for _ in range(60):
        second(0.3, 0)
    assert set(d.fleet.slots) == {"pool/0"}


def test_a_fleet_with_a_living_replica_is_not_broken() -> None:
    d = Driven()
    d.step(least=2)
    d.load("pool/0")
    for k in range(1, 8):
        d.fleet.failed(f"pool/{k}", "no memory", d.now)
        d.step(100, least=2)
    assert not d.fleet.broken
    assert d.fleet.last_error == "no memory"
    assert d.fleet.members() == {"pool/0": ()}


def test_replicas_move_between_experts_with_the_phases() -> None:
    d = Driven(experts=EXPERTS, each=1)
    assert d.step(least=2, wants=("high",)) == [Start("pool/0", ("high",)), Start("pool/1", ("high",))]
    d.load("pool/0", "pool/1")
    # One trial goes on to the next phase, another does not.
    moves = d.step(least=2, wants=("high", "low"))
    assert moves == [Move("pool/1", ("low",))]
    assert d.fleet.members() == {"pool/0": ("high",)}
    assert d.step(least=2, wants=("high", "low")) == []
    d.fleet.moved("pool/1", d.now)
    assert d.fleet.members() == {"pool/0": ("high",), "pool/1": ("low",)}
    # The first one died and came back with what its process was started with.
    assert d.step(least=2, wants=("low",)) == [Move("pool/0", ("low",))]
    d.fleet.moved("pool/0", d.now)
    d.fleet.lost("pool/0", "killed", d.now)
    d.fleet.loaded("pool/0", ("high",), d.now)
    assert d.step(least=2, wants=("low",)) == [Move("pool/0", ("low",))]
    assert [a for a in d.log if isinstance(a, Stop)] == []


def test_load_is_a_matter_of_the_last_seconds() -> None:
    d = Driven()
    d.step(least=1, most=2)
    d.load("pool/0")
    busy, grown = 0.0, None
    for second in range(60):
        busy += 0.95
        d.now += 1
        d.hear("pool/0", open_requests=4, busy=busy)
        if d.step(0, least=1, most=2):
            grown = second
            break
    assert grown is not None
    assert WINDOW + 10 <= grown <= 2 * WINDOW + 11
    d.load("pool/1")
    assert set(d.fleet.members()) == {"pool/0", "pool/1"}
    for _ in range(300):
        d.now += 1
        for name in list(d.fleet.slots):
            d.hear(name, open_requests=0, busy=busy)
        d.step(0, least=1, most=2)
    assert set(d.fleet.slots) == {"pool/0"}


def test_who_is_lost_and_who_is_back_is_news_once() -> None:
    attendance = Attendance()

    def news(last_error: str = "", **replicas: tuple[str, str]) -> list[News]:
        seen = {name: ReplicaLook(stage, (), error, None, 0.0) for name, (stage, error) in replicas.items()}
        return attendance.news(Look("pool", seen, (), "", last_error))

    assert attendance.news(None) == []
    assert attendance.news(None) == [News("keeper", "lost", "no answer")]
    assert attendance.news(None) == []
    assert news() == [News("keeper", "back")]
    assert attendance.news(None) == []
    assert news() == []
    assert news(a=("loading", ""), b=("loading", "")) == []
    assert news(a=("ready", ""), b=("loading", "")) == []
    assert news(a=("ready", ""), b=("loading", "its process died\nbecause")) == [News("b", "lost", "its process died")]
    assert news(a=("loading", "killed"), b=("loading", "its process died")) == [News("a", "lost", "killed")]
    assert news(a=("ready", ""), b=("moving", "")) == [News("a", "back"), News("b", "back")]
    assert news(a=("ready", "no answer to a ping"), b=("ready", "")) == [News("a", "lost", "no answer to a ping")]
    assert news(a=("loading", ""), b=("loading", "")) == [News("b", "lost")]  # of another keeper, which starts them
    assert news(a=("ready", ""), b=("ready", "")) == [News("a", "back"), News("b", "back")]
    assert news(a=("leaving", ""), b=("ready", "")) == []
    assert news(b=("ready", "")) == []
    assert news("it ran out of memory") == [News("b", "lost", "it ran out of memory")]
