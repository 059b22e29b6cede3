"""What dies when, and what must come of it: the table of faults. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

KINDS = ("worker", "controller", "driver", "teacher", "reward", "node", "pool network")
MOMENTS = (
    "start",
    "rollout",
    "fake update",
    "waiting for teacher",
    "reporting",
    "checkpointing",
    "phase change",
    "export",
)
CYCLES, EVERY = 16, 2
"""Of a run: two phases of half of them each, and a checkpoint after so many."""
AT: dict[str, int | None] = {
    "start": 0,
    "fake update": 2,
    "reporting": 4,
    "phase change": CYCLES // 2,
    "rollout": 10,
    "checkpointing": 11,
    "waiting for teacher": 14,
    "export": None,
}
"""The cycle, counted from 0, that each moment is in, in their order: a new checkpoint lies between any two, so that
each is a failure of its own and not one of a row. Training runs ahead of a checkpoint that is held up, to the next
one: that lies between as well."""
SAME = "nothing is under way to the pool then: the same as at rollout"
LEFT_OUT: dict[tuple[str, str], str] = {
    ("controller", "export"): "Ray Train's controller ends with training",
    ("reward", "export"): "the reward models' pool ends with training",
    ("teacher", "reporting"): SAME,
    ("reward", "reporting"): SAME,
    ("reward", "phase change"): SAME,
    ("pool network", "reporting"): SAME,
    ("pool network", "checkpointing"): SAME,
    ("pool network", "phase change"): SAME,
    ("node", "fake update"): "to the others it is the same as at rollout",
    ("node", "reporting"): "to the others it is the same as at rollout",
}
"""Cells without a fault, and why."""
TWICE = ("driver",)
"""Kinds after which the same command is given once more; all others end by themselves."""
GROUP = ("worker", "controller", "node")
"""Kinds after which the driver starts all workers anew."""


@dataclass(frozen=True)
class Cell:
    """One fault.

    Attributes:
        kind: what it is done to.
        moment: when.
    """

    kind: str
    moment: str

    @property
    def name(self) -> str:
        """For people, and for files."""
        return f"{self.kind}-{self.moment}".replace(" ", "-")

    @property
    def cycle(self) -> int | None:
        """Counted from 0, that is in progress; ``None`` after training."""
        return AT[self.moment]

    @property
    def rank(self) -> int:
        """Of the worker that stands still; each of the two has its turn."""
        return MOMENTS.index(self.moment) % 2

    @property
    def starts(self) -> int:
        """How often the command is given."""
        return 2 if self.kind in TWICE else 1


def absent(events: list[dict[str, Any]]) -> list[str]:
    """Replicas that were lost and are not back."""
    last = {e["replica"]: e["state"] for e in events if e["event"] == "replica"}
    return [replica for replica, state in last.items() if state == "lost"]


def cells(kinds: tuple[str, ...] = KINDS, moments: tuple[str, ...] = MOMENTS) -> list[Cell]:
    """All faults of these kinds and moments."""
    return [Cell(k, m) for k in kinds for m in moments if (k, m) not in LEFT_OUT]


def runs(faults: list[Cell], *, apart: bool) -> list[list[Cell]]:
    """Which faults are done to one run, in their order: all of a kind, or each to one of its own."""
    if apart:
        return [[cell] for cell in faults]
    order = list(AT)
    chains = [sorted((c for c in faults if c.kind == k), key=lambda c: order.index(c.moment)) for k in KINDS]
    return [chain for chain in chains if chain]


def recovery(cell: Cell, events: list[dict[str, Any]], killed: float, until: float = math.inf) -> tuple[str, list[str]]:
    """What the event log tells of a recovery.

    Args:
        cell: the fault.
        events: of the run, in order.
        killed: when the fault was, seconds since 1970.
        until: when the next one was.

    Returns:
        The recovery in words, and what is wrong with it.
    """
    after = [e for e in events if killed <= e["time"] < until]
    before = [e for e in events if e["time"] < killed]
    groups = [e for e in after if e["event"] in ("start", "resume")]
    exports = [e for e in after if e["event"] == "export"]
    lost = [e for e in after if e["event"] == "replica"]
    failures = [e for e in after if e["event"] == "restart"]
    found, wrong = [], list[str]()
    if cell.moment == "export":
        wrong += ["training had not ended before the fault"] * (not any(e["event"] == "finished" for e in before))
        wrong += ["workers were started after the fault"] * bool(groups)
        if cell.kind in ("worker", "driver", "node"):
            pids = {e["pid"] for e in before if e["event"] == "export"}
            anew = [e for e in exports if e["pid"] not in pids]
            wrong += [] if anew else ["no other process exported again"]
            found += ["exported again by another process"] if anew else []
    elif cell.kind in (*GROUP, *TWICE):
        if not groups:
            wrong.append("no workers were started after the fault")
        else:
            pids = {e["pid"] for e in before if e["event"] in ("start", "resume")}
            wrong += ["the same process went on"] * (groups[-1]["pid"] in pids)
            back = groups[-1].get("cycle", 0)
            at = f"resumed at cycle {back}" if groups[-1]["event"] == "resume" else "started anew"
            found.append(at)
            # A killed driver's workers go on for seconds, until Ray has noticed, and may come to a checkpoint.
            if cell.kind != "driver" and cell.cycle is not None and back > cell.cycle + 1:
                wrong.append(f"{at}, hit in cycle {cell.cycle + 1}")
            if cell.cycle is not None and back < (cell.cycle // EVERY - 1) * EVERY:
                wrong.append(f"{at}: more than one checkpoint was lost")
        if cell.kind in GROUP:
            wrong += [] if failures else ["the log has no restart"]
            found += [f"restart: {failures[0]['failure']} of rank {failures[0]['rank']}"] if failures else []
    else:
        wrong += ["workers were started anew"] * bool(groups and cell.moment != "start")
        wrong += ["workers were started twice"] * (len(groups) > 1)
    if cell.kind in ("teacher", "reward", "pool network"):
        pool = "reward" if cell.kind == "reward" else "teacher"
        # A cut can part the driver from the keeper of pools as well.
        cut = ("keeper",) if cell.kind == "pool network" else ()
        ours = [e for e in lost if e["replica"].startswith((f"{pool}-", *cut))]
        # A worker asks elsewhere within seconds, and may be done before the driver has noticed what it is cut off from.
        again = [e for e in after if e["event"] == "asked_again"] if cell.kind == "pool network" else []
        wrong += [] if ours or again else [f"the log has no lost replica of the {pool}"]
        found += [f"{len(again)} requests asked again"] if again else []
        found += [f"replica {ours[0]['replica'].rpartition('/')[2]} {ours[0]['state']}"] if ours else []
    return "; ".join(found), wrong
