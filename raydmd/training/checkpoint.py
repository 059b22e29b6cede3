"""Checkpoints: PyTorch's distributed format for tensors, JSON for where the run stands.

Files of a checkpoint: ``*.distcp`` and ``.metadata`` (tensors, one file per rank, reshardable),
``progress.json`` (cycle, phase, recipe, versions), and each rank's list of its files.
"""

from __future__ import annotations

import contextlib
import json
import re
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from raydmd import __version__
from raydmd.training.metadata import Reader, read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import timedelta
    from pathlib import Path

PROGRESS = "progress.json"
FINAL, PHASE = "-final", "-phase"
"""Ends of the names of a run's last checkpoint, after which none comes, and of those that end a phase."""
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


@dataclass(frozen=True, kw_only=True)
class Writing:
    """A checkpoint that is being written.

    Attributes:
        name: its name.
        folder: of this rank's files, or of all ranks'.
        complete: returns once this rank's files are there, whole and listed.
        done: is called once they are where they stay.
    """

    name: str
    folder: Path
    complete: Callable[[], None]
    done: Callable[[], None]


def writers(patience: timedelta) -> dist.ProcessGroup | None:
    """A group of all ranks that says nothing but what checkpoints need, so that they can be written beside training.

    Args:
        patience: how long ranks wait for each other.
    """
    return dist.new_group(backend="gloo", timeout=patience) if dist.is_initialized() else None


def save(
    folder: Path,
    tensors: dict[str, Tensor],
    progress: Progress,
    *,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
    background: bool = False,
) -> Callable[[], None]:
    """Write this rank's part into ``folder``; all ranks call it.

    Args:
        folder: one for all ranks, or of each its own.
        tensors: what to write. In the background they are copied first, so that the caller may go on changing them.
        progress: where the run stands.
        rank: of this process.
        group: of :func:`writers`.
        background: return once they are copied.

    Returns:
        What to call for it to be there.

    Raises:
        OSError: on all ranks, if any of them can't write; in the background what is returned raises it.
    """
    if rank == 0:
        (folder / PROGRESS).write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
    if not background:
        with _plainly(folder):
            dcp_save(tensors, checkpoint_id=str(folder), process_group=group)
        return lambda: None
    with _plainly(folder):
        future = async_save(tensors, checkpoint_id=str(folder), process_group=group)
    assert isinstance(future, Future)

    def written() -> None:
        with _plainly(folder):
            future.result()

    return written


def size(tensors: dict[str, Tensor]) -> int:
    """Bytes of all ranks' parts: what is sharded is written by its owners, what all have by one of them."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def read_progress(folder: Path) -> Progress:
    """Where the run stood when ``folder`` was written."""
    return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place, whatever world size wrote them.

    Raises:
        DamagedCheckpoint: on all ranks alike, if its metadata are none of a table of tensors.
        OSError: if any rank can't read it.
    """
    read_metadata(folder)  # by every rank: PyTorch has the first one read them, and the others fail in another way
    with _plainly(folder):
        dcp_load(tensors, storage_reader=Reader(str(folder)))


@contextlib.contextmanager
def _plainly(folder: Path) -> Iterator[None]:
    """Raise what went wrong as an error: PyTorch's own is a ``BaseException``, which Ray's threads do not notice."""
    try:
        yield
    except CheckpointException as error:
        found = "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in error.failures.items())
        raise OSError(f"checkpoint {folder.name}: {found}") from error
