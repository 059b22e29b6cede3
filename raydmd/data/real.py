"""Real samples for a discriminator: checked, encoded once, drawn by the same positions as everything else."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydmd.data.captions import read_captions
from raydmd.data.media import LATENTS, Kind, check, find, pixels
from raydmd.models.base import Conditions
from raydmd.models.identity import fingerprint
from raydmd.models.places import locate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.draws import Draws
    from raydmd.models.base import Shape
    from raydmd.models.family import Family
    from raydmd.recipe import Model
    from raydmd.recipe_gan import Gan

SHARD = 64
"""Samples in one file of encoded latents; an encoding that is interrupted goes on with the next."""
EMPTY = 1
"""Row of the empty prompt in the captions' table, whose row 0 is the negative prompt."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files that were looked into.

    Attributes:
        kind: of all files.
        files: in the order of their names.
        captions: one per sample, empty where there is none.
    """

    kind: Kind
    files: tuple[Path, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RealBatch:
    """Real samples.

    Attributes:
        x0: clean latents, ``(B, *latent)``, fp32.
        cond: their captions' conditions, the empty prompt's where there is none.
    """

    x0: Tensor
    cond: Conditions


class RealData:
    """Encoded samples, addressed by the positions of a run's stream.

    Args:
        tables: latents ``(n, *latent)`` each.
        rows: the caption's row in the table per sample, over all tables.
        conditions: encoded captions; row :data:`EMPTY` is the empty prompt.
    """

    def __init__(self, tables: Sequence[Tensor], rows: Sequence[int], conditions: Conditions) -> None:
        self._tables, self._rows, self._conditions = list(tables), list(rows), conditions
        self._starts = [0, *accumulate(len(table) for table in tables)]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, draws: Draws) -> RealBatch:
        """A real sample for each position, on the draws' device."""
        chosen = self._chosen(draws)
        tables = [bisect_right(self._starts, i) - 1 for i in chosen]
        x0 = torch.stack([self._tables[k][i - self._starts[k]] for k, i in zip(tables, chosen, strict=True)])
        cond = self._conditions.rows([self._rows[i] for i in chosen])
        return RealBatch(x0=x0.float().to(draws.device), cond=cond.to(draws.device))

    def heard(self, draws: Draws, cond: Conditions) -> Conditions:
        """The conditions under which generated samples are judged.

        Their own, but the empty prompt where the real sample of the same position has no caption: else the prompt
        alone would tell what is real.
        """
        captioned = torch.tensor([self._rows[i] != EMPTY for i in self._chosen(draws)], device=draws.device)
        return cond if captioned.all() else cond.where(captioned, self._conditions.rows([EMPTY]))

    def _chosen(self, draws: Draws) -> list[int]:
        return [min(int(u * len(self)), len(self) - 1) for u in draws.uniform("gan.sample").double().tolist()]


def inspect(settings: Gan, shape: Shape) -> Source:
    """Look into the files that a recipe names, without decoding them.

    Raises:
        InputError: naming what is missing, unreadable or unfit.
    """
    data = settings.data.expanduser().absolute()
    kind, files = find(data)
    counts = check(kind, files, shape)
    captions = read_captions(kind, files, counts, data, settings.captions)
    return Source(kind=kind, files=tuple(files), captions=tuple(captions))


def prepare(source: Source, model: Model, family: Family, cache: Path, say: Callable[[str], None]) -> Path:
    """Encode what is not encoded yet.

    Args:
        source: of :func:`inspect`.
        model: the recipe's section; part of the cache's key.
        family: its pipeline.
        cache: folder that keeps encodings between runs.
        say: hears of the progress.

    Returns:
        A file that :func:`load_real` reads.

    Raises:
        InputError: naming a file that can't be decoded.
    """
    texts = ["", *dict.fromkeys(text for text in source.captions if text)]
    conditions = family.encode(texts, cache)
    number = {text: EMPTY + i for i, text in enumerate(texts)}
    files = source.files if source.kind == "latents" else _encoded(source, model, family, cache, say)
    index = {
        "files": [str(file) for file in files],
        "rows": [number[text] for text in source.captions],
        "conditions": str(conditions),
    }
    text = json.dumps(index)
    file = cache / f"real-{_hash(text)}.json"
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
    return file


def load_real(file: Path) -> RealData:
    """What :func:`prepare` has written; latents are memory-mapped, rows are read when they are used."""
    index = json.loads(file.read_text(encoding="utf-8"))
    tables = [load_file(name)[LATENTS] for name in index["files"]]
    return RealData(tables, index["rows"], Conditions.read(Path(index["conditions"])))


def _encoded(source: Source, model: Model, family: Family, cache: Path, say: Callable[[str], None]) -> list[Path]:
    """Latents in shards of their own, each written once."""
    shape, device = family.shape(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = fingerprint(locate(model).settings, ("vae",))
    found = []
    for start in range(0, len(source.files), SHARD):
        part = source.files[start : start + SHARD]
        stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in part]
        facts = [vae, [shape.frames, shape.height, shape.width], stamps]
        file = cache / f"latents-{_hash(json.dumps(facts))}.safetensors"
        found.append(file)
        if file.is_file():
            continue
        say(f"encoding real samples {start + 1}..{start + len(part)} of {len(source.files)} ...")
        rows = [family.encode_pixels(pixels(source.kind, f, shape)[None].to(device)).cpu().contiguous() for f in part]
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({LATENTS: torch.cat(rows)}, partial)
        partial.replace(file)
    return found


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
