"""The ``monitor`` section: when a run looks as if it collapses, and what happens then."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raydmd.recipe_types import Above1, Count, Positive, Section

SIGNALS = ("gradient", "fake_error", "critic_lag", "brightness", "spread", "saturation", "diversity")
"""The monitor's limits."""


class Monitor(Section):
    """The collapse monitor: what is watched in training, when it speaks, and what happens then.

    A limit of ``null`` switches its signal off. Rows are cycles; levels are medians over ``window`` rows, of the fake
    score's errors geometric means over ``settle`` rows.
    """

    action: Literal["warn", "stop", "rollback", "raise_ratio", "cut_rate"] = "warn"
    """On an alarm. ``warn`` says so; ``stop`` writes a checkpoint and stops, resumable, also with other monitor
    settings; ``rollback`` goes back to the last checkpoint from before the trouble and goes on from there with
    other draws, ``cut`` and ``ratio``; ``raise_ratio`` and ``cut_rate`` go on with one of the two."""
    gradient: Above1 | None = 5.0
    """Largest gradient norm of the student, over its own median in ``settle`` rows."""
    fake_error: Above1 | None = 3.0
    """Largest fake-score error in any noise band, over its own best level."""
    critic_lag: Above1 | None = 2.0
    """Largest fake-score error, as the geometric mean over noise bands, over its own best level."""
    brightness: Positive | None = 0.3
    """Largest drift of the samples' mean since the phase's start, in the teacher's standard deviations."""
    spread: Above1 | None = 1.5
    """Largest factor, either way, between the samples' standard deviation and that of the teacher's answers in the
    phase's first rows, over the nearest that the samples have been."""
    saturation: Annotated[float, Field(gt=0, lt=1)] | None = 0.05
    """Largest rise in the share of latents beyond three standard deviations of the teacher's answers in the phase's
    first rows."""
    diversity: Annotated[float, Field(gt=0, lt=1)] | None = 0.4
    """Smallest distance between samples of one prompt, over that at the phase's start."""
    every: Count = 20
    """Cycles between measurements of diversity."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Per prompt, for diversity."""
    prompts: Count = 2
    """For diversity: the first so many."""
    settle: Count = 50
    """First rows of a phase, in which nothing fires; the levels at their end are the phase's start."""
    window: Annotated[int, Field(ge=2)] = 20
    """Rows whose median is a level."""
    patience: Count = 10
    """Rows in a row over a limit before it fires, and well below it before it may fire anew."""
    limit: Count = 2
    """Rollbacks, raises and cuts of a run; the next alarm stops it."""
    cut: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on both roles' rates, per action."""
    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5
    """Factor on ``training.fake_updates``, rounded up, per action."""

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        used = {
            "rollback": ("limit", "cut", "ratio"),
            "raise_ratio": ("limit", "ratio"),
            "cut_rate": ("limit", "cut"),
        }.get(self.action, ())
        idle = [(k, f"action={self.action}") for k in ("limit", "cut", "ratio") if k not in used]
        if self.diversity is None:
            idle += [(k, "diversity=null") for k in ("every", "samples", "prompts")]
        for key, reason in idle:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)} does nothing with {reason}; leave it out")
        if (self.action == "cut_rate" and self.cut == 1) or (self.action == "raise_ratio" and self.ratio == 1):
            raise ValueError(f"action={self.action} with a factor of 1 changes nothing")
        if self.action != "warn" and not any(getattr(self, k) is not None for k in SIGNALS):
            raise ValueError(f"action={self.action} never happens, since every limit is null")
        return self

    @property
    def probes(self) -> int:
        """Measurements of diversity that make a level."""
        return 3

    @property
    def lookback(self) -> int:
        """Cycles before an alarm in which its cause may lie."""
        return self.patience + max(self.window, 0 if self.diversity is None else self.probes * self.every)

    def raised(self, fake_updates: int) -> int:
        """Fake updates after one raise."""
        return ceil(fake_updates * self.ratio)
