"""A sweep's trials in Optuna's storage: the one truth that every cluster and every restart goes by.

A trial is claimed by one cluster, beats while it runs, and is told once. One whose cluster died is given back, with its
number's folder, so that its run goes on from its last checkpoint where the next cluster sees the same storage.
"""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from raydmd.errors import InputError
from raydmd.redact import hidden
from raydmd.tuning.repeats import SEED
from raydmd.tuning.rows import (
    AT,
    BORN,
    DEATHS,
    ERROR,
    LINEAGE,
    OF,
    OWNER,
    REPEAT,
    SECONDS,
    STOP,
    VOID,
    Row,
    figures_at,
    is_given,
    is_setting,
    root_of,
    row_of,
)
from raydmd.tuning.storage import GRACE, RETRIES, Patience, first_line, is_outage, patiently, quiet, storage_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.recipe import Recipe
    from raydmd.tuning.population import Entry
    from raydmd.tuning.spec import Sweep

READY = 60.0
"""Seconds that another cluster may take to set up the study it has just made."""
DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}


@dataclass(frozen=True)
class Claim:
    """A trial that this cluster runs.

    Attributes:
        number: of the trial.
        root: number that its folder is called after: of the first attempt.
        changes: of the recipe.
        known: cycles whose evaluations earlier attempts have told.
    """

    number: int
    root: int
    changes: dict[str, Any]
    known: frozenset[int] = frozenset()


class Study:
    """A sweep's study.

    Args:
        spec: the sweep.
        base: the recipe that trials differ from.
        url: of the storage.
        cluster: who claims.

    Attributes:
        patience: with the storage.

    Raises:
        InputError: if the storage can't be used, or its study of this name is another sweep's.
    """

    def __init__(self, spec: Sweep, base: Recipe, url: str, cluster: str) -> None:
        self.spec, self._base, self._cluster, self._url = spec, base, cluster, url
        self._mine: dict[int, int] = {}
        self._asked: optuna.Trial | None = None
        self.patience = Patience(url)
        facts, storage = spec.facts(base), storage_of(url)
        goals = [DIRECTIONS[goal] for goal in spec.objectives.values()]
        try:
            with quiet():
                self._study = optuna.create_study(
                    study_name=spec.name, storage=storage, directions=goals, sampler=RandomSampler()
                )
            for i, point in enumerate(spec.grid(base) if spec.search.kind == "grid" else ()):
                self._study.enqueue_trial(point, user_attrs={REPEAT: 0})
                for repeat in range(1, spec.repeats):
                    self._study.enqueue_trial(point, user_attrs={REPEAT: repeat, OF: i * spec.repeats})
            self._study.set_user_attr("facts", facts)
        except DuplicatedStudyError:
            self._study = optuna.load_study(study_name=spec.name, storage=storage, sampler=RandomSampler())
            self._agrees(facts)
        except SQLAlchemyError as error:
            raise InputError(f"the study's storage {hidden(url)} can't be used: {first_line(error)}") from None
        self._storage = storage
        self._stops = self._study.user_attrs.get(STOP, [])

    @patiently
    def claim(self) -> Claim | None:
        """A trial to run; ``None`` if there is none now."""
        try:
            return self._claimed()
        except UpdateFinishedTrialError:  # it took so long that the trial was taken for lost
            if self._asked:
                self._mine.pop(self._asked.number, None)
            self._asked = None
            return None

    def _claimed(self) -> Claim | None:
        if self._asked is None:
            self._rescue()
            trials, grid = self._trials(), self.spec.search.kind == "grid"
            waiting = any(t.state == TrialState.WAITING for t in trials)
            if not waiting and (grid or sum(is_setting(t) for t in trials) >= self.budget):
                return None
            with quiet():
                self._asked = self._study.ask()
        trial = self._asked  # kept until it is a claim: an outage in between must not leave it behind
        number = trial.number
        if not is_given(frozen := self._frozen(number)):  # drawn here, since another cluster was a moment earlier
            before = sum(is_setting(t) for t in self._trials() if t.number < number)
            if self.spec.search.kind == "grid" or before >= self.budget:
                trial.set_user_attr(VOID, True)
                self._tell(number, TrialState.FAIL)
                self._asked = None
                return None
        self._study.sampler = self._sampler(number)
        self._mine[number] = trial._trial_id
        self.beat()
        trial.set_user_attr(OWNER, self._cluster)
        trial.set_user_attr(BORN, number)
        trial.set_user_attr(SECONDS, 0.0)  # those of an attempt before this one are that one's
        changes, root = self.spec.changes(self._base, trial), root_of(frozen)
        if self.spec.repeats > 1:
            if REPEAT not in trial.user_attrs:
                self._repeat(trial, root)
            changes[SEED] = self._base.seed + int(trial.user_attrs.get(REPEAT, 0))
        trial.set_user_attr("changes", changes)
        self._asked = None
        return Claim(number, root, changes, frozenset(figures_at(frozen)))

    @property
    def budget(self) -> int:
        """Settings in all; a grid's are all its points."""
        return len(self.spec.grid(self._base)) if self.spec.search.kind == "grid" else self.spec.budget.trials

    @patiently
    def taken(self) -> int:
        """Settings that are settled, run or wait."""
        return sum(is_setting(t) for t in self._trials())

    @patiently
    def over(self) -> bool:
        """Whether nothing is left to run, here or elsewhere."""
        states = [t.state for t in self._trials()]
        busy = any(s in (TrialState.RUNNING, TrialState.WAITING) for s in states)
        return not busy and (self.spec.search.kind == "grid" or self.taken() >= self.budget)

    def beat(self) -> None:
        """Say that this cluster's trials are alive, if the storage is there."""
        try:
            for trial_id in list(self._mine.values()):
                with contextlib.suppress(UpdateFinishedTrialError):
                    self._storage.record_heartbeat(trial_id)
        except (SQLAlchemyError, StorageInternalError) as error:
            if not is_outage(error):
                raise
            self.patience.missed(error)

    def told_to_stop(self) -> bool:
        """Whether somebody has told this cluster, or all, to stop since this command began."""
        try:
            new = self._study.user_attrs.get(STOP, [])[len(self._stops) :]
        except (SQLAlchemyError, StorageInternalError) as error:
            if not is_outage(error):
                raise
            return False
        return any(who in (None, self._cluster) for who in new)

    @patiently
    def note(self, number: int, cycle: int, figures: Mapping[str, float], *, gpu_seconds: float = 0.0) -> bool:
        """Keep what an evaluation of a trial has found; whether the trial is still this cluster's."""
        found = {k: float(figures[k]) for k in self.spec.objectives if k in figures}
        try:
            self._storage.set_trial_user_attr(self._mine[number], f"{AT}{cycle}", found)
            self._storage.set_trial_user_attr(self._mine[number], SECONDS, gpu_seconds)
            if len(self.spec.objectives) == 1 and found:  # what the estimator ranks stopped trials by
                self._storage.set_trial_intermediate_value(self._mine[number], cycle, next(iter(found.values())))
        except UpdateFinishedTrialError:  # it was taken for lost
            return False
        return True

    @patiently
    def numbers(self, number: int) -> dict[str, Any]:
        """What a trial's settings were made of when it was first claimed."""
        return dict(self._frozen(number).params)

    @patiently
    def descend(self, number: int, lineage: Sequence[Entry]) -> None:
        """Keep which settings a member of a population has had; the last ones are its own now."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._mine[number], LINEAGE, [e.plain() for e in lineage])
            self._storage.set_trial_user_attr(self._mine[number], "changes", lineage[-1].changes)

    @patiently
    def finished(self, number: int, figures: Mapping[str, float]) -> None:
        """Tell a trial's end; one that has no figure of an objective has failed."""
        if missing := [k for k in self.spec.objectives if k not in figures]:
            self.failed(number, f"its evaluation has no {', '.join(missing)}")
            return
        self._tell(number, TrialState.COMPLETE, [float(figures[k]) for k in self.spec.objectives])

    @patiently
    def stopped_early(self, number: int) -> None:
        """Tell that a trial was not worth going on with."""
        self._tell(number, TrialState.PRUNED)

    @patiently
    def failed(self, number: int, why: str) -> None:
        """Tell that a trial's run failed; it is not tried again."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._mine[number], ERROR, why)
        self._tell(number, TrialState.FAIL)

    @patiently
    def died(self, number: int, why: str) -> None:
        """Tell that a trial's process is gone: the trial goes on elsewhere, unless that happens every time."""
        deaths = int(self._frozen(number).user_attrs.get(DEATHS, 0)) + 1
        if deaths > RETRIES:
            self.failed(number, f"{why}; {deaths} times")
            return
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(self._mine[number], DEATHS, deaths)
        self.let_go(number)

    @patiently
    def let_go(self, number: int) -> None:
        """Let others, or this cluster later, go on with a trial."""
        if number in self._mine:
            self._lose(self._frozen(number))
            self._mine.pop(number)

    @patiently
    def give_back(self) -> int:
        """Let others, or the next command, go on with this cluster's trials; returns how many there were.

        Those that a command before this one has left are among them: a cluster has one command at a time.
        """
        mine = [t for t in self._trials() if t.state == TrialState.RUNNING and t.user_attrs.get(OWNER) == self._cluster]
        for trial in mine:
            self._lose(trial)
        self._mine.clear()
        return len(mine)

    @patiently
    def rows(self) -> list[Row]:
        """All trials, in order."""
        return [row_of(t, list(self.spec.objectives)) for t in self._trials()]

    @patiently
    def gpu_hours(self) -> float:
        """Of all clusters' trials so far."""
        held = (t for t in self._trials() if t.state != TrialState.WAITING)  # one that is put back has a copy of them
        return sum(float(t.user_attrs.get(SECONDS, 0.0)) for t in held) / 3600

    @patiently
    def attribute(self, name: str, make: Any = None) -> Any:
        """What all clusters share, made by the first."""
        if name not in self._study.user_attrs and make is not None:
            mine = self._first(name)
            deadline = time.monotonic() + (0 if mine else READY)
            while name not in self._study.user_attrs and time.monotonic() < deadline:
                time.sleep(0.5)
            if name not in self._study.user_attrs:  # whoever was first has died over it
                self._study.set_user_attr(name, make())
        return self._study.user_attrs.get(name)

    def _first(self, name: str) -> bool:
        """Whether nobody has asked this before: what a database makes once is a study's name."""
        try:
            with quiet():
                optuna.create_study(study_name=f"{self.spec.name}: {name}", storage=self._storage)
        except DuplicatedStudyError:
            return False
        return True

    def _repeat(self, trial: optuna.Trial, root: int) -> None:
        """Have the setting of a trial run again, with other seeds; a cluster may have died over it."""
        there = {t.user_attrs.get(REPEAT) for t in self._trials() if t.user_attrs.get(OF) == root}
        for repeat in range(1, self.spec.repeats):
            if repeat not in there:
                self._study.enqueue_trial(trial.params, user_attrs={REPEAT: repeat, OF: root})
        trial.set_user_attr(REPEAT, 0)

    def _rescue(self) -> None:
        """Give back what dead clusters have left."""
        if time.monotonic() - self.patience.since < GRACE:
            return  # after an outage others need time for a sign of life, as this cluster does
        with quiet():
            fail_stale_trials(self._study)
        for trial in self._trials():
            # Claimed by somebody who died before the first sign of life.
            unborn = trial.state == TrialState.RUNNING and trial.user_attrs.get(BORN) != trial.number
            if unborn and trial.datetime_start and datetime.now() - trial.datetime_start > timedelta(seconds=GRACE):
                self._lose(trial)
        self._follow_up()

    def _follow_up(self) -> None:
        """Have lost trials run again that nobody has put back: whoever was at it died, or the storage was away."""
        trials = self._trials()
        followed = {number for t in trials for number in t.system_attrs.get("retry_history", ())}
        for trial in trials:
            lost = trial.state == TrialState.FAIL and not {ERROR, VOID} & trial.user_attrs.keys()
            if not lost or trial.number in followed or trial.datetime_complete is None:
                continue
            if datetime.now() - trial.datetime_complete > timedelta(seconds=GRACE):
                self._again(trial)

    def _lose(self, trial: FrozenTrial) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            if self._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL):
                self._again(trial)

    def _again(self, trial: FrozenTrial) -> None:
        with quiet():
            RetryHeartbeatStaleTrialCallback(None)(self._study, copy.deepcopy(trial))  # it writes to it

    def _tell(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        # Told already, if it was taken for lost meanwhile: then another has it.
        self._study.tell(number, list(values) if values is not None else None, state=state, skip_if_finished=True)
        self._mine.pop(number, None)

    def _agrees(self, facts: Mapping[str, Any]) -> None:
        deadline, seen = time.monotonic() + READY, 0
        while (before := self._study.user_attrs.get("facts")) is None:
            if (now := len(self._study.get_trials(deepcopy=False))) > seen:  # a grid takes a while
                deadline, seen = time.monotonic() + READY, now
            if time.monotonic() > deadline:
                raise InputError(
                    f"study {self.spec.name!r} in {hidden(self._url)} was begun and never set up, by a command that "
                    "died: delete it, or give another name"
                )
            time.sleep(0.5)
        differ = sorted(_different(before, facts))
        if differ:
            raise InputError(
                f"study {self.spec.name!r} in {hidden(self._url)} is of another sweep: {', '.join(differ[:8])} differ. "
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


def rows_of(spec: Sweep, url: str) -> list[Row]:
    """The trials of a study that somebody else runs.

    Raises:
        InputError: if there is no such study.
    """
    return [row_of(t, list(spec.objectives)) for t in _opened(spec, url).get_trials(deepcopy=False)]


def tell_to_stop(spec: Sweep, url: str, cluster: str | None) -> None:
    """Have a cluster's command stop, or all clusters', wherever they run.

    Raises:
        InputError: if there is no such study, or no such cluster in it.
    """
    study = _opened(spec, url)
    known = {t.user_attrs[OWNER] for t in study.get_trials(deepcopy=False) if OWNER in t.user_attrs}
    if cluster is not None and cluster not in known:
        raise InputError(
            f"study {spec.name!r} has no cluster {cluster!r}; it has {', '.join(sorted(known)) or 'none yet'}"
        )
    study.set_user_attr(STOP, [*study.user_attrs.get(STOP, []), cluster])


def _opened(spec: Sweep, url: str) -> optuna.Study:
    try:
        return optuna.load_study(study_name=spec.name, storage=storage_of(url))
    except KeyError:
        raise InputError(f"{hidden(url)} has no study {spec.name!r}: was it begun?") from None


def _different(a: Any, b: Any, key: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return {k for name in a.keys() | b.keys() for k in _different(a.get(name), b.get(name), f"{key}.{name}")}
    return set() if a == b else {key.removeprefix(".")}
