"""A reward as what a replica runs: latents in, decoded here, judged, rewards out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from raydmd.errors import InputError, NonFiniteError
from raydmd.methods.terms import Answer
from raydmd.models import load_family
from raydmd.models.places import locate
from raydmd.models.sizes import training_latents
from raydmd.rewards.build import build
from raydmd.serving.batcher import Key
from raydmd.serving.engine import Engine
from raydmd.serving.messages import RewardRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from raydmd import recipe as recipes
    from raydmd.models.family import Family
    from raydmd.models.sizes import Latent
    from raydmd.rewards.base import Reward
    from raydmd.serving.messages import Request


class RewardEngine(Engine):
    """Judges clean latents for their prompts.

    Args:
        reward: one, or a sum of several.
        family: decodes.
        prompts: by row of the condition table; row 0 is the negative prompt.
        device: where both run.
        latents: shapes of one latent that are judged.
    """

    def __init__(
        self, reward: Reward, family: Family, prompts: Sequence[str], *, device: str, latents: Collection[Latent]
    ) -> None:
        self._reward, self._family, self._prompts, self._device = reward, family, prompts, device
        self._latents = tuple(latents)

    def key(self, request: Request) -> Key:
        """See :class:`~raydmd.serving.engine.Engine`."""
        return Key("", tuple(request.x_t.shape[1:]), 1.0, "reward")

    @torch.no_grad()
    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`~raydmd.serving.engine.Engine`."""
        for request in requests:
            self._check(request)
        prompts = [self._prompts[row] for r in requests for row in r.conditions]
        ids = [f"{r.name} sample {i}" for r in requests for i in range(len(r.conditions))]
        pixels = self._family.decode(torch.cat([r.x_t for r in requests]).to(self._device))
        rewards = self._reward.score(pixels, prompts, ids)
        parts = torch.split(rewards.float(), [len(r.conditions) for r in requests])
        return [Answer(value=part.to(r.x_t.device)) for r, part in zip(requests, parts, strict=True)]

    def warm_up(self) -> None:
        """See :class:`~raydmd.serving.engine.Engine`."""
        shape = max(self._latents, key=math.prod)
        # Not row 0: nothing is ever made for the negative prompt, and a reward need not know it.
        self.answer([RewardRequest(x_t=torch.zeros(1, *shape), conditions=(1,), name="warm-up")])

    def _check(self, request: Request) -> None:
        size = request.x_t.shape[0]
        if tuple(request.x_t.shape[1:]) not in self._latents or len(request.conditions) != size or size < 1:
            raise InputError(
                f"request {request.name!r}: latents of shape {tuple(request.x_t.shape)} and {len(request.conditions)} "
                f"conditions; a reward wants B of {' or '.join(map(str, self._latents))} and B conditions"
            )
        wrong = [row for row in request.conditions if not 0 <= row < len(self._prompts)]
        if wrong:
            raise InputError(f"request {request.name!r}: conditions {wrong} are not among {len(self._prompts)} prompts")
        bad = (~torch.isfinite(request.x_t).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(f"request {request.name!r}: latents of samples {bad} are not finite", tuple(bad))


def load_reward_engine(
    recipe: recipes.Recipe, prompts: Sequence[str], device: str, experts: tuple[str, ...] = ()
) -> RewardEngine:
    """Load what ``method.adapt.rewards`` names, with the family that decodes for it.

    Args:
        recipe: the run; its method adapts to rewards.
        prompts: the training prompts, in the order of the condition table.
        device: ``cpu`` or ``cuda``.
        experts: none: reward models have no experts.

    Raises:
        InputError: if a model is missing or of the wrong class.
    """
    del experts
    adapt = recipe.method.adapt
    if adapt is None:
        raise InputError("method.adapt is not set, so no reward is asked for")
    reward = build(adapt.rewards, judge=locate(recipe.model).reward, device=device)
    rows = [recipe.model.negative_prompt, *prompts]
    family = load_family(recipe.model)
    return RewardEngine(reward, family, rows, device=device, latents=training_latents(family, recipe.data))
