"""Tensors to and from what crosses a process border: numpy and scalars, never torch.

Ray's object store moves numpy arrays without copying them; a pickled tensor of 64 MB takes 6 to 14
times as long. numpy knows no bfloat16, so its bits travel as uint16. Large tensors may be lent instead: then their
place in the message is taken by what they are fetched with, see :mod:`raydmd.serving.direct`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.methods.terms import Answer
from raydmd.serving.messages import Reply, Request, RewardRequest, RolloutRequest, ScoreRequest, WalkRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from raydmd.draws import Draws

# Arrays from the object store are read-only, and torch has no read-only tensors: it warns, once in a process. Nothing
# here writes to them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))


INLINE = 64 << 10
"""Bytes up to which a tensor travels within the call: the object store, or lending it, costs more than the copy."""
Lend = Callable[[Tensor], Any]
"""Keeps a tensor for whoever has what it returns."""
Fetch = Callable[[Any], Tensor]
"""Gets what was lent."""


class ArrayWire(TypedDict):
    """A tensor on the wire.

    Attributes:
        data: its values, or the bits of a bfloat16 tensor as uint16; empty if it was lent.
        bf16: whether ``data`` holds such bits.
        lent: what it is fetched with, or nothing.
    """

    data: NDArray[Any]
    bf16: bool
    lent: Any


class RequestWire(TypedDict):
    """A request on the wire, with who asks; each kind fills in what it has."""

    kind: Literal["score", "walk", "reward", "rollout"]
    x_t: ArrayWire
    t: ArrayWire | None
    grid: tuple[float, ...]
    conditions: tuple[int, ...]
    guidance: float
    expert: str
    split: bool
    name: str
    client: str
    table: str
    rollout: tuple[Draws, int, int] | None


_NOTHING = np.empty(0, np.uint8)


class ReplyWire(TypedDict):
    """A :class:`~raydmd.serving.messages.Reply` on the wire."""

    value: ArrayWire
    uncond: ArrayWire | None
    replica: str
    seconds: float
    batch_items: int


def encode_array(tensor: Tensor, lend: Lend | None = None) -> ArrayWire:
    """A tensor as numpy; shares memory with a contiguous CPU tensor.

    Args:
        tensor: any shape and device.
        lend: for tensors beyond :data:`INLINE`, if there is a way.

    Returns:
        Its wire form.

    Raises:
        TypeError: for dtypes that neither numpy nor this codec knows.
    """
    if lend is not None and tensor.nbytes > INLINE:
        return ArrayWire(data=_NOTHING, bf16=False, lent=lend(tensor))
    plain = tensor.detach().contiguous().cpu()
    bf16 = plain.dtype == torch.bfloat16
    # numpy() of a 0-d bfloat16 is refused too, so the view comes first; both keep shape and size.
    return ArrayWire(data=(plain.view(torch.uint16) if bf16 else plain).numpy(), bf16=bf16, lent=None)


def decode_array(wire: ArrayWire, fetch: Fetch | None = None) -> Tensor:
    """The tensor of a wire array, on the CPU or where it was lent.

    It shares the array's memory: nobody may write to it in place.

    Args:
        wire: encoded.
        fetch: for tensors that were lent.

    Raises:
        InputError: if it was lent, and there is no way to fetch it.
    """
    if wire["lent"] is not None:
        if fetch is None:
            raise InputError("a tensor was lent, and this process was not told how to fetch it")
        return fetch(wire["lent"])
    tensor = torch.from_numpy(wire["data"])
    return tensor.view(torch.bfloat16) if wire["bf16"] else tensor


def encode_request(request: Request, client: str, table: str = "", lend: Lend | None = None) -> RequestWire:
    """A request for the wire; its arrays share memory with the request's CPU tensors.

    Args:
        request: of any kind.
        client: who asks.
        table: file of the condition table that its rows are of.
        lend: see :func:`encode_array`.

    Returns:
        Its wire form.
    """
    wire = RequestWire(
        kind="reward",
        x_t=encode_array(request.x_t, lend),
        t=None,
        grid=(),
        conditions=tuple(request.conditions),
        guidance=1.0,
        expert="",
        split=False,
        name=request.name,
        client=client,
        table=table,
        rollout=None,
    )
    if isinstance(request, ScoreRequest):
        wire |= {"kind": "score", "t": encode_array(request.t), "guidance": request.guidance.scale}
        wire |= {"expert": request.expert, "split": request.split}
    elif isinstance(request, WalkRequest):
        wire |= {"kind": "walk", "grid": request.grid, "guidance": request.guidance.scale}
    elif isinstance(request, RolloutRequest):
        wire |= {"kind": "rollout", "rollout": (request.draws, request.phase, request.version)}
    return wire


def decode_request(wire: RequestWire, fetch: Fetch | None = None) -> Request:
    """The request of a wire record; who asked stays in ``wire["client"]``. See :func:`decode_array`."""
    x_t, conditions, name = decode_array(wire["x_t"], fetch), wire["conditions"], wire["name"]
    if wire["kind"] == "reward":
        return RewardRequest(x_t=x_t, conditions=conditions, name=name)
    if wire["rollout"] is not None:
        draws, phase, version = wire["rollout"]
        return RolloutRequest(x_t=x_t, draws=draws, phase=phase, version=version, conditions=conditions, name=name)
    guidance = Guidance(wire["guidance"])
    if wire["kind"] == "walk":
        return WalkRequest(
            x_t=x_t,
            grid=wire["grid"],
            conditions=conditions,
            guidance=guidance,
            name=name,
            table=wire["table"],
        )
    if wire["t"] is None:
        raise InputError(f"request {name!r} asks for scores and gives no times")
    return ScoreRequest(
        x_t=x_t,
        t=decode_array(wire["t"]),
        conditions=conditions,
        guidance=guidance,
        expert=wire["expert"],
        split=wire["split"],
        name=name,
        table=wire["table"],
    )


def encode_reply(reply: Reply, lend: Lend | None = None) -> ReplyWire:
    """A reply for the wire; its arrays share memory with the reply's CPU tensors. See :func:`encode_array`."""
    uncond = reply.answer.uncond
    return ReplyWire(
        value=encode_array(reply.answer.value, lend),
        uncond=None if uncond is None else encode_array(uncond, lend),
        replica=reply.replica,
        seconds=reply.seconds,
        batch_items=reply.batch_items,
    )


def decode_reply(wire: ReplyWire, fetch: Fetch | None = None) -> Reply:
    """The reply of a wire record, on the CPU or where it was lent. See :func:`decode_array`."""
    uncond = None if wire["uncond"] is None else decode_array(wire["uncond"], fetch)
    return Reply(
        answer=Answer(value=decode_array(wire["value"], fetch), uncond=uncond),
        replica=wire["replica"],
        seconds=wire["seconds"],
        batch_items=wire["batch_items"],
    )
