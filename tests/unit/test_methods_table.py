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
    names = {"dmd2": methods.DMD2, "phased": "phased", "dp_dmd": "dp_dmd"}
    return {names[name]: [dict.fromkeys(methods.COLUMNS, v) for v in seen] for name, seen in values.items()}


def test_a_tie_is_no_finding(methods):
    assert methods.by_chance([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]) == 1.0
    assert methods.by_chance([0.004, 0.004, 0.004], [0.0, 0.0, 0.0]) == 1.0
    assert methods.by_chance([0.5, 0.51, 0.52], [0.8, 0.81, 0.82]) == 1.0
    assert methods.by_chance([0.1], [0.2]) == 1.0


def test_seeds_are_compared_with_themselves(methods):
    """What seeds share, their prompts and their noise, is no chance."""
    a, b = [0.2, 0.5, 0.8], [0.25, 0.551, 0.849]
    assert methods.by_chance(a, b) < 1e-3
    assert methods.by_chance(a, [b[2], b[0], b[1]]) > 0.5


def test_directions_are_told_with_their_sign(methods):
    shown = rows(methods, dmd2=(0.50, 0.51, 0.52), phased=(0.80, 0.811, 0.819))
    lines = [line for line in methods.directions(shown) if "Phased DMD" in line]
    assert len(lines) == 2  # diversity and motion
    assert all("| 3 of 3 seeds | yes (p = " in line for line in lines)
    lines = methods.directions(rows(methods, dmd2=(0.80, 0.811, 0.819), phased=(0.50, 0.51, 0.52)))
    assert sum("| 0 of 3 seeds | the contrary (p = " in line for line in lines) == 2
    lines = methods.directions(rows(methods, dmd2=(0.5, 0.6, 0.7), phased=(0.7, 0.65, 0.6)))
    assert sum("| 2 of 3 seeds | not told apart (p = " in line for line in lines) == 2


def test_directions_are_corrected_for_their_number(methods):
    """A p of 0.03 tells one direction, but not the two that Phased DMD has here."""
    two = {"dmd2": (0.50, 0.50, 0.50), "phased": (0.60, 0.55, 0.58)}
    assert 0.025 < methods.by_chance(two["phased"], two["dmd2"]) < 0.05
    lines = methods.directions(rows(methods, **two))
    assert [("not told apart" in line) for line in lines[2:]] == [True, True]
    lines = methods.directions(rows(methods, dmd2=two["dmd2"], dp_dmd=two["phased"]))
    assert ["| yes (p" in line for line in lines[2:]] == [True]


def test_evaluations_are_counted_by_sample_and_gradient(methods):
    import torch

    class Network(torch.nn.Linear):
        def forward(self, x):
            return (super().forward(x),)

    network, other = Network(2, 2), torch.nn.Linear(2, 2)
    with methods.Counter(Network, batch=4) as count:
        network(torch.zeros(4, 2))  # 1, and 3 since its parameters ask for a gradient
        with torch.no_grad():
            network(torch.zeros(8, 2))  # two batches without one
        other(torch.zeros(4, 2))
    network(torch.zeros(4, 2))
    assert count.total == 3.0 + 2.0


def test_controls_name_variants_and_models(methods):
    assert set(methods.CONTROLS) | set(methods.SHARES) <= set(methods.VARIANTS)
    assert {m for models in methods.CONTROLS.values() for m in models} <= set(methods.MODELS)


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
