"""Going on from the last whole checkpoint where a run's newest ones, or Ray Train's books on them, are damaged.

Ray Train takes the newest checkpoint that its books name, and none else. So the best whole one is put where workers
look for one that their run has taken over, and Ray Train begins new books under another name. What was written to
its end is never deleted here, damaged or not.
"""

from __future__ import annotations

import errno
import functools
import shutil
import time
from typing import TYPE_CHECKING, Any, TypeVar

from raydmd.errors import DamagedCheckpoint, RunFailed, RunStopped
from raydmd.redact import hidden
from raydmd.training.checkpoint import cycle_of
from raydmd.training.events import METRICS, EventLog, append, read_lines
from raydmd.training.folder import trained
from raydmd.training.manifest import damage, unfinished
from raydmd.training.restarts import COMMITTED, FALLBACK
from raydmd.training.store import PARTIAL, Store, check_space, link_tree
from raydmd.training.takeover import TAKEN, since

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from raydmd.recipe import Recipe

T = TypeVar("T")
MOST = 3
"""Falls back to one checkpoint, with none committed after it, that show more than a damaged file."""
HOPELESS = (errno.ENOENT, errno.ENOSPC, errno.EDQUOT)
"""What is as wrong a while later."""
PAUSE = 5.0
"""Seconds between two questions to object storage that does not answer."""


def check_books(recipe: Recipe) -> None:
    """See that a run which is to go on can.

    Raises:
        DamagedCheckpoint: if the final checkpoint is damaged, or Ray Train could not go by its books.
        OSError: if object storage does not answer.
    """
    store = Store.of(recipe.folder, recipe.checkpoints.storage)
    if (final := trained(recipe.folder)) is not None:
        with store.at(final) as files:
            if wrong := damage(files):
                raise DamagedCheckpoint(f"checkpoint {final} is damaged: {wrong}")
        return
    try:
        named = names_in(store.books())
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and not store.local:  # that it can't be reached says nothing of it
            raise
        raise DamagedCheckpoint(f"Ray Train's list of checkpoints can't be read: {error}") from None
    if gone := sorted(named.difference(store.names())):
        raise DamagedCheckpoint(f"checkpoint {gone[-1]} is gone")


def catch_up(recipe: Recipe) -> None:
    """Write the row and the event of the newest checkpoint, if its controller died between its books and these.

    Nobody else has them: training goes on behind that checkpoint.
    """
    store, log = Store.of(recipe.folder, recipe.checkpoints.storage), recipe.folder / "events.jsonl"
    newest = store.books().get("latest_checkpoint_result")
    if not newest:
        return
    name, row = newest["checkpoint_dir_name"], {k: v for k, v in newest["metrics"].items() if v is not None}
    told = [e for e in read_lines(log) if e["event"] in (COMMITTED, FALLBACK)]
    last = max((n for n, e in enumerate(told) if e["event"] == FALLBACK), default=-1)
    if any(e["checkpoint"] == name for e in told[last + 1 :]):
        return
    append(recipe.folder / METRICS, row | {"time": time.time()})
    EventLog(log).write(COMMITTED, checkpoint=name)


def fall_back(recipe: Recipe, why: str) -> str:
    """Have the next start go by the best whole checkpoint; nothing is deleted.

    Args:
        recipe: of a run whose folder this process has locked, and that nobody trains.
        why: for the event.

    Returns:
        The checkpoint's name; empty if the run has none and begins anew.

    Raises:
        RunFailed: if it has some, and all of them are damaged; or if it fell back to this one time and again.
        OSError: if object storage does not answer.
    """
    folder, store = recipe.folder, Store.of(recipe.folder, recipe.checkpoints.storage)
    events = EventLog(folder / "events.jsonl")
    before = [e for e in read_lines(folder / "events.jsonl") if e["event"] in (FALLBACK, COMMITTED)][-MOST:]
    if len(before) == MOST and {(e["event"], e["checkpoint"]) for e in before} == {(FALLBACK, before[0]["checkpoint"])}:
        raise RunFailed(
            f"run '{folder.name}': {why}. It fell back to {before[0]['checkpoint'] or 'its beginning'} {MOST} times, "
            "which is whole as it is read here: look at that node's disk, memory and network, or leave it out"
        )
    took = [(f.name, TAKEN) for f in (folder / TAKEN).glob("cycle-*") if f.suffix != PARTIAL]
    found = sorted([*took, *own(folder, store)], reverse=True)
    for name, place in found:
        if place == TAKEN:
            wrong = damage(folder / TAKEN / name)
        else:
            with store.at(name, place) as files:
                if not (wrong := damage(files)):
                    shutil.rmtree(folder / TAKEN, ignore_errors=True)
                    if not store.local:
                        check_space(name, sum(f.stat().st_size for f in files.rglob("*")), folder)
                    partial = (folder / TAKEN / name).with_suffix(PARTIAL)
                    link_tree(files, partial)
                    partial.rename(folder / TAKEN / name)
        if not wrong:
            events.write(FALLBACK, checkpoint=name, message=why)
            return name
        print(f"checkpoint {store.path(name, place)} is damaged: {wrong}", flush=True)
    if found or since(folder) >= 0:
        raise RunFailed(
            f"run '{folder.name}': {why}, and none of its {len(found)} checkpoints is whole. They are kept in "
            f"{store.root}; give another --name to begin anew"
        )
    events.write(FALLBACK, checkpoint="", message=why)
    return ""


def clear(recipe: Recipe) -> None:
    """Delete what nobody has written to its end, and nobody will: a checkpoint at a notice has a cycle of its own.

    To be called while nobody trains.

    Raises:
        OSError: if object storage does not answer.
    """
    store = Store.of(recipe.folder, recipe.checkpoints.storage)
    try:
        booked = names_in(store.books())
    except (ValueError, TypeError):  # what is booked is not known
        return
    for name in set(store.names()) - booked:
        if unfinished(functools.partial(store.read, name)):
            store.drop(name, store.experiment)
            EventLog(recipe.folder / "events.jsonl").write("cleared", checkpoint=name)


def patiently(ask: Callable[[], T], recipe: Recipe, meanwhile: Callable[[], object] = lambda: None) -> T:
    """What object storage answers, as soon as it does; a disk's errors are raised at once, and what is not there.

    Args:
        ask: what may raise ``OSError``.
        recipe: of the run, whose ``placement.room_timeout`` it has for that.
        meanwhile: is called between two tries.

    Raises:
        OSError: if waiting does not help.
        RunFailed: if it does not answer in time.
        RunStopped: if the run is stopped meanwhile.
    """
    patience, told = recipe.placement.room_timeout, ""
    end = time.monotonic() + patience
    while True:
        try:
            return ask()
        except OSError as error:
            if recipe.checkpoints.storage is None or error.errno in HOPELESS:
                raise
            what = hidden(f"checkpoints.storage={recipe.checkpoints.storage} does not answer: {error}")
            if time.monotonic() > end:
                raise RunFailed(
                    f"run '{recipe.name}': {what}, for placement.room_timeout={patience:g} s. "
                    "The same command resumes it"
                ) from error
            if not told:
                told = what
                EventLog(recipe.folder / "events.jsonl").write("waiting", message=what)
                print(f"{what}; asked again for up to {patience:g} s (placement.room_timeout)", flush=True)
        if (recipe.folder / "STOP").exists():
            raise RunStopped(f"run '{recipe.name}' stopped while {told}; the same command resumes it")
        meanwhile()
        time.sleep(PAUSE)


def own(folder: Path, store: Store) -> list[tuple[str, str]]:
    """Names and places of the checkpoints that a run has written, since it took another's state over if it did."""
    begun = since(folder)
    return [(n, place) for place in store.places() for n in store.names(place) if cycle_of(n) > begun]


def names_in(books: Any) -> set[str]:
    """All checkpoints that Ray Train's list names, wherever in it."""
    if isinstance(books, dict):
        own = {v for k, v in books.items() if k == "checkpoint_dir_name" and isinstance(v, str)}
        return own.union(*(names_in(v) for v in books.values()))
    if isinstance(books, list):
        return set[str]().union(*(names_in(v) for v in books))
    return set()
