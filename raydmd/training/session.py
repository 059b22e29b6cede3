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
from raydmd.training.store import check_space

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from raydmd.models.tokens import TokenGroup
    from raydmd.training.checkpoint import Writing
    from raydmd.training.preemption import Notice

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
    def begin(self, name: str, size: int) -> Path:
        """An empty folder for this rank's files of a checkpoint, once the one before is there.

        It may be that of all ranks: none may write into it before all have asked.

        Args:
            name: of the checkpoint.
            size: bytes of all ranks' files, about.

        Raises:
            RunFailed: if there is no room for it.
        """

    @abstractmethod
    def report(self, metrics: Mapping[str, float], writing: Writing | None = None, *, background: bool = False) -> None:
        """Hand over metrics, and a checkpoint in the folder that :meth:`begin` gave. All ranks call it.

        Args:
            metrics: of this rank.
            writing: the checkpoint.
            background: do not wait for it.
        """

    @abstractmethod
    def latest(self, fits: Fits | None = None) -> contextlib.AbstractContextManager[Path | None]:
        """The last committed checkpoint as a folder, or ``None``; all ranks ask at the same place.

        Args:
            fits: whether one after so many cycles will do; default: any.
        """

    def held(self) -> None:
        """See that the run is still this group's: what would write for it asks before.

        Raises:
            LeaseLost: if another has taken it over.
        """
        return

    def notice(self) -> Notice | None:
        """That nodes of this run will be taken away, if it is known; all ranks ask at the same place."""
        return None


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

    def begin(self, name: str, size: int) -> Path:
        """See :class:`Session`."""
        check_space(name, size, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.folder, prefix=".partial-"))

    def report(self, metrics: Mapping[str, float], writing: Writing | None = None, *, background: bool = False) -> None:
        """See :class:`Session`; nothing is done in the background."""
        self.reports.append(dict(metrics))
        if writing is not None:
            writing.complete()
            target = self.folder / writing.name
            shutil.rmtree(target, ignore_errors=True)
            writing.folder.rename(target)
            writing.done()

    @contextlib.contextmanager
    def latest(self, fits: Fits | None = None) -> Iterator[Path | None]:
        """See :class:`Session`."""
        folders = (f for f in self.folder.glob("cycle-*") if fits is None or fits(cycle_of(f.name)))
        yield max(folders, default=None)
