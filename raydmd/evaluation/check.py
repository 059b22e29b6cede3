"""What can be said of an evaluation's settings before a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raydmd.errors import InputError

if TYPE_CHECKING:
    from raydmd.recipe_evaluation import Evaluation as Settings


def check_instruments(settings: Settings) -> None:
    """Refuse folders and files that are not there, before anything starts. Hub ids are left to the hub.

    Raises:
        InputError: naming the key.
    """
    named = [(f"networks.{n.name}.path", n.path) for n in settings.networks]
    named += [(f"rewards.{r.kind}.path", r.path) for r in settings.rewards if r.path]
    named += [("lpips.weights", settings.lpips.weights)] if settings.lpips and settings.lpips.weights else []
    for key, path in named:
        folder, _, name = path.partition("/")
        is_id = name and "/" not in name and path[0] not in "./~" and not Path(folder).is_dir()
        if not Path(path).exists() and (not is_id or key == "lpips.weights"):
            raise InputError(f"evaluation.{key}: there is no {path!r}")
