"""The teacher's arithmetic, one function for every placement, and the teacher in this process.

:func:`answer` is what a replica runs too, so a pool that does not batch across requests equals
:class:`LocalTeacher` bit for bit on equal hardware and thread counts.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.errors import InputError, NonFiniteError, RaydmdError
from raydmd.serving.client import Pending, ReplicaFailed, TeacherClient
from raydmd.serving.messages import ScoreReply, ScoreRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raydmd.models.base import Conditions, Experts


def answer(experts: Experts, conditions: Conditions, requests: Sequence[ScoreRequest]) -> list[Tensor]:
    """Answer requests in one forward, conditional and unconditional together.

    Args:
        experts: the frozen teacher, in evaluation mode.
        conditions: the condition table; row 0 is the unconditional one.
        requests: at least one; all of one expert, latent shape and guidance.

    Returns:
        Guided x0 per request, fp32, shape and device of its ``x_t``, without gradient.

    Raises:
        InputError: if a request does not fit the teacher, the conditions or the others.
        NonFiniteError: if a value of an answer is not finite; names request and sample.
    """
    for request in requests:
        _check(experts, conditions, request, requests[0])
    first = requests[0]
    home = next(experts.modules[first.expert].parameters(), first.x_t).device
    x_t = torch.cat([r.x_t for r in requests]).to(home)
    t = torch.cat([r.t for r in requests]).to(home)
    ids = [row for r in requests for row in r.conditions]
    # A trainer's autocast must not reach in: here and in a replica the arithmetic is the same.
    with torch.no_grad(), torch.autocast(home.type, enabled=False):
        cond = conditions.rows(ids).to(home)
        uncond = conditions.rows([0] * len(ids)).to(home) if first.guidance.active else cond
        x0 = experts.guided_x0(x_t, t, cond, uncond, first.guidance).float()
    parts = torch.split(x0, [r.x_t.shape[0] for r in requests])
    for request, part in zip(requests, parts, strict=True):
        _refuse_non_finite(request, part)
    return [part.to(r.x_t.device) for r, part in zip(requests, parts, strict=True)]


def answer_each(
    experts: Experts, conditions: Conditions, requests: Sequence[ScoreRequest], *, who: str
) -> list[Tensor | RaydmdError]:
    """As :func:`answer`, but a failure is the outcome of the guilty request alone.

    A batch that raises is run again, each request by itself.

    Args:
        experts: see :func:`answer`.
        conditions: see :func:`answer`.
        requests: see :func:`answer`.
        who: the replica, for messages.

    Returns:
        Per request its x0, or a typed error: the one of :func:`answer`, or :class:`ReplicaFailed`.
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

    def submit(self, request: ScoreRequest) -> LocalPending:
        """Answer at once; errors come from ``result``, as with a pool."""
        start = self._clock()
        outcome = answer_each(self._experts, self._conditions, [request], who=self._name)[0]
        if isinstance(outcome, RaydmdError):
            return LocalPending(outcome)
        return LocalPending(
            ScoreReply(
                x0=outcome,
                replica=self._name,
                seconds=self._clock() - start,
                batch_items=request.x_t.shape[0],
            )
        )


def _check(experts: Experts, conditions: Conditions, request: ScoreRequest, first: ScoreRequest) -> None:
    say = f"request {request.name!r}: "
    size = request.x_t.shape[0]
    if request.expert not in experts.modules:
        raise InputError(f"{say}no expert {request.expert!r} here, there is {sorted(experts.modules)}")
    if size < 1 or request.t.shape != (size,) or len(request.conditions) != size:
        raise InputError(
            f"{say}{size} samples, times of shape {tuple(request.t.shape)} and "
            f"{len(request.conditions)} conditions do not belong together"
        )
    wrong = [row for row in request.conditions if not 0 <= row < len(conditions)]
    if wrong:
        raise InputError(f"{say}conditions {wrong} are not in the table of {len(conditions)} rows")
    routed = {experts.routing.expert(float(v)) for v in request.t}
    if routed != {request.expert}:
        raise InputError(
            f"{say}asks expert {request.expert!r}, its times {request.t.tolist()} belong to {sorted(routed)}"
        )
    mates = (request.expert, request.x_t.shape[1:], request.guidance, request.x_t.dtype)
    if mates != (first.expert, first.x_t.shape[1:], first.guidance, first.x_t.dtype):
        raise InputError(f"{say}cannot share a forward with request {first.name!r}")


def _refuse_non_finite(request: ScoreRequest, x0: Tensor) -> None:
    finite = x0.isfinite().flatten(1)
    bad = (~finite.all(1)).nonzero().flatten().tolist()
    if not bad:
        return
    i = bad[0]
    came = "" if request.x_t[i].isfinite().all() else "; its x_t was not finite already"
    raise NonFiniteError(
        f"request {request.name!r}, sample {i} (condition {request.conditions[i]}, "
        f"t = {float(request.t[i]):.6g}): {int((~finite[i]).sum())} of {finite.shape[1]} values of "
        f"the teacher's x0 are not finite; bad samples of this request: {bad}{came}"
    )
