"""A comparison as plain values: what the page draws from and ``compare.json`` holds. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from raydmd.comparing.curves import MOST, drawn
from raydmd.comparing.differ import Differences, differences, label_of, short
from raydmd.comparing.importance import ENOUGH, EVALUATOR, Importance, importance
from raydmd.comparing.measured import baselines, unlike
from raydmd.comparing.ranking import chosen, figure, figures_in, front, objectives_of, order
from raydmd.comparing.runs import EVALUATION, STATES, named_apart, with_repeats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.comparing.differ import Parameter
    from raydmd.comparing.ranking import Figure
    from raydmd.comparing.runs import Run
    from raydmd.comparing.samples import Group, Shot


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs and what was found about them.

    Attributes:
        title: of the page.
        runs: the best first.
        by: the figure that they are sorted by.
        objectives: of the front.
        front: places of the runs on it.
        differences: between their recipes; parameters in the order of their importance.
        importance: of the parameters.
        notes: what a reader should know.
    """

    title: str
    runs: list[Run]
    by: Figure | None = None
    objectives: list[Figure] = field(default_factory=list)
    front: set[int] = field(default_factory=set)
    differences: Differences = field(default_factory=Differences)
    importance: Importance = field(default_factory=Importance)
    notes: list[str] = field(default_factory=list)


def compared(
    runs: Sequence[Run],
    *,
    title: str,
    by: str | None = None,
    goal: str | None = None,
    objectives: Mapping[str, str] | None = None,
    sweep_objectives: Mapping[str, str] | None = None,
    searched: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare runs.

    Args:
        runs: in any order.
        title: of the page.
        by: the figure to sort by.
        goal: ``min`` or ``max``.
        objectives: of the front, with their goals.
        sweep_objectives: of the sweep that the runs are trials of.
        searched: keys of that sweep's space, which come first.
        notes: what a reader should know.

    Returns:
        The comparison, its runs sorted.

    Raises:
        InputError: for a figure that is not there, or of which it is not known which way is better.
    """
    given, of_sweep = dict(objectives or {}), dict(sweep_objectives or {})
    named = with_repeats(named_apart(runs))
    # What is asked for wins over a sweep's goal, but not over itself.
    known = {**of_sweep, **given}
    if by and goal and by not in given:
        known.pop(by, None)
    sort_by = chosen(named, by, goal, known)
    ordered = [named[i] for i in order(named, sort_by)]
    axes = objectives_of(ordered, given, of_sweep, sort_by)
    found = differences(ordered)
    mattered = importance(ordered, found.parameters, sort_by)
    return Comparison(
        title=title,
        runs=ordered,
        by=sort_by,
        objectives=axes,
        front=front(ordered, axes) if len(axes) > 1 and len(ordered) > 1 else set(),
        differences=Differences(tuple(_ranked(found.parameters, mattered, searched)), found.same),
        importance=mattered,
        notes=[*notes, *unlike(named), *_told_of_repeats(ordered)],
    )


def document(
    found: Comparison, samples: Sequence[Group] = (), notes: Sequence[str] = (), *, facts: Mapping[str, str]
) -> dict[str, Any]:
    """A comparison as plain values that JSON knows.

    Args:
        found: the comparison.
        samples: of its runs.
        notes: on the samples.
        facts: versions, time, place.
    """
    curves = drawn(found.runs)
    mattered = found.importance
    counts = {state: n for state in STATES if (n := sum(run.state == state for run in found.runs))}
    return {
        "title": found.title,
        "facts": dict(facts),
        "notes": list(found.notes),
        "states": counts,
        "by": _figure(found.by) if found.by else None,
        "objectives": [_figure(f) for f in found.objectives],
        "figures": [_figure(f) for f in figures_in(found.runs)],
        "parameters": [_parameter(p, mattered) for p in found.differences.parameters],
        "same": {k: _plain(v) for k, v in found.differences.same.items()},
        "importance": {
            "evaluator": EVALUATOR,
            "enough": ENOUGH,
            **asdict(mattered),
        },
        "runs": [_run(i, run, found) for i, run in enumerate(found.runs)],
        "baselines": [{"title": t, "figures": _finite(figures), "runs": n} for t, figures, n in baselines(found.runs)],
        "curves": {
            "points_at_most": MOST,
            "thinned": curves.thinned,
            "not_finite_left_out": curves.not_finite,
            "metrics": {
                name: {
                    "goal": figure(name.removeprefix(EVALUATION)).goal if name.startswith(EVALUATION) else "",
                    "runs": {str(i): [list(xs), list(ys)] for i, (xs, ys) in of_runs.items()},
                }
                for name, of_runs in curves.metrics.items()
            },
        },
        "sample_notes": list(notes),
        "samples": [
            {
                "prompts": group.prompts,
                "seed": _plain(group.seed),
                "model": _plain(group.model),
                "teachers": [{"title": title, "shots": _shots(shots)} for title, shots in group.teachers],
                "students": [{"run": place, "shots": _shots(shots)} for place, shots in group.students],
            }
            for group in samples
        ],
    }


def as_text(document: Mapping[str, Any], *, indent: int | None = 1) -> str:
    """JSON that any parser reads: without NaN."""
    return json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)


def for_page(document: Mapping[str, Any]) -> str:
    """JSON for a script element: nothing in it ends the element, or begins another one."""
    text = as_text(document, indent=None)
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _ranked(parameters: Sequence[Parameter], mattered: Importance, searched: Sequence[str]) -> list[Parameter]:
    sections = ("method.", "training.", "model.", "data.", "seed")
    shares = {} if mattered.cycle else mattered.shares  # of runs on their way they are a hint at best

    def place(parameter: Parameter) -> tuple[Any, ...]:
        key = parameter.key
        base = key.partition("[")[0]
        in_space = list(searched).index(base) if base in searched else len(searched)
        section = next((i for i, s in enumerate(sections) if key.startswith(s)), len(sections))
        return -shares.get(key, -1.0), in_space, section

    return sorted(parameters, key=place)


def _run(place: int, run: Run, found: Comparison) -> dict[str, Any]:
    here = {p.key: p.of(place) for p in found.differences.parameters if p.has(place)}
    finite = _finite(run.figures)
    cost = found.by.cost(run) if found.by else math.inf
    again = run.repeats
    extra = {f.key: v for f in (found.by, *found.objectives) if f and (v := run.value(f.key)) is not None}
    return {
        "name": run.name,
        "place": run.place,
        "link": run.link if run.link.startswith(("http://", "https://")) or ":" not in run.link else "",
        "sweep": run.sweep,
        "state": run.state,
        "error": run.error,
        "cycles": run.cycles,
        "planned": run.planned,
        "measured": run.measured,
        "figures": {**finite, **extra},
        "not_finite": sorted(set(run.figures) - set(finite)),
        "changes": {k: _plain(v) for k, v in here.items()},
        "shown": {k: short(v) for k, v in here.items()},
        "front": place in found.front,
        "cost": cost if math.isfinite(cost) else None,
        "teacher": _finite(run.teacher),
        "repeats": {**asdict(again), "means": dict(again.means), "spread": dict(again.spread)} if again else None,
    }


def _told_of_repeats(runs: Sequence[Run]) -> list[str]:
    settings = {run.repeats.first: run.repeats.runs for run in runs if run.repeats}
    if not settings:
        return []
    several = f"{len(settings)} settings were" if len(settings) > 1 else "one setting was"
    return [f"{several} run with several seeds: order, front and importance are by their means"]


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in figures.items() if math.isfinite(v)}


def _figure(figure: Figure) -> dict[str, Any]:
    return {"key": figure.key, "goal": figure.goal, "digits": figure.digits, "help": figure.help}


def _parameter(parameter: Parameter, mattered: Importance) -> dict[str, Any]:
    kinds = {} if parameter.numeric else {label_of(v): short(v) for v in parameter.values if label_of(v)}
    return {
        "key": parameter.key,
        "label": parameter.label,
        "numeric": parameter.numeric,
        "log": parameter.log,
        "values": [shown for _, shown in sorted(kinds.items())],
        "importance": mattered.shares.get(parameter.key),
    }


def _shots(shots: Sequence[Shot]) -> list[dict[str, Any]]:
    return [asdict(shot) for shot in shots]


def _plain(value: Any) -> Any:
    """What JSON knows; other things as their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value)
