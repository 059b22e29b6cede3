"""What every section of a recipe is made of: a strict base class, bounded numbers, values that move."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Above1 = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Word = Annotated[str, Field(min_length=1)]
Times = tuple[Fraction, Fraction]
"""A window of noise levels before the shift, rising."""


class Section(BaseModel):
    """A part of the recipe: frozen, no unknown keys, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class Ramp(Section):
    """A value that moves linearly over each phase's cycles and then stays."""

    start: NonNegative
    end: NonNegative
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the phase after which it stays at ``end``."""


Weight = NonNegative | Ramp
"""A weight, constant or moving."""


class Balance(Section):
    """A weight that sets itself in every update: a gradient ``balance`` times as strong as the score term's.

    Gradients are compared where the term meets the student's output, over all samples of the update, see
    :mod:`raydmd.methods.weighing`.
    """

    balance: Positive | Ramp

    @model_validator(mode="after")
    def _not_idle(self) -> Self:
        if not ever_positive(self):
            raise ValueError("balance=0 switches the term off; leave the term out")
        return self


TermWeight = Weight | Balance
"""A weight of a term beside the score term."""


def value_at(weight: float | Ramp, progress: float) -> float:
    """The weight after a share ``progress`` in [0, 1] of a phase."""
    if isinstance(weight, Ramp):
        done = min(progress / weight.until, 1.0)
        return weight.start + (weight.end - weight.start) * done
    return weight


def ever_positive(weight: float | Ramp | Balance) -> bool:
    """Whether the weight is above zero at any time."""
    if isinstance(weight, Balance):
        weight = weight.balance
    return max(weight.start, weight.end) > 0 if isinstance(weight, Ramp) else weight > 0


def rising(name: str, times: tuple[float, float]) -> None:
    """Refuse a window that does not rise.

    Raises:
        ValueError: naming it.
    """
    if not times[0] < times[1]:
        raise ValueError(f"{name} must rise, given {list(times)}")
