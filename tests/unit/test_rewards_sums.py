"""What any reward may answer and be asked, and sums of rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from raydmd.errors import InputError, NonFiniteError, RewardError
from raydmd.rewards.base import Reward
from raydmd.rewards.compose import Part, WeightedSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

pytestmark = pytest.mark.unit

PROMPTS = ["a red bag", "a dog that runs over the beach", "x"]
PIXELS = torch.rand(3, 2, 3, 8, 10, generator=torch.Generator().manual_seed(0))


class Fixed(Reward):
    """Answers what it was given."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.name, self.values = name, values

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.values


def test_answers_of_the_wrong_length_or_not_finite_are_refused() -> None:
    pixels = PIXELS
    # One value for three samples would broadcast in silence, (3, 1) would make a table.
    for values in (torch.zeros(1), torch.zeros(2), torch.zeros(3, 1), torch.tensor(0.0)):
        with pytest.raises(RewardError, match=rf"'odd' gave {values.numel()} values .* for 3 samples"):
            Fixed("odd", values).score(pixels, PROMPTS, range(3))
    bad = Fixed("odd", torch.tensor([0.0, torch.inf, torch.nan]))
    with pytest.raises(NonFiniteError, match=r"'odd', sample seed-8 \(prompt 'a dog.*is inf.*\['seed-8', 'seed-9'\]$"):
        bad.score(pixels, PROMPTS, ["seed-7", "seed-8", "seed-9"])
    with pytest.raises(NonFiniteError, match=r"'odd', sample 1 "):
        WeightedSum([Part(reward=bad)])(pixels, PROMPTS)


def test_inputs_that_do_not_belong_together_are_refused() -> None:
    reward, pixels = Fixed("r", torch.zeros(3)), PIXELS
    for wrong in (pixels[0], pixels.transpose(1, 2), pixels[:, :0]):
        with pytest.raises(InputError, match="shape"):
            reward.score(wrong, PROMPTS, range(3))
    for shown, prompts, ids in ((pixels[:2], PROMPTS, range(3)), (pixels, PROMPTS, range(2))):
        with pytest.raises(InputError, match="belong together"):
            reward.score(shown, prompts, ids)
    for shown in (pixels * 2 - 1, pixels * 255):
        with pytest.raises(InputError, match=r"in \[0, 1\]"):
            reward.score(shown, PROMPTS, range(3))
    assert reward.score(pixels, PROMPTS, range(3)).tolist() == [0, 0, 0]


def test_a_sum_weighs_and_standardises_and_names_its_parts() -> None:
    first, second = Fixed("pick", torch.tensor([21.0, 23.0, 19.0])), Fixed("zoo", torch.tensor([-1.0, 0.0, -3.0]))
    total = WeightedSum([Part(reward=first, weight=0.5, mean=21, scale=2), Part(reward=second, weight=-1)])
    assert total.name == "0.5*(pick-21)/2 + -1*zoo"
    assert total.score(PIXELS, PROMPTS, range(3)).tolist() == [1.0, 0.5, 2.5]
    assert total(PIXELS, PROMPTS).tolist() == [1.0, 0.5, 2.5]
    nested = WeightedSum([Part(reward=total, weight=2)])
    assert nested.score(PIXELS, PROMPTS, range(3)).tolist() == [2.0, 1.0, 5.0]
    for values, error in ((torch.zeros(1), RewardError), (torch.tensor([0.0, torch.nan, 0.0]), NonFiniteError)):
        mixed = WeightedSum([Part(reward=first), Part(reward=Fixed("guilty", values))])
        with pytest.raises(error, match="reward 'guilty'"):
            mixed.score(PIXELS, PROMPTS, range(3))
    huge = Part(reward=Fixed("huge", torch.full((3,), 3e38)))
    with pytest.raises(NonFiniteError, match=r"reward 'huge \+ huge', sample 0"):
        WeightedSum([huge, huge]).score(PIXELS, PROMPTS, range(3))


def test_parts_that_make_no_sense_are_refused() -> None:
    reward = Fixed("r", torch.zeros(3))
    wrong: list[dict[str, float]] = [{"weight": 0.0}, {"scale": 0.0}, {"scale": -1.0}, {"mean": float("nan")}]
    for settings in wrong:
        with pytest.raises(InputError):
            Part(reward=reward, **settings)
    with pytest.raises(InputError, match="at least one"):
        WeightedSum([])
