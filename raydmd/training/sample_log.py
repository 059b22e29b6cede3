"""Which samples each update got, and the noise that was drawn for them: one JSON line per update and rank.

Two runs saw the same samples if their logs name the same positions, rows and hashes for every cycle and slot, whatever
the number of workers was. A cycle that is done again after a restart has a second line, with another ``group``.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from raydmd.recipe import Recipe
    from raydmd.training.session import Session

FOLDER = "sample-log"
"""Of a run, with a file for each rank."""


class UpdateLog:
    """The samples of one update on one rank; :class:`~raydmd.draws.Draws` tells it what it draws.

    Args:
        cycle: of the update.
        slot: of the cycle.
        positions: global index of each sample; of one that was drawn anew much larger, see
            :data:`~raydmd.training.stream.ANEW`.
        rows: of each sample in the condition table.
    """

    def __init__(self, cycle: int, slot: str, positions: Sequence[int], rows: Sequence[int]) -> None:
        self.place = cycle, slot
        self._facts = {"cycle": cycle, "slot": slot, "positions": list(positions), "rows": list(rows)}
        self._hashes = {key: hashlib.blake2b(digest_size=8) for key in (*positions, None)}

    def drawn(self, purpose: str, position: int | None, value: Tensor) -> None:
        """Take note of what was drawn for a sample, or with ``None`` for all of the update's."""
        self._hashes[position].update(purpose.encode() + b"\0" + value.numpy().tobytes())

    def facts(self) -> dict[str, object]:
        """What is written: ``noise`` is a hash per sample, ``shared`` one of what all samples share."""
        *noise, shared = (h.hexdigest() for h in self._hashes.values())
        return {**self._facts, "noise": noise, "shared": shared}


class SampleLog:
    """Of one rank of a run.

    Args:
        recipe: the run; off unless it asks for it.
        session: where this rank is.
        group: of what this group of workers writes.
    """

    def __init__(self, recipe: Recipe, session: Session, group: str) -> None:
        share, shares = session.share
        # Ranks that share their samples have one line between them.
        self._enabled = recipe.training.sample_log and (session.tokens is None or session.tokens.leads)
        self._path = recipe.folder / FOLDER / f"rank{share:05d}.jsonl"
        self._by = {"rank": share, "world": shares, "group": group}
        self._open: list[UpdateLog] = []

    def update(self, cycle: int, slot: str, positions: Sequence[int], rows: Sequence[int]) -> UpdateLog | None:
        """Begin an update's line; ``None`` if the log is off."""
        if not self._enabled:
            return None
        self._open = [update for update in self._open if update.place != (cycle, slot)]  # it is made again
        self._open.append(UpdateLog(cycle, slot, positions, rows))
        return self._open[-1]

    def write(self) -> None:
        """Write the lines of all updates since the last call; they are done."""
        if not self._open:
            return
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({**update.facts(), **self._by}) + "\n" for update in self._open))
        self._open.clear()
