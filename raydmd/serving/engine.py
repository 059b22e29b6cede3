"""What a replica runs: an engine answers batches of requests. The teacher's is here, the rewards' in their room."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
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
    from collections.abc import Sequence

    from raydmd.methods.terms import Answer
    from raydmd.models.base import Experts

BuildTeacher = Callable[[torch.device, tuple[str, ...]], "Experts"]
"""Loads a frozen teacher onto a device: the experts that are named, or all if none is."""
Build = Callable[[str, tuple[str, ...]], "Engine"]
"""Loads an engine onto a device, ``cpu`` or ``cuda``, with the experts that are named, or all if none is."""

TABLES = 8
"""Condition tables that an engine keeps: those of so many runs share a model without being read again."""


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

    def experts(self, request: Request) -> frozenset[str]:
        """The experts that a request needs; none for models without."""
        del request
        return frozenset()

    def hold(self, experts: tuple[str, ...]) -> None:
        """Hold these experts in place of others.

        Raises:
            InputError: if this engine cannot, or they cannot be loaded.
        """
        raise InputError(f"{type(self).__name__} has no experts to change for {experts}")


class TeacherEngine(Engine):
    """The frozen teacher.

    Args:
        experts: in evaluation mode; some of the model's, where ``load`` is given.
        conditions: the first condition table; row 0 is the negative prompt.
        table: its file, named after its content; others are read when a request names them.
        sample_shape: shape of one latent, for the warm-up; ``None`` skips it.
        load: makes an engine's experts anew from their names, for :meth:`hold`.
    """

    def __init__(
        self,
        experts: Experts,
        conditions: Conditions,
        *,
        table: str = "",
        sample_shape: tuple[int, ...] | None = None,
        load: Callable[[tuple[str, ...]], Experts] | None = None,
    ) -> None:
        self._experts, self._shape, self._load = experts, sample_shape, load
        self._first, self._routing = conditions, experts.routing
        self._tables = OrderedDict({_content(table): conditions})

    def key(self, request: Request) -> Key:
        """See :class:`Engine`."""
        latent = tuple(request.x_t.shape[1:])
        self._fits(request, latent)
        if isinstance(request, WalkRequest):
            return Key("", latent, request.guidance.scale, request.grid, _content(request.table))
        if isinstance(request, ScoreRequest):
            kind = "split" if request.split else ""
            return Key(request.expert, latent, request.guidance.scale, kind, _content(request.table))
        raise InputError(f"request {request.name!r} asks a teacher for rewards")

    def _fits(self, request: Request, latent: tuple[int, ...]) -> None:
        """Refuse what the network would fail on: that would be taken for a fault of the replica's."""
        own = self._shape
        if request.x_t.dtype != torch.float32:
            raise InputError(f"request {request.name!r}: x_t must be float32, and is {request.x_t.dtype}")
        if own is not None and (len(latent) != len(own) or latent[: len(own) > 1] != own[: len(own) > 1]):  # channels
            raise InputError(f"request {request.name!r}: samples of shape {latent} do not fit a model of {own}")

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See :class:`Engine`."""
        ours = [r for r in requests if isinstance(r, ScoreRequest | WalkRequest)]
        if len(ours) < len(requests):
            raise InputError("a teacher answers scores and walks, no rewards")
        return answer(self._experts, self._table(ours[0].table), ours)

    def warm_up(self) -> None:
        """See :class:`Engine`."""
        edges = (1.0, *self._routing.boundaries, 0.0)
        for k, expert in enumerate(self._routing.experts):
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
                answer(self._experts, self._first, [request])

    def experts(self, request: Request) -> frozenset[str]:
        """See :class:`Engine`."""
        if isinstance(request, ScoreRequest):
            return frozenset([request.expert])
        steps = request.grid[:-1] if isinstance(request, WalkRequest) else ()
        return frozenset(self._routing.expert(t) for t in steps)

    def hold(self, experts: tuple[str, ...]) -> None:
        """See :class:`Engine`."""
        if self._load is None:
            super().hold(experts)
            return
        del self._experts  # or both would need memory
        self._experts = self._load(experts)
        self.warm_up()

    def _table(self, name: str) -> Conditions:
        if not name:
            return self._first
        content = _content(name)
        if content not in self._tables:
            self._tables[content] = Conditions.read(Path(name))
            while len(self._tables) > TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(content)
        return self._tables[content]


@functools.cache
def _content(table: str) -> str:
    """What a table's file is called, which is the digest of what is in it: runs have copies of their own."""
    return Path(table).stem


def load_teacher_engine(
    build: BuildTeacher,
    conditions_file: str,
    sample_shape: tuple[int, ...] | None,
    device: str,
    experts: tuple[str, ...] = (),
) -> TeacherEngine:
    """Load a teacher and its conditions, frozen and on the device.

    Args:
        build: loads experts onto a device: those named, or all.
        conditions_file: as :meth:`Conditions.save` writes it, row 0 the negative prompt.
        sample_shape: shape of one latent, for a warm-up; ``None`` skips it.
        device: ``cpu`` or ``cuda``.
        experts: to hold at first; empty for all.

    Raises:
        InputError: if the conditions cannot be read.
    """
    conditions = Conditions.read(Path(conditions_file))

    def load(names: tuple[str, ...]) -> Experts:
        loaded = build(torch.device(device), names)
        for module in loaded.modules.values():
            module.eval().requires_grad_(False)
        return loaded

    return TeacherEngine(load(experts), conditions, table=conditions_file, sample_shape=sample_shape, load=load)


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
