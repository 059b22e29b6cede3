"""Which checkpoints stay longer than Ray Train's last ones: every so many cycles, and the best one.

Ray Train deletes its own by their age alone. Those that are to stay are copied beside them, once they are committed and
before they are old; the copy of one that is best no more goes again. The last ones are never touched here.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray.train import UserCallback

from raydmd.errors import InputError
from raydmd.evaluation.table import COLUMNS, column
from raydmd.recipe_io import nearest
from raydmd.training.checkpoint import FINAL, PHASE, cycle_of
from raydmd.training.events import EventLog, read_lines
from raydmd.training.mending import names_in
from raydmd.training.store import KEPT, Store
from raydmd.training.students import EVALUATION, EVALUATIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.context import TrainRunContext

    from raydmd.recipe import Recipe


def to_keep(
    names: Iterable[str], measured: Mapping[str, float], *, every: int | None, evaluated: int | None
) -> set[str]:
    """Those of a run's checkpoints that stay.

    Args:
        names: all that there are.
        measured: what the evaluations of students found, by the names of their checkpoints; the smaller the better.
        every: cycles between those that stay for good; ``None`` for none.
        evaluated: cycles between two evaluations, if the best one stays.
    """
    best = min((v for v in measured.values() if not math.isnan(v)), default=math.nan)

    def stays(name: str) -> bool:
        cycle, student = cycle_of(name), name.removesuffix(PHASE)
        if every and cycle % every == 0:
            return True
        if not evaluated or cycle % evaluated:
            return False
        return student not in measured or measured[student] == best  # what waits for its evaluation may be the best

    return {name for name in names if not name.endswith(FINAL) and stays(name)}


def retain(recipe: Recipe, store: Store) -> None:
    """Keep and drop as a run's settings and its evaluations so far ask; to be called whenever one of them is new."""
    asked = recipe.checkpoints
    if asked.keep_every is None and asked.best is None:
        return
    events = EventLog(recipe.folder / "events.jsonl")
    try:
        # Only what Ray Train has committed: whatever else is there was not written to its end.
        there = names_in(store.books()).intersection(store.names())
        kept = {name for name in store.names(KEPT) if store.first_list(name, KEPT)}
        measured = _measured(recipe.folder, asked.best) if asked.best else {}
        evaluated = recipe.evaluation.every if asked.best else None
        wanted = to_keep(there | kept, measured, every=asked.keep_every, evaluated=evaluated)
        for name in sorted(wanted & there):
            if name in kept and store.first_list(name, KEPT) == store.first_list(name):
                continue  # else it was written anew, after a fall back to one before it
            store.keep(name)
            events.write("kept", checkpoint=name)
        for name in sorted(kept - wanted):
            store.drop(name)
            events.write("dropped", checkpoint=name)
    except (OSError, ValueError) as error:  # training is none the worse for it; the next checkpoint's turn tries again
        events.write("retention", message=f"{type(error).__name__}: {error}")


class Retention(UserCallback):
    """Keeps and drops whenever a checkpoint is committed; runs in Ray Train's controller, beside its work.

    Args:
        recipe: the run.
        store: of its checkpoints.
    """

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self._recipe, self._store = recipe, store
        self._thread: ThreadPoolExecutor | None = None  # made over there

    def after_report(
        self, run_context: TrainRunContext, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """See :class:`ray.train.UserCallback`."""
        if checkpoint is not None:
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="raydmd-retention")
            self._thread.submit(retain, self._recipe, self._store)


def check_best(recipe: Recipe) -> None:
    """See that it is known which value of the figure in ``checkpoints.best`` is best.

    Raises:
        InputError: if it is not.
    """
    best = recipe.checkpoints.best
    if best is None:
        return
    known = column(best)
    if known is None or known.better not in ("low", "high"):
        near = nearest(best, [c.key for c in COLUMNS if c.better in ("low", "high")])
        raise InputError(
            f"checkpoints.best={best} is no figure whose lowest or highest value is best"
            + (f"; did you mean '{near}'?" if near else ", such as frechet")
        )


def _measured(folder: Path, figure: str) -> dict[str, float]:
    known, key = column(figure), f"{EVALUATION}{figure}"
    sign = -1.0 if known and known.better == "high" else 1.0
    rows = list(read_lines(folder / EVALUATIONS))
    if rows and not any(key in row for row in rows):
        raise ValueError(f"the run's evaluations have no figure {figure}, which checkpoints.best names")
    return {str(row["student"]): sign * float(row.get(key, math.nan)) for row in rows}
