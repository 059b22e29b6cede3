"""Rewards served by real replicas."""

from pathlib import Path

import helpers
import pytest
import torch

from raydmd.models import load_family
from raydmd.recipe import Recipe, derive
from raydmd.rewards.engine import load_reward_engine
from raydmd.serving.local import LocalClient
from raydmd.serving.messages import RewardRequest
from raydmd.serving.pool_client import PoolClient
from raydmd.training.pools import reward_pool

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
PROMPTS = ["a red bag moving left fast", "something moving up", "something", "a blue coat"]


def test_the_zoo_s_reward_in_a_pool_equals_the_local_one(tmp_path: Path) -> None:
    recipe = derive(Recipe(output=tmp_path), {"model.path": "wan22-tiny", "method.name": "amd", "deterministic": True})
    family = load_family(recipe.model)
    shape = family.shape().latent
    generator = torch.Generator().manual_seed(0)
    request = RewardRequest(x_t=torch.randn(4, *shape, generator=generator), conditions=(1, 2, 3, 4), name="four")
    expected = LocalClient(load_reward_engine(recipe, PROMPTS, "cpu")).submit(request).result().answer.value
    with helpers.own_cluster(torch.get_num_threads()), reward_pool(recipe, family, PROMPTS) as pool:
        answer = PoolClient(pool.client_spec(), "rank 0").submit(request).result().answer.value
    assert expected.shape == (4,)
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)
