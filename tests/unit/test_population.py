"""Populations: what may move, what comes out of a move, who takes over from whom, whose settings made a student."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from raydmd.errors import InputError
from raydmd.models.base import Routing
from raydmd.process import Process, RectifiedFlow
from raydmd.recipe import Recipe, derive, known_keys
from raydmd.tuning.explore import Explored, explore
from raydmd.tuning.population import (
    MOVABLE,
    REASONS,
    Entry,
    check_population,
    check_shapes,
    generations,
    kept_keys,
    schedule,
    state_shape,
    takeovers,
)
from raydmd.tuning.rows import Row
from raydmd.tuning.show import as_json, scheduled
from raydmd.tuning.spec import Sweep, read_sweep
from tests.unit.test_sweep_space import Chance

pytestmark = pytest.mark.unit

BASE = derive(Recipe(), {"method.name": "decoupled", "training.cycles": 100, "evaluation.every": 20})
SPACE: dict[str, Any] = {
    "method.guidance": {"low": 2.0, "high": 6.0},
    "training.student.rate": {"low": 1e-6, "high": 1e-2, "log": True},
    "training.fake_updates": {"low": 1, "high": 6},
    "training.warmup": {"low": 0, "high": 40, "step": 10},
    "method.times": {"ordered": 2, "gap": 0.3},
    "method.decouple.schedule": ["hybrid", "constrained", "full"],
    "method.decouple.augment": {"low": 0.0, "high": 2.0, "step": 0.25},
    "method.decouple.augment_times": {
        "of": [[0.02, 0.98], [0.02, 0.5]],
        "when": {"method.decouple.schedule": ["hybrid", "full"]},
    },
}


def sweep(space: dict[str, Any] = SPACE, **other: Any) -> Sweep:
    return read_sweep({"name": "s", "space": space, "population": {}, **other})


ONE = Routing(("transformer",))


@dataclass
class Family:
    """As much of one as a training state's shape needs."""

    teacher: Routing = ONE
    process: Process = field(default_factory=RectifiedFlow)
    prediction: str = "flow"

    def routing(self) -> Routing:
        return self.teacher


def valid(value: Any, key: str) -> None:
    """What the space promises of a key."""
    if key == "method.times":
        assert 0 <= value[0] < value[1] <= 1
        assert value[1] - value[0] >= 0.3 - 1e-5
    elif key == "training.warmup":
        assert value in (0, 10, 20, 30, 40)
    elif key == "method.decouple.augment":
        assert 0 <= value <= 2
        assert value * 4 == round(value * 4)
    elif isinstance(SPACE[key], dict) and "low" in SPACE[key]:
        assert SPACE[key]["low"] <= value <= SPACE[key]["high"]


def test_whatever_is_explored_is_valid_and_near() -> None:
    """A walk of thousands of moves, each from where the last one came to."""
    spec, rng = sweep(), random.Random(0)
    chooser = Chance(0)
    spec.changes(BASE, chooser)
    numbers, seen, moved = chooser.asked, dict[str, set[str]](), 0
    for _ in range(3000):
        found = explore(spec, BASE, numbers, rng, fits=lambda _: None)
        assert found is not None
        changes, new = found
        derive(BASE, changes)
        for key, value in changes.items():
            valid(value, key)
            seen.setdefault(key, set()).add(json.dumps(value))
        assert ("method.decouple.augment_times" in changes) == (changes["method.decouple.schedule"] != "constrained")
        before, after = numbers["method.guidance"], new["method.guidance"]
        near = [min(before * 1.2, 6.0), max(before / 1.2, 2.0)]
        moved += any(after == pytest.approx(n) for n in near)
        numbers = new
    assert moved / 3000 == pytest.approx(0.75, abs=0.04)  # the others were drawn anew
    assert seen["method.decouple.schedule"] == {'"hybrid"', '"constrained"', '"full"'}
    assert seen["training.fake_updates"] == {str(n) for n in range(1, 7)}
    assert len(seen["training.student.rate"]) > 1000


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("phases", [2, (1, 2), (2, 3)])
def test_explored_boundaries_always_leave_each_phase_a_step(steps: int, phases: Any) -> None:
    spec, rng = sweep({"method.boundaries": {"phases": phases}}), random.Random(1)
    base = derive(Recipe(), {"method.steps": steps, "training.cycles": 100})
    numbers: dict[str, Any] = {}
    seen = set()
    for _ in range(1000):
        chooser = Explored(numbers, rng, resample=0.1, factor=1.5)
        changes = spec.changes(base, chooser)
        derive(base, changes)  # refuses a phase without a step
        numbers = chooser.chosen
        seen.add(json.dumps(changes))
    assert len(seen) > 200


def test_a_number_that_does_not_move_enough_moves_to_the_next_point_and_an_end_turns_back() -> None:
    for seed in range(50):
        chooser = Explored({"k": 2}, random.Random(seed), resample=0.0, factor=1.1)
        assert chooser.suggest_int("k", 1, 8, step=1, log=False) in (1, 3)
        chooser = Explored({"k": 8}, random.Random(seed), resample=0.0, factor=1.1)
        assert chooser.suggest_int("k", 1, 8, step=1, log=False) == 7
        chooser = Explored({"k": 0.0}, random.Random(seed), resample=0.0, factor=1.2)
        assert chooser.suggest_float("k", 0.0, 2.0, step=None, log=False) == pytest.approx(0.4)
        chooser = Explored({"k": "b"}, random.Random(seed), resample=0.0, factor=1.2)
        assert chooser.suggest_categorical("k", ["a", "b", "c", "d"]) in ("a", "c")


def test_what_is_kept_stays_and_nothing_else_does() -> None:
    spec = sweep({"method.boundaries": {"phases": 2}, "method.guidance": {"low": 2.0, "high": 6.0}})
    base = derive(Recipe(), {"training.cycles": 100})
    chooser = Chance(3)
    before = spec.changes(base, chooser)
    for seed in range(30):
        rng = random.Random(seed)
        found = explore(spec, base, chooser.asked, rng, fits=lambda _: None, kept=("method.boundaries",))
        assert found is not None
        assert found[0]["method.boundaries"] == before["method.boundaries"]
        assert found[0]["method.guidance"] != before["method.guidance"]
    assert kept_keys(base, before, 49) == ()
    assert kept_keys(base, before, 50) == ("method.boundaries",)  # the first phase has trained its expert
    assert kept_keys(derive(base, {"method.name": "dmd2"}), {}, 99) == ()


def test_an_exploration_that_fits_nowhere_is_given_up() -> None:
    def never(_: Recipe) -> None:
        raise InputError("no")

    assert explore(sweep(), BASE, {}, random.Random(0), fits=never) is None


def test_the_worst_take_over_from_the_best() -> None:
    costs = {k: float(k) for k in range(8)}
    for seed in range(50):
        found = takeovers(costs, range(8), [], quantile=0.25, rng=random.Random(seed))
        assert set(found) == {6, 7}
        assert set(found.values()) <= {0, 1}
    assert takeovers({0: 1.0, 1: 1.0}, [0, 1], [], quantile=0.5, rng=random.Random(0)) == {}  # none is better
    assert takeovers({0: 2.0, 1: 1.0}, [0, 1], [], quantile=0.1, rng=random.Random(0)) == {0: 1}
    assert takeovers({0: 2.0}, [0], [], quantile=0.5, rng=random.Random(0)) == {}
    assert takeovers({}, [0, 1], [], quantile=0.5, rng=random.Random(0)) == {}


def test_one_that_failed_or_has_no_figure_is_the_worst() -> None:
    found = takeovers({0: 1.0, 1: 2.0, 2: 3.0}, range(4), [], quantile=0.25, rng=random.Random(0))
    assert found == {3: 0}
    found = takeovers({0: 1.0, 1: 2.0, 2: 0.1}, range(4), [2, 3], quantile=0.25, rng=random.Random(0))
    assert found == {2: 0, 3: 0}
    assert takeovers({}, range(2), [0, 1], quantile=0.5, rng=random.Random(0)) == {}


def row(root: int, *entries: Entry, state: str = "finished") -> Row:
    changes = entries[-1].changes
    return Row(root, root, state, "c", changes, {"frechet": float(root)}, {}, "", lineage=tuple(entries))


def test_a_schedule_is_that_of_the_state_and_not_of_the_trial() -> None:
    rows = [
        row(0, Entry(0, None, {"a": 0}), Entry(40, 1, {"a": 1.5})),
        row(1, Entry(0, None, {"a": 1}), Entry(20, 2, {"a": 2.5}), Entry(60, 0, {"a": 1.7})),
        row(2, Entry(0, None, {"a": 2, "b": 1})),
    ]
    path = [(e.cycle, e.donor, e.changes["a"]) for e in schedule(rows, 1)]
    # Trial 1 at the end is 0's state of cycle 60, which was 1's of cycle 40, which was 2's of cycle 20.
    assert path == [(0, None, 2), (20, 2, 2.5), (40, 1, 1.5), (60, 0, 1.7)]
    assert [e.changes["a"] for e in schedule(rows, 2)] == [2]
    text = scheduled(rows, rows[1])
    assert text.splitlines() == [
        "from cycle 0: a=2, b=1",
        "from cycle 20: a=2.5, without b   (from trial 0002's state)",
        "from cycle 40: a=1.5   (from trial 0001's state)",
        "from cycle 60: a=1.7   (from trial 0000's state)",
    ]
    [shown] = as_json(rows, sweep({"method.guidance": [1, 2]}), only=rows[1:2])["trials"]
    assert [(e["cycle"], e["changes"]["a"]) for e in shown["schedule"]] == [(0, 2), (20, 2.5), (40, 1.5), (60, 1.7)]
    assert shown["changes"] == {"a": 1.7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stopping": {}}, "stopping and population exclude each other"),
        ({"budget": {"trials": 1}}, "needs two"),
        ({"budget": {"gpu_hours": 3}}, "budget.gpu_hours does nothing with a population"),
        ({"search": {"kind": "grid"}}, "draws its first ones at random"),
        ({"population": {"quantile": 0.6}}, "quantile"),
        ({"population": {"factor": 1.0}}, "factor"),
        ({"population": {"evry": 1}}, "evry"),
        ({"space": {"method.steps": [2, 4]}}, "a student has learnt its own steps"),
        ({"space": {"training.student.lora": [None, {"rank": 4}]}}, "its weights have other shapes"),
        ({"space": {"training.student.lora.rank": [4, 8]}}, "its weights have other shapes"),
        ({"space": {"training.batch": [8, 16]}}, "updates have other samples"),
        ({"space": {"training.cycles": [80, 160]}}, "compared at the same cycles"),
        ({"space": {"model.height": [16, 32]}}, "its networks are other ones"),
        ({"space": {"method.gan.depths": [[0.5], [1.0]]}}, "heads have other shapes"),
        ({"space": {"method.name": ["dmd2", "amd"]}}, "follows one method's student"),
        ({"space": {"seed": [1, 2]}}, "members draw the same numbers"),
        ({"space": {"data.sizes": [[], []]}}, "it trains on other data"),
    ],
)
def test_what_can_not_be_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sweep(**changes)


def test_the_lists_name_keys_that_there_are() -> None:
    keys = known_keys()
    assert set(MOVABLE) <= set(keys)
    assert all(any(k == p or k.startswith(f"{p}.") for k in keys) for p in REASONS)
    # Nothing of the model, the data or the adapters has slipped in.
    assert not [k for k in MOVABLE if k.startswith(("model", "data", "placement", "evaluation")) or ".lora" in k]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.every": 0}, "set evaluation.every"),
        ({"evaluation.every": 100}, "nothing would ever be taken over"),
        ({"monitor.action": "rollback"}, "would go back behind what was taken over"),
        ({"method.regression": {"loss": "l2"}, "method.solver": "euler"}, "set method.regression.guidance"),
    ],
)
def test_a_recipe_that_leaves_nothing_to_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_population(sweep({"method.guidance": [2, 4]}), derive(BASE, changes))


def test_members_meet_every_so_many_evaluations_and_not_at_the_end() -> None:
    assert generations(sweep(), BASE) == (20, 40, 60, 80)
    assert generations(sweep(population={"every": 2}), BASE) == (40, 80)


def test_settings_that_lead_to_other_networks_are_refused() -> None:
    wan = Family(Routing(("transformer", "transformer_2"), (0.875,)))
    base = derive(Recipe(), {"training.cycles": 100, "evaluation.every": 20})

    def check(space: dict[str, Any], family: Family) -> None:
        spec = sweep(space)
        check_shapes(spec, spec.corners(base), family)  # type: ignore[arg-type]

    one = Family()
    check({"method.boundaries": {"phases": 2}}, one)
    with pytest.raises(InputError, match="train other networks"):
        check({"method.boundaries": {"phases": (1, 2)}}, one)
    with pytest.raises(InputError, match=r"training.ema=0.0 and training.ema=0.9 train other networks"):
        check({"training.ema": [0.0, 0.9]}, one)
    check({"training.ema": [0.5, 0.9]}, one)
    with pytest.raises(InputError, match="each within one of the teacher's experts"):
        check({"method.boundaries": {"of": [[0.95], [0.7]]}}, wan)
    near = [derive(base, {"method.boundaries": [b]}) for b in (0.89, 0.91)]
    shapes = [state_shape(r, wan) for r in near]  # type: ignore[arg-type]
    assert shapes[0] == shapes[1]
    assert all(a != b for a, b in itertools.pairwise(state_shape(r, f) for r, f in zip(near, (one, wan), strict=True)))  # type: ignore[arg-type]
