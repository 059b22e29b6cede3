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


def rows(methods, better: bool = True, **values: tuple[float, ...]) -> dict[str, list[dict[str, float]]]:
    """Every figure of a variant is its values, one per seed; its distance falls or rises with them."""
    names = {"dmd2": methods.DMD2, "phased": "phased", "dp_dmd": "dp_dmd"}
    return {
        names[name]: [dict.fromkeys(methods.COLUMNS, v) | {"frechet": -v if better else v} for v in seen]
        for name, seen in values.items()
    }


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
    up, down = (0.80, 0.811, 0.819), (0.50, 0.51, 0.52)
    lines = [x for x in methods.directions(rows(methods, dmd2=down, phased=up)) if "Phased DMD" in x]
    assert len(lines) == 2  # diversity and motion
    assert all("0.3" in line and line.endswith("| yes * |") for line in lines)
    lines = methods.directions(rows(methods, dmd2=up, phased=down))
    assert sum(line.endswith("| the contrary * |") for line in lines) == 2
    lines = methods.directions(rows(methods, dmd2=(0.5, 0.6, 0.7), phased=(0.7, 0.65, 0.6)))
    assert sum(line.endswith("| not told apart |") for line in lines) == 2


def test_diversity_at_a_worse_distance_is_said_to_be(methods):
    """What has learnt no guidance yet is the most diverse."""
    up, down = (0.80, 0.811, 0.819), (0.50, 0.51, 0.52)
    diverse, moving = methods.directions(rows(methods, better=False, dmd2=down, phased=up))[2:]
    assert diverse.endswith("| yes, at a worse Fréchet * |")
    assert moving.endswith("| yes * |")


def test_a_star_is_for_what_holds_when_corrected(methods):
    """A p of 0.03 tells one direction, but not the two that Phased DMD has here."""
    two = {"dmd2": (0.50, 0.50, 0.50), "phased": (0.60, 0.55, 0.58)}
    assert 0.025 < methods.by_chance(two["phased"], two["dmd2"]) < 0.05
    lines = methods.directions(rows(methods, **two))
    assert [line.endswith("| yes |") for line in lines[2:]] == [True, True]
    lines = methods.directions(rows(methods, dmd2=two["dmd2"], dp_dmd=two["phased"]))
    assert [line.endswith("| yes * |") for line in lines[2:]] == [True]
    assert methods.holm([0.001, 0.04, 0.02]) == [True, True, True]
    assert methods.holm([0.001, 0.04, 0.03]) == [True, False, False]


def test_the_interval_is_the_tests(methods):
    """Of differences 0.1, 0.05, 0.08: mean 0.0767, standard error 0.01453, t of two degrees 4.3027."""
    low, high = methods.interval((0.60, 0.55, 0.58), (0.50, 0.50, 0.50))
    assert (low, high) == pytest.approx((0.0142, 0.1392), abs=2e-4)


def test_a_seed_without_a_figure_drops_out_of_both(methods):
    shown = rows(methods, dmd2=(0.5, 0.1, 0.5), phased=(0.9, 0.6, 0.7))
    shown["phased"][1] = {k: None for k in shown["phased"][1]}
    line = next(x for x in methods.directions(shown) if "Phased DMD is" in x)
    assert "0.800 against 0.500" in line


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
    known = {*methods.VARIANTS, methods.TEACHER}
    assert {name for _, one, _, _, other in methods.DIRECTIONS for name in (one, other)} <= known
    assert {key for _, _, key, _, _ in methods.DIRECTIONS} <= set(methods.COLUMNS)


def test_phases_have_two_steps_each(methods):
    from raydmd.methods.phases import split_grid
    from raydmd.process import step_grid

    for model, settings in methods.MODELS.items():
        parts = split_grid(step_grid(4, settings["shift"]), methods.BOUNDARIES[model])
        assert [len(part) for part in parts] == [2, 2], model
