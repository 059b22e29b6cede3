"""Making pairs: the teacher walks from each noise, many requests at a time, one shard after the other."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from raydmd.guidance import Guidance
from raydmd.pairs.manifest import MANIFEST, Manifest, Origin, PairsError, refuse_other, write_prompts
from raydmd.pairs.store import pair_noise, pair_prompts, write_shard
from raydmd.process import step_grid
from raydmd.serving.messages import WalkRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from raydmd.serving.client import Client, Pending


def begin(folder: Path, origin: Origin, negative: str, prompts: Sequence[str]) -> Manifest:
    """Start a folder of pairs, or take up one that was begun.

    Args:
        folder: exists.
        origin: of the pairs.
        negative: the negative prompt.
        prompts: the others.

    Returns:
        The manifest, with the shards that are whole.

    Raises:
        PairsError: if the folder's pairs are of another origin; names the field.
    """
    if not (folder / MANIFEST).exists():
        write_prompts(folder, negative, prompts)
        manifest = Manifest(origin=origin)
        manifest.write(folder)
        return manifest
    manifest = Manifest.read(folder)
    refuse_other(folder, manifest.origin, origin)
    write_prompts(folder, negative, prompts)
    whole = []
    with contextlib.suppress(PairsError):  # a shard that has come to harm, and those after it, are made again
        for shard in manifest.shards:
            shard.check(folder, whole=True)
            whole.append(shard)
    return replace(manifest, shards=tuple(whole))


def make_pairs(
    folder: Path,
    manifest: Manifest,
    prompts: int,
    teacher: Client,
    *,
    ahead: int,
    tell: Callable[[Manifest], None] = lambda _: None,
) -> Manifest:
    """Make the shards that are missing, in order.

    Requests never reach over a shard's end and their sizes are the origin's, so a shard's bytes don't depend on
    what was made in the same process before it.

    Args:
        folder: of the pairs.
        manifest: as :func:`begin` gives it.
        prompts: how many there are.
        teacher: walks.
        ahead: requests under way at a time.
        tell: is called after each shard.

    Returns:
        The manifest, finished.

    Raises:
        PoolError: or NonFiniteError, from the teacher; shards that were written stay.
    """
    origin = manifest.origin
    requests = _requests(origin, prompts, first=len(manifest.shards))
    pending: deque[tuple[int, WalkRequest, Pending]] = deque()

    def refill() -> None:
        while len(pending) < ahead and (following := next(requests, None)):
            pending.append((*following, teacher.submit(following[1])))

    latents: list[Tensor] = []
    rows: list[int] = []
    refill()
    while pending:
        number, request, answer = pending.popleft()
        latents.append(answer.result().answer.value)
        rows += request.conditions
        refill()
        if not pending or pending[0][0] != number:
            shard = write_shard(folder, number, torch.cat(latents), rows)
            latents, rows = [], []
            manifest = replace(manifest, shards=(*manifest.shards, shard))
            manifest.write(folder)
            tell(manifest)
    return manifest


def _requests(origin: Origin, prompts: int, *, first: int) -> Iterator[tuple[int, WalkRequest]]:
    grid, guidance = tuple(step_grid(origin.steps, origin.shift)), Guidance(origin.guidance)
    for number in range(first, origin.shards):
        indices = origin.indices(number)
        for start in range(0, len(indices), origin.request):
            part = indices[start : start + origin.request]
            request = WalkRequest(
                x_t=pair_noise(origin.seed, part, origin.latent),
                grid=grid,
                conditions=pair_prompts(origin.seed, part, prompts),
                guidance=guidance,
                name=f"pairs {part[0]}..{part[-1]}",
            )
            yield number, request
