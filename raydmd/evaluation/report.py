"""A run's report: one page that needs nothing else, and the same figures as JSON."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from raydmd.evaluation.evaluate import UNDISTILLED, Evaluation, format_value
from raydmd.evaluation.page import PAGE
from raydmd.evaluation.pictures import (
    animation,
    contact_sheet,
    curve,
    display_size,
    png,
    same_rows,
    strip,
)
from raydmd.evaluation.table import ARROWS
from raydmd.files import replace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from raydmd.evaluation.evaluate import Row, Value
    from raydmd.evaluation.samples import Samples
    from raydmd.evaluation.table import Column

_STRIP_FRAMES = 4
"""Three samplers' strips, each beside its animation, fit onto a laptop."""
_WIDE = 8
"""Columns that fit beside the samplers' names."""


def write_report(
    folder: Path,
    title: str,
    evaluation: Evaluation,
    contact: Sequence[Samples],
    recipe_yaml: str,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    facts: Mapping[str, str],
    phases: Sequence[int] = (),
) -> Path:
    """Write ``report.html``, ``result.json`` and ``contact.png``.

    Args:
        folder: where to; made if missing.
        title: the page's heading.
        evaluation: the figures.
        contact: samplers with the same prompts and seeds for the contact sheet; may be empty.
        recipe_yaml: the resolved recipe.
        curves: values by cycle of figures of the training.
        facts: versions, machine, times.
        phases: cycles at which one phase ended and another began, marked in the curves.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: if the contact sheet's samples were made from different prompts.
    """
    sheet = _sheet(contact) if contact else None
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    drawn = {name: curve(points, phases) for name, points in curves.items()}
    html = page.render(
        title=title,
        lede=_lede(evaluation),
        tiles=_tiles(evaluation),
        tables=_tables(evaluation),
        legend=evaluation.shown(),
        clips=evaluation.rows[0]["clips"],
        sheet=sheet,
        # The SVG is this project's own and holds numbers only; a curve's name is escaped.
        curves=[(name, Markup(svg)) for name, svg in drawn.items() if svg],
        facts=dict(facts),
        recipe=recipe_yaml,
    )
    folder.mkdir(parents=True, exist_ok=True)
    result = {"title": title, **evaluation.to_json(), "facts": dict(facts)}
    # JSON knows no NaN; a figure that is none must stop here and not in a reader's parser.
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    if contact:
        contact_sheet(contact).save(folder / "contact.png")
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    replace(folder / "result.json", text + "\n")  # the last of all: with it a run is finished
    return path


def _lede(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One sentence on the first student, in parts that are strong or not."""
    students = evaluation.students()
    if not students:
        return []
    student, teacher = evaluation.row(students[0]), _teacher(evaluation)
    parts: list[dict[str, Any]] = [
        {"text": str(student["title"]), "strong": True},
        {"text": f": {student['evaluations']} network evaluations per clip instead of "},
        {"text": f"the teacher's {teacher['evaluations']}"},
    ]
    gaps = evaluation.gaps(students[0])
    closed = gaps.get("frechet")
    if isinstance(closed, float):
        baseline = evaluation.row(str(gaps["against"]))["title"]
        if closed >= 0:
            parts += [{"text": ". It closes "}, {"text": f"{closed:.0%}", "strong": True}]
            parts += [{"text": " of the Fréchet gap between "}]
        else:
            parts += [{"text": ". It is "}, {"text": "farther from the teacher", "strong": True}]
            parts += [{"text": " than "}]
        parts += [{"text": str(baseline), "strong": True}]
        parts += [{"text": " and the teacher"}] if closed >= 0 else []
    parts.append({"text": "."})
    return parts


def _tiles(evaluation: Evaluation) -> list[dict[str, str]]:
    """The first student's headline figures, each beside the baseline's and the teacher's."""
    students = evaluation.students()
    if not students:
        return []
    student, teacher = evaluation.row(students[0]), _teacher(evaluation)
    against = evaluation.gaps(students[0]).get("against")
    baseline = evaluation.row(str(against)) if against else None
    columns = {column.key: column for column in evaluation.shown()}
    tiles = []
    # Not seconds: samplers are measured side by side, and on a laptop they share its cores.
    note = f"teacher {teacher['evaluations']}"
    tiles.append({"label": "Network evaluations", "value": str(student["evaluations"]), "note": note})
    for key, more in (
        ("frechet", " distance"),
        ("joint", ": all stated attributes right"),
        ("flow", ", pixels per frame"),
        ("coverage_entropy", ", 1 is the truth"),
    ):
        if key not in columns:
            continue
        label = columns[key].label
        label = label[0].upper() + label[1:] + more
        note = f"teacher {_show(key, teacher[key], columns)}"
        if baseline:
            note = f"undistilled {_show(key, baseline[key], columns)}, {note}"
        tiles.append({"label": label, "value": _show(key, student[key], columns), "note": note})
    return tiles


def _teacher(evaluation: Evaluation) -> Row:
    """The teacher on the student's seeds where there is one: the reference is the same teacher on others."""
    return evaluation.row(evaluation.floor) if evaluation.floor else evaluation.rows[0]


def _show(key: str, value: Value, columns: Mapping[str, Column]) -> str:
    if key == "joint" and isinstance(value, float):
        return f"{value:.1%}"
    return format_value(value, columns[key])


def _tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The terminal's columns and then the rest, in tables that each fit onto a laptop."""
    shown, best = evaluation.shown(), evaluation.best()
    brief, rest = [c for c in shown if c.brief], [c for c in shown if not c.brief]
    parts = [brief, *(rest[i : i + _WIDE] for i in range(0, len(rest), _WIDE))]
    return [
        {
            "columns": [{"label": c.label, "help": c.help, "arrow": ARROWS.get(c.better or "", "")} for c in columns],
            "rows": [
                {
                    "title": row["title"],
                    "kind": _kind(evaluation, row),
                    "cells": [
                        {
                            "text": format_value(row[c.key], c),
                            "best": str(row["name"]) in best.get(c.key, ()),
                        }
                        for c in columns
                    ],
                }
                for row in evaluation.rows
            ],
        }
        for columns in parts
        if columns
    ]


def _kind(evaluation: Evaluation, row: Row) -> str:
    if row["name"] in evaluation.students():
        return "student"
    return UNDISTILLED if str(row["name"]).startswith(UNDISTILLED) else "teacher"


def _sheet(contact: Sequence[Samples]) -> dict[str, Any]:
    return {
        "heads": [samples.title for samples in contact],
        "rows": [
            {
                "prompt": contact[0].prompts[row],
                "clips": [_clip(samples, row) for samples in contact],
            }
            for row in range(same_rows(contact))
        ],
    }


def _clip(samples: Samples, row: int) -> dict[str, Any]:
    clip = samples.clips[row]
    frames, (width, height) = strip(clip, frames=_STRIP_FRAMES), display_size(clip)
    moving = _uri("webp", animation(clip)) if clip.shape[0] > 1 else None
    return {
        "moving": moving,
        "strip": _uri("png", png(frames)),
        "width": width,
        "height": height,
        "strip_width": frames.width,
    }


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
