"""What ``benchmarks/methods.py`` says of figures: ties, spreads, directions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import methods

    yield methods
    for name in ("methods", "bench"):
        sys.modules.pop(name, None)


def rows(methods, **values: tuple[float, ...]) -> dict[str, list[dict[str, float]]]:
    """Every figure of a variant is its values, one per seed."""
    return {name.replace("_", " "): [dict.fromkeys(methods.COLUMNS, v) for v in seen] for name, seen in values.items()}


def test_a_tie_is_no_finding(methods):
    assert methods.by_chance([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]) == 1.0
    assert methods.by_chance([0.1], [0.2, 0.3]) == 1.0
    assert methods.by_chance([0.50, 0.51, 0.52], [0.80, 0.81, 0.83]) < 1e-3


def test_directions_are_told_with_their_sign_and_corrected_for_their_number(methods):
    shown = rows(methods, dmd2=(0.50, 0.51, 0.52), phased=(0.80, 0.81, 0.83))
    lines = [line for line in methods.directions(shown) if "Phased DMD" in line]
    assert len(lines) == 2  # diversity and motion
    assert all("| yes (p = " in line for line in lines)
    lines = methods.directions(rows(methods, dmd2=(0.80, 0.81, 0.83), phased=(0.50, 0.51, 0.52)))
    assert sum("the contrary" in line for line in lines) == 2
    lines = methods.directions(rows(methods, dmd2=(0.5, 0.6, 0.7), phased=(0.55, 0.65, 0.75)))
    assert sum("not told apart, leans so" in line for line in lines) == 2


def test_every_direction_names_variants_that_train(methods):
    known = {*methods.VARIANTS, "reference"}
    assert {name for _, one, _, _, other in methods.DIRECTIONS for name in (one, other)} <= known
    assert {key for _, _, key, _, _ in methods.DIRECTIONS} <= set(methods.COLUMNS)


def test_phases_have_two_steps_each(methods):
    from raydmd.methods.phases import split_grid
    from raydmd.process import step_grid

    for model, settings in methods.MODELS.items():
        parts = split_grid(step_grid(4, settings["shift"]), methods.BOUNDARIES[model])
        assert [len(part) for part in parts] == [2, 2], model
