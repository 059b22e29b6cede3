"""A run's worker in this process, for benchmarks that time its cycles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from raydmd.models import load_family
from raydmd.models.base import Conditions
from raydmd.models.places import locate
from raydmd.recipe import Recipe, derive
from raydmd.training.cycle import train_cycle
from raydmd.training.events import EventLog
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from raydmd.models.family import Family
    from raydmd.serving.client import Client

FAKE_UPDATES = 5


def dmd2(folder: Path, **changes: Any) -> Recipe:
    """DMD2 on the zoo's ``sd35-tiny``, all parameters trained."""
    parent = derive(
        Recipe(name="dmd2", output=folder),
        {
            "model.path": "sd35-tiny",
            "method": {"name": "dmd2", "steps": 4, "shift": 3.0, "guidance": 3.5},
            "training": {
                "batch": 8,
                "fake_updates": FAKE_UPDATES,
                "precision": "fp32",
                "ema": 0.0,
                "student": {"lora": None},
            },
            "monitor.diversity": None,
        },
    )
    return derive(parent, changes)


def conditions(recipe: Recipe, family: Family) -> Path:
    """The file of the zoo's encoded prompts."""
    prompts = locate(recipe.model).prompts.read_text(encoding="utf-8").splitlines()
    return family.encode(prompts, recipe.folder / "conditions")


def cycles(recipe: Recipe, client: Client) -> Callable[[int], dict[str, float]]:
    """What runs a cycle and says what it measured, times under ``time/``."""
    family = load_family(recipe.model)
    job = Job(recipe=recipe, family=family, conditions=Conditions.read(conditions(recipe, family)))
    session = FolderSession(recipe.folder, torch.device("cpu"))
    actors = Worker(job, client, session, EventLog(recipe.folder / "events.jsonl")).begin()
    return lambda cycle: train_cycle(actors, cycle)


def seconds(metrics: dict[str, float]) -> dict[str, float]:
    """A cycle's times by what they were spent on."""
    return {k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/")}
