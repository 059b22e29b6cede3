"""From what a user names to runs: folders of runs and sweeps, and names on a tracking server."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydmd.comparing.folders import is_run, read_run, read_sweep
from raydmd.comparing.runs import numbered, once
from raydmd.errors import InputError
from raydmd.recipe_io import nearest_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from raydmd.comparing.runs import Run
    from raydmd.recipe import Recipe
    from raydmd.tracking.reader import Reader

SWEEP_FILE = "sweep.yaml"


@dataclass(frozen=True, kw_only=True)
class SweepFacts:
    """What a sweep's folder and study say.

    Attributes:
        name: of the sweep.
        objectives: with their goals.
        searched: keys of its space.
        base: the recipe that trials differ from.
        rows: of its study, see :class:`raydmd.tuning.study.Row`.
        notes: what a reader should know, its verdict above all.
    """

    name: str
    objectives: Mapping[str, str]
    searched: Sequence[str]
    base: Recipe
    rows: Sequence[Any]
    notes: Sequence[str] = ()


@dataclass
class Gathered:
    """What was named.

    Attributes:
        runs: all of them, each once.
        title: for a page.
        objectives: of the sweeps, where they agree.
        searched: keys of the sweeps' spaces.
        notes: what a reader should know.
        seconds: that reading took.
    """

    runs: list[Run] = field(default_factory=list)
    title: str = ""
    objectives: dict[str, str] = field(default_factory=dict)
    searched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def gather(what: Sequence[str], tracking: str | None, study: Callable[[Path], SweepFacts]) -> Gathered:
    """Read all that was named.

    Args:
        what: folders of runs and sweeps; with a tracking server ids and names on it, too.
        tracking: address of the server, or of a database.
        study: reads a sweep's folder.

    Raises:
        InputError: for what is not there, stands for several things, or holds no runs.
    """
    begun, found = time.perf_counter(), Gathered()
    reader: Reader | None = None
    goals: list[dict[str, str]] = []
    for name in what:
        folder = Path(name)
        here = is_run(folder) or (folder / SWEEP_FILE).is_file()
        path = name.startswith((".", "/", "~")) or "/" in name.rstrip("/")
        if tracking and not (here and path):
            reader = reader or _reader(tracking)
            if _from_server(reader, name, found, goals, here=here):
                continue
        if not here:
            raise _absent(name, tracking, reader)
        if (folder / SWEEP_FILE).is_file():
            facts = study(folder)
            known = {run.sweep for run in found.runs}
            own = numbered([*known, facts.name])[-1]
            if own != facts.name:
                found.notes.append(f"sweep {own} is {folder.absolute()}")
            runs = read_sweep(folder, own, facts.base, facts.rows, facts.searched)
            if not runs:
                raise InputError(f"sweep '{facts.name}' in {folder} has no trials yet")
            found.runs += runs
            found.notes += facts.notes
            if any(row.lineage for row in facts.rows):
                found.notes.append(
                    f"settings of the population {own} change on the way: shown are the last ones; "
                    f"raydmd sweep best {folder} prints all"
                )
            found.searched += [k for k in facts.searched if k not in found.searched]
            goals.append(dict(facts.objectives))
        else:
            found.runs.append(read_run(folder))
    named = len(found.runs)
    found.runs = once(found.runs)
    if len(found.runs) < named:
        found.notes.append(f"{named - len(found.runs)} named more than once")
    if goals and all(g == goals[0] for g in goals):
        found.objectives = goals[0]
    elif goals:
        found.notes.append("the sweeps have different objectives: --by and --objectives choose")
    found.title = Path(what[0]).name if len(what) == 1 else f"{len(found.runs)} runs"
    found.seconds = time.perf_counter() - begun
    return found


def _reader(tracking: str) -> Reader:
    from raydmd.tracking.reader import Reader  # brings MLflow along

    return Reader(tracking)


def _from_server(reader: Reader, name: str, found: Gathered, goals: list[dict[str, str]], *, here: bool) -> bool:
    """Read a name from the server, if it has it."""
    from raydmd.comparing.server import LESS, MANY, found_on, objectives_on, read_found

    known = found_on(reader, name)
    if known is None:
        return False
    if here:
        raise InputError(
            f"'{name}' is a folder here, and {known.said()} on {reader.uri}: write ./{name} for the one, or "
            f"{known.kind}:{name} for the other"
        )
    runs = read_found(reader, known)
    if len(runs) > MANY:
        found.notes.append(f"{known.said()} has {len(runs)} runs: curves of {' and '.join(LESS)} were not asked for")
    found.runs += runs
    if objectives := objectives_on(known):
        goals.append(objectives)
    return True


def _absent(name: str, tracking: str | None, reader: Reader | None) -> InputError:
    """The error for a name that is nothing, with the nearest thing that is something."""
    folder = Path(name)
    around = folder.parent if folder.parent.is_dir() else Path()
    folders = [f for place in (around, Path("runs")) if place.is_dir() for f in place.iterdir() if f.is_dir()]
    known = {f.name: f for f in folders if is_run(f) or (f / SWEEP_FILE).is_file()}
    near = nearest_name(folder.name, known)
    if folder.is_dir():
        below = [f for f in sorted(folder.iterdir()) if f.is_dir() and (is_run(f) or (f / SWEEP_FILE).is_file())]
        if below:
            hint = f"below it are {len(below)}: {' '.join(str(f) for f in below[:3])}{' ...' if below[3:] else ''}"
            return InputError(f"{name} is no run's folder, and no sweep's; {hint}")
        return InputError(f"{name} is no run's folder, and no sweep's: it has no recipe.yaml and no {SWEEP_FILE}")
    if reader is not None and near is None:
        near_there = reader.near(name)
        hint = f"; did you mean '{near_there}'?" if near_there else ""
        return InputError(f"'{name}' is no folder, and no run, sweep or experiment on {reader.uri}{hint}")
    hint = f"; did you mean {known[near]}?" if near else ""
    where = "" if tracking else "; names on a tracking server need --tracking URI, or MLFLOW_TRACKING_URI"
    return InputError(f"there is no folder {name}{hint}{where if not near else ''}")
