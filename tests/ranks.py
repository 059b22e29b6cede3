"""One of several processes that train together, without Ray."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import torch.distributed as dist

from raydmd.training.session import FolderSession

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from raydmd.training.checkpoint import Writing


class OneOfSome(FolderSession):
    """A rank whose checkpoints are all ranks', as they are on a disk with Ray; its reports are kept in a file."""

    def __init__(self, folder: Path, rank: int, world: int = 2) -> None:
        super().__init__(folder)
        self.rank, self.world = rank, world

    def begin(self, name: str, size: int) -> Path:
        folder = self.folder / name
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        return folder

    def report(self, metrics: Mapping[str, float], writing: Writing | None = None, *, background: bool = False) -> None:
        self.reports.append(dict(metrics))
        with (self.folder / f"reports-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(dict(metrics)) + "\n")
        if writing is not None:
            writing.complete()
            dist.barrier()
            writing.done()
