"""What a comparison must not make of runs: repeats, teachers, figures measured otherwise, runs known twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raydmd.comparing.differ import differences
from raydmd.comparing.document import compared, document
from raydmd.comparing.importance import ENOUGH
from raydmd.comparing.runs import FINISHED, STOPPED, Run, once
from raydmd.comparing.terminal import text
from raydmd.errors import InputError

pytestmark = pytest.mark.unit

FACTS = {"raydmd": "0", "made": "now", "read": "1 runs in 0 s"}


def run(name: str, recipe: dict[str, Any] | None = None, state: str = FINISHED, **figures: float) -> Run:
    flat = {"name": name, "training.cycles": 10, "model.path": "m", **(recipe or {})}
    curves = {f"evaluation/{k}": [(10, v)] for k, v in figures.items()}
    return Run(
        name=name,
        place=f"/runs/{name}",
        state=state,
        recipe=flat,
        cycles=10,
        planned=10,
        measured=10,
        figures=figures,
        curves=curves,
    )


def test_a_setting_of_several_seeds_is_judged_by_their_mean() -> None:
    lucky = [run(f"a{s}", {"seed": s, "method.guidance": 2.0}, frechet=f) for s, f in enumerate((1.0, 9.0, 8.0))]
    steady = [run(f"b{s}", {"seed": s, "method.guidance": 3.0}, frechet=f) for s, f in enumerate((4.0, 4.5, 5.0))]
    found = compared([*lucky, *steady, run("c", {"seed": 0, "method.guidance": 4.0}, frechet=5.0)], title="t")
    assert [r.name for r in found.runs] == ["b0", "b1", "b2", "c", "a0", "a1", "a2"]
    again = found.runs[0].repeats
    assert again is not None
    assert (again.first, again.runs, again.means["frechet"], again.spread["frechet"]) == ("b0", 3, 4.5, 0.5)
    assert "4.5 ± 0.5 (3)" in text(found)
    assert "2 settings were run with several seeds" in text(found)
    [first, *_] = document(found, facts=FACTS)["runs"]
    assert (first["cost"], first["repeats"]["means"]["frechet"]) == (4.5, 4.5)


def test_repeats_are_one_run_to_what_mattered_and_unfinished_ones_are_none() -> None:
    runs = [
        run(f"{g}-{s}", {"seed": s, "method.guidance": float(g)}, frechet=g + s / 10) for g in range(6) for s in (0, 1)
    ]
    assert compared(runs, title="t").importance.finished == 6
    more = [
        run(f"{g}-{s}", {"seed": s, "method.guidance": float(g)}, frechet=g + s / 10)
        for g in range(ENOUGH)
        for s in (0, 1)
    ]
    assert list(compared(more, title="t").importance.shares) == ["method.guidance"]
    half = [run("a", {"seed": 0}, frechet=1.0), run("b", {"seed": 1}, STOPPED, frechet=2.0)]
    assert all(r.repeats is None for r in compared(half, title="t").runs)


def test_a_figure_may_be_best_nearest_to_the_teachers() -> None:
    runs = [replace(run(n, flow=f), teacher={"flow": 2.0}) for n, f in (("still", 0.0), ("wild", 5.0), ("near", 2.5))]
    found = compared(runs, title="t", by="flow")
    assert found.by is not None
    assert (found.by.goal, [r.name for r in found.runs]) == ("teacher", ["near", "still", "wild"])
    assert [r.name for r in compared(runs, title="t", by="flow", goal="max").runs] == ["wild", "near", "still"]
    with pytest.raises(InputError, match="no run here has its teacher's flow"):
        compared([run("a", flow=1.0)], title="t", by="flow")


def test_the_teacher_and_the_undistilled_model_stand_below_the_runs_once() -> None:
    teacher = {"teacher, 30 guided steps": {"frechet": 1.25, "seconds": 1.0}}
    runs = [replace(run(n, frechet=f), baselines=teacher) for n, f in (("a", 3.0), ("b", 2.0))]
    slower = replace(runs[1], baselines={"teacher, 30 guided steps": {"frechet": 1.25, "seconds": 2.0}})
    found = compared([runs[0], slower], title="t")
    [told] = document(found, facts=FACTS)["baselines"]
    assert (told["title"], told["figures"]["frechet"], told["runs"]) == ("teacher, 30 guided steps", 1.25, 2)
    lines = text(found).splitlines()
    assert [line for line in lines if "teacher, 30" in line and "1.25" in line]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"evaluation.samples": 64}, {"evaluation.samples": 128}, "evaluation.samples (128, 64)"),
        ({"model.path": "x"}, {"model.path": "y"}, "model.path (x, y)"),
        ({"method.guidance": 2.0}, {"method.guidance": 4.0}, "evaluation.guidance (2, 4)"),
        (
            {"method.guidance": 2.0, "evaluation.guidance": 3.0},
            {"method.guidance": 4.0, "evaluation.guidance": 3.0},
            "",
        ),
        ({"evaluation.every": 1}, {"evaluation.every": 2}, ""),
    ],
)
def test_figures_that_were_not_measured_alike_are_told(one: dict[str, Any], other: dict[str, Any], said: str) -> None:
    found = compared([run("a", one, frechet=1.0), run("b", other, frechet=2.0)], title="t")
    notes = " ".join(found.notes)
    assert (said in notes) if said else not notes


def test_a_number_that_is_off_in_some_runs_stays_a_number() -> None:
    runs = [
        run(str(i), {"method.weight": None if i % 4 == 0 else float(i)}, frechet=float(i if i % 4 else 30))
        for i in range(16)
    ]
    [weight] = differences(runs).parameters
    assert weight.numeric
    found = compared(runs, title="t")
    assert found.importance.shares["method.weight"] > 0
    assert "off" in text(found)


def test_a_goal_belongs_to_a_figure() -> None:
    with pytest.raises(InputError, match="which way --by is better"):
        compared([run("a", frechet=1.0)], title="t", goal="max")


def test_a_run_is_known_once_and_by_its_sweep() -> None:
    folder, trial = run("a"), replace(run("0000"), place="/runs/a", sweep="s")
    elsewhere = replace(run("far"), tracked="id", place="mlflow:id")
    here = replace(run("b"), tracked="id")
    assert [r.name for r in once([folder, trial, here, elsewhere])] == ["0000", "b"]


def test_a_narrow_terminal_gets_whole_names_and_figures() -> None:
    runs = [run(f"a-very-long-name-of-a-run-{i}", {"method.guidance": float(i)}, frechet=1 / 3 + i) for i in range(3)]
    said = text(compared(runs, title="t"), width=40)
    assert "a-very-long-name-of-a-run-2" in said
    assert "0.3333" in said
    assert "left out here: guidance" in said
