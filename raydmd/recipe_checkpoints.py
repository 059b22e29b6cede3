"""The ``checkpoints`` section: when a run's state is written, where to, and which of it stays."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from raydmd.recipe_types import Count, Section, Word


class Checkpoints(Section):
    """What a run can go on from."""

    every: Count = 200
    """Cycles between two; another one is written where a phase ends, at a stop and at the end."""
    background: bool = True
    """Training goes on while one is written; it waits only until its state was copied to the host's memory."""
    keep: Annotated[int, Field(ge=2)] = 3
    """The last ones that stay, or more where ``monitor.action=rollback`` looks further back. Two at least: whether the
    newest is whole shows when it is read."""
    keep_every: Count | None = None
    """Cycles between those that stay for good; a multiple of ``every``."""
    best: Word | None = None
    """Figure of the evaluations in training by which the best one stays as well, e.g. ``frechet``; needs an
    ``evaluation.every`` that is a multiple of ``every``."""
    storage: Word | None = None
    """Where they go instead of the run's folder: ``s3://bucket/folder`` or another address that pyarrow or fsspec
    know. Credentials come from the environment of every node."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(f"keep_every={self.keep_every} is no multiple of every={self.every}")
        scheme, found, rest = (self.storage or "").partition("://")
        if self.storage is not None and (not found or scheme == "file"):
            raise ValueError(
                f"storage={self.storage} is no address of object storage such as s3://bucket/folder; checkpoints on a "
                "disk go to the run's own folder: set output"
            )
        if "@" in rest.partition("/")[0]:
            raise ValueError("storage holds credentials, and recipes are kept and shown: give them by the environment")
        return self
