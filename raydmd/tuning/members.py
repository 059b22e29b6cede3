"""A population on Ray Tune: each of Tune's trials is one leg of one member's run, from one takeover to the next.

Tune's own scheduler of that kind takes no searcher, keeps who took over from whom in its process, and shares out room
by pausing trials that must then be restored. Here a member between two legs is a folder with a checkpoint: what Tune
does is to run as many legs at a time as there is room for. Who takes over from whom is decided once, from what the
study knows, and written into it before anything is done; whatever dies, the next command goes on from there.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from raydmd.errors import InputError
from raydmd.recipe import derive
from raydmd.training.takeover import LEG, happened, take_over
from raydmd.tuning.explore import explore
from raydmd.tuning.population import Entry, generations, kept_keys, takeovers
from raydmd.tuning.trial import folder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.tuning.spec import Sweep
    from raydmd.tuning.study import Claim, Study
    from raydmd.tuning.trial import Common

PLACE = "population of"
"""The study's attribute that names the cluster of its population."""


@dataclass
class Member:
    """A trial of a population.

    Attributes:
        claim: on the study's trial.
        lineage: settings that it has had.
        state: ``idle``, ``running``, ``arrived`` at the end of its leg, or ``over``.
        figures: of its evaluations by cycle.
        seconds: GPU seconds of the legs that are done.
        fault: why its leg failed; empty if it did not.
    """

    claim: Claim
    lineage: list[Entry]
    state: str = "idle"
    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    fault: str = ""


class Members(Searcher):
    """Claims all trials of a study and has Tune run their legs, in step.

    Args:
        spec: a sweep with a population.
        study: the sweep's.
        common: what every trial is told.
        fits: raises an InputError for a recipe that can't be run.
        stop: the file that stops the sweep.
    """

    def __init__(self, spec: Sweep, study: Study, common: Common, fits: Callable[[Recipe], None], stop: Path) -> None:
        super().__init__()
        self._spec, self._study, self._common, self._stop = spec, study, common, stop
        self._base, self._fits = common.base, fits
        self._first, self._goal = next(iter(spec.objectives.items()))
        self._cycles = generations(spec, common.base)
        self.robbed: set[str] = set()
        """Nobody's: a population is one cluster's."""
        self._members: dict[int, Member] = {}
        self._legs: dict[str, Member] = {}
        self._decided: list[int] = []
        self._open()

    def close(self, why: str) -> None:
        """A population has no budget but its members; see :class:`~raydmd.tuning.search.StudySearch`."""

    @property
    def until(self) -> int | None:
        """The cycle that legs go to now; ``None`` on the last one."""
        left = self._cycles[len(self._decided) :]
        return left[0] if left else None

    def suggest(self, trial_id: str) -> Any:
        """See :class:`ray.tune.search.Searcher`."""
        if self._stop.exists() or not self._going():
            return self.FINISHED
        if all(m.state == "arrived" for m in self._going()):
            self._turn()
        member = next((m for m in self._going() if m.state == "idle"), None)
        if member is None:
            return None if self._going() else self.FINISHED
        member.state, self._legs[trial_id] = "running", member
        claim, now = member.claim, member.lineage
        said = "; ".join(f"cycle {e.cycle} from {e.donor:04d}" for e in now if e.donor is not None)
        tags = {**self._common.tags, "raydmd.settings": _said(now[-1].changes)}
        tags |= {"raydmd.taken_over": said} if said else {}
        return {
            "number": claim.number,
            "root": claim.root,
            "changes": now[-1].changes,
            "until": self.until,
            "common": replace(self._common, tags=tags),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep an evaluation; those of earlier legs are told again at the start of each."""
        member = self._legs.get(trial_id)
        if member is None or self._first not in result or (cycle := int(result["cycle"])) in member.figures:
            return
        member.figures[cycle] = result
        spent = member.seconds + float(result["gpu_seconds"])
        self._study.note(member.claim.number, cycle, result, gpu_seconds=spent)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take note of a leg's end."""
        self.on_trial_result(trial_id, result or {})
        member = self._legs.pop(trial_id, None)
        if member is None:
            return
        member.seconds += float((result or {}).get("gpu_seconds", 0.0))
        if error or "error" in (result or {}):
            said = str((result or {}).get("error", "its process ended; Ray's logs say why"))
            if self.until is None:
                self._fail(member, said)
            else:
                member.state, member.fault = "arrived", said
        elif result and result.get("finished"):
            self._study.finished(member.claim.number, result)
            member.state = "over"
        else:
            member.state = "arrived" if result and result.get(LEG) else "idle"

    def save(self, checkpoint_path: str) -> None:
        """The study has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """The study has it all."""

    def _going(self) -> list[Member]:
        return [m for _, m in sorted(self._members.items()) if m.state != "over"]

    def _open(self) -> None:
        """Claim the members, and finish the turn that was under way when the last command ended."""
        while claim := self._study.claim():
            first = Entry(0, None, claim.changes, self._study.numbers(claim.number))
            self._members[claim.root] = Member(claim, [first])
        at = {row.root: row.at for row in self._study.rows() if row.state == "running"}
        for cycle in self._cycles:
            decision = self._study.attribute(f"population {cycle}")
            if decision is None:
                break
            self._decided.append(cycle)
            self._enter(decision)
        for member in self._members.values():
            self._study.descend(member.claim.number, member.lineage)
        if self._decided:
            self._carry_out(self._decided[-1])
        for root, member in self._members.items():
            member.figures = dict(at.get(root, {}))
            here = self.until is not None and happened(folder_of(self._base, root), LEG, self.until)
            if here and self.until in member.figures:
                member.state = "arrived"

    def _turn(self) -> None:
        """Decide who takes over from whom, write it down, do it, and let all go on."""
        cycle = self.until
        assert cycle is not None
        decision: dict[str, Any] = self._study.attribute(f"population {cycle}", lambda: self._decision(cycle))
        for root, member in self._members.items():
            if member.state == "arrived" and member.fault and str(root) not in decision:
                self._fail(member, member.fault)
        self._decided.append(cycle)
        self._enter(decision)
        for member in self._going():
            member.state, member.fault = "idle", ""
        self._carry_out(cycle)

    def _decision(self, cycle: int) -> dict[str, Any]:
        """Entries of the members that take over, by folder number."""
        assert self._spec.population is not None
        going = {m.claim.root: m for m in self._going()}
        sign = 1.0 if self._goal == "min" else -1.0
        costs = {r: sign * m.figures[cycle][self._first] for r, m in going.items() if cycle in m.figures}
        seed = self._spec.search.seed
        chosen = takeovers(
            {r: cost for r, cost in costs.items() if math.isfinite(cost)},
            list(going),
            [r for r, m in going.items() if m.fault],
            quantile=self._spec.population.quantile,
            rng=random.Random(f"{seed}/{cycle}"),
        )
        found = {}
        for taker, donor in chosen.items():
            before = going[donor].lineage[-1]
            kept = kept_keys(self._base, before.changes, cycle)
            rng = random.Random(f"{seed}/{cycle}/{taker}")
            near = explore(self._spec, self._base, before.numbers, rng, fits=self._fits, kept=kept)
            changes, numbers = near or (before.changes, before.numbers)
            found[str(taker)] = Entry(cycle, donor, changes, numbers).plain()
        return found

    def _enter(self, decision: Mapping[str, Any]) -> None:
        for root, plain in decision.items():
            if member := self._members.get(int(root)):
                member.lineage.append(Entry(**plain))

    def _carry_out(self, cycle: int) -> None:
        """Copy training states. No leg runs meanwhile, so that every donor stands where it was measured."""
        for root, member in sorted(self._members.items()):
            entry = member.lineage[-1]
            if entry.cycle != cycle or entry.donor is None:
                continue
            self._study.descend(member.claim.number, member.lineage)
            recipe = derive(self._base, {**entry.changes, "name": f"{root:04d}"})
            donor = folder_of(self._base, entry.donor)
            if take_over(recipe, donor, cycle=cycle, changes=entry.changes):
                print(f"cycle {cycle}: trial {root:04d} takes over {donor.name}, {_said(entry.changes)}", flush=True)

    def _fail(self, member: Member, why: str) -> None:
        self._study.failed(member.claim.number, why)
        member.state = "over"


def only_here(study: Study, spec: Sweep, cluster: str) -> None:
    """Refuse a second cluster: members must see each other's checkpoints, and wait for each other.

    Raises:
        InputError: naming the cluster that has the population.
    """
    owner = study.attribute(PLACE, lambda: cluster)
    if owner != cluster:
        raise InputError(
            f"sweep {spec.name!r}: its population belongs to cluster {owner!r}, and its members must see each other's "
            f"checkpoints; to go on with it from here give --cluster {owner}, or give this one's another name"
        )


def _said(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in changes.items())
