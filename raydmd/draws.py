"""Random numbers as a function of (run seed, purpose, position), never of process state.

A position is the global index of a sample in the run's stream, so a restart, a replay or another world
size draws the same numbers for the same sample.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


CPU = torch.device("cpu")


class Witness(Protocol):
    """Somebody who is told what is drawn."""

    def drawn(self, purpose: str, position: int | None, value: Tensor) -> None:
        """Called for each sample, or with ``None`` for what all samples share; ``value`` is on the CPU."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch.

    Attributes:
        seed: of the run.
        update: which update of the run this batch serves, the same on all ranks, e.g. ``12/student``.
        positions: global index of each sample in the run's stream.
        device: where drawn tensors go; numbers are made on the CPU and do not depend on it.
        witness: is told what is drawn.
    """

    seed: int
    update: str
    positions: Sequence[int]
    device: torch.device = CPU
    witness: Witness | None = field(default=None, compare=False, repr=False)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise ``(B, *shape)``, fp32."""
        rows = [torch.randn(tuple(shape), generator=self._generator(purpose, p)) for p in self.positions]
        self._tell(purpose, rows)
        return torch.stack(rows).to(self.device)

    def uniform(self, purpose: str) -> Tensor:
        """Uniform numbers in [0, 1), ``(B,)``, fp32."""
        rows = [torch.rand(1, generator=self._generator(purpose, p)) for p in self.positions]
        self._tell(purpose, rows)
        return torch.cat(rows).to(self.device)

    def on(self, device: torch.device) -> Draws:
        """The same numbers on another device."""
        return replace(self, device=device)

    def shared(self, purpose: str) -> float:
        """One uniform number in [0, 1) that all samples and all ranks share."""
        value = torch.rand((), dtype=torch.float64, generator=self._generator(purpose, self.update))
        if self.witness:
            self.witness.drawn(purpose, None, value)
        return float(value)

    def _tell(self, purpose: str, rows: Sequence[Tensor]) -> None:
        if self.witness:
            for position, row in zip(self.positions, rows, strict=True):
                self.witness.drawn(purpose, position, row)

    def _generator(self, purpose: str, key: int | str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}|{purpose}|{key}".encode(), digest_size=8).digest()
        # The top bit would make the seed negative for torch.
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def shuffled(seed: int, epoch: int, count: int) -> list[int]:
    """A permutation of ``range(count)`` for one epoch."""
    digest = hashlib.blake2b(f"{seed}|prompts|{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(count, generator=generator).tolist()
