"""What is said of a sweep's best trial against the recipe it began from."""

from __future__ import annotations

import pytest

from raydmd.tuning.verdict import Verdict

pytestmark = pytest.mark.unit

GOALS = {"frechet": "min", "joint": "max"}


def verdict(found: list[float]) -> Verdict:
    default = {"frechet": [10.0, 12.0, 11.0], "joint": [0.9, 0.8, 0.85]}
    return Verdict(7, [1, 2, 3], default, {"frechet": found, "joint": [0.95, 0.7, 0.85]})


def test_better_on_every_seed_is_better() -> None:
    text = verdict([9.0, 8.0, 10.0]).text(GOALS)
    assert "trial 0007 beats the recipe: frechet is better on 3 of 3, joint is better on 1 of 3 held-out seeds" in text
    assert "| on 3 held-out seeds | frechet ↓ | joint ↑ |" in text
    assert "| the recipe as it is | 11 ± 1 | 0.85 ± 0.05 |" in text
    assert "| trial 0007 | 9 ± 1 | 0.8333 ± 0.13 |" in text


def test_anything_less_is_not() -> None:
    assert "does NOT beat the recipe: frechet is better on 2 of 3" in verdict([9.0, 8.0, 11.0]).text(GOALS)


def test_several_trainings_of_each_are_told_and_paired() -> None:
    default, found = {"frechet": [10.0, 12.0, 11.0, 13.0]}, {"frechet": [9.0, 11.0, 12.0, 12.0]}
    text = Verdict(7, [1, 2], default, found, trainings=2).text({"frechet": "min"})
    assert "| on 2 held-out seeds, 2 trainings each |" in text
    assert "does NOT beat the recipe: frechet is better on 3 of 4 pairs of seed and training" in text


def test_the_goal_decides_which_way() -> None:
    assert verdict([0.0, 0.0, 0.0]).better("joint", "max") == 1  # equal is not better
