"""The teacher's arithmetic, one function for every placement.

A pool that does not batch across requests so equals a teacher in this process bit for bit, on equal hardware and
thread counts.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.errors import InputError, NonFiniteError
from raydmd.methods.terms import Answer
from raydmd.sampling import sample
from raydmd.serving.messages import ScoreRequest, TeacherRequest, WalkRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.models.base import Conditions, Experts


def answer(experts: Experts, conditions: Conditions, requests: Sequence[TeacherRequest]) -> list[Answer]:
    """Answer requests in one forward (a walk: one per step), conditional and unconditional together.

    Args:
        experts: the frozen teacher, in evaluation mode.
        conditions: the condition table; row 0 is the unconditional one.
        requests: at least one; all of one kind, expert, latent shape and guidance.

    Returns:
        Per request its answer, on the device of its ``x_t``, without gradient.

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
    outcomes: list[Answer] = []
    for i, request in enumerate(requests):
        parts = [half[i] for half in halves]
        for part in parts:
            _refuse_non_finite(request, part)
        home_again = [part.to(request.x_t.device) for part in parts]
        outcomes.append(Answer(value=home_again[0], uncond=home_again[1] if split else None))
    return outcomes


def _check(experts: Experts, conditions: Conditions, request: TeacherRequest, first: TeacherRequest) -> None:
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


def _refuse_non_finite(request: TeacherRequest, x0: Tensor) -> None:
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
        f"the teacher's x0 are not finite; bad samples of this request: {bad}{came}",
        tuple(bad),
    )
