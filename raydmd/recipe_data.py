"""The ``data`` section: prompts, and the sizes of the samples that are made of them."""

from __future__ import annotations

from pathlib import Path

from raydmd.recipe_types import Count, Positive, Section, Word


class Size(Section):
    """A size that samples are trained at, and how often."""

    height: Count
    width: Count
    frames: Count | None = None
    """Pixel frames; default: the model's."""
    weight: Positive = 1.0
    """How often, relative to the others."""


class Data(Section):
    """Prompts. Distillation is data-free otherwise, but for ``method.gan``."""

    prompts: Word | None = None
    """A file, by its ending: .txt (one prompt a line), .jsonl, .csv, .tsv, .parquet; or a dataset's folder or hub id.
    Default: the zoo's own."""
    column: Word | None = None
    """Of a table; default: ``prompt``, ``caption`` or ``text``, the first that it has."""
    split: Word = "train"
    """Of a dataset."""
    timeout: Positive = 3600.0
    """Seconds that a part of the prompts may take to be encoded, its wait for a free node included."""
    quarantine: tuple[Count, ...] = ()
    """Prompts that are never trained on, by their number from 1 on, as messages have it: those whose samples are not
    finite. In its place comes the prompt after it; all other samples stay as they are. May change on the way."""
    cache: Path | None = None
    """Where encoded prompts are kept; default: ``conditions`` beside the run."""
    sizes: tuple[Size, ...] = ()
    """Sizes to train on, e.g. ``[{height: 480, width: 832, weight: 0.4}, {height: 832, width: 480, weight: 0.4}]``.
    Each update of student and fake score has one of them, drawn by weight; ``method.shift`` is the same for all, and
    memory must do for the largest. Default: the model's own size, which stays that of evaluation and of
    ``raydmd sample``."""
