"""Going on from the last whole checkpoint where a run's newest ones, or Ray Train's books on them, are damaged.

Ray Train takes the newest checkpoint that its books name, and none else. So its folder is set aside as it is, and the
best whole checkpoint in it is put where workers look for one that their run has taken over.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from raydmd.errors import DamagedCheckpoint, RunFailed
from raydmd.training.events import EventLog
from raydmd.training.folder import trained
from raydmd.training.manifest import damage
from raydmd.training.takeover import PARTIAL, TAKEN, link_tree

if TYPE_CHECKING:
    from pathlib import Path

TRAIN, ASIDE = "train", "aside-{}"
BOOKS = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that it keeps."""


def check_books(folder: Path) -> None:
    """See that a run which is to go on can.

    Raises:
        DamagedCheckpoint: if the final checkpoint is damaged, or Ray Train could not go by its books.
    """
    if (final := trained(folder)) is not None:
        if wrong := damage(final):
            raise DamagedCheckpoint(f"checkpoint {final.name} is damaged: {wrong}")
        return
    books = folder / TRAIN / BOOKS
    if not books.is_file():
        return
    try:
        names = _named(json.loads(books.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"Ray Train's list of checkpoints can't be read: {error}") from None
    if gone := sorted(name for name in names if not (folder / TRAIN / name).is_dir()):
        raise DamagedCheckpoint(f"checkpoint {gone[-1]} is gone")


def set_aside(folder: Path, why: str) -> str:
    """Have the next start go by the best whole checkpoint; nothing is deleted.

    Args:
        folder: of a run that this process has locked, and that nobody trains.
        why: for the event.

    Returns:
        The checkpoint's name; empty if the run has none and begins anew.

    Raises:
        RunFailed: if it has some, and all of them are damaged.
    """
    if (folder / TRAIN).is_dir():
        count = 1 + sum(1 for _ in folder.glob(ASIDE.format("*")))
        (folder / TRAIN).rename(folder / ASIDE.format(count))
    places = [*folder.glob(f"{ASIDE.format('*')}/cycle-*"), *(folder / TAKEN).glob("cycle-*")]
    found = sorted((f for f in places if f.suffix != PARTIAL), key=lambda f: f.name, reverse=True)
    for best in found:
        if wrong := damage(best):
            print(f"checkpoint {best} is damaged: {wrong}", flush=True)
            continue
        if best.parent.name != TAKEN:
            shutil.rmtree(folder / TAKEN, ignore_errors=True)
            partial = (folder / TAKEN / best.name).with_suffix(PARTIAL)
            link_tree(best, partial)
            partial.rename(folder / TAKEN / best.name)
        EventLog(folder / "events.jsonl").write("fallback", checkpoint=best.name, message=why)
        return best.name
    if found:
        raise RunFailed(
            f"run '{folder.name}': {why}, and none of its {len(found)} checkpoints is whole. They are kept in "
            f"{folder}; give another --name to begin anew"
        )
    EventLog(folder / "events.jsonl").write("fallback", checkpoint="", message=why)
    return ""


def _named(tree: Any) -> set[str]:
    """All checkpoints that Ray Train's list names, wherever in it."""
    if isinstance(tree, dict):
        own = {v for k, v in tree.items() if k == "checkpoint_dir_name" and isinstance(v, str)}
        return own.union(*(_named(v) for v in tree.values()))
    if isinstance(tree, list):
        return set[str]().union(*(_named(v) for v in tree))
    return set()
