"""Checkpoints: PyTorch's distributed format for tensors, JSON for where the run stands.

Files of a checkpoint: ``*.distcp`` and ``.metadata`` (tensors, one file per rank, reshardable),
``progress.json`` (cycle, phase, recipe, versions).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from raydmd import __version__

if TYPE_CHECKING:
    from pathlib import Path

PROGRESS = "progress.json"
STUDENT = "student"
"""Folder of a finished run's checkpoint that holds its student, one safetensors file per expert."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        cycle: cycles done.
        phase: index of the phase that the roles in this checkpoint belong to.
        monitor: what the collapse monitor remembers, and what it has changed.
        recipe: the resolved recipe, as YAML.
        raydmd: version that wrote it.
        torch: version that wrote it.
    """

    cycle: int
    phase: int
    monitor: dict[str, Any]
    recipe: str
    raydmd: str = __version__
    torch: str = torch.__version__


def name_of(cycle: int, attempt: int = 0) -> str:
    """Name of the checkpoint after ``cycle`` cycles and ``attempt`` rollbacks; sorts in the order of writing."""
    return f"cycle-r{attempt:02d}-{cycle:08d}" if attempt else f"cycle-{cycle:08d}"


def cycle_of(name: str) -> int:
    """Cycles after which the checkpoint of this name was written."""
    return int(re.findall(r"\d{8,}", name)[0])


def save(folder: Path, tensors: dict[str, Tensor], progress: Progress, *, rank: int) -> None:
    """Write this rank's part into ``folder``. All ranks call it, each with a folder of its own."""
    dcp_save(tensors, checkpoint_id=str(folder))
    if rank == 0:
        (folder / PROGRESS).write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")


def read_progress(folder: Path) -> Progress:
    """Where the run stood when ``folder`` was written."""
    return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place, whatever world size wrote them."""
    dcp_load(tensors, checkpoint_id=str(folder))
