"""The teacher's arithmetic, one function for every placement, and the teacher in this process.

:func:`answer` is what a replica runs too, so a pool that does not batch across requests equals
:class:`LocalTeacher` bit for bit on equal hardware and thread counts.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.errors import InputError, NonFiniteError, RaydmdError
from raydmd.sampling import sample
from raydmd.serving.client import Pending, ReplicaFailed, TeacherClient
from raydmd.serving.messages import Request, ScoreReply, ScoreRequest, WalkRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.models.base import Conditions, Experts


Halves = tuple[Tensor, Tensor | None]
"""An answer's ``x0``, and its unconditional half if that was asked for."""


def answer(experts: Experts, conditions: Conditions, requests: Sequence[Request]) -> list[Halves]:
    """Answer requests in one forward (a walk: one per step), conditional and unconditional together.

    Args:
        experts: the frozen teacher, in evaluation mode.
        conditions: the condition table; row 0 is the unconditional one.
        requests: at least one; all of one kind, expert, latent shape and guidance.

    Returns:
        Per request what :class:`~raydmd.serving.messages.ScoreReply` holds, fp32, shape and device of its
        ``x_t``, without gradient.

    Raises:
        InputError: if a request does not fit the teacher, the conditions or the others.
        NonFiniteError: if a value of an answer is not finite; names request and sample.
    """
    for request in requests:
        _check(experts, conditions, request, requests[0])
    first = requests[0]
    home = next(next(iter(experts.modules.values())).parameters(), first.x_t).device
    x_t = torch.cat([r.x_t for r in requests]).to(home)
    ids = [row for r in requests for row in r.conditions]
    split = isinstance(first, ScoreRequest) and first.split
    # A trainer's autocast must not reach in: here and in a replica the arithmetic is the same.
    with torch.no_grad(), torch.autocast(home.type, enabled=False):
        cond = conditions.rows(ids).to(home)
        uncond = conditions.rows([0] * len(ids)).to(home) if first.guidance.active or split else cond
        if isinstance(first, WalkRequest):
            results = [sample(experts, x_t, cond, uncond, grid=first.grid, guidance=first.guidance)]
        else:
            t = torch.cat([r.t for r in requests if isinstance(r, ScoreRequest)]).to(home)
            if split:
                results = list(experts.both_x0(x_t, t, cond, uncond))
            else:
                results = [experts.guided_x0(x_t, t, cond, uncond, first.guidance)]
    sizes = [r.x_t.shape[0] for r in requests]
    halves = [torch.split(result.float(), sizes) for result in results]
    outcomes: list[Halves] = []
    for i, request in enumerate(requests):
        parts = [half[i] for half in halves]
        for part in parts:
            _refuse_non_finite(request, part)
        home_again = [part.to(request.x_t.device) for part in parts]
        outcomes.append((home_again[0], home_again[1] if split else None))
    return outcomes


def answer_each(
    experts: Experts, conditions: Conditions, requests: Sequence[Request], *, who: str
) -> list[Halves | RaydmdError]:
    """As :func:`answer`, but a failure is the outcome of the guilty request alone.

    A batch that raises is run again, each request by itself.

    Args:
        experts: see :func:`answer`.
        conditions: see :func:`answer`.
        requests: see :func:`answer`.
        who: the replica, for messages.

    Returns:
        Per request its answer, or a typed error: the one of :func:`answer`, or :class:`ReplicaFailed`.
    """
    try:
        return list(answer(experts, conditions, requests))
    except Exception as error:
        if len(requests) > 1:
            return [outcome for request in requests for outcome in answer_each(experts, conditions, [request], who=who)]
        if isinstance(error, RaydmdError):
            return [error]
        text = f"replica {who!r}, request {requests[0].name!r}: {type(error).__name__}: {error}"
        return [ReplicaFailed(text)]


class LocalPending(Pending):
    """An answer that is already there."""

    def __init__(self, outcome: ScoreReply | RaydmdError) -> None:
        """Keep what came out.

        Args:
            outcome: the reply, or the error that :meth:`result` raises.
        """
        self._outcome = outcome

    @property
    def waited(self) -> float:
        """Always 0: the time was spent in ``submit``."""
        return 0.0

    def result(self) -> ScoreReply:
        """See :class:`~raydmd.serving.client.Pending`."""
        if isinstance(self._outcome, RaydmdError):
            raise self._outcome
        return self._outcome


class LocalTeacher(TeacherClient):
    """The frozen teacher in this process. Eager: the forward runs inside :meth:`submit`.

    The caller has put the experts into evaluation mode, and owns threads and determinism settings.
    """

    def __init__(
        self,
        experts: Experts,
        conditions: Conditions,
        *,
        name: str = "local",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Serve from this process.

        Args:
            experts: the frozen teacher.
            conditions: the condition table.
            name: what replies call this teacher.
            clock: seconds.
        """
        self._experts = experts
        self._conditions = conditions
        self._name = name
        self._clock = clock

    @property
    def retries(self) -> int:
        """Always 0: there is nobody else to ask."""
        return 0

    def submit(self, request: Request) -> LocalPending:
        """Answer at once; errors come from ``result``, as with a pool."""
        start = self._clock()
        outcome = answer_each(self._experts, self._conditions, [request], who=self._name)[0]
        if isinstance(outcome, RaydmdError):
            return LocalPending(outcome)
        return LocalPending(
            ScoreReply(
                x0=outcome[0],
                uncond=outcome[1],
                replica=self._name,
                seconds=self._clock() - start,
                batch_items=request.x_t.shape[0],
            )
        )


def _check(experts: Experts, conditions: Conditions, request: Request, first: Request) -> None:
    say = f"request {request.name!r}: "
    size = request.x_t.shape[0]
    wrong = [row for row in request.conditions if not 0 <= row < len(conditions)]
    if wrong:
        raise InputError(f"{say}conditions {wrong} are not in the table of {len(conditions)} rows")
    if isinstance(request, WalkRequest):
        if size < 1 or len(request.conditions) != size:
            raise InputError(f"{say}{size} samples and {len(request.conditions)} conditions do not belong together")
        if len(request.grid) < 2 or any(not 0 <= b < a <= 1 for a, b in itertools.pairwise(request.grid)):
            raise InputError(f"{say}times of a walk must fall within 1..0, given {request.grid}")
        alike = isinstance(first, WalkRequest) and request.grid == first.grid
    else:
        _check_score(experts, request, say)
        alike = isinstance(first, ScoreRequest) and (request.expert, request.split) == (first.expert, first.split)
    mates = (request.x_t.shape[1:], request.guidance, request.x_t.dtype)
    if not alike or mates != (first.x_t.shape[1:], first.guidance, first.x_t.dtype):
        raise InputError(f"{say}cannot share a forward with request {first.name!r}")


def _check_score(experts: Experts, request: ScoreRequest, say: str) -> None:
    size = request.x_t.shape[0]
    if request.expert not in experts.modules:
        raise InputError(f"{say}no expert {request.expert!r} here, there is {sorted(experts.modules)}")
    if size < 1 or request.t.shape != (size,) or len(request.conditions) != size:
        raise InputError(
            f"{say}{size} samples, times of shape {tuple(request.t.shape)} and "
            f"{len(request.conditions)} conditions do not belong together"
        )
    routed = {experts.routing.expert(float(v)) for v in request.t}
    if routed != {request.expert}:
        raise InputError(
            f"{say}asks expert {request.expert!r}, its times {request.t.tolist()} belong to {sorted(routed)}"
        )


def _refuse_non_finite(request: Request, x0: Tensor) -> None:
    finite = x0.isfinite().flatten(1)
    bad = (~finite.all(1)).nonzero().flatten().tolist()
    if not bad:
        return
    i = bad[0]
    level = (
        f"t = {float(request.t[i]):.6g}" if isinstance(request, ScoreRequest) else f"walk of {len(request.grid)} times"
    )
    came = "" if request.x_t[i].isfinite().all() else "; its x_t was not finite already"
    raise NonFiniteError(
        f"request {request.name!r}, sample {i} (condition {request.conditions[i]}, "
        f"{level}): {int((~finite[i]).sum())} of {finite.shape[1]} values of "
        f"the teacher's x0 are not finite; bad samples of this request: {bad}{came}"
    )
