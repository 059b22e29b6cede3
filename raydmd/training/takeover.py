"""Taking over another run's training state: a member of a population goes on from a copy of a better one's.

The copy lies in the run's folder under :data:`TAKEN`, beside the checkpoints that Ray Train keeps books on, and the
workers start from it as long as it is not older than those. It appears whole or not at all, and an event says that it
is there: a takeover that was interrupted is done again.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import yaml

from raydmd.errors import RunFailed
from raydmd.files import replace
from raydmd.training.checkpoint import PROGRESS, cycle_of, name_of, read_progress
from raydmd.training.events import EventLog, read_lines
from raydmd.training.lock import PATIENCE, locked
from raydmd.training.manifest import reseal
from raydmd.training.restarts import COMMITTED, FALLBACK
from raydmd.training.store import PARTIAL, Store, link_tree
from raydmd.training.students import STUDENTS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from raydmd.recipe import Recipe

TAKEN = "taken"
"""Folder of a run with the checkpoint that it took over."""
EVENTS = "events.jsonl"
LEG, EXPLOIT = "leg", "exploit"


def take_over(recipe: Recipe, donor: Path, *, cycle: int, changes: Mapping[str, Any]) -> bool:
    """Let a run that stands still go on from another one's checkpoint, unless it does already.

    Args:
        recipe: of the run, with its settings from now on.
        donor: folder of the run that is taken over, which stands at this cycle.
        cycle: cycles done by the checkpoint.
        changes: settings that the sweep has chosen, for the event.

    Returns:
        Whether there was something to do.

    Raises:
        InputError: if the run is in progress in another process.
        RunFailed: if the donor has no such checkpoint, or it can't be copied.
    """
    folder = recipe.folder
    with locked(folder, patience=PATIENCE):
        if happened(folder, EXPLOIT, cycle):
            return False
        store, target = Store.of(donor, recipe.checkpoints.storage), folder / TAKEN / name_of(cycle)
        source = checkpoint_at(store, cycle)
        try:
            shutil.rmtree(folder / TAKEN, ignore_errors=True)  # of an earlier takeover, or of one that was interrupted
            shutil.rmtree(folder / STUDENTS, ignore_errors=True)  # one not measured yet is no longer this run's
            partial = target.with_suffix(PARTIAL)
            with store.at(source) as files:
                link_tree(files, partial)
            _adopt(partial / PROGRESS, recipe)
            reseal(partial, PROGRESS)
            partial.rename(target)
            replace(folder / "recipe.yaml", recipe.to_yaml())
        except OSError as error:
            raise RunFailed(
                f"run '{recipe.name}' can't take over {store.path(source)}: {error}; the same command tries again"
            ) from error
        EventLog(folder / EVENTS).write(EXPLOIT, cycle=cycle, donor=donor.name, changes=dict(changes))
    return True


def taken(folder: Path) -> Path | None:
    """The checkpoint that a run has taken over, if it still goes by one."""
    return max((f for f in (folder / TAKEN).glob("cycle-*") if f.suffix != PARTIAL), default=None)


def pending(folder: Path) -> Path | None:
    """What a run has taken over, until a checkpoint that was written after it is committed.

    By the log's order, not by the cycles: a rollback may have gone back to before it.
    """
    events = [e["event"] for e in read_lines(folder / EVENTS) if e["event"] in (EXPLOIT, FALLBACK, COMMITTED)]
    return None if events and events[-1] == COMMITTED else taken(folder)


def newer(took: Path | None, own: Path | None) -> Path | None:
    """The checkpoint that a run goes on from: the one that it took over, until it has written one after it."""
    if took is None or own is None:
        return took or own
    try:
        return took if read_progress(took).cycle >= read_progress(own).cycle else own
    except (OSError, ValueError, TypeError):
        return own  # whoever reads it will find which of its files are damaged


def end_leg(folder: Path, cycle: int) -> bool:
    """Write down that a run stands at ``cycle``, with a checkpoint that Ray Train knows; returns whether it does.

    What it has taken over before is no longer needed then.
    """
    ends = [e for e in read_lines(folder / EVENTS) if e["event"] in ("stopped", "failed", "finished")]
    last = ends[-1] if ends else {}
    if last.get("event") != "stopped" or last["cycle"] != cycle or last["alarm"]:
        return False
    release(folder)
    if not happened(folder, LEG, cycle):
        EventLog(folder / EVENTS).write(LEG, cycle=cycle)
    return True


def release(folder: Path) -> None:
    """Let go of what a run has taken over: it has a checkpoint of its own after it."""
    shutil.rmtree(folder / TAKEN, ignore_errors=True)


def since(folder: Path) -> int:
    """The cycle at which a run last took another's state over; -1 if it never did. Its own before are not its past."""
    return max((int(e["cycle"]) for e in read_lines(folder / EVENTS) if e["event"] == EXPLOIT), default=-1)


def happened(folder: Path, event: str, cycle: int) -> bool:
    """Whether a run's log has this event at this cycle."""
    return any(e["event"] == event and e["cycle"] == cycle for e in read_lines(folder / EVENTS))


def checkpoint_at(store: Store, cycle: int) -> str:
    """Name of the checkpoint that a run's leg has left in its store.

    Raises:
        RunFailed: if it is not there.
    """
    found = [name for name in store.names() if cycle_of(name) == cycle]
    if not found:
        raise RunFailed(f"there is no checkpoint of cycle {cycle} in {store.path('')}: do all nodes share it?")
    return max(found)


def _adopt(file: Path, recipe: Recipe) -> None:
    """Let a checkpoint's monitor go by the new settings: it would bring the donor's number of fake updates along."""
    progress = json.loads(file.read_text(encoding="utf-8"))
    measures, now = progress["monitor"]["measures"], recipe.training.fake_updates
    raised = measures["fake_updates"] != yaml.safe_load(progress["recipe"])["training"]["fake_updates"]
    measures["fake_updates"] = max(now, measures["fake_updates"]) if raised else now
    replace(file, json.dumps(progress, indent=1))
