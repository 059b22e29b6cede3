"""Taking over another run's training state: a member of a population goes on from a copy of a better one's.

The copy lies in the run's folder under :data:`TAKEN`, beside the checkpoints that Ray Train keeps books on, and the
workers start from it as long as it is not older than those. It appears whole or not at all, and an event says that it
is there: a takeover that was interrupted is done again.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import yaml

from raydmd.errors import RunFailed
from raydmd.training.checkpoint import PROGRESS, cycle_of, name_of, read_progress
from raydmd.training.events import EventLog, read_lines
from raydmd.training.folder import PATIENCE, locked
from raydmd.training.manifest import reseal
from raydmd.training.students import STUDENTS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from raydmd.recipe import Recipe

TAKEN = "taken"
"""Folder of a run with the checkpoint that it took over."""
PARTIAL = ".partial"
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
        source, target = checkpoint_at(donor, cycle), folder / TAKEN / name_of(cycle)
        try:
            shutil.rmtree(folder / TAKEN, ignore_errors=True)  # of an earlier takeover, or of one that was interrupted
            shutil.rmtree(folder / STUDENTS, ignore_errors=True)  # one not measured yet is no longer this run's
            partial = target.with_suffix(PARTIAL)
            link_tree(source, partial)
            _adopt(partial / PROGRESS, recipe)
            reseal(partial, PROGRESS)
            partial.rename(target)
            _replace(folder / "recipe.yaml", recipe.to_yaml())
        except OSError as error:
            raise RunFailed(
                f"run '{recipe.name}' can't take over {source}: {error}; the same command tries again"
            ) from error
        EventLog(folder / EVENTS).write(EXPLOIT, cycle=cycle, donor=donor.name, changes=dict(changes))
    return True


def taken(folder: Path) -> Path | None:
    """The checkpoint that a run has taken over, if it still goes by one."""
    return max((f for f in (folder / TAKEN).glob("cycle-*") if f.suffix != PARTIAL), default=None)


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


def happened(folder: Path, event: str, cycle: int) -> bool:
    """Whether a run's log has this event at this cycle."""
    return any(e["event"] == event and e["cycle"] == cycle for e in read_lines(folder / EVENTS))


def checkpoint_at(folder: Path, cycle: int) -> Path:
    """The checkpoint that a run's leg has left.

    Raises:
        RunFailed: if it is not there.
    """
    places = (*(folder / "train").glob("cycle-*"), *folder.glob("cycle-*"))
    found = [f for f in places if cycle_of(f.name) == cycle and (f / PROGRESS).is_file()]
    if not found:
        raise RunFailed(f"run '{folder.name}' has no checkpoint of cycle {cycle} in {folder}: do all nodes share it?")
    return max(found, key=lambda f: f.name)


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder's files, by hard links where the file system has them: checkpoints are never written to again.

    Raises:
        OSError: if a file can't be copied.
    """
    target.mkdir(parents=True)
    for file in sorted(source.rglob("*")):
        copy = target / file.relative_to(source)
        if file.is_dir():
            copy.mkdir(exist_ok=True)
            continue
        try:
            os.link(file, copy)
        except OSError:  # another file system, or one without links; a full disk is met again here
            shutil.copy2(file, copy)


def _adopt(file: Path, recipe: Recipe) -> None:
    """Let a checkpoint's monitor go by the new settings: it would bring the donor's number of fake updates along."""
    progress = json.loads(file.read_text(encoding="utf-8"))
    measures, now = progress["monitor"]["measures"], recipe.training.fake_updates
    raised = measures["fake_updates"] != yaml.safe_load(progress["recipe"])["training"]["fake_updates"]
    measures["fake_updates"] = max(now, measures["fake_updates"]) if raised else now
    _replace(file, json.dumps(progress, indent=1))


def _replace(file: Path, text: str) -> None:
    """Write a file anew: under its name there is the old one or the new one, and links to the old one keep it."""
    partial = file.with_name(f".{file.name}{PARTIAL}")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
