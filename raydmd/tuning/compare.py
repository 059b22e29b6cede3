"""A sweep's own page: ``compare.html`` in its folder, and the same figures as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.comparing.gather import SweepFacts
from raydmd.comparing.write import PAGE, sweep_page
from raydmd.tuning.show import best_of
from raydmd.tuning.verdict import kept

__all__ = ["PAGE", "compare_page", "facts_of"]

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.tuning.rows import Row
    from raydmd.tuning.spec import Sweep


def facts_of(spec: Sweep, base: Recipe, rows: Sequence[Row], folder: Path) -> SweepFacts:
    """What a comparison wants to know of a sweep."""
    best = best_of(rows, spec)
    verdict = kept(folder, best, spec) if best else None
    return SweepFacts(
        name=spec.name,
        objectives=spec.objectives,
        searched=list(spec.space),
        base=base,
        rows=list(rows),
        notes=[f"verdict: {verdict.sentence(spec.objectives)}"] if verdict else [],
    )


def compare_page(spec: Sweep, base: Recipe, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a sweep's page; one that can't be written does not undo a sweep.

    Args:
        spec: the sweep.
        base: the recipe that its trials differ from.
        rows: its trials.
        folder: of the sweep.

    Returns:
        The page and its JSON; nothing where there are no trials, or it could not be written.
    """
    if not rows:
        return []
    facts = facts_of(spec, base, rows, folder)
    try:
        page = sweep_page(folder, facts)
    except Exception as error:  # the trials are what counts, and 'raydmd compare' can make it again
        print(f"compare: {folder / PAGE} was not written ({type(error).__name__}: {error})", flush=True)
        return []
    return [page, page.with_suffix(".json")]
