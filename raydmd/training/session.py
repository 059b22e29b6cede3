"""What the loop needs of its surroundings: ranks, a place to report to, a checkpoint to start from."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raydmd.training.checkpoint import cycle_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from raydmd.models.tokens import TokenGroup

Fits = Callable[[int], bool]


class Session(ABC):
    """One worker's surroundings."""

    rank: int
    world: int
    device: torch.device
    tokens: TokenGroup | None = None
    """Ranks with the same samples, which share their tokens; ``None`` if each has samples of its own."""

    @property
    def share(self) -> tuple[int, int]:
        """Which share of a batch's samples is this rank's, and how many there are."""
        size = self.tokens.size if self.tokens else 1
        return self.rank // size, self.world // size

    @abstractmethod
    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, name: str | None = None) -> None:
        """Hand over metrics, and with ``checkpoint`` this rank's files of checkpoint ``name``. All ranks call it."""

    @abstractmethod
    def latest(self, fits: Fits | None = None) -> contextlib.AbstractContextManager[Path | None]:
        """The last committed checkpoint as a folder, or ``None``; all ranks ask at the same place.

        Args:
            fits: whether one after so many cycles will do; default: any.
        """


class FolderSession(Session):
    """A single process without Ray: checkpoints are folders, reports are kept in a list.

    Args:
        folder: where checkpoints go.
        device: to train on.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.rank, self.world = 0, 1
        self.device = device or torch.device("cpu")
        self.folder = folder
        self.reports: list[dict[str, float]] = []

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None, name: str | None = None) -> None:
        """See :class:`Session`."""
        self.reports.append(dict(metrics))
        if checkpoint is not None and name is not None:
            partial = Path(tempfile.mkdtemp(dir=self.folder, prefix=".partial-"))
            shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
            target = self.folder / name
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)

    @contextlib.contextmanager
    def latest(self, fits: Fits | None = None) -> Iterator[Path | None]:
        """See :class:`Session`."""
        folders = (f for f in self.folder.glob("cycle-*") if fits is None or fits(cycle_of(f.name)))
        yield max(folders, default=None)
