"""What a replica runs: an engine answers batches of requests. The teacher's is here, the rewards' in their room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raydmd.errors import InputError, RaydmdError
from raydmd.guidance import Guidance
from raydmd.models.base import Conditions
from raydmd.serving.batcher import Key
from raydmd.serving.client import ReplicaFailed
from raydmd.serving.messages import Request, ScoreRequest, WalkRequest
from raydmd.serving.teacher import answer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.methods.terms import Answer
    from raydmd.models.base import Experts


class Engine(ABC):
    """A frozen model that answers requests; pure, one batch at a time."""

    @abstractmethod
    def key(self, request: Request) -> Key:
        """What requests of one forward share.

        Raises:
            InputError: if this engine does not answer such requests.
        """

    @abstractmethod
    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests of one key in one forward, each on the device of its tensors.

        Raises:
            InputError: a request does not fit the model.
            NonFiniteError: an answer is not finite; names request and sample.
        """

    @abstractmethod
    def warm_up(self) -> None:
        """Run once, so that the first request does not pay for it."""


class TeacherEngine(Engine):
    """The frozen teacher.

    Args:
        experts: in evaluation mode.
        conditions: the condition table; row 0 is the negative prompt.
        sample_shape: shape of one latent, for the warm-up; ``None`` skips it.
    """

    def __init__(
        self, experts: Experts, conditions: Conditions, *, sample_shape: tuple[int, ...] | None = None
    ) -> None:
        self._experts, self._conditions, self._shape = experts, conditions, sample_shape

    def key(self, request: Request) -> Key:
        """See :class:`Engine`."""
        latent = tuple(request.x_t.shape[1:])
        if isinstance(request, WalkRequest):
            return Key("", latent, request.guidance.scale, request.grid)
        if isinstance(request, ScoreRequest):
            return Key(request.expert, latent, request.guidance.scale, "split" if request.split else "")
        raise InputError(f"request {request.name!r} asks a teacher for rewards")

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`Engine`."""
        ours = [r for r in requests if isinstance(r, ScoreRequest | WalkRequest)]
        if len(ours) < len(requests):
            raise InputError("a teacher answers scores and walks, no rewards")
        return answer(self._experts, self._conditions, ours)

    def warm_up(self) -> None:
        """See :class:`Engine`."""
        edges = (1.0, *self._experts.routing.boundaries, 0.0)
        for k, expert in enumerate(self._experts.routing.experts):
            if self._shape is not None and expert in self._experts.modules:
                middle = torch.full((1,), (edges[k] + edges[k + 1]) / 2)
                request = ScoreRequest(
                    x_t=torch.zeros(1, *self._shape),
                    t=middle,
                    conditions=(0,),
                    guidance=Guidance(2.0),
                    expert=expert,
                    name=f"warm-up of {expert}",
                )
                self.answer([request])


def load_teacher_engine(
    build: Callable[[torch.device], Experts], conditions_file: str, sample_shape: tuple[int, ...] | None, device: str
) -> TeacherEngine:
    """Load a teacher and its conditions, frozen and on the device.

    Args:
        build: loads the experts onto a device.
        conditions_file: as :meth:`Conditions.save` writes it, row 0 the negative prompt.
        sample_shape: shape of one latent, for a warm-up; ``None`` skips it.
        device: ``cpu`` or ``cuda``.

    Raises:
        InputError: if the conditions cannot be read.
    """
    experts = build(torch.device(device))
    for module in experts.modules.values():
        module.eval().requires_grad_(False)
    return TeacherEngine(experts, Conditions.read(Path(conditions_file)), sample_shape=sample_shape)


def answer_each(engine: Engine, requests: Sequence[Request], *, who: str) -> list[Answer | RaydmdError]:
    """As the engine answers, but a failure is the outcome of the guilty request alone.

    A batch that raises is run again, each request by itself.

    Args:
        engine: answers.
        requests: of one key.
        who: the replica, for messages.

    Returns:
        Per request its answer, or a typed error: the engine's, or :class:`ReplicaFailed`.
    """
    try:
        return list(engine.answer(requests))
    except Exception as error:
        if len(requests) > 1:
            return [outcome for request in requests for outcome in answer_each(engine, [request], who=who)]
        if isinstance(error, RaydmdError):
            return [error]
        text = f"replica {who!r}, request {requests[0].name!r}: {type(error).__name__}: {error}"
        return [ReplicaFailed(text)]
