"""Between Ray Tune and the study: Tune asks here for trials, and tells here what became of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from raydmd.tuning.trial import HELD, STOPPED

if TYPE_CHECKING:
    from raydmd.tuning.study import Claim, Study
    from raydmd.tuning.trial import Common

PAUSE = 2.0
"""Seconds before the study is asked again, if it had nothing."""


class StudySearch(Searcher):
    """Claims trials of a study.

    Args:
        study: the sweep's.
        common: what every trial is told.

    Attributes:
        claims: under way here, by Tune's name of the trial.
        roots: of all that were ever claimed here.
        robbed: Tune's names of trials that were taken for lost, and are another cluster's now.
        why: no more are claimed; empty while they are.
    """

    def __init__(self, study: Study, common: Common) -> None:
        super().__init__()
        self._study, self._common = study, common
        self.claims: dict[str, Claim] = {}
        self.roots: set[int] = set()
        self.robbed: set[str] = set()
        self.why = ""
        self._asked = 0.0

    def known(self, trial_id: str) -> frozenset[int]:
        """Cycles whose evaluations were there before this attempt."""
        claim = self.claims.get(trial_id)
        return claim.known if claim else frozenset()

    def close(self, why: str) -> None:
        """Claim no more."""
        if not self.why:
            self.why = why
            print(f"no new trial starts: {why}", flush=True)

    def suggest(self, trial_id: str) -> Any:
        """See :class:`ray.tune.search.Searcher`."""
        if self.why:
            return self.FINISHED
        if time.monotonic() - self._asked < PAUSE:
            return None
        claim = self._study.claim()
        if claim is None:
            self._asked = time.monotonic()
            # Others' trials may yet come back, if their cluster dies.
            return self.FINISHED if self._study.over() else None
        self.claims[trial_id] = claim
        self.roots.add(claim.root)
        return {"number": claim.number, "root": claim.root, "changes": claim.changes, "common": self._common}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep an evaluation."""
        if (claim := self.claims.get(trial_id)) and "error" not in result:
            cycle, seconds = int(result["cycle"]), float(result["gpu_seconds"])
            if not self._study.note(claim.number, cycle, result, gpu_seconds=seconds):
                self.robbed.add(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study."""
        claim = self.claims.pop(trial_id, None)
        if claim is None:
            return
        if error or result is None:
            self._study.died(claim.number, "its process ended; Ray's logs say why")
        elif HELD in result:
            self._study.let_go(claim.number)
        elif STOPPED in result:
            pass  # the study gives it back
        elif "error" in result:
            self._study.failed(claim.number, str(result["error"]))
        else:  # Tune does not tell a trial's last result before its end
            self._study.note(claim.number, int(result["cycle"]), result, gpu_seconds=float(result["gpu_seconds"]))
            if result.get("finished"):
                self._study.finished(claim.number, result)
            else:
                self._study.stopped_early(claim.number)

    def save(self, checkpoint_path: str) -> None:
        """The study has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """The study has it all."""
