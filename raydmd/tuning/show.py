"""A sweep in a terminal: its trials, the best of them, the front of several objectives. Pure."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from rich.box import ASCII2
from rich.console import Console
from rich.table import Table

from raydmd.tuning.population import schedule
from raydmd.tuning.repeats import merged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.tuning.population import Entry
    from raydmd.tuning.rows import Row
    from raydmd.tuning.spec import Sweep

LATER = ("finished", "stopped early", "running", "waiting", "failed")


def front(rows: Sequence[Row], objectives: Mapping[str, str]) -> list[Row]:
    """Finished trials that no other one beats in every objective, best in the first objective first."""
    done = [row for row in rows if row.values]
    kept = [
        row
        for row in done
        if not any(_beats(other.values, row.values, objectives) for other in done if other is not row)
    ]
    return sorted(kept, key=lambda row: _costs(row.values, objectives))


def best_of(rows: Sequence[Row], spec: Sweep) -> Row | None:
    """The finished trial that is best in the first objective; ``None`` before there is one."""
    done = [row for row in merged(rows, spec.repeats) if row.values]
    return min(done, key=lambda row: _costs(row.values, spec.objectives), default=None)


def table(rows: Sequence[Row], spec: Sweep, *, only: Sequence[Row] | None = None) -> str:
    """The trials as text, best first; those on the front marked.

    Args:
        rows: all trials.
        spec: the sweep.
        only: trials to show; default: all but lost ones, whose successors are there.
    """
    settings = merged(rows, spec.repeats)
    shown = settings if only is None else list(only)
    on_front = {row.number for row in front(settings, spec.objectives)} if len(spec.objectives) > 1 else set()
    keys = list(dict.fromkeys(key for row in shown for key in row.changes))
    made = Table(box=ASCII2, pad_edge=False)
    made.add_column("trial", justify="right")
    made.add_column("state")
    made.add_column("cycles", justify="right")
    for name, goal in spec.objectives.items():
        made.add_column(f"{name} {'↓' if goal == 'min' else '↑'}", justify="right", no_wrap=True)
    for key in keys:
        made.add_column(key.removeprefix("method.").removeprefix("training."))
    for row in sorted(shown, key=lambda r: _order(r, spec.objectives)):
        figures = row.values or (row.at[row.trained] if row.at else {})
        state = f"{row.state}{f' ({len(row.runs)} runs)' if row.runs else ''}{' *' if row.number in on_front else ''}"
        made.add_row(
            f"{row.root:04d}",
            state,
            str(row.trained or "-"),
            *(_figure(figures, row.spread, name) for name in spec.objectives),
            *(_short(row.changes[key]) if key in row.changes else "-" for key in keys),
        )
    out = io.StringIO()
    Console(file=out, width=240, no_color=True).print(made)
    notes = ["* on the front: no other trial is as good in all objectives and better in one"] if on_front else []
    notes += [f"trial {row.root:04d}: {row.error}" for row in shown if row.error]
    return "\n".join([*(line.rstrip() for line in out.getvalue().splitlines()), *notes])


def progress(rows: Sequence[Row], spec: Sweep) -> str:
    """One line: how many trials in which state, and the best so far."""
    settings = merged(rows, spec.repeats)
    counts = [f"{n} {state}" for state in LATER if (n := sum(row.state == state for row in settings))]
    best, name = best_of(rows, spec), next(iter(spec.objectives))
    under_way = [f"{r.root:04d} at {r.trained}" for r in settings if r.state == "running" and r.trained]
    counts += [f"trial {', '.join(under_way)} cycles"] if under_way else []
    so_far = f"   best {name} {best.values[name]:.4g} (trial {best.root:04d})" if best else ""
    total = len(settings) if spec.search.kind == "grid" else spec.budget.trials
    return f"of {total}: {', '.join(counts) or 'none yet'}{so_far}"


def scheduled(rows: Sequence[Row], row: Row) -> str:
    """The settings that a population's student was trained with, a line for each stretch; empty for other trials."""
    if not row.lineage:
        return ""
    lines, before = list[str](), dict[str, Any]()
    for entry in schedule(rows, row.root):
        moved = {k: v for k, v in entry.changes.items() if k not in before or before[k] != v}
        left = [k for k in before if k not in entry.changes]
        said = [*(f"{k}={_short(v)}" for k, v in moved.items()), *(f"without {k}" for k in left)]
        whose = f"   (from trial {entry.donor:04d}'s state)" if entry.donor is not None else ""
        lines.append(f"from cycle {entry.cycle}: {', '.join(said) or 'as before'}{whose}")
        before = entry.changes
    return "\n".join(lines)


def as_json(rows: Sequence[Row], spec: Sweep, *, only: Sequence[Row] | None = None) -> dict[str, Any]:
    """The same for a machine.

    Args:
        rows: all trials.
        spec: the sweep.
        only: trials to show; default: all.
    """
    on_front = {row.number for row in front(merged(rows, spec.repeats), spec.objectives)}
    return {
        "sweep": spec.name,
        "objectives": dict(spec.objectives),
        "trials": [
            {
                "trial": row.root,
                "number": row.number,
                "state": row.state,
                "cluster": row.cluster,
                "changes": row.changes,
                "values": row.values,
                **({"spread": row.spread, "runs": list(row.runs)} if row.runs else {}),
                "evaluations": {str(k): v for k, v in row.at.items()},
                "front": row.number in on_front,
                "error": row.error,
                **({"schedule": [_stretch(e) for e in schedule(rows, row.root)]} if row.lineage else {}),
            }
            for row in (rows if only is None else only)
        ],
    }


def _stretch(entry: Entry) -> dict[str, Any]:
    return {"cycle": entry.cycle, "donor": entry.donor, "changes": entry.changes}


def _costs(values: Mapping[str, float], objectives: Mapping[str, str]) -> tuple[float, ...]:
    return tuple(values[k] if goal == "min" else -values[k] for k, goal in objectives.items())


def _beats(a: Mapping[str, float], b: Mapping[str, float], objectives: Mapping[str, str]) -> bool:
    x, y = _costs(a, objectives), _costs(b, objectives)
    return x != y and all(p <= q for p, q in zip(x, y, strict=True))


def _order(row: Row, objectives: Mapping[str, str]) -> tuple[Any, ...]:
    if row.values:
        return 0, *_costs(row.values, objectives), row.number
    last = row.at[row.trained] if row.at else {}
    costs = _costs(last, objectives) if objectives.keys() <= last.keys() else ()
    return 1, -row.trained, LATER.index(row.state) if row.state in LATER else len(LATER), *costs, row.number


def _figure(figures: Mapping[str, float], spread: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "-"
    return f"{figures[name]:.4g}{f' ± {spread[name]:.2g}' if name in spread else ''}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
