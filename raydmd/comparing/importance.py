"""Which of the differing keys mattered for a figure: Optuna's PED-ANOVA on the runs. Pure.

It compares where the better runs lie in each key's range with where all runs lie (Watanabe et al. 2023,
arXiv:2304.10255). It says which keys the better runs share, not why; keys that were always changed together share what
one of them may have caused.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

from raydmd.comparing.differ import label_of
from raydmd.comparing.runs import EVALUATION, FINISHED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.comparing.differ import Parameter
    from raydmd.comparing.ranking import Figure
    from raydmd.comparing.runs import Run

EVALUATOR = "PED-ANOVA"
ENOUGH = 10
"""Runs below which importances are noise."""
FEW = 4
"""Values of a number that count as kinds of it."""
BETTER = 5
"""Runs that the better ones are at least, as the evaluator's authors ask for."""
SECTIONS = ("method.", "training.", "model.", "data.")
"""Of keys that can matter."""


@dataclass(frozen=True)
class Importance:
    """What mattered.

    Attributes:
        shares: of each key, the largest first; they add up to 1. Empty where there are too few runs to tell.
        runs: how many it was taken from.
        finished: how many runs have finished.
        cycle: after which all runs were compared; 0 for the last figures of finished runs.
        why: there are no shares.
    """

    shares: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    finished: int = 0
    cycle: int = 0
    why: str = ""


def importance(runs: Sequence[Run], parameters: Sequence[Parameter], by: Figure | None) -> Importance:
    """The share of each key in a figure.

    Of finished runs; where they are too few, of all runs' figures at the last cycle after which enough were evaluated.

    Args:
        runs: that are compared.
        parameters: keys that differ between them.
        by: the figure.
    """
    done = [i for i, run in enumerate(runs) if run.state == FINISHED]
    if by is None:
        return Importance(finished=len(done), why="no run has been evaluated")
    costs = {i: by.cost(runs[i]) for i in done if by.cost(runs[i]) < float("inf")}
    # Repeats count once, by their mean.
    settings = {again.first if (again := runs[i].repeats) else runs[i].name: i for i in reversed(costs)}
    costs = {i: cost for i, cost in costs.items() if i in settings.values()}
    finished, cycle = len(costs), 0
    if finished < ENOUGH:
        cycle, costs = _at(runs, by)
    if len(costs) < ENOUGH:
        few = f"{finished} finished run{'' if finished == 1 else 's'}"
        return Importance(finished=finished, why=f"too few runs to tell: {few} with {by.key}, of {ENOUGH} needed")
    # After equally many cycles it does not matter how many there will be.
    usable = [p for p in parameters if _usable(p, list(costs)) and not (cycle and p.key == "training.cycles")]
    if not usable:
        return Importance(finished=finished, why="no key of method, training, model or data is comparable between runs")
    shares = _shares(usable, costs)
    return Importance(shares, runs=len(costs), finished=finished, cycle=cycle)


def _at(runs: Sequence[Run], by: Figure) -> tuple[int, dict[int, float]]:
    """The last cycle after which enough runs have a figure, and their costs there."""
    at: dict[int, dict[int, float]] = {}
    for i, run in enumerate(runs):
        for cycle, value in run.curves.get(f"{EVALUATION}{by.key}", []):
            if value == value and (cost := by.cost_of(value, run)) < float("inf"):
                at.setdefault(cycle, {})[i] = cost
    enough = [cycle for cycle, costs in at.items() if len(costs) >= ENOUGH]
    return (max(enough), at[max(enough)]) if enough else (0, {})


def _usable(parameter: Parameter, places: Sequence[int]) -> bool:
    """Whether a key can matter: it has values that come again, or numbers."""
    here = {label_of(parameter.values[i]) for i in places if _has(parameter, i)}
    own = not parameter.numeric and 2 * len(here) > len(places)
    return parameter.key.startswith(SECTIONS) and len(here) > 1 and not own


def _shares(parameters: Sequence[Parameter], costs: dict[int, float]) -> dict[str, float]:
    spaces = {p.key: _distribution(p, list(costs)) for p in parameters}
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study()
            for i, cost in costs.items():
                here = [p for p in parameters if _has(p, i)]
                values = {p.key: _value(p, i, list(costs)) for p in here}
                own = {p.key: spaces[p.key] for p in here}
                study.add_trial(create_trial(state=TrialState.COMPLETE, value=cost, params=values, distributions=own))
            better = max(0.1, min(0.5, BETTER / len(costs)))
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=better))
    finally:
        optuna.logging.set_verbosity(before)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _distribution(parameter: Parameter, places: Sequence[int]) -> Any:
    if not _continuous(parameter, places):
        return CategoricalDistribution(sorted({label_of(parameter.values[i]) for i in places if _has(parameter, i)}))
    numbers = [float(parameter.values[i]) for i in places if _has(parameter, i)]
    return FloatDistribution(min(numbers), max(numbers), log=parameter.log)


def _continuous(parameter: Parameter, places: Sequence[int]) -> bool:
    """Whether it has more than a few values; a density over a range finds differences in two or three that are none."""
    return parameter.numeric and len({parameter.values[i] for i in places if _has(parameter, i)}) > FEW


def _has(parameter: Parameter, run: int) -> bool:
    """Whether a run has a value of it; to be off is one among kinds, and none among numbers."""
    return parameter.has(run) and not (parameter.numeric and parameter.values[run] is None)


def _value(parameter: Parameter, run: int, places: Sequence[int]) -> Any:
    value = parameter.values[run]
    return float(value) if _continuous(parameter, places) else label_of(value)
