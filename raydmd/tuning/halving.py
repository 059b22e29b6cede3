"""Early stopping that counts all trials of a study: Ray Tune's asynchronous halving, told of other clusters' too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import AsyncHyperBandScheduler

if TYPE_CHECKING:
    from raydmd.recipe import Recipe
    from raydmd.tuning.search import StudySearch
    from raydmd.tuning.spec import Sweep
    from raydmd.tuning.study import Study


@dataclass(frozen=True)
class _Elsewhere:
    """A trial that another cluster runs, or a command before this one has run."""

    trial_id: str


class Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving (arXiv:1810.05934) over cycles, by the sweep's first objective.

    Args:
        study: has the evaluations of all.
        search: knows which trials are this process's own.
        **settings: of Ray Tune's scheduler.
    """

    def __init__(self, study: Study, search: StudySearch, **settings: Any) -> None:
        super().__init__(**settings)
        self._study, self._search = study, search
        self._heard: set[tuple[int, int]] = set()

    @classmethod
    def of(cls, spec: Sweep, base: Recipe, study: Study, search: StudySearch) -> Halving:
        """For a sweep that has ``stopping``."""
        assert spec.stopping is not None
        metric, goal = next(iter(spec.objectives.items()))
        return cls(
            study,
            search,
            time_attr="cycle",
            metric=metric,
            mode=goal,
            max_t=base.training.cycles,
            grace_period=spec.stopping.grace * base.evaluation.every,
            reduction_factor=spec.stopping.reduction,
            stop_last_trials=False,
        )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See :class:`ray.tune.schedulers.TrialScheduler`."""
        self._hear(tune_controller)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        # One that goes on after an interruption tells its evaluations again: it has been judged by them.
        known = int(result[self._time_attr]) in self._search.known(trial.trial_id)
        return self.CONTINUE if known else decision

    def _hear(self, controller: Any) -> None:
        """Take in what others have found."""
        for row in self._study.rows():
            if row.root in self._search.roots or row.state == "lost":
                continue
            for cycle, figures in row.at.items():
                if (row.root, cycle) in self._heard or self._metric not in figures:
                    continue
                self._heard.add((row.root, cycle))
                stub = _Elsewhere(f"study-{row.root}")
                if stub.trial_id not in self._trial_info:
                    super().on_trial_add(controller, stub)  # type: ignore[arg-type]  # its name is all that is used
                found = {self._time_attr: cycle, self._metric: figures[self._metric]}
                super().on_trial_result(controller, stub, found)  # type: ignore[arg-type]
