"""Pairs on disk: shards of latents, memory-mapped; the noise is drawn again from seed and index.

A shard is a safetensors file with ``latents`` ``(n, *latent)``, fp32, and ``prompts`` ``(n,)``, int64: the row of
each pair's prompt in a condition table whose row 0 is the negative prompt. The noise is no bit smaller than the
latents and a function of seed and index, so it is not stored; the manifest has a digest of the first pair's.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from raydmd.draws import Draws, shuffled
from raydmd.pairs.manifest import Manifest, PairsError, Shard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OPEN = 64
"""Shards that stay mapped."""


def pair_noise(seed: int, indices: Sequence[int], latent: tuple[int, ...]) -> Tensor:
    """What the teacher's walks of these pairs start from, ``(B, *latent)``, fp32."""
    return Draws(seed, "pairs", tuple(indices)).normal("pair.noise", latent)


def noise_digest(seed: int, latent: tuple[int, ...]) -> str:
    """Digest of the first pair's noise."""
    return hashlib.sha256(pair_noise(seed, [0], latent).numpy().tobytes()).hexdigest()[:32]


def pair_prompts(seed: int, indices: Sequence[int], prompts: int) -> tuple[int, ...]:
    """Row in the condition table of each pair's prompt: all prompts in turn, in an order of their own each time."""
    orders = {epoch: shuffled(seed, epoch, prompts) for epoch in {i // prompts for i in indices}}
    return tuple(1 + orders[i // prompts][i % prompts] for i in indices)


def write_shard(folder: Path, shard: int, latents: Tensor, prompts: Sequence[int]) -> Shard:
    """Write a shard, at once or not at all.

    Args:
        folder: of the pairs.
        shard: its number.
        latents: clean latents ``(n, *latent)``, fp32.
        prompts: row of each one's prompt, length n.

    Returns:
        Its entry in the manifest.
    """
    file = folder / f"pairs-{shard:05d}.safetensors"
    rows = torch.tensor(list(prompts), dtype=torch.int64)
    # Not save_file, whose files nobody else may read: trainers may run as other users.
    partial = file.with_suffix(".partial")
    partial.write_bytes(save({"latents": latents.contiguous(), "prompts": rows}))
    partial.replace(file)
    return Shard.of(file, len(latents))


class PairStore:
    """A finished folder of pairs, read by index.

    Args:
        folder: of the pairs.
        manifest: its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._mapped: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> PairStore:
        """Open a folder and see that all of it is there.

        Args:
            folder: of the pairs.
            verify: compare every shard with its checksum, not its size alone.

        Raises:
            PairsError: if pairs are missing or unfinished, or a shard is not what was written; names it.
        """
        manifest = Manifest.read(folder)
        origin = manifest.origin
        if not manifest.finished:
            raise PairsError(
                f"pairs in {folder} are unfinished: {len(manifest.shards)} of {origin.shards} shards; the same "
                "'raydmd pairs' command makes the others"
            )
        store = cls(folder, manifest)
        for number, shard in enumerate(manifest.shards):
            shard.check(folder, whole=verify)
            store._check_shapes(number)
        return store

    def __len__(self) -> int:
        return self.manifest.origin.count

    def targets(self, indices: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Latents ``(B, *latent)``, fp32, and the rows of their prompts, of the given pairs.

        Raises:
            PairsError: if a shard cannot be read; names it.
        """
        latents, prompts = [], []
        for index in indices:
            number, row = divmod(index, self.manifest.origin.shard)
            shard = self._shard(number)
            latents.append(shard.get_slice("latents")[row])
            prompts.append(int(shard.get_slice("prompts")[row : row + 1]))
        return torch.stack(latents), tuple(prompts)

    def noise(self, indices: Sequence[int]) -> Tensor:
        """What the walks to :meth:`targets` started from, ``(B, *latent)``, fp32."""
        return pair_noise(self.manifest.origin.seed, indices, self.manifest.origin.latent)

    def _shard(self, number: int) -> Any:
        if number not in self._mapped:
            while len(self._mapped) >= OPEN:
                del self._mapped[next(iter(self._mapped))]
            file = self.folder / self.manifest.shards[number].file
            try:
                self._mapped[number] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise PairsError(f"pairs in {self.folder}: shard {file.name} is not readable: {error}") from None
        return self._mapped[number]

    def _check_shapes(self, number: int) -> None:
        shard, entry, latent = self._shard(number), self.manifest.shards[number], self.manifest.origin.latent
        wanted = {"latents": [entry.pairs, *latent], "prompts": [entry.pairs]}
        found = {name: list(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118 # no mapping
        if found != wanted:
            raise PairsError(f"pairs in {self.folder}: shard {entry.file} holds {found}, not {wanted}")
