"""Rows, gaps and the report, with a judge whose answers are known."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from raydmd.errors import InputError
from raydmd.evaluation.evaluate import COLUMNS, Evaluation, evaluate, format_value, gap_closed
from raydmd.evaluation.pictures import contact_sheet, curve, strip
from raydmd.evaluation.report import write_report
from raydmd.evaluation.samples import Samples
from raydmd.zoo.judge import Judge
from raydmd.zoo.world import ATTRIBUTES

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

PROMPTS = ["a red bag"] * 4 + ["a blue bag"] * 4


class MeanJudge(Judge):
    """Features are mean colours; every clip is a red bag that moves left slowly."""

    def features(self, clips: Tensor) -> Tensor:
        return clips.mean((1, 3, 4))

    def predict(self, clips: Tensor) -> dict[str, Tensor]:
        seen = {"item": 6, "colour": 0, "direction": 0, "speed": 0}
        return {name: torch.full((len(clips),), seen[name]) for name in ATTRIBUTES}


def samples(name: str, level: float, *, evaluations: int = 4, prompts: list[str] = PROMPTS, frames: int = 3) -> Samples:
    generator = torch.Generator().manual_seed(0)
    clips = level + 0.2 * torch.rand(len(prompts), frames, 3, 16, 16, generator=generator)
    return Samples(
        name=name,
        title=f"the {name}",
        clips=clips,
        prompts=prompts,
        evaluations=evaluations,
        seconds=evaluations / 100,
    )


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    return evaluate(
        samples("teacher", 0.2, evaluations=80),
        samples("teacher_again", 0.21, evaluations=80),
        [
            samples("undistilled", 0.6),
            samples("undistilled_guided", 0.5),
            samples("undistilled_more", 0.22, evaluations=8),
            samples("student", 0.3),
        ],
        MeanJudge(),
    )


def test_rows_hold_every_column_and_known_figures(evaluation: Evaluation) -> None:
    names = [row["name"] for row in evaluation.rows]
    assert names[:2] == ["teacher", "teacher_again"]
    for row in evaluation.rows:
        assert {column.key for column in COLUMNS} <= set(row)
    student = evaluation.row("student")
    # The same noise on another level: the distance is the square of the shift in three channels.
    assert student["frechet"] == pytest.approx(3 * 0.1**2, rel=1e-3)
    assert student["joint"] == 0.5
    assert student["accuracy_item"] == 1.0
    assert student["accuracy_speed"] is None
    assert student["missing_modes"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert student["flow_ratio"] == pytest.approx(1.0, abs=0.05)


def test_gap_is_to_the_better_baseline_at_the_students_cost(evaluation: Evaluation) -> None:
    assert evaluation.best_undistilled() == "undistilled_guided"
    gaps = evaluation.gaps("student")
    assert gaps["against"] == "undistilled_guided"
    start, end, floor = (3 * shift**2 for shift in (0.3, 0.1, 0.01))
    assert gaps["frechet"] == pytest.approx((start - end) / (start - floor), rel=1e-3)
    assert gaps["joint"] is None


def test_gap_closed_is_a_fraction_or_nothing() -> None:
    u, s, t = {"x": 10.0, "y": None}, {"x": 4.0, "y": 1.0}, {"x": 2.0, "y": 1.0}
    assert gap_closed(u, s, t, "x") == 0.75
    assert gap_closed(u, s, u, "x") is None
    assert gap_closed(u, s, t, "y") is None


def test_a_baseline_ahead_of_the_teacher_leaves_no_gap() -> None:
    found = evaluate(
        samples("teacher", 0.2),
        samples("again", 0.5),
        [samples("undistilled", 0.3), samples("student", 0.4)],
        MeanJudge(),
    )
    assert found.gaps("student")["frechet"] is None


def test_without_a_judge_there_are_motion_colour_and_time() -> None:
    found = evaluate(samples("teacher", 0.2), None, [samples("undistilled", 0.3), samples("student", 0.4)], None)
    row = found.row("student")
    assert row["frechet"] is row["joint"] is row["diversity"] is None
    for key in ("flow", "brightness", "saturation", "seconds"):
        assert isinstance(row[key], float)
    assert found.best_undistilled() == "undistilled"


def test_images_have_no_motion() -> None:
    found = evaluate(samples("teacher", 0.2, frames=1), None, [], None)
    assert found.rows[0]["flow"] is None
    assert found.rows[0]["flow_ratio"] is None


def test_names_must_differ_and_exist(evaluation: Evaluation) -> None:
    with pytest.raises(InputError, match="differ"):
        evaluate(samples("a", 0.2), None, [samples("a", 0.3)], None)
    with pytest.raises(InputError, match="no row 'nobody'"):
        evaluation.row("nobody")
    lonely = evaluate(samples("teacher", 0.2), None, [samples("student", 0.3)], None)
    assert lonely.gaps("student") == {}
    with pytest.raises(InputError, match="undistilled"):
        lonely.best_undistilled()


def test_text_is_plain_and_holds_the_figures(evaluation: Evaluation) -> None:
    text = evaluation.text()
    assert "\x1b" not in text
    line = next(line for line in text.splitlines() if "the student" in line)
    frechet = next(column for column in COLUMNS if column.key == "frechet")
    assert format_value(evaluation.row("student")["frechet"], frechet) in line
    assert len(evaluation.text(full=True).splitlines()[0]) > len(text.splitlines()[0])


def test_result_json_is_the_table(evaluation: Evaluation, tmp_path: Path) -> None:
    contact = [samples("teacher", 0.2), samples("student", 0.3)]
    path = write_report(
        tmp_path / "new",
        title="a run",
        evaluation=evaluation,
        contact=contact,
        recipe_yaml="name: run\n",
        curves={"loss": [(0, 1.0), (10, 0.5)], "empty": []},
        facts={"torch": "2"},
    )
    result = json.loads((path.parent / "result.json").read_text(encoding="utf-8"))
    assert result["rows"] == evaluation.rows
    assert result["gap_closed"] == {"student": evaluation.gaps("student")}
    page = path.read_text(encoding="utf-8")
    body = re.findall(r'<tr class="student">(.*?)</tr>', page, flags=re.DOTALL)
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row)[1:] for row in body]
    shown = evaluation.shown()
    ordered = [c for c in shown if c.brief] + [c for c in shown if not c.brief]
    expected = [format_value(result["rows"][-1][c.key], c) for c in ordered]
    assert [cell for row in cells for cell in row] == expected
    assert page.count("<svg") == 1
    assert (path.parent / "contact.png").is_file()


def test_the_page_escapes_and_needs_nothing_else(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & [bold]"
    prompts = [evil, "b"]
    contact = [samples("teacher", 0.2, prompts=prompts), samples("student", 0.3, prompts=prompts)]
    found = evaluate(contact[0], None, contact[1:], None)
    path = write_report(tmp_path, evil, found, contact, f"name: {evil}", {evil: [(0, 1.0), (1, 2.0)]}, {evil: evil})
    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://", page)


def test_a_report_without_pictures_curves_or_students(tmp_path: Path) -> None:
    found = evaluate(samples("teacher", 0.2), None, [], None)
    path = write_report(tmp_path, "bare", found, [], "", {}, {})
    assert "the teacher" in path.read_text(encoding="utf-8")
    assert not (tmp_path / "contact.png").exists()


def test_contact_sheets_share_prompts_and_keep_pixels() -> None:
    one = samples("teacher", 0.2)
    with pytest.raises(InputError, match="share their prompts"):
        contact_sheet([one, samples("student", 0.3, prompts=["other"] * 8)])
    frames = strip(one.clips[0])
    assert frames.size == (3 * 32 + 2 * 2, 32)
    first = round(float(one.clips[0, 0, 0, 0, 0]) * 255)
    for place in ((0, 0), (1, 1)):
        pixel = frames.getpixel(place)
        assert isinstance(pixel, tuple)
        assert pixel[0] == first
    assert contact_sheet([one, one]).width > 2 * frames.width
    large = torch.zeros(9, 3, 480, 832)
    assert strip(large, frames=2).size == (2 * 166 + 2, 96)


def test_curves_leave_out_what_is_not_finite() -> None:
    assert curve([(0, float("nan")), (1, 1.0)]) is None
    drawn = curve([(0, 1.0), (1, float("inf")), (2, 1.0)])
    assert drawn is not None
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_curves_mark_where_phases_change() -> None:
    points = [(0, 1.0), (10, 3.0), (20, 2.0)]
    plain, marked = curve(points), curve(points, [5, 15, 20, 40])
    assert plain is not None
    assert marked is not None
    assert "dasharray" not in plain
    (path,) = [part for part in marked.split("<path") if "dasharray" in part]
    assert path.count("V128") == 2  # those inside; a mark at the end would be the frame's edge
    assert 'd="M131.5,10.0V128M270.5,10.0V128"' in path


def test_curves_over_decades_are_drawn_by_logarithms() -> None:
    def heights(values: list[float]) -> tuple[list[float], bool]:
        drawn = curve(list(enumerate(values)))
        assert drawn is not None
        line = drawn.split('polyline points="')[1].split('"')[0]
        return [float(place.split(",")[1]) for place in line.split()], ">log<" in drawn

    (low, middle, high), said = heights([0.01, 1.0, 100.0])
    assert said
    assert middle == pytest.approx((low + high) / 2)
    (low, middle, high), said = heights([0.0, 1.0, 100.0])  # zero has no logarithm
    assert not said
    assert middle == pytest.approx(low + 0.01 * (high - low), abs=0.1)


def test_taking_rows_keeps_prompts_with_clips() -> None:
    part = samples("teacher", 0.2).take([7, 0])
    assert part.prompts == ["a blue bag", "a red bag"]
    assert len(part) == 2
