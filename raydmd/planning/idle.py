"""Stand-ins that cost nothing: what a cycle takes with them is no network's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raydmd.methods.terms import Answer
from raydmd.models.base import Conditions, Experts
from raydmd.serving.client import Client, Pending
from raydmd.serving.messages import Reply, RewardRequest

if TYPE_CHECKING:
    from raydmd.serving.messages import Request
    from raydmd.training.roles import TrainedRole


def noise(conditions: Conditions) -> Conditions:
    """Noise in place of zeros; masks stay."""
    return Conditions(
        **{k: v if v.dtype == torch.bool else torch.randn_like(v) for k, v in conditions.tensors().items()}
        if conditions.embeds.shape[1:] != (1, 1)
        else conditions.tensors()  # numbers of classes
    )


class _Said(Pending):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    @property
    def waited(self) -> float:
        return 0.0

    def result(self) -> Reply:
        return Reply(answer=self._answer, replica="nobody", seconds=0.0, batch_items=len(self._answer.value))


class Idle(Client):
    """Answers at once, and nothing."""

    @property
    def retries(self) -> int:
        """None."""
        return 0

    def submit(self, request: Request) -> Pending:
        """What was asked is the answer; all rewards are alike."""
        if isinstance(request, RewardRequest):
            return _Said(Answer(value=torch.zeros(len(request.x_t), device=request.x_t.device)))
        return _Said(Answer(value=request.x_t, uncond=request.x_t))


class Nothing(nn.Module):
    """A network that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        """What goes in."""
        del t, cond
        return self.one.to(x_t) * x_t


class Free:
    """A role whose networks and updates cost nothing."""

    def __init__(self, role: TrainedRole) -> None:
        e = role.experts
        self.name = role.name
        self.experts = Experts({name: Nothing() for name in e.modules}, e.routing, e.process, e.prediction)

    def update(self, loss: Tensor, *, where: str) -> float:
        """Only the backward pass."""
        del where
        torch.autograd.backward(loss)
        return 0.0
