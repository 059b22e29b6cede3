"""Runs as a tracking server tells them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from raydmd.comparing.curves import COUNTERS, MOST
from raydmd.comparing.folders import REFERENCE, RESULT, beside, numbers, results_in
from raydmd.comparing.ranking import figure
from raydmd.comparing.runs import EVALUATION, FAILED, FINISHED, RUNNING, STOPPED, UNKNOWN, WAITING, Run, curves_of
from raydmd.errors import InputError
from raydmd.tracking.reader import EXPERIMENT, OBJECTIVES, OF_SWEEP, SWEEP, Found, Reader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlflow.entities import Run as MlflowRun

    from raydmd.comparing.runs import Curve

STATES = {"FINISHED": FINISHED, "RUNNING": RUNNING, "FAILED": FAILED, "KILLED": STOPPED, "SCHEDULED": WAITING}
REPORT = "report.html"
STEPS = "evaluations"
"""Of the network for a clip: no curve, and yet a figure."""
MANY, LESS = 50, ("time/", "monitor/")
"""With more runs than this the curves of times and of the monitor are not asked for, nor the teachers' figures."""


def found_on(reader: Reader, what: str) -> Found | None:
    """The one thing on the server that a name stands for; ``None`` if there is none.

    Raises:
        InputError: if there are several; names them.
    """
    found = list({f.id + f.kind: f for f in reader.find(what)}.values())
    if len(found) > 1:
        shown = "; ".join(f.said() for f in found[:6])
        kinds = {f.kind for f in found}
        how = "give the id" if len(kinds) == 1 else f"give the id, or say which: {found[0].kind}:{what}"
        raise InputError(f"'{what}' is the name of {len(found)} things on {reader.uri}: {shown}. Please {how}")
    return found[0] if found else None


def read_found(reader: Reader, found: Found) -> list[Run]:
    """The runs of what was found, with their curves.

    Raises:
        InputError: if there are none.
    """
    runs = reader.runs_of(found)
    if not runs:
        what = {OF_SWEEP: "has no trials yet", EXPERIMENT: "holds no runs"}[found.kind]
        raise InputError(f"{found.said()} on {reader.uri} {what}")
    skip = (*COUNTERS, *LESS) if len(runs) > MANY else COUNTERS
    histories = reader.histories(runs, skip, most=MOST).points
    whole = len(runs) <= MANY
    return [_run(reader, run, histories[run.info.run_id], whole=whole) for run in runs]


def objectives_on(found: Found) -> dict[str, str]:
    """A sweep's objectives: as its run says, or as far as they can be told from its best figures."""
    if found.kind != OF_SWEEP or found.run is None:
        return {}
    if said := found.run.data.tags.get(OBJECTIVES):
        read: dict[str, str] = json.loads(said)
        return read
    best = [k.removeprefix("best/") for k in found.run.data.metrics if k.startswith("best/")]
    return {k: goal for k in best if (goal := figure(k).goal)}


def _run(
    reader: Reader, run: MlflowRun, history: Mapping[str, Sequence[tuple[int, int, float]]], *, whole: bool
) -> Run:
    run_id, tags = str(run.info.run_id), run.data.tags
    recipe = {k: _value(v) for k, v in run.data.params.items()}
    planned = int(recipe.get("training.cycles") or 0)
    curves: dict[str, Curve] = {}
    for name, points in history.items():
        curves |= curves_of({"cycle": step, name: value} for _, step, value in points) if name != "cycle" else {}
    cycles = max((curve[-1][0] for curve in curves.values() if curve), default=0)
    of_evaluations = {k.removeprefix(EVALUATION): c for k, c in curves.items() if k.startswith(EVALUATION) and c}
    measured = max((curve[-1][0] for curve in of_evaluations.values()), default=0)
    state = STATES.get(str(run.info.status), UNKNOWN)
    results = results_in(reader.text(run_id, RESULT) or "") if whole and state == FINISHED else {}
    figures = {k: c[-1][1] for k, c in of_evaluations.items() if c[-1][0] == measured}
    if figures and (steps := run.data.metrics.get(f"{EVALUATION}{STEPS}")):
        figures[STEPS] = steps
    return Run(
        name=tags.get("raydmd.trial") or str(run.info.run_name),
        place=f"mlflow:{run_id}",
        link=reader.page_of(run),
        sweep=tags.get(SWEEP, ""),
        state=state,
        recipe=recipe,
        cycles=cycles,
        planned=planned,
        measured=measured,
        figures=figures,
        curves=curves,
        baselines=beside(results),
        teacher=numbers(results.get(REFERENCE, {})),
        tracked=run_id,
        report=lambda: reader.text(run_id, REPORT) if state == FINISHED else None,
    )


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # cut off, or of another program
        return text
