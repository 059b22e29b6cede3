"""The networks of a phase: student and fake score, made from the family's experts, and the roles that train them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from raydmd.methods.presets import source_expert
from raydmd.models.offload import offloaded
from raydmd.training.roles import TrainedRole, add_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from raydmd.models.base import Denoiser, Routing
    from raydmd.models.family import Family
    from raydmd.recipe import Recipe
    from raydmd.recipe_training import Role
    from raydmd.training.session import Session
    from raydmd.training.tied import Tied


@dataclass(frozen=True)
class Building:
    """Makes networks and roles.

    Attributes:
        recipe: the run.
        family: its pipeline.
        session: ranks and the device.
        tied: the networks that student and fake score share with the teacher, where they do.
    """

    recipe: Recipe
    family: Family
    session: Session
    tied: Tied | None

    def expert(self, role: str, expert: str) -> Denoiser:
        """A network of ``student`` or ``fake``, with the weights of the teacher's expert that it begins from."""
        if self.tied is not None:
            return self.tied.expert(role, expert)
        training = self.recipe.training
        lora = (training.student if role == "student" else training.fake).lora
        precision = torch.bfloat16 if training.precision == "bf16" else torch.float32
        source = source_expert(self.recipe.method, self.family.routing(), expert) if role == "student" else expert
        # What is frozen needs no master weights.
        sharded = training.sharding == "fsdp" and dist.is_initialized()
        with self.family.without_weights(sharded and self.session.rank > 0):  # they are sent rank 0's
            denoiser = self.family.denoiser(source, dtype=precision if lora else torch.float32, autocast=precision)
        if lora is not None:
            add_adapter(denoiser, lora, seed=self.recipe.seed)
        if training.gradient_checkpointing:
            denoiser.network.enable_gradient_checkpointing()
        denoiser.keeping = offloaded if training.offload_activations else None
        if self.session.tokens:
            self.session.tokens.share(denoiser)
        denoiser.train()
        return denoiser if sharded else denoiser.to(self.session.device)

    def role(
        self,
        name: str,
        experts: dict[str, Denoiser],
        trained: tuple[str, ...],
        finished: tuple[str, ...],
        settings: Role,
        routing: Routing,
        heads: Mapping[str, nn.Module] | None = None,
    ) -> TrainedRole:
        """What trains networks: see :class:`~raydmd.training.roles.TrainedRole`."""
        training, gan = self.recipe.training, self.recipe.method.gan
        return TrainedRole(
            name,
            experts,
            trained=trained,
            finished=finished,
            settings=settings,
            average=training.ema if name == "student" else 0.0,
            routing=routing,
            process=self.family.process,
            prediction=self.family.prediction,
            sharding=training.sharding,
            precision=training.precision,
            heads=heads,
            head_rate=gan.rate if gan else None,
        )
