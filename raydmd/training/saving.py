"""Writing checkpoints, each rank its part, beside the training that goes on."""

from __future__ import annotations

import hashlib
import json
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from raydmd.errors import DamagedCheckpoint
from raydmd.training import checkpoint
from raydmd.training.manifest import FIRST, damage, seal
from raydmd.training.ranks import Ranks, over_ranks, patience

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from raydmd.recipe import Recipe
    from raydmd.training.events import EventLog
    from raydmd.training.session import Session


class Saver:
    """One rank's part in a run's checkpoints; every method is called by all ranks at the same places.

    Args:
        recipe: the run.
        session: of this rank.
        events: where it is told that one is there.

    Attributes:
        stamp: of what this group of workers writes, and no other.
    """

    def __init__(self, recipe: Recipe, session: Session, events: EventLog) -> None:
        self._session, self._events = session, events
        self._background = recipe.checkpoints.background
        self._ranks = Ranks(session)
        self._group = checkpoint.writers(patience(recipe.training.step_timeout))
        self.stamp = self._ranks.everyone(uuid.uuid4().hex)[0]

    def write(
        self,
        name: str,
        tensors: dict[str, Tensor],
        progress: checkpoint.Progress,
        row: Mapping[str, float],
        *,
        wait: bool,
        more: Callable[[Path], None] | None = None,
        most: int = 0,
    ) -> None:
        """Write a checkpoint and report it.

        Args:
            name: of the checkpoint.
            tensors: what it holds; they may change once this returns.
            progress: where the run stands.
            row: metrics of this rank that are reported with it.
            wait: return once it is there, instead of once its tensors are copied.
            more: writes further files into a folder.
            most: bytes of these.

        Raises:
            RunFailed: on all ranks, if there is no room for it; the one before is whole.
        """
        rank, world, background = self._session.rank, self._session.world, self._background and not wait
        folder, error = Path(), None
        try:
            folder = self._session.begin(name, checkpoint.size(tensors) + most)
        except Exception as e:
            error = e
        self._ranks.agree(error)
        written = checkpoint.save(folder, tensors, progress, rank=rank, group=self._group, background=background)
        if more is not None:
            try:
                more(folder)
            except Exception as e:
                error = e
            self._ranks.agree(error)

        def complete() -> None:
            written()
            self._session.held()  # that may have taken long
            seal(folder, rank=rank, world=world, stamp=self.stamp)

        def done() -> None:
            self._events.write("checkpoint", cycle=progress.cycle, phase=progress.phase, name=name)

        writing = checkpoint.Writing(name=name, folder=folder, complete=complete, done=done)
        # All ranks' means by the first of them: Ray Train's books keep its row alone, see mending.catch_up.
        rows = [json.loads(said) for said in self._ranks.everyone(json.dumps(dict(row)))]
        self._session.report(over_ranks(rows) if rank == 0 else {}, writing, background=background)

    def check(self, folder: Path) -> None:
        """See that a checkpoint is what was written, and the same on all ranks; each reads a share of it.

        Raises:
            DamagedCheckpoint: on all ranks alike.
            RuntimeError: on all ranks, if they were given different ones.
        """
        share, shares = self._session.rank, self._session.world
        if wrong := damage(folder, part=share, parts=shares):
            wrong += f" (as rank {share} on {socket.gethostname()} reads it)"
        if found := next(filter(None, self._ranks.everyone(wrong)), ""):
            raise DamagedCheckpoint(f"checkpoint {folder.name} is damaged: {found}")
        mine = hashlib.sha256((folder / FIRST).read_bytes()).hexdigest()
        if len(set(self._ranks.everyone(mine))) > 1:
            raise RuntimeError(
                f"ranks were given different checkpoints, this one {folder}: does every node see the same?"
            )
