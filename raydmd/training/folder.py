"""A run's folder: who holds it, how far it came, and whether a recipe is the one it was started with."""

from __future__ import annotations

import contextlib
import fcntl
import time
from typing import IO, TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from raydmd.errors import InputError
from raydmd.recipe import Recipe
from raydmd.recipe_io import explain
from raydmd.training.events import read_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATIENCE = 60.0
"""Seconds that processes of a command that was killed may live on."""
FREE_KEYS = ("monitor", "placement", "tracking", "evaluation", "output")
"""Sections that may differ between a run and its resumption."""
FREE_DATA = ("cache", "timeout")
FREE_METHOD = ("regression.verify",)
FREE_TRAINING = ("checkpoint_every", "report_every", "max_failures", "step_timeout", "stall_timeout")


class Held(InputError):
    """Another process has the folder."""


@contextlib.contextmanager
def locked(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the run's folder, so that the same name never runs twice at once on it.

    Args:
        folder: of the run; made if it is not there.
        patience: seconds to wait for another process that holds it.

    Raises:
        Held: if another process holds it.
        InputError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to output folder {folder}: {error}") from None
    with file:
        deadline = time.monotonic() + patience
        while not _held(file):
            if time.monotonic() >= deadline:
                raise Held(f"run '{folder.name}' is in progress in another process ({folder})")
            time.sleep(0.5)
        yield


def trained(folder: Path) -> Path | None:
    """The final checkpoint, if training is done.

    Ray Train uploads it file by file, so that it is there says little; the worker's last event, written once all of
    it had arrived, does.
    """
    if not any(e["event"] == "finished" for e in read_lines(folder / "events.jsonl")):
        return None
    return next((p.parent for p in (folder / "train").glob("*-final/progress.json")), None)


def finished(folder: Path) -> bool:
    """Whether a run has left its results."""
    return (folder / "result.json").is_file()


def same_run(recipe: Recipe, folder: Path) -> None:
    """Refuse to resume a run with another recipe.

    Raises:
        InputError: naming the keys that differ.
    """
    file = folder / "recipe.yaml"
    if not file.is_file():
        return
    before = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:  # keys that came after it was started have their defaults
        before = Recipe.model_validate(before).model_dump(mode="json")
    except ValidationError as error:
        raise InputError(
            f"run '{recipe.name}' in {folder} was started by another release: its recipe.yaml is refused by this one "
            f"({explain(error)}). Go on with that release, or give another --name"
        ) from None
    now = recipe.model_dump(mode="json")
    differs = [k for k in _leaves(now) | _leaves(before) if _get(now, k) != _get(before, k) and not _free(k)]
    if differs:
        shown = "; ".join(f"{k}: was {_get(before, k)!r}, now {_get(now, k)!r}" for k in sorted(differs)[:6])
        raise InputError(
            f"run '{recipe.name}' in {folder} was started with another recipe ({shown}). "
            "Give the old settings to resume it, or another --name"
        )


def _held(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free(key: str) -> bool:
    section, _, rest = key.partition(".")
    within = {"method": FREE_METHOD, "training": FREE_TRAINING, "data": FREE_DATA}
    return section in FREE_KEYS or rest in within.get(section, ())


def _leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    return {
        leaf
        for k, v in tree.items()
        for leaf in (_leaves(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {f"{prefix}{k}"})
    }


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
