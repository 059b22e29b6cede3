"""Search spaces: what they draw is valid, corners are seen beforehand, bad ones are refused with the reason."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from raydmd.errors import InputError
from raydmd.recipe import Recipe, derive
from raydmd.tuning.space import Choice, Explorer, Ordered, Phases, Range, ends, points
from raydmd.tuning.spec import CORNERS, Sweep, read_sweep

pytestmark = pytest.mark.unit

STUDENT = {"steps": 4, "shift": 5.0}


class Chance:
    """Draws at random, as Optuna's own sampler does."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.asked: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        del step, log
        return self.asked.setdefault(name, self._draw.uniform(low, high))

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        del step, log
        return self.asked.setdefault(name, self._draw.randint(low, high))

    def suggest_categorical(self, name: str, choices: Any) -> str:
        return self.asked.setdefault(name, self._draw.choice(choices))


def sweep(space: dict[str, Any], **other: Any) -> Sweep:
    return read_sweep({"name": "s", "space": space, **other})


@pytest.mark.parametrize("steps", [2, 4, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_every_draw_of_phases_gives_each_a_step(steps: int, shift: float) -> None:
    spec, seen = Phases(phases=(1, 3)), set()
    for seed in range(200):
        found = spec.pick("method.boundaries", Chance(seed), {"steps": steps, "shift": shift})
        base = derive(Recipe(), {"method.steps": steps, "method.shift": shift, "training.cycles": 100})
        derive(base, {"method.boundaries": found})  # refuses a phase without a step
        seen.add(len(found) + 1)
    assert seen == set(range(1, min(3, steps) + 1))


def test_ordered_numbers_keep_order_gap_and_spread() -> None:
    spec = Ordered(ordered=(1, 3), low=0.1, high=0.9, gap=0.1)
    drawn = [spec.pick("k", Chance(seed), STUDENT) for seed in range(3000)]
    for values in drawn:
        assert all(b - a >= 0.1 - 1e-5 for a, b in itertools.pairwise(values))
        assert values[0] >= 0.1
        assert values[-1] <= 0.9
    pairs = [values for values in drawn if len(values) == 2]
    # Uniform over ordered pairs: the smaller of two, without the gap, is at a third of the way on average.
    mean = sum(a for a, _ in pairs) / len(pairs)
    assert mean == pytest.approx(0.1 + 0.7 / 3, abs=0.02)
    falling = Ordered(ordered=2, falling=True).pick("k", Chance(0), STUDENT)
    assert falling[0] > falling[1]


def test_ranges_and_choices() -> None:
    assert isinstance(Range(low=1, high=8).pick("k", Chance(0), STUDENT), int)
    assert isinstance(Range(low=1, high=8.5).pick("k", Chance(0), STUDENT), float)
    whole = Choice(of=(None, {"steps": 5, "weight": 0.1}))
    assert {str(whole.pick("k", Chance(seed), STUDENT)) for seed in range(20)} == {str(v) for v in whole.of}


def test_an_explorer_goes_through_every_combination_once() -> None:
    explorer, seen = Explorer(ends), []
    for _ in explorer.rounds():
        kind = explorer.suggest_categorical("kind", ["a", "b"])
        low = explorer.suggest_float("x", 0, 1, step=None, log=False) if kind == "a" else None
        seen.append((kind, low, explorer.suggest_int("n", 1, 3, step=1, log=False)))
    assert len(seen) == len(set(seen)) == 6
    assert {n for *_, n in seen} == {1, 3}


def test_a_grid_is_every_point_and_needs_steps() -> None:
    space = {"method.guidance": {"low": 2.0, "high": 4.0, "step": 0.5}, "training.fake_updates": [1, 5]}
    found = sweep(space, search={"kind": "grid"}).grid(Recipe())
    assert len(found) == 10
    assert {p["method.guidance"] for p in found} == {2.0, 2.5, 3.0, 3.5, 4.0}
    with pytest.raises(InputError, match="a grid needs a step"):
        sweep({"method.guidance": {"low": 2.0, "high": 4.0}}).grid(Recipe())
    assert points(0.0, 0.3, 0.1, False) == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_when_leaves_a_key_out() -> None:
    spec = sweep(
        {
            "method.decouple.schedule": ["hybrid", "coupled"],
            "method.decouple.augment_times": {
                "ordered": 2,
                "gap": 0.2,
                "when": {"method.decouple.schedule": ["hybrid"]},
            },
        }
    )
    base = derive(Recipe(), {"method.name": "decoupled"})
    drawn = [spec.pick(base, Chance(seed)) for seed in range(20)]
    assert {("method.decouple.augment_times" in d, d["method.decouple.schedule"]) for d in drawn} == {
        (True, "hybrid"),
        (False, "coupled"),
    }
    assert len(list(spec.corners(base))) == 5


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"method.guidanse": [1, 2]}, "unknown key 'method.guidanse'; did you mean 'method.guidance'"),
        ({"method.guidance": 3}, "give a list of values, or a mapping"),
        ({"method.guidance": {"lo": 1, "hi": 2}}, "needs one of of, ordered, phases, low"),
        ({"method.guidance": {"low": 4, "high": 2}}, "low=4 must lie below high=2"),
        ({"method.guidance": {"low": 0.0, "high": 2.0, "log": True}}, "log needs low above 0"),
        ({"method.guidance": {"low": 1, "high": 2, "hihg": 3}}, "hihg"),
        ({"method.guidance": {"phases": 2}}, "'phases' makes boundaries"),
        ({"method.times": {"ordered": 3, "gap": 0.5}}, "do not fit"),
        ({"method.boundaries": {"phases": [3, 2]}}, "must rise"),
        ({"placement.workers": [1, 2]}, "not searched"),
        ({"method.guidance": {"low": 1, "high": 2, "when": {"method.steps": [4]}}}, "must come before it"),
        ({}, "at least 1"),
    ],
)
def test_a_bad_space_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        sweep(space)


def test_an_impossible_corner_is_refused_with_the_reason() -> None:
    spec = sweep({"method.boundaries": [[0.9, 0.7], [0.7, 0.9]]})
    with pytest.raises(InputError, match=r"method.boundaries=\[0.7, 0.9\].*boundaries must fall"):
        list(spec.corners(Recipe()))
    few = sweep({"method.steps": [1, 4], "method.boundaries": {"phases": 2}})
    with pytest.raises(InputError, match="2 phases can't share 1 step"):
        list(few.corners(Recipe()))
    crossing = sweep({"method.times": {"of": [[0.9, 0.1]]}})
    with pytest.raises(InputError, match="times"):
        list(crossing.corners(Recipe()))


def test_steps_between_whole_ends_need_not_be_whole() -> None:
    spec = sweep({"method.guidance": {"low": 2, "high": 3, "step": 0.5}}, search={"kind": "grid"})
    assert [point["method.guidance"] for point in spec.grid(Recipe())] == [2.0, 2.5, 3.0]


def test_a_space_of_too_many_corners_is_looked_at_on_all_sides() -> None:
    far = {"training.ema": {"low": 0.5, "high": 1.5}}  # an average's decay lies below 1
    rates = ("rate", "eps", "clip", "weight_decay")
    many: dict[str, Any] = {
        f"training.{r}.{k}": {"low": 1e-6, "high": 1e-4} for r in ("student", "fake") for k in rates
    }
    counts = ("batch", "fake_updates", "report_every", "fake_warmup")
    many |= {f"training.{key}": {"low": 2, "high": 4} for key in counts}
    assert 2 ** (len(far) + len(many)) > CORNERS
    with pytest.raises(InputError, match=r"training\.ema"):
        list(sweep({**far, **many}).corners(Recipe()))


def test_repeats_are_not_halved() -> None:
    with pytest.raises(InputError, match="repeats and stopping exclude each other"):
        sweep({"method.guidance": [2, 3]}, repeats=2, stopping={"reduction": 3})


def test_a_spec_survives_yaml() -> None:
    space = {"method.boundaries": {"phases": [1, 2]}, "method.guidance": [2, 4], "training.fake_updates": [1, 5]}
    spec = sweep(space, stopping={"reduction": 2}, objectives={"frechet": "min", "joint": "max"})
    assert read_sweep(spec.model_dump(mode="json")) == spec
    facts = spec.facts(Recipe())
    assert facts == read_sweep(spec.model_dump(mode="json")).facts(derive(Recipe(), {"output": "elsewhere"}))
    assert facts != spec.facts(derive(Recipe(), {"method.steps": 2}))
