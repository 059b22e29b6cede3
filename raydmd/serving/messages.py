"""The wire: one record per message, a shape and a role per field. Nothing else crosses the process border."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from raydmd.draws import Draws
    from raydmd.guidance import Guidance
    from raydmd.methods.terms import Answer
    from raydmd.models.base import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """A question to the frozen teacher: where would it take these noisy latents?

    Pure: the same request always has the same answer, so it may be sent twice.

    Attributes:
        x_t: noisy latents ``(B, *latent)``, fp32.
        t: times ``(B,)`` in [0, 1], fp32; all of one expert.
        conditions: row of the condition table per sample, length B; row 0 is the negative prompt.
        guidance: how the teacher follows the prompt.
        expert: which expert serves it.
        split: answer in halves, conditional and unconditional, instead of guided.
        name: for messages, e.g. ``cycle 12 rank 0``.
        table: file of the condition table; empty for the one the model was loaded with.
    """

    x_t: Tensor
    t: Tensor
    conditions: tuple[int, ...]
    guidance: Guidance
    expert: str
    split: bool = False
    name: str = ""
    table: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WalkRequest:
    """A question that takes the frozen teacher several steps: where do these latents come to, deterministically?

    Pure, as :class:`ScoreRequest` is. It crosses experts where the grid does.

    Attributes:
        x_t: latents at the first time, ``(B, *latent)``, fp32.
        grid: times, falling; the answer is the latent at the last one.
        conditions: row of the condition table per sample, length B; row 0 is the negative prompt.
        guidance: how the teacher follows the prompt.
        name: for messages.
        table: as in :class:`ScoreRequest`.
    """

    x_t: Tensor
    grid: tuple[float, ...]
    conditions: tuple[int, ...]
    guidance: Guidance
    name: str = ""
    table: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardRequest:
    """A question to a reward model: how good are these samples for their prompts? Pure, as the others are.

    Attributes:
        x_t: clean latents ``(B, *latent)``, fp32; decoded where the reward runs.
        conditions: row of the condition table per sample, length B; row k is the k-th prompt.
        name: for messages.
    """

    x_t: Tensor
    conditions: tuple[int, ...]
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRequest:
    """A question to the student as it was after some updates: what do you make of this noise?

    Attributes:
        x_t: noise ``(B, *latent)``, fp32.
        draws: the rollout's other random numbers.
        phase: index of the phase in progress.
        version: student updates that its weights have had.
        conditions: row of the condition table per sample, length B.
        name: for messages.
    """

    x_t: Tensor
    draws: Draws
    phase: int
    version: int
    conditions: tuple[int, ...]
    name: str = ""


def trial(client: str) -> str:
    """The run that a client belongs to: ``run/rank0`` is run's."""
    return client.rpartition("/")[0] or client


TeacherRequest = ScoreRequest | WalkRequest
Request = TeacherRequest | RewardRequest | RolloutRequest


def split(request: Request, routing: Routing | None) -> list[tuple[Request, frozenset[str]]]:
    """A request and, where it crosses experts that different replicas may hold, its legs, each with what it needs.

    Args:
        request: of any kind.
        routing: of the model, where its replicas hold some experts each.
    """
    if routing is None or isinstance(request, RewardRequest | RolloutRequest):
        return [(request, frozenset())]
    if isinstance(request, ScoreRequest):
        return [(request, frozenset([request.expert]))]
    steps = [routing.expert(t) for t in request.grid[:-1]]
    edges = [0, *(i for i in range(1, len(steps)) if steps[i] != steps[i - 1]), len(steps)]
    whole: list[tuple[Request, frozenset[str]]] = [(request, frozenset(steps))]
    if len(edges) == 2:
        return whole
    for a, b in itertools.pairwise(edges):
        # A later leg begins where the one before ends.
        leg = replace(request, grid=request.grid[a : b + 1], x_t=request.x_t if a == 0 else request.x_t[:0])
        whole.append((leg, frozenset([steps[a]])))
    return whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer and how it was made.

    Attributes:
        answer: what was asked for.
        replica: who answered.
        seconds: time the forward took.
        batch_items: samples in the forward that served it, over all clients.
    """

    answer: Answer
    replica: str
    seconds: float
    batch_items: int
