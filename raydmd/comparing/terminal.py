"""A comparison in a terminal. Pure."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.box import ASCII2
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raydmd.comparing.differ import short
from raydmd.comparing.importance import EVALUATOR
from raydmd.comparing.measured import baselines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.comparing.differ import Parameter
    from raydmd.comparing.document import Comparison
    from raydmd.comparing.importance import Importance
    from raydmd.comparing.ranking import Figure
    from raydmd.comparing.runs import Run

ERRORS = 8
"""Failed runs whose errors are told."""
WIDEST = 30
"""Characters of a value."""
BASELINES = 6
"""Teachers and undistilled models that are shown."""
NAMED = 6
"""Keys left out that are named."""


def text(found: Comparison, *, width: int = 120) -> str:
    """The table and its notes.

    Args:
        found: the comparison.
        width: of the terminal, in characters.
    """
    figures = list(dict.fromkeys([*([found.by] if found.by else []), *found.objectives]))
    fixed = _fixed(found, figures)
    taken = sum(len(max(c, key=len)) + 3 for c in fixed)
    shown, left_out = _fitting(found, taken, width)
    made = Table(box=ASCII2, pad_edge=False)
    for name, justify in (("run", "left"), ("state", "left"), ("cycles", "right")):
        made.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for column in fixed[3:]:
        made.add_column(Text(column[0]), justify="right", no_wrap=True)
    for parameter in shown:
        made.add_column(
            Text(parameter.label), justify="right" if parameter.numeric else "left", overflow="ellipsis", no_wrap=True
        )
    for i in range(len(found.runs)):
        own = [Text(column[i + 1]) for column in fixed]
        made.add_row(*own, *(Text(_cut(short(p.values[i]))) for p in shown), end_section=i == len(found.runs) - 1)
    for row in zip(*(c[1 + len(found.runs) :] for c in fixed), strict=True):
        made.add_row(*map(Text, row))
    out = io.StringIO()
    # Names and figures are never cut: a narrow terminal wraps the lines.
    Console(file=out, width=max(width, taken + 8), no_color=True).print(made)
    table = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join([table, *_notes(found, left_out)])


def told(mattered: Importance, by: Figure, *, most: int = 4) -> str:
    """One line: which keys mattered, and how sure that is."""
    if not mattered.shares:
        return f"what mattered: {mattered.why}"
    top = ", ".join(f"{key} {share:.0%}" for key, share in list(mattered.shares.items())[:most])
    if mattered.cycle:
        few = f"{mattered.finished} of {mattered.runs} runs have finished"
        return f"what mattered for {by.key} after {mattered.cycle} cycles, a hint, since {few}: {top} ({EVALUATOR})"
    return f"what mattered for {by.key}: {top} ({EVALUATOR}, {mattered.runs} runs)"


def state_of(run: Run, *, front: bool) -> str:
    """A run's state, marked where it is on the front."""
    return f"{run.state} *" if front else run.state


def value_of(run: Run, figure: Figure) -> str:
    """A figure as text."""
    value = run.value(figure.key)
    if value is None:
        return "nan" if figure.key in run.figures else "-"
    return _number(value)


def mean_of(run: Run, figure: Figure) -> str:
    """Mean and standard deviation of a setting's repeats as text."""
    if not run.repeats or figure.key not in run.repeats.means:
        return "-"
    mean, spread = run.repeats.means[figure.key], run.repeats.spread[figure.key]
    return f"{mean:.4g} ± {spread:.2g} ({run.repeats.runs})"


def _fixed(found: Comparison, figures: Sequence[Figure]) -> list[list[str]]:
    """The columns that are always there, heads first."""
    runs = found.runs
    known = [(title, given) for title, given, _ in baselines(runs)[:BASELINES] if any(f.key in given for f in figures)]
    columns = [
        ["run", *(run.name for run in runs), *(title for title, _ in known)],
        ["state", *(state_of(run, front=i in found.front) for i, run in enumerate(runs)), *("" for _ in known)],
        ["cycles", *(str(run.measured or run.cycles or "-") for run in runs), *("" for _ in known)],
        *(
            [figure.title, *(value_of(run, figure) for run in runs), *(_number(b.get(figure.key)) for _, b in known)]
            for figure in figures
        ),
    ]
    if found.by and any(run.repeats for run in runs):
        means = (mean_of(run, found.by) for run in runs)
        columns.insert(4, [f"mean {found.by.key}", *means, *("" for _ in known)])
    return columns


def _fitting(found: Comparison, taken: int, width: int) -> tuple[list[Parameter], list[Parameter]]:
    """The keys that fit beside the fixed columns, and the rest."""
    shown: list[Parameter] = []
    parameters = found.differences.parameters
    for parameter in parameters:
        cells = [parameter.label, *(_cut(short(v)) for v in parameter.values)]
        taken += max(map(len, cells)) + 3
        if taken > width:
            break
        shown.append(parameter)
    return shown, list(parameters[len(shown) :])


def _notes(found: Comparison, left_out: Sequence[Parameter]) -> list[str]:
    notes = []
    if found.front:
        axes = " and ".join(f.title for f in found.objectives)
        notes.append(f"* on the front of {axes}: no other run is as good in all of them and better in one")
    same = len(found.differences.same)
    notes.append(f"all the same: {same} key{'' if same == 1 else 's'}")
    if left_out:
        named = ", ".join(p.label for p in left_out[:NAMED])
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        notes.append(f"left out here: {named}{more} (a wider terminal, the page and the JSON have them)")
    if found.by and found.differences.parameters:
        notes.append(told(found.importance, found.by))
    failed = [run for run in found.runs if run.error]
    notes += [f"{run.name}: {run.error}" for run in failed[:ERRORS]]
    if len(failed) > ERRORS:
        notes.append(f"and {len(failed) - ERRORS} more errors (the page has them)")
    return [*notes, *(f"note: {note}" for note in found.notes)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cut(cell: str) -> str:
    return cell if len(cell) <= WIDEST else f"{cell[: WIDEST - 1]}…"
