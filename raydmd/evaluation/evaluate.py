"""Puts samplers beside their teacher: a row of figures each, and how much of the gap is closed."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from raydmd.errors import InputError
from raydmd.evaluation.distances import frechet
from raydmd.evaluation.diversity import pairwise_diversity
from raydmd.evaluation.metrics import accuracy_by_stated, attribute_accuracy, brightness, coverage, saturation
from raydmd.evaluation.motion import dynamic_degree, optical_flow
from raydmd.evaluation.table import COLUMNS, Column

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from raydmd.evaluation.instruments import Instruments
    from raydmd.evaluation.samples import Samples
    from raydmd.zoo.judge import Judge

Value = str | int | float | None
Row = dict[str, Value]
"""Figures of one sampler by name, see ``COLUMNS``; ``None`` where they can't be had."""

UNDISTILLED = "undistilled"
"""How the names of the undistilled teacher's rows start."""

DYNAMIC_SHARE = 0.011
"""A clip is dynamic from this share of its shorter side per frame: 0.35 of 32 pixels, which is half
of what the zoo calls slow."""


GAPS = ("frechet", "joint", "flow", "coverage_entropy", "saturation")
"""Figures for which the closed share of the gap is reported."""
LEAST_GAP = 0.05
"""Smaller gaps, relative to the teacher's figure, are not divided by."""


@dataclass(frozen=True)
class Evaluation:
    """What came out, one row per sampler.

    Attributes:
        rows: the reference first, then its repeat with other seeds if any, then the others.
        floor: name of the repeat's row.
        columns: of the table, as far as any row has a figure.
    """

    rows: list[Row]
    floor: str | None = None
    columns: tuple[Column, ...] = COLUMNS

    def row(self, name: str) -> Row:
        """The row of one sampler.

        Raises:
            InputError: if there is none of that name.
        """
        for row in self.rows:
            if row["name"] == name:
                return row
        known = ", ".join(str(row["name"]) for row in self.rows)
        raise InputError(f"the evaluation has no row '{name}'; it has {known}")

    def students(self) -> list[str]:
        """Names of what was distilled, in the order given."""
        names = [str(row["name"]) for row in self.rows[self._teachers() :]]
        return [name for name in names if not name.startswith(UNDISTILLED)]

    def best_undistilled(self, student: str | None = None) -> str:
        """The fair baseline: the undistilled teacher at the student's number of evaluations.

        Of several the one with the lowest Frechet distance, without distances the first. If none
        has the student's number of evaluations, the choice is among all.

        Args:
            student: name of a row; default: the first student.

        Raises:
            InputError: if there is no such student or no undistilled row.
        """
        names = self.students()
        if student is None and not names:
            raise InputError("the evaluation has no student")
        of = self.row(student or names[0])
        rows = [row for row in self.rows if str(row["name"]).startswith(UNDISTILLED)]
        if not rows:
            raise InputError("the evaluation has no row whose name starts with 'undistilled'")
        fair = [row for row in rows if row["evaluations"] == of["evaluations"]] or rows
        return str(min(fair, key=lambda row: _number(row["frechet"], float("inf")))["name"])

    def gaps(self, student: str) -> dict[str, Value]:
        """Share of the gap from the undistilled baseline to the teacher that a student closes.

        The teacher's figures are those of its repeat with other seeds, where there is one, because
        its Frechet distance to itself is zero by construction.

        Returns:
            ``against``, the baseline's name, and the fractions of ``GAPS``, ``None`` where the
            baseline is ahead of the teacher or within 5% of it; empty without a baseline.
        """
        if not any(str(row["name"]).startswith(UNDISTILLED) for row in self.rows):
            return {}
        against = self.best_undistilled(student)
        goal = self.row(self.floor) if self.floor else self.rows[0]
        gaps: dict[str, Value] = {"against": against}
        for metric in GAPS:
            better = next(column.better for column in COLUMNS if column.key == metric)
            start, end = (_number(row[metric], 0.0) for row in (self.row(against), goal))
            # A baseline that beats the teacher or is as good leaves no gap, and a ratio of noise.
            ahead = (better == "low" and start < end) or (better == "high" and start > end)
            none = ahead or abs(start - end) < LEAST_GAP * abs(end)
            closed = gap_closed(self.row(against), self.row(student), goal, metric)
            gaps[metric] = None if none else closed
        return gaps

    def best(self) -> dict[str, set[str]]:
        """Per column the names of the rows that are best in it, teachers aside."""
        rows, found = self.rows[self._teachers() :], {}
        for column in self.columns:
            goal = _number(self.rows[0][column.key], 0.0)
            ranks = {
                str(row["name"]): _rank(column, value, goal)
                for row in rows
                if isinstance(value := row[column.key], int | float)
            }
            if column.better and len(ranks) > 1:
                least = min(ranks.values())
                found[column.key] = {name for name, rank in ranks.items() if rank == least}
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists: ``rows``, and ``gap_closed`` by student."""
        return {
            "rows": [dict(row) for row in self.rows],
            "gap_closed": {name: self.gaps(name) for name in self.students()},
        }

    def table(self, *, full: bool = False) -> Table:
        """The rows for a terminal; best values bold, teachers aside.

        Args:
            full: all columns instead of those that fit into about 110 characters.
        """
        columns = [c for c in self.shown() if full or c.brief]
        best, table = self.best(), Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("sampler")
        for column in columns:
            arrow = {"low": " ↓", "high": " ↑"}.get(column.better or "", "")
            table.add_column(column.label + arrow, justify="right", no_wrap=True)
        for row in self.rows:
            name = str(row["name"])
            cells = [
                f"[bold]{text}[/bold]" if name in best.get(column.key, ()) else text
                for column in columns
                for text in [format_value(row[column.key], column)]
            ]
            # Titles are the user's own words and may hold square brackets.
            table.add_row(str(row["title"]).replace("[", r"\["), *cells)
        return table

    def text(self, *, full: bool = False) -> str:
        """The table as plain text, for logs and whatever else is no terminal."""
        table, out = self.table(full=full), io.StringIO()
        table.box = ASCII2
        Console(file=out, width=260, no_color=True, force_terminal=False).print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def shown(self) -> list[Column]:
        """The columns in which any row has a figure."""
        return [c for c in self.columns if any(row[c.key] is not None for row in self.rows)]

    def _teachers(self) -> int:
        return 2 if self.floor else 1


def evaluate(
    reference: Samples,
    floor: Samples | None,
    others: Sequence[Samples],
    judge: Judge | None,
    instruments: Instruments | None = None,
) -> Evaluation:
    """Measure samplers against a teacher.

    Args:
        reference: the teacher at full steps.
        floor: the same with other seeds: the Frechet distance that no student can be blamed for.
        others: undistilled rows (names start with ``undistilled``) and students.
        judge: knows the zoo's world; without one there are motion, colour and timings only.
        instruments: what else measures.

    Returns:
        One row each, in the order given.

    Raises:
        InputError: if two samples have one name.
    """
    given = [reference, *([floor] if floor else []), *others]
    names = [samples.name for samples in given]
    if len(set(names)) < len(names):
        raise InputError(f"samples must differ in name, given {', '.join(names)}")
    features = judge.features(reference.clips) if judge else None
    rows = [_row(samples, judge, features) for samples in given]
    columns = COLUMNS
    if instruments is not None:
        columns = (*COLUMNS, *instruments.columns())
        for row, samples in zip(rows, given, strict=True):
            row |= instruments.measure(samples)
    for row in rows:
        flow, goal = _number(row["flow"], 0.0), _number(rows[0]["flow"], 0.0)
        row["flow_ratio"] = flow / goal if row["flow"] is not None and goal else None
    return Evaluation(rows=rows, floor=floor.name if floor else None, columns=columns)


def gap_closed(
    undistilled: Mapping[str, Value],
    student: Mapping[str, Value],
    teacher: Mapping[str, Value],
    metric: str,
) -> float | None:
    """How much of the way from the undistilled sampler to the teacher a student has gone.

    Args:
        undistilled: row of the baseline.
        student: row of the student.
        teacher: row of the teacher.
        metric: a key of the rows.

    Returns:
        ``(u - s) / (u - t)``: 0 at the baseline, 1 at the teacher, above 1 beyond it; ``None`` if
        there is no gap or a figure is missing.
    """
    u, s, t = undistilled[metric], student[metric], teacher[metric]
    if not all(isinstance(value, int | float) for value in (u, s, t)):
        return None
    start, reached, goal = (_number(value, 0.0) for value in (u, s, t))
    return None if start == goal else (start - reached) / (start - goal)


def format_value(value: Value, column: Column) -> str:
    """A figure as the tables show it; a hyphen where there is none."""
    return f"{value:.{column.digits}f}" if isinstance(value, int | float) else "-"


def _row(samples: Samples, judge: Judge | None, reference: Tensor | None) -> Row:
    row: Row = {"name": samples.name, "title": samples.title, "clips": len(samples)}
    row |= dict.fromkeys(column.key for column in COLUMNS)
    row |= {
        "evaluations": samples.evaluations,
        "seconds": samples.seconds,
        "brightness": brightness(samples.clips),
        "saturation": saturation(samples.clips),
    }
    if samples.clips.shape[1] > 1:
        flow = optical_flow(samples.clips)
        row["flow"] = float(flow.double().mean())
        row["dynamic_degree"] = dynamic_degree(flow, DYNAMIC_SHARE * min(samples.clips.shape[-2:]))
    if judge is None or reference is None:
        return row
    features, predictions = judge.features(samples.clips), judge.predict(samples.clips)
    if min(len(features), len(reference)) > 1:
        row["frechet"] = frechet(reference, features)
    accuracy = attribute_accuracy(samples.prompts, predictions, judge.language)
    row["joint"] = accuracy["joint"]
    row |= {f"accuracy_{name}": accuracy[name] for name in judge.language.attributes}
    by_stated = accuracy_by_stated(samples.prompts, predictions, judge.language)
    row |= {f"joint_{count}": figures["joint"] for count, figures in by_stated.items()}
    row["diversity"] = pairwise_diversity(features, samples.prompts)
    spread = coverage(samples.prompts, predictions, judge.language)
    if grouped := spread["grouped"].get("mean"):
        row["coverage_entropy"] = grouped["entropy"]
        row["coverage_distance"] = grouped["distance"]
        row["missing_modes"] = grouped["missing"]
    if pooled := spread["pooled"].get("mean"):
        row |= {f"pooled_{name}": pooled[name] for name in ("entropy", "distance", "missing")}
    return row


def _number(value: Value, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def _rank(column: Column, value: float, goal: float) -> float:
    """Smaller is better, equal where the table shows the same."""
    shown = round(value, column.digits)
    if column.better == "teacher":
        return abs(shown - round(goal, column.digits))
    return -shown if column.better == "high" else shown
