"""What the collapse monitor needs of a worker: rows equal on all ranks, a diversity probe, a saved state."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from raydmd.draws import Draws
from raydmd.training.cycle import ERRORS
from raydmd.training.monitor import RAISED, Alarm, Measures, Memory, Monitor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raydmd.models.base import Conditions
    from raydmd.recipe import Recipe
    from raydmd.training.cycle import Actors
    from raydmd.training.session import Session

DIVERSITY = "student/diversity"
KEYS = (
    "student/gradient",
    "student/x0_mean",
    "student/x0_std",
    "student/saturation",
    DIVERSITY,
    "teacher/x0_mean",
    "teacher/x0_std",
    *ERRORS,
)
"""What the monitor is fed with, in one order on all ranks."""


class Watch:
    """The monitor of one worker.

    Args:
        recipe: the run.
        conditions: encoded prompts; the probe takes the first ones.
        session: ranks and device.
    """

    def __init__(self, recipe: Recipe, conditions: Conditions, session: Session) -> None:
        self._settings, self._seed = recipe.monitor, recipe.seed + 2  # 0 and 1 are the stream's and the warm-up's
        self._conditions, self._session = conditions, session
        self._share = recipe.training.batch // session.share[1]
        self.monitor = Monitor(recipe.monitor, recipe.training.fake_updates)

    @property
    def measures(self) -> Measures:
        """What the actions so far have changed."""
        return self.monitor.measures

    def look(self, actors: Actors, metrics: Mapping[str, float]) -> Alarm | None:
        """Feed the monitor with one cycle. All ranks call it and get the same answer.

        Raises:
            NonFiniteError: if a metric is not finite on any rank, on all ranks alike.
        """
        row = dict(metrics)
        if self._settings.diversity is not None and self.monitor.memory.rows % self._settings.every == 0:
            row[DIVERSITY] = self._probe(actors)
        return self.monitor.see(self._over_ranks(row))

    def report(self) -> dict[str, float]:
        """For the metrics: alarms that are raised, each signal's pressure, the diversity last measured."""
        memory = self.monitor.memory
        found = {f"monitor/{kind}": pressure for kind, pressure in self.monitor.pressures.items()}
        if DIVERSITY in memory.recent:
            found[DIVERSITY] = memory.recent[DIVERSITY][-1]
        found |= {f"{RAISED}{kind}": 1.0 for kind in memory.raised}
        return found | {"monitor/alarm": len(memory.raised), "monitor/attempt": self.measures.attempt}

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, for the checkpoint."""
        return {"memory": asdict(self.monitor.memory), "measures": asdict(self.measures)}

    def restore(self, state: Mapping[str, Any], measures: Measures | None = None) -> None:
        """Go on from a checkpoint; ``measures`` of now are kept over those of an earlier one."""
        self.monitor.memory = Memory(**state["memory"])
        self.monitor.measures = measures or Measures(**state["measures"])

    def _probe(self, a: Actors) -> float:
        """Mean distance, per latent value, between samples of one prompt; always the same noise, on every rank."""
        s = self._settings
        # A phase of its last step alone, so that the rollout walks to the end and no exit step is drawn.
        phase = replace(a.phase, first=a.phase.last - 1)
        rows = [1 + k for k in range(min(s.prompts, len(self._conditions) - 1)) for _ in range(s.samples)]
        found = []
        for i in range(0, len(rows), self._share):  # no more at once than in training, or it might not fit
            part = rows[i : i + self._share]
            draws = Draws(self._seed, f"probe/{phase.index}", range(i, i + len(part)), self._session.device)
            cond = self._conditions.rows(part).to(self._session.device)
            with torch.no_grad():
                sample = a.method.rollout(a.student.experts, cond, draws, phase, a.latent, grad=False)
            found.append(sample.x0.float().flatten(1))
        x0 = torch.cat(found)
        groups = x0.reshape(-1, s.samples, x0.shape[1])
        distances = [float(torch.pdist(group).mean()) for group in groups]
        return sum(distances) / len(distances) / math.sqrt(x0.shape[1])

    def _over_ranks(self, row: Mapping[str, float]) -> dict[str, float]:
        """The mean of each watched metric over the ranks that have it."""
        if self._session.world == 1:
            return {k: row[k] for k in KEYS if k in row}
        pairs = [[row.get(k, 0.0), float(k in row)] for k in KEYS]
        sums = torch.tensor(pairs, dtype=torch.float64, device=self._session.device)
        dist.all_reduce(sums)
        return {k: value / count for k, (value, count) in zip(KEYS, sums.tolist(), strict=True) if count}
