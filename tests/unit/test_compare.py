"""What a comparison finds: differences, order, front, importance, thinner curves, samples, and JSON that is safe."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest

from raydmd.comparing.curves import drawn, thin
from raydmd.comparing.differ import differences, short
from raydmd.comparing.document import as_text, compared, document, for_page
from raydmd.comparing.importance import ENOUGH, importance
from raydmd.comparing.page import page
from raydmd.comparing.ranking import figure, read_objectives
from raydmd.comparing.runs import FAILED, FINISHED, STOPPED, Run, curves_of, leaves, named_apart
from raydmd.comparing.samples import Sheet, Shot, groups, sheet_of
from raydmd.comparing.terminal import text
from raydmd.errors import InputError

pytestmark = pytest.mark.unit

FACTS = {"raydmd": "0", "made": "now", "read": "1 runs in 0 s"}


def run(name: str, recipe: dict[str, Any] | None = None, state: str = FINISHED, **figures: float) -> Run:
    flat = {"name": name, "training.cycles": 10, "method.steps": 4, **(recipe or {})}
    curves = {f"evaluation/{k}": [(10, v)] for k, v in figures.items()}
    return Run(name=name, place=f"/runs/{name}", state=state, recipe=flat, cycles=10, planned=10, measured=10,
               figures=figures, curves=curves)  # fmt: skip


def test_only_what_differs_is_told_and_the_rest_is_counted() -> None:
    a = run("a", {"method.guidance": 2.0, "output": "x", "tracking.uri": "y"})
    b = run("b", {"method.guidance": 3.5, "output": "z"})
    found = differences([a, b])
    assert [p.key for p in found.parameters] == ["method.guidance"]
    assert found.same == {"training.cycles": 10, "method.steps": 4}
    [guidance] = found.parameters
    assert (guidance.label, guidance.numeric, guidance.log) == ("guidance", True, False)


def test_labels_are_as_short_as_tells_them_apart_and_never_a_heads() -> None:
    a = run("a", {"training.student.rate": 1e-6, "training.fake.rate": 1.0, "training.cycles": 1})
    b = run("b", {"training.student.rate": 1e-3, "training.fake.rate": 2.0, "training.cycles": 2})
    found = {p.key: p for p in differences([a, b]).parameters}
    assert {p.label for p in found.values()} == {"student.rate", "fake.rate", "training.cycles"}
    assert found["training.student.rate"].log
    assert not found["training.fake.rate"].log


def test_a_section_that_is_off_is_one_column_unless_the_others_differ_in_it() -> None:
    off, on = run("a", {"method.gan": None}), {"method.gan.weight": 0.1, "method.gan.lr": 1.0}
    one = differences([off, run("b", on)])
    assert [(p.key, [short(v) for v in p.values]) for p in one.parameters] == [("method.gan", ["off", "on"])]
    both = differences([off, run("b", on), run("c", {**on, "method.gan.weight": 0.2})])
    assert [(p.key, [short(v) for v in p.values]) for p in both.parameters] == [
        ("method.gan.weight", ["-", "0.1", "0.2"])
    ]


def test_lists_of_drawn_numbers_are_shown_number_by_number_and_a_few_choices_are_not() -> None:
    drawn_times = [run(str(i), {"method.times": [i / 100, 0.9 + i / 1000]}) for i in range(9)]
    assert [p.key for p in differences(drawn_times).parameters] == ["method.times[0]", "method.times[1]"]
    few = [run(str(i), {"method.times": [0.02, [0.5, 0.98][i % 2]]}) for i in range(9)]
    [times] = differences(few).parameters
    assert (times.key, times.numeric) == ("method.times", False)


def test_the_best_come_first_and_those_that_have_not_finished_come_after() -> None:
    runs = [
        run("slow", frechet=3.0),
        run("broken", state=FAILED),
        run("nan", frechet=math.nan),
        run("best", frechet=1.0),
        run("early", state=STOPPED, frechet=0.5),
    ]
    found = compared(runs, title="t")
    assert [r.name for r in found.runs] == ["best", "slow", "nan", "early", "broken"]
    assert found.by is not None
    assert (found.by.key, found.by.goal) == ("frechet", "min")
    backwards = compared(runs, title="t", by="frechet", goal="max")
    assert backwards.runs[0].name == "slow"


def test_the_front_is_of_finished_runs_with_both_figures() -> None:
    runs = [
        run("a", frechet=1.0, joint=0.1),
        run("b", frechet=2.0, joint=0.5),
        run("c", frechet=2.0, joint=0.4),
        run("d", frechet=3.0),
        run("e", state=STOPPED, frechet=0.1, joint=0.9),
    ]
    found = compared(runs, title="t", objectives={"frechet": "", "joint": "max"})
    assert {found.runs[i].name for i in found.front} == {"a", "b"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"by": "frechte"}, "did you mean 'frechet'"),
        ({"by": "brightness"}, "--goal min or --goal max"),
        ({"by": "fake/loss"}, "--goal min or --goal max"),
        ({"objectives": {"frechet": "", "brightness": ""}}, "brightness:min"),
        ({"objectives": {"nothing": "min"}}, "their evaluations have: brightness, frechet"),
    ],
)
def test_figures_that_cannot_sort_are_refused(given: dict[str, Any], said: str) -> None:
    one = run("a", frechet=1.0, brightness=0.5)
    one = replace(one, curves={**one.curves, "fake/loss": [(1, 2.0)]})
    with pytest.raises(InputError, match=re.escape(said)):
        compared([one, run("b", frechet=2.0)], title="t", **given)


def test_a_goal_is_known_where_the_evaluation_knows_it() -> None:
    goals = {k: figure(k).goal for k in ("frechet_dino", "recall_dino", "reward_clip_2", "vendi_dino", "diversity")}
    goals |= {k: figure(k).goal for k in ("missing_modes", "fake/loss")}
    assert goals == {
        "frechet_dino": "min", "recall_dino": "max", "reward_clip_2": "max", "vendi_dino": "teacher",
        "diversity": "teacher",        "missing_modes": "min", "fake/loss": "",
    }  # fmt: skip


def test_objectives_are_read_strictly() -> None:
    assert read_objectives("a:min, evaluation/b:max,c") == {"a": "min", "b": "max", "c": ""}
    for wrong in ("a:low", ":min", "a:min,"):
        with pytest.raises(InputError, match="frechet:min"):
            read_objectives(wrong)


def test_thinning_keeps_ends_and_spikes() -> None:
    curve = [(i, math.sin(i / 50)) for i in range(5000)]
    curve[1234] = (1234, 99.0)
    curve[4321] = (4321, -99.0)
    less = thin(curve, 500)
    assert len(less) <= 500
    assert less[0] == curve[0]
    assert less[-1] == curve[-1]
    assert {(1234, 99.0), (4321, -99.0)} <= set(less)
    assert [x for x, _ in less] == sorted({x for x, _ in less})
    assert thin(curve[:500], 500) == curve[:500]


def test_curves_leave_out_what_is_no_number_and_say_so() -> None:
    one = replace(run("a"), curves={"fake/loss": [(1, 1.0), (2, math.nan), (3, math.inf), (4, 4.0)]})
    long = replace(run("b"), curves={"fake/loss": [(i, float(i)) for i in range(2000)]})
    found = drawn([one, long], most=100)
    assert found.metrics["fake/loss"][0] == ([1, 4], [1.0, 4.0])
    assert found.not_finite == 2
    assert found.thinned == ["fake/loss"]


def test_cycles_that_came_again_after_a_rollback_count_as_they_were_last() -> None:
    rows = [{"cycle": c, "loss": float(c), "note": "x", "ok": True} for c in (1, 2, 3, 4)]
    again = [{"cycle": c, "loss": 10.0 * c} for c in (3, 4, 5)]
    assert curves_of([*rows, *again]) == {"loss": [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]}


def searched(count: int, *, state: str = FINISHED) -> list[Run]:
    """Runs whose figure hangs on the rate, hardly on the guidance."""
    draw, found = random.Random(0), []
    for i in range(count):
        rate, guidance = 10 ** draw.uniform(-6, -3), draw.uniform(1, 7)
        recipe = {"training.student.rate": rate, "method.guidance": guidance, "data.prompts": f"file {i}"}
        value = 10 * abs(math.log10(rate) + 4.5) + 0.1 * guidance
        found.append(run(str(i), recipe, state=state, frechet=value))
    return found


def test_what_mattered_is_found_and_what_is_of_each_run_alone_is_not_asked() -> None:
    found = compared(searched(40), title="t").importance
    assert next(iter(found.shares)) == "training.student.rate"
    assert found.shares["training.student.rate"] > 0.7
    assert set(found.shares) == {"training.student.rate", "method.guidance"}
    assert (found.runs, found.finished, found.cycle) == (40, 40, 0)


def test_too_few_runs_say_nothing_about_importance() -> None:
    found = compared(searched(ENOUGH - 1), title="t").importance
    assert not found.shares
    assert f"{ENOUGH - 1} finished runs with frechet, of {ENOUGH} needed" in found.why
    only = importance([run("a")], [], None)
    assert only.why == "no run has been evaluated"


def test_where_few_have_finished_all_are_compared_at_the_last_cycle_they_share() -> None:
    runs = searched(30, state=STOPPED)
    runs[0] = replace(runs[0], state=FINISHED)
    found = compared(runs, title="t").importance
    assert (found.cycle, found.runs, found.finished) == (10, 30, 1)
    assert next(iter(found.shares)) == "training.student.rate"


def test_keys_that_only_some_runs_have_do_not_stop_it() -> None:
    runs = [
        replace(r, recipe={**r.recipe, **({"method.gan.weight": i / 40} if i % 2 else {"method.gan": None})})
        for i, r in enumerate(searched(40))
    ]
    assert "method.gan.weight" in compared(runs, title="t").importance.shares


def test_names_are_told_apart_by_sweep_and_then_by_number() -> None:
    runs = [replace(run("0000"), sweep=s) for s in ("x", "y", "y")]
    assert [r.name for r in named_apart(runs)] == ["x/0000", "y/0000", "y/0000 (2)"]


def test_a_table_fits_its_terminal_and_names_what_it_leaves_out() -> None:
    keys = {f"method.decouple.key_{k}": 0.0 for k in range(16)}
    runs = [run(f"r{i}", {k: i + 0.5 for k in keys}, frechet=float(i)) for i in range(3)]
    runs.append(replace(run("[bold]bad[/bold]", state=FAILED), error="it broke"))
    found = compared(runs, title="t")
    told = text(found, width=100)
    rows = told.splitlines()
    assert max(len(row) for row in rows if row.startswith(("|", "+"))) <= 100
    assert [row.split("|")[1].strip() for row in rows if row.startswith("|r")][:4] == ["run", "r0", "r1", "r2"]
    assert "[bold]bad[/bold]" in told
    assert "all the same: 2 keys" in told
    assert re.search(r"left out here: .*key_\d.* and \d more", told)
    assert "[bold]bad[/bold]: it broke" in told
    assert "key_11" in text(found, width=400)


def test_json_has_no_nan_and_a_scripts_end_in_a_name_does_not_end_the_script() -> None:
    evil = "</script><script>alert(1)</script><!--\u2028"
    bad = replace(run(evil, {"model.path": evil}, frechet=math.nan, joint=math.inf), link="javascript:alert(1)")
    whole = document(compared([bad, run("b", frechet=1.0, joint=0.1)], title=evil), facts=FACTS)
    told = json.loads(as_text(whole))
    row = next(r for r in told["runs"] if r["name"] == evil)
    assert row["figures"] == {}
    assert row["not_finite"] == ["frechet", "joint"]
    assert row["link"] == ""
    safe = for_page(whole)
    assert not set("<>&\u2028") & set(safe)
    assert json.loads(safe) == told
    html = page(whole)
    assert "<script>alert" not in html
    assert html.count("</script>") == 2
    assert "@@" not in html.replace(safe, "")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)


def test_a_page_is_of_itself_alone_whatever_fills_it() -> None:
    whole = document(compared([run("@@SCRIPT@@", frechet=1.0), run("b", frechet=2.0)], title="@@DATA@@"), facts=FACTS)
    html = page(whole)
    assert "<h1></h1>" in html
    assert html.count('id="data"') == 1
    assert "<title>@@DATA@@" in html


def test_samples_are_comparable_only_where_prompts_and_seeds_are_the_same() -> None:
    shot = Shot("data:image/png;base64,AA==", "", 8, 8)
    other = replace(shot, still="data:image/png;base64,BB==")
    sheet = Sheet(["teacher", "student"], ["a", "b"], [[shot, shot], [shot, shot]])
    teacher = Sheet(["teacher", "student"], ["a", "b"], [[other, shot], [shot, shot]])
    runs = [run(n, {"evaluation.seed": seed}) for n, seed in (("a", 1), ("b", 1), ("c", 2), ("d", 1), ("e", 1))]
    prompts = replace_prompts(sheet, ["a", "c"])
    found = groups(runs, {0: sheet, 1: teacher, 2: sheet, 3: sheet, 4: prompts})
    assert [[place for place, _ in g.students] for g in found] == [[0, 1, 3], [2], [4]]
    assert len(found[0].teachers) == 2


def replace_prompts(sheet: Sheet, prompts: list[str]) -> Sheet:
    return Sheet(sheet.heads, prompts, sheet.shots)


def test_pictures_that_are_none_are_not_taken_from_a_report() -> None:
    html = (
        '<table class="sheet"><thead><tr><th>prompt</th><th>student</th></tr></thead><tbody><tr><td>p</td>'
        '<td><img class="strip" src="{}" width="8" height="8"></td></tr></tbody></table>'
    )
    good = sheet_of(html.format("data:image/png;base64,AA=="))
    assert good is not None
    assert (good.heads, good.prompts, good.shots[0][0].width) == (["student"], ["p"], 8)
    assert sheet_of(html.format("http://elsewhere/x.png")) is None
    assert sheet_of(html.format("data:text/html;base64,AA==")) is None
    assert sheet_of("<p>nothing") is None


def test_leaves_are_values_by_dotted_key() -> None:
    assert leaves({"a": {"b": 1, "c": {}}, "d": (1, 2)}) == {"a.b": 1, "d": [1, 2]}
