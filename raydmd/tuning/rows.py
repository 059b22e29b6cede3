"""A study's trials as everybody but the study sees them, and the names under which Optuna keeps what is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from raydmd.tuning.population import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

AT = "at "
"""Before the cycle, in the name of what keeps an evaluation's figures."""
ERROR, OWNER, SECONDS, REPEAT, OF, LINEAGE = "error", "owner", "gpu_seconds", "repeat", "of", "lineage"
BORN, DEATHS, VOID = "born", "deaths", "void"
"""The number under which it was claimed; how often its process has died; nobody is to run it."""
STOP = "stops"
"""Of a study: whom each word to stop was for, the first one first; null is for all."""


@dataclass(frozen=True)
class Row:
    """A trial as the tables show it.

    Attributes:
        number: of the trial.
        root: that its folder is called after.
        state: ``finished``, ``stopped early``, ``running``, ``waiting``, ``failed`` or ``lost``.
        cluster: that ran it.
        changes: of the recipe, as text by key.
        values: of the objectives, once it has finished.
        at: figures of its evaluations by cycle.
        error: why it failed.
        of: trial whose setting it repeats.
        spread: standard deviations of the values, of a setting that was run several times.
        runs: its trials.
        lineage: settings that a member of a population has had, the first ones first.
    """

    number: int
    root: int
    state: str
    cluster: str
    changes: dict[str, Any]
    values: dict[str, float]
    at: dict[int, dict[str, float]]
    error: str
    of: int | None = None
    spread: dict[str, float] = field(default_factory=dict)
    runs: tuple[int, ...] = ()
    lineage: tuple[Entry, ...] = ()

    @property
    def trained(self) -> int:
        """Cycles of its last evaluation."""
        return max(self.at, default=0)


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial takes a place of the budget: a lost one's is its successor's."""
    return trial.state != TrialState.FAIL or ERROR in trial.user_attrs


def is_given(trial: FrozenTrial) -> bool:
    """Whether it was put into the study to be claimed, rather than drawn by the one who claims it."""
    return bool({"fixed_params", "retry_history"} & trial.system_attrs.keys())


def is_setting(trial: FrozenTrial) -> bool:
    """Whether it counts, and is the first run of its setting."""
    return counts(trial) and not trial.user_attrs.get(REPEAT)


def root_of(trial: FrozenTrial) -> int:
    """Number of a trial's first attempt."""
    history: list[int] = trial.system_attrs.get("retry_history", [])
    return history[0] if history else trial.number


def figures_at(trial: FrozenTrial) -> dict[int, dict[str, float]]:
    """Figures of a trial's evaluations, in the order of their cycles."""
    found = {int(k.removeprefix(AT)): dict(v) for k, v in trial.user_attrs.items() if k.startswith(AT)}
    return dict(sorted(found.items()))


def row_of(trial: FrozenTrial, objectives: Sequence[str]) -> Row:
    """A trial as the tables show it."""
    states = {
        TrialState.COMPLETE: "finished",
        TrialState.PRUNED: "stopped early",
        TrialState.RUNNING: "running",
        TrialState.WAITING: "waiting",
        TrialState.FAIL: "failed" if ERROR in trial.user_attrs else "lost",
    }
    attrs = trial.user_attrs
    values = trial.values if trial.state == TrialState.COMPLETE else None
    return Row(
        number=trial.number,
        root=root_of(trial),
        state=states[trial.state],
        cluster=str(attrs.get(OWNER, "")),
        changes=dict(attrs.get("changes", {})),
        values=dict(zip(objectives, values, strict=True)) if values else {},
        at=figures_at(trial),
        error=str(attrs.get(ERROR, "")),
        of=attrs.get(OF),
        lineage=tuple(Entry(**entry) for entry in attrs.get(LINEAGE, ())),
    )
