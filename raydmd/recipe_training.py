"""The ``training`` section: the loop, and how student and fake score learn in it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raydmd.recipe_types import Below1, Count, Fraction, NonNegative, Positive, Section, Word


class Lora(Section):
    """Low-rank adapters (peft)."""

    rank: Count = 64
    """Of each pair of matrices."""
    alpha: Positive = 8.0
    """What they add is multiplied by ``alpha / rank``."""
    targets: Annotated[tuple[Word, ...], Field(min_length=1)] | None = None
    """Ends of module names; default: the family's attention and feed-forward projections."""


class Role(Section):
    """A trainable network: its optimizer and what of it is trained."""

    rate: Positive
    """AdamW's."""
    betas: tuple[Below1, Below1] = (0.0, 0.999)
    """AdamW's."""
    eps: Positive = 1e-8
    """AdamW's: a gradient much smaller is not scaled up to a whole step, so that rounding does not train."""
    weight_decay: NonNegative = 0.0
    """AdamW's."""
    clip: Positive = 1.0
    """Largest gradient norm."""
    lora: Lora | None = None
    """Adapters; ``null`` trains all parameters."""


class Training(Section):
    """The loop."""

    cycles: Count = 1000
    """Student updates, over all phases."""
    phase_split: tuple[Positive, ...] | None = None
    """Relative cycles per phase; default: equal."""
    batch: Count = 64
    """Samples per student update, over all workers."""
    fake_updates: Annotated[int, Field(ge=0)] = 5
    """Fake-score updates per student update."""
    fake_warmup: Annotated[int, Field(ge=0)] = 0
    """Fake-score updates before a phase's first student update."""
    student: Role = Role(rate=5e-5, lora=Lora())
    fake: Role = Role(rate=4e-7)
    warmup: Annotated[int, Field(ge=0)] = 0
    """Cycles of a phase over which rates rise."""
    decay: Fraction = 0.0
    """Last fraction of a phase over which rates fall linearly to zero."""
    ema: Below1 = 0.0
    """Decay of the student's moving average, which is what is exported; 0 switches it off."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the forward passes; master weights and optimizer states stay fp32."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """Whole copies on every worker, or parameters, gradients and optimizer states spread over them (FSDP2)."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, more time."""
    offload_activations: bool = False
    """Keep the blocks' inputs, from which they are computed anew, in the host's memory meanwhile."""
    report_every: Count = 10
    """Cycles between two rows of metrics."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of the workers in a row, without a new checkpoint between them, before the run gives up."""
    step_timeout: Positive = 1800.0
    """Seconds that collectives, teacher requests and a checkpoint may each take."""
    stall_timeout: Positive = 7200.0
    """Seconds for a cycle, a phase's start or a checkpoint, after which a worker leaves its stacks and ends."""
    poison_budget: Annotated[int, Field(ge=0)] = 0
    """Samples of a run whose teacher's answer, reward or loss is not finite that may be drawn anew, with other noise
    and the prompt after theirs; each is told. The one after that ends the run, resumable, with the list of all."""
    on_stall: Literal["restart", "stop"] = "restart"
    """What follows then: all workers start again from the last checkpoint, or the run stops there."""
    sample_log: bool = False
    """Write into ``OUTPUT/NAME/sample-log`` which samples every update gets, and a hash of each one's noise."""
