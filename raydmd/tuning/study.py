"""A sweep's trials in Optuna's storage: the one truth that every cluster and every restart goes by.

A trial is claimed by one cluster, beats while it runs, and is told once. One whose cluster died is given back, with its
number's folder, so that its run goes on from its last checkpoint where the next cluster sees the same storage.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from raydmd.errors import InputError
from raydmd.tuning.population import Entry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.recipe import Recipe
    from raydmd.tuning.spec import Sweep

BEAT = 10
"""Seconds between signs of life of a running trial."""
GRACE = 60
"""Seconds of silence after which a trial is taken for lost."""
RETRIES = 5
"""Times that a trial may be lost."""
READY = 60.0
"""Seconds that another cluster may take to set up the study it has just made."""
AT = "at "
"""Before the cycle, in the name of what keeps an evaluation's figures."""
ERROR, OWNER, SECONDS, LINEAGE = "error", "owner", "gpu_seconds", "lineage"
DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}


@dataclass(frozen=True)
class Claim:
    """A trial that this cluster runs.

    Attributes:
        number: of the trial.
        root: number that its folder is called after: of the first attempt.
        changes: of the recipe.
    """

    number: int
    root: int
    changes: dict[str, Any]


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
    lineage: tuple[Entry, ...] = ()

    @property
    def trained(self) -> int:
        """Cycles of its last evaluation."""
        return max(self.at, default=0)


class Study:
    """A sweep's study.

    Args:
        spec: the sweep.
        base: the recipe that trials differ from.
        url: of the storage.
        cluster: who claims.

    Raises:
        InputError: if the storage can't be used, or its study of this name is another sweep's.
    """

    def __init__(self, spec: Sweep, base: Recipe, url: str, cluster: str) -> None:
        self.spec, self._base, self._cluster, self._url = spec, base, cluster, url
        self._mine: dict[int, int] = {}
        facts, storage = spec.facts(base), storage_of(url)
        goals = [DIRECTIONS[goal] for goal in spec.objectives.values()]
        try:
            with quiet():
                self._study = optuna.create_study(
                    study_name=spec.name, storage=storage, directions=goals, sampler=RandomSampler()
                )
            for point in spec.grid(base) if spec.search.kind == "grid" else ():
                self._study.enqueue_trial(point)
            self._study.set_user_attr("facts", facts)
        except DuplicatedStudyError:
            self._study = optuna.load_study(study_name=spec.name, storage=storage, sampler=RandomSampler())
            self._agrees(facts)
        except SQLAlchemyError as error:
            raise InputError(f"the study's storage {shown(url)} can't be used: {_first(error)}") from None
        self._storage = storage

    def claim(self) -> Claim | None:
        """A trial to run; ``None`` if there is none now."""
        self._rescue()
        waiting = any(t.state == TrialState.WAITING for t in self._trials())
        if not waiting and (self.spec.search.kind == "grid" or self.taken() >= self.budget):
            return None
        with quiet():
            trial = self._study.ask()
        number = trial.number
        before = sum(counts(t) for t in self._trials() if t.number < number)
        if not waiting and before >= self.budget:  # another cluster was a moment earlier
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        self._study.sampler = self._sampler(number)
        self._mine[number] = trial._trial_id
        self.beat()
        trial.set_user_attr(OWNER, self._cluster)
        changes = self.spec.changes(self._base, trial)
        trial.set_user_attr("changes", changes)
        return Claim(number, root_of(self._frozen(number)), changes)

    @property
    def budget(self) -> int:
        """Trials in all."""
        return self.spec.budget.trials

    def taken(self) -> int:
        """Trials that are settled, run or wait."""
        return sum(counts(t) for t in self._trials())

    def over(self) -> bool:
        """Whether nothing is left to run, here or elsewhere."""
        states = [t.state for t in self._trials()]
        busy = any(s in (TrialState.RUNNING, TrialState.WAITING) for s in states)
        return not busy and (self.spec.search.kind == "grid" or self.taken() >= self.budget)

    def beat(self) -> None:
        """Say that this cluster's trials are alive."""
        for trial_id in list(self._mine.values()):
            with contextlib.suppress(UpdateFinishedTrialError):
                self._storage.record_heartbeat(trial_id)

    def note(self, number: int, cycle: int, figures: Mapping[str, float], *, gpu_seconds: float = 0.0) -> None:
        """Keep what an evaluation of a trial has found."""
        found = {k: float(figures[k]) for k in self.spec.objectives if k in figures}
        with contextlib.suppress(UpdateFinishedTrialError):  # it was taken for lost: then another has it
            self._storage.set_trial_user_attr(self._mine[number], f"{AT}{cycle}", found)
            self._storage.set_trial_user_attr(self._mine[number], SECONDS, gpu_seconds)

    def numbers(self, number: int) -> dict[str, Any]:
        """What a trial's settings were made of when it was first claimed."""
        return dict(self._frozen(number).params)

    def descend(self, number: int, lineage: Sequence[Entry]) -> None:
        """Keep which settings a member of a population has had; the last ones are its own now."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._mine[number], LINEAGE, [e.plain() for e in lineage])
            self._storage.set_trial_user_attr(self._mine[number], "changes", lineage[-1].changes)

    def finished(self, number: int, figures: Mapping[str, float]) -> None:
        """Tell a trial's end; one that has no figure of an objective has failed."""
        if missing := [k for k in self.spec.objectives if k not in figures]:
            self.failed(number, f"its evaluation has no {', '.join(missing)}")
            return
        self._tell(number, TrialState.COMPLETE, [float(figures[k]) for k in self.spec.objectives])

    def stopped_early(self, number: int) -> None:
        """Tell that a trial was not worth going on with."""
        self._tell(number, TrialState.PRUNED)

    def failed(self, number: int, why: str) -> None:
        """Tell that a trial's run failed; it is not tried again."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._mine[number], ERROR, why)
        self._tell(number, TrialState.FAIL)

    def give_back(self) -> int:
        """Let others, or the next command, go on with this cluster's trials; returns how many there were.

        Those that a command before this one has left are among them: a cluster has one command at a time.
        """
        mine = [t for t in self._trials() if t.state == TrialState.RUNNING and t.user_attrs.get(OWNER) == self._cluster]
        for trial in mine:
            self._lose(trial)
        self._mine.clear()
        return len(mine)

    def rows(self) -> list[Row]:
        """All trials, in order."""
        return [row_of(t, list(self.spec.objectives)) for t in self._trials()]

    def gpu_hours(self) -> float:
        """Of all clusters' trials so far."""
        return sum(float(t.user_attrs.get(SECONDS, 0.0)) for t in self._trials()) / 3600

    def attribute(self, name: str, make: Any = None) -> Any:
        """What all clusters share, made by the first."""
        found = self._study.user_attrs
        if name not in found and make is not None:
            self._study.set_user_attr(name, make())
        return self._study.user_attrs.get(name)

    def _rescue(self) -> None:
        """Give back what dead clusters have left."""
        with quiet():
            fail_stale_trials(self._study)
        for trial in self._trials():
            # Claimed by somebody who died before the first sign of life.
            unborn = trial.state == TrialState.RUNNING and OWNER not in trial.user_attrs
            if unborn and trial.datetime_start and datetime.now() - trial.datetime_start > timedelta(seconds=GRACE):
                self._lose(trial)

    def _lose(self, trial: FrozenTrial) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            if self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL):
                with quiet():
                    RetryHeartbeatStaleTrialCallback(None)(self._study, copy.deepcopy(trial))  # it writes to it

    def _tell(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        # Told already, if it was taken for lost meanwhile: then another has it.
        self._study.tell(number, list(values) if values is not None else None, state=state, skip_if_finished=True)
        self._mine.pop(number, None)

    def _agrees(self, facts: Mapping[str, Any]) -> None:
        deadline = time.monotonic() + READY
        while (before := self._study.user_attrs.get("facts")) is None:
            if time.monotonic() > deadline:
                raise InputError(
                    f"study {self.spec.name!r} in {shown(self._url)} was begun and never set up, by a command that "
                    "died: delete it, or give another name"
                )
            time.sleep(0.5)
        differ = sorted(_different(before, facts))
        if differ:
            raise InputError(
                f"study {self.spec.name!r} in {shown(self._url)} is of another sweep: {', '.join(differ[:8])} differ. "
                "Give the sweep another name"
            )

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _frozen(self, number: int) -> FrozenTrial:
        return next(t for t in self._trials() if t.number == number)

    def _sampler(self, number: int) -> BaseSampler:
        # Anew for each trial, seeded by its number: the same whoever asks, and after whatever restart.
        seed = self.spec.search.seed * 1_000_003 + number
        if self.spec.search.kind == "tpe" and not self.spec.population:  # whose members all start knowing nothing
            with quiet():
                return TPESampler(seed=seed, n_startup_trials=self.spec.search.startup, constant_liar=True)
        return RandomSampler(seed=seed)


def storage_of(url: str) -> RDBStorage:
    """Optuna's storage, with signs of life.

    Raises:
        InputError: if it can't be reached.
    """
    try:
        with quiet():
            callback = RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)
            return RDBStorage(
                url,
                heartbeat_interval=BEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=callback,
                engine_kwargs={"pool_pre_ping": True},
            )
    except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
        raise InputError(f"the study's storage {shown(url)} can't be used: {_first(error)}") from None


def rows_of(spec: Sweep, url: str) -> list[Row]:
    """The trials of a study that somebody else runs.

    Raises:
        InputError: if there is no such study.
    """
    try:
        study = optuna.load_study(study_name=spec.name, storage=storage_of(url))
    except KeyError:
        raise InputError(f"{shown(url)} has no study {spec.name!r}: was it begun?") from None
    return [row_of(t, list(spec.objectives)) for t in study.get_trials(deepcopy=False)]


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial takes a place of the budget: a lost one's is its successor's."""
    return trial.state != TrialState.FAIL or ERROR in trial.user_attrs


def root_of(trial: FrozenTrial) -> int:
    """Number of a trial's first attempt."""
    history: list[int] = trial.system_attrs.get("retry_history", [])
    return history[0] if history else trial.number


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
        at={int(k.removeprefix(AT)): dict(v) for k, v in sorted(attrs.items()) if k.startswith(AT)},
        error=str(attrs.get(ERROR, "")),
        lineage=tuple(Entry(**entry) for entry in attrs.get(LINEAGE, ())),
    )


@contextlib.contextmanager
def quiet() -> Any:
    """Optuna's log is not a run's; what is experimental in it is tested here."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # Signs of life are given by this module.
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        yield


def shown(url: str) -> str:
    """A storage's address without its password."""
    head, at, tail = url.rpartition("@")
    return f"{head.partition('://')[0]}://...@{tail}" if at else url


def _different(a: Any, b: Any, key: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return {k for name in a.keys() | b.keys() for k in _different(a.get(name), b.get(name), f"{key}.{name}")}
    return set() if a == b else {key.removeprefix(".")}


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
