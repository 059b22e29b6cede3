"""The collapse monitor: fed with a row of metrics per cycle, it says when a run goes wrong and what to do. Pure.

DMD's losses mean little, so the monitor watches what their failures look like (DMD2, arXiv:2405.14867, section
4.2: brightness oscillates where the critic lags; Decoupled DMD: the spread of samples rises under CFG alone).
Every signal is a *pressure*: what is measured over what is allowed, 1 at the limit. All ranks must feed equal rows,
and then decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Literal

from raydmd.errors import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raydmd.recipe_monitor import Monitor as Settings

Action = Literal["warn", "stop", "rollback", "raise_ratio", "cut_rate"]

CLEAR = 0.8
"""Pressure below which a raised alarm calms down; between it and 1 nothing changes."""

BAND = "fake/error_"
"""How the keys of the fake score's error by noise band begin."""

SPREAD, REFERENCE, CENTRE = "student/x0_std", "teacher/x0_std", "teacher/x0_mean"
RAISED = "monitor/raised/"
"""Before the names of raised signals in a run's metrics."""

NARROW, WIDE = "spread/narrow", "spread/wide"

TINY = 1e-12


@dataclass(frozen=True)
class Alarm:
    """Something went wrong.

    Attributes:
        kind: the signal under the highest pressure, named like its limit in the recipe.
        message: what is measured, of every signal that fired, and against what.
        action: what to do about it.
        measures: those before the action.
    """

    kind: str
    message: str
    action: Action
    measures: Measures


@dataclass
class Memory:
    """What the monitor remembers of a phase: plain numbers, which JSON keeps exactly.

    Attributes:
        rows: seen in this phase.
        recent: the last values of each metric, oldest first.
        start: level of each metric when the phase had settled.
        best: lowest level of each noise band's error since then; narrowest and widest spread of the student, in that
            of the teacher's first answers.
        streak: rows in a row over the limit, by kind.
        calm: rows in a row below :data:`CLEAR`, by raised kind.
        raised: rows since it last fired, by raised kind.
    """

    rows: int = 0
    recent: dict[str, list[float]] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    streak: dict[str, int] = field(default_factory=dict)
    calm: dict[str, int] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measures:
    """What the actions so far have changed; outlives phases and rollbacks.

    Attributes:
        fake_updates: per student update.
        rate: factor on both roles' rates.
        actions: taken so far.
        attempt: rollbacks so far; salts the stream's seed, since the same draws would collapse again.
    """

    fake_updates: int
    rate: float = 1.0
    actions: int = 0
    attempt: int = 0

    def after(self, action: Action, settings: Settings) -> Measures:
        """The measures once an action is taken; ``warn`` and ``stop`` change nothing."""
        if action in ("warn", "stop"):
            return self
        back = action == "rollback"
        return replace(
            self,
            fake_updates=settings.raised(self.fake_updates) if back or action == "raise_ratio" else self.fake_updates,
            rate=self.rate * settings.cut if back or action == "cut_rate" else self.rate,
            actions=self.actions + 1,
            attempt=self.attempt + back,
        )


class Monitor:
    """Watches one run.

    An alarm needs ``patience`` rows over its limit in a row, in a phase that has settled. It stays raised, and
    silent, until it was calm for as many rows; one that stays over its limit fires again after ``settle`` rows.

    Args:
        settings: limits and actions.
        fake_updates: per student update, before any action.

    Attributes:
        memory: of this phase; replaced to restore.
        measures: what actions have changed; replaced to restore.
        pressures: of the last row, by kind; not needed to resume.
    """

    def __init__(self, settings: Settings, fake_updates: int) -> None:
        self._settings = settings
        self.memory = Memory()
        self.measures = Measures(fake_updates)
        self.pressures: dict[str, float] = {}

    @property
    def reference(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the teacher's answers in the phase's first rows, once there were enough.

        Later answers follow the samples they are about, and would excuse a student that drifts.
        """
        start = self.memory.start
        return (start[CENTRE], start[REFERENCE]) if start.keys() >= {CENTRE, REFERENCE} else None

    def begin(self) -> None:
        """Forget the last phase."""
        self.memory, self.pressures = Memory(), {}

    def see(self, row: Mapping[str, float]) -> Alarm | None:
        """Take in one cycle's metrics, equal on all ranks.

        Args:
            row: ``student/gradient``, ``student/x0_mean``, ``student/x0_std``, ``student/saturation``,
                ``student/diversity``, ``teacher/x0_mean``, ``teacher/x0_std`` and ``fake/error_*``, each where it was
                measured.

        Returns:
            What fired, if anything; its action is counted in :attr:`measures` already.

        Raises:
            NonFiniteError: if a metric is not finite.
        """
        self._remember(row)
        if self.memory.rows < self._settings.settle:
            return None
        measured = self._measured()
        self.pressures = {kind: pressure for kind, (pressure, _) in measured.items()}
        fired = [kind for kind, pressure in self.pressures.items() if self._fires(kind, pressure)]
        if not fired:
            return None
        return self._alarm(max(fired, key=self.pressures.__getitem__), "; ".join(measured[k][1] for k in fired))

    def _alarm(self, kind: str, message: str) -> Alarm:
        s, action = self._settings, self._settings.action
        if action not in ("warn", "stop") and self.measures.actions >= s.limit:
            action, message = "stop", f"{message} (after monitor.limit={s.limit} actions)"
        alarm = Alarm(kind, message, action, self.measures)
        if action == "stop":
            self.stopped(alarm)
        self.measures = self.measures.after(action, s)
        return alarm

    def stopped(self, alarm: Alarm) -> None:
        """The run stops for an alarm: nothing of its action has happened, and a resumed run gets as many rows again."""
        self.measures = alarm.measures
        self.memory.streak, self.memory.calm, self.memory.raised = {}, {}, {}

    def _remember(self, row: Mapping[str, float]) -> None:
        m, s = self.memory, self._settings
        for key, value in row.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"metric {key} is {value}; the last checkpoint is kept")
            m.recent[key] = [*m.recent.get(key, []), value][-self._length(key) :]
        m.rows += 1
        if m.rows >= s.window and m.recent.keys() >= {SPREAD, REFERENCE}:
            for key in {CENTRE, REFERENCE} & m.recent.keys():
                m.start.setdefault(key, median(m.recent[key]))
            ratio = self._spread()
            m.best[NARROW] = min(m.best.get(NARROW, math.inf), ratio)
            m.best[WIDE] = max(m.best.get(WIDE, 0.0), ratio)
        if m.rows < s.settle:
            return
        for key, values in m.recent.items():
            # Measured too seldom to have a level yet: its start comes later.
            if key not in m.start and (key != "student/diversity" or len(values) == s.probes):
                m.start[key] = median(values)
            if key.startswith(BAND) and len(values) >= s.window:
                m.best[key] = min(m.best.get(key, math.inf), _level(key, values))

    def _length(self, key: str) -> int:
        s = self._settings
        if key.startswith(BAND):
            return max(s.settle, s.window)
        # A gradient is held against its own median, which must not follow a spike before the spike can fire.
        return {"student/diversity": s.probes, "student/gradient": max(s.settle, 2 * s.patience + 1)}.get(key, s.window)

    def _measured(self) -> dict[str, tuple[float, str]]:
        """Pressure and words by kind, of the signals that are on and have been measured."""
        s, m = self._settings, self.memory
        now = {key: _level(key, values) for key, values in m.recent.items()}
        found: dict[str, tuple[float, str]] = {}
        gradients = m.recent.get("student/gradient", [])
        if s.gradient is not None and len(gradients) > 1:
            times = gradients[-1] / max(median(gradients[:-1]), TINY)
            found["gradient"] = times / s.gradient, f"the student's gradient is {times:.1f} of its median"
        lags = {k.removeprefix(BAND): now[k] / max(best, TINY) for k, best in m.best.items() if k.startswith(BAND)}
        if s.fake_error is not None and lags:
            band = max(lags, key=lags.__getitem__)
            words = f"the fake score's error at noise {band} is {lags[band]:.2f} of its best"
            found["fake_error"] = lags[band] / s.fake_error, words
        if s.critic_lag is not None and lags:
            lag = math.exp(sum(math.log(max(v, TINY)) for v in lags.values()) / len(lags))
            found["critic_lag"] = lag / s.critic_lag, f"the fake score lags: its error is {lag:.2f} of its best"
        if s.brightness is not None and m.start.keys() >= {"student/x0_mean", REFERENCE}:
            drift = (now["student/x0_mean"] - m.start["student/x0_mean"]) / max(m.start[REFERENCE], TINY)
            words = f"brightness drifted by {drift:+.2f} of the teacher's spread"
            found["brightness"] = abs(drift) / s.brightness, words
        if s.spread is not None and WIDE in m.best:
            ratio = self._spread()
            # Of what lies on the other side of the teacher's spread nothing can be lost.
            lost = max(ratio / max(m.best[NARROW], 1.0), min(m.best[WIDE], 1.0) / ratio)
            words = f"the student's spread is {ratio:.2f} of the teacher's, and was nearer by a factor of {lost:.1f}"
            found["spread"] = lost / s.spread, words
        if s.saturation is not None and "student/saturation" in m.start:
            rise = now["student/saturation"] - m.start["student/saturation"]
            found["saturation"] = rise / s.saturation, f"{rise:.1%} more of the latents are saturated than at the start"
        if s.diversity is not None and "student/diversity" in m.start:
            share = max(now["student/diversity"], TINY) / max(m.start["student/diversity"], TINY)
            found["diversity"] = s.diversity / share, f"samples of one prompt lie {share:.2f} as far apart as at first"
        return found

    def _spread(self) -> float:
        """The student's spread in that of the teacher's answers when the phase began.

        Guidance widens those and a student starts soft, so only what is lost against its own best tells of trouble.
        """
        return max(median(self.memory.recent[SPREAD]), TINY) / max(self.memory.start[REFERENCE], TINY)

    def _fires(self, kind: str, pressure: float) -> bool:
        m, s = self.memory, self._settings
        m.streak[kind] = m.streak.get(kind, 0) + 1 if pressure > 1 else 0
        persists = m.streak[kind] >= s.patience
        if kind in m.raised:
            m.raised[kind] += 1
            m.calm[kind] = m.calm.get(kind, 0) + 1 if pressure < CLEAR else 0
            if m.calm[kind] >= s.patience:
                del m.raised[kind], m.calm[kind]
                return False
            persists = persists and m.raised[kind] >= s.settle
        if persists:
            m.raised[kind] = 0
        return persists


def _level(key: str, values: list[float]) -> float:
    """What recent values of a metric come to: their median, but of the fake score's errors the geometric mean.

    An error depends on the step at which the rollout left, by a factor of ten at high noise: the median of so few would
    jump with the draw of the steps.
    """
    if not key.startswith(BAND):
        return median(values)
    return math.exp(sum(math.log(max(value, TINY)) for value in values) / len(values))
