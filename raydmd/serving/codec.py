"""Tensors to and from what crosses a process border: numpy and scalars, never torch.

Ray's object store moves numpy arrays without copying them; a pickled tensor of 64 MB takes 6 to 14
times as long. numpy knows no bfloat16, so its bits travel as uint16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from raydmd.guidance import Guidance
from raydmd.serving.messages import Request, ScoreReply, ScoreRequest, WalkRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ArrayWire(TypedDict):
    """A tensor on the wire.

    Attributes:
        data: its values, or the bits of a bfloat16 tensor as uint16.
        bf16: whether ``data`` holds such bits.
    """

    data: NDArray[Any]
    bf16: bool


class RequestWire(TypedDict):
    """A :class:`~raydmd.serving.messages.ScoreRequest` on the wire, with who asks; a walk has a grid and no ``t``."""

    x_t: ArrayWire
    t: ArrayWire | None
    grid: tuple[float, ...]
    conditions: tuple[int, ...]
    guidance: float
    expert: str
    split: bool
    name: str
    client: str


class ReplyWire(TypedDict):
    """A :class:`~raydmd.serving.messages.ScoreReply` on the wire."""

    x0: ArrayWire
    uncond: ArrayWire | None
    replica: str
    seconds: float
    batch_items: int


def encode_array(tensor: Tensor) -> ArrayWire:
    """A tensor as numpy; shares memory with a contiguous CPU tensor.

    Args:
        tensor: any shape and device.

    Returns:
        Its wire form.

    Raises:
        TypeError: for dtypes that neither numpy nor this codec knows.
    """
    plain = tensor.detach().contiguous().cpu()
    bf16 = plain.dtype == torch.bfloat16
    # numpy() of a 0-d bfloat16 is refused too, so the view comes first; both keep shape and size.
    return ArrayWire(data=(plain.view(torch.uint16) if bf16 else plain).numpy(), bf16=bf16)


def decode_array(wire: ArrayWire) -> Tensor:
    """The tensor of a wire array, on the CPU; shares memory with a writeable array, else copies."""
    data = wire["data"]
    # Arrays from the object store are read-only, and torch has no read-only tensors.
    tensor = torch.from_numpy(data if data.flags.writeable else np.array(data))
    return tensor.view(torch.bfloat16) if wire["bf16"] else tensor


def encode_request(request: Request, client: str) -> RequestWire:
    """A request for the wire; its arrays share memory with the request's CPU tensors."""
    return RequestWire(
        x_t=encode_array(request.x_t),
        t=None if isinstance(request, WalkRequest) else encode_array(request.t),
        grid=request.grid if isinstance(request, WalkRequest) else (),
        conditions=tuple(request.conditions),
        guidance=request.guidance.scale,
        expert="" if isinstance(request, WalkRequest) else request.expert,
        split=isinstance(request, ScoreRequest) and request.split,
        name=request.name,
        client=client,
    )


def decode_request(wire: RequestWire) -> Request:
    """The request of a wire record; who asked stays in ``wire["client"]``."""
    if wire["t"] is None:
        return WalkRequest(
            x_t=decode_array(wire["x_t"]),
            grid=wire["grid"],
            conditions=wire["conditions"],
            guidance=Guidance(wire["guidance"]),
            name=wire["name"],
        )
    return ScoreRequest(
        x_t=decode_array(wire["x_t"]),
        t=decode_array(wire["t"]),
        conditions=wire["conditions"],
        guidance=Guidance(wire["guidance"]),
        expert=wire["expert"],
        split=wire["split"],
        name=wire["name"],
    )


def encode_reply(reply: ScoreReply) -> ReplyWire:
    """A reply for the wire; its arrays share memory with the reply's CPU tensors."""
    return ReplyWire(
        x0=encode_array(reply.x0),
        uncond=None if reply.uncond is None else encode_array(reply.uncond),
        replica=reply.replica,
        seconds=reply.seconds,
        batch_items=reply.batch_items,
    )


def decode_reply(wire: ReplyWire) -> ScoreReply:
    """The reply of a wire record, on the CPU."""
    return ScoreReply(
        x0=decode_array(wire["x0"]),
        uncond=None if wire["uncond"] is None else decode_array(wire["uncond"]),
        replica=wire["replica"],
        seconds=wire["seconds"],
        batch_items=wire["batch_items"],
    )
