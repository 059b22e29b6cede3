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
from raydmd.serving.messages import ScoreReply, ScoreRequest

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
    """A :class:`~raydmd.serving.messages.ScoreRequest` on the wire, with who asks."""

    x_t: ArrayWire
    t: ArrayWire
    conditions: tuple[int, ...]
    guidance: float
    expert: str
    name: str
    client: str


class ReplyWire(TypedDict):
    """A :class:`~raydmd.serving.messages.ScoreReply` on the wire."""

    x0: ArrayWire
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


def encode_request(request: ScoreRequest, client: str) -> RequestWire:
    """A request for the wire; its arrays share memory with the request's CPU tensors."""
    return RequestWire(
        x_t=encode_array(request.x_t),
        t=encode_array(request.t),
        conditions=tuple(request.conditions),
        guidance=request.guidance.scale,
        expert=request.expert,
        name=request.name,
        client=client,
    )


def decode_request(wire: RequestWire) -> ScoreRequest:
    """The request of a wire record; who asked stays in ``wire["client"]``."""
    return ScoreRequest(
        x_t=decode_array(wire["x_t"]),
        t=decode_array(wire["t"]),
        conditions=wire["conditions"],
        guidance=Guidance(wire["guidance"]),
        expert=wire["expert"],
        name=wire["name"],
    )


def encode_reply(reply: ScoreReply) -> ReplyWire:
    """A reply for the wire; its array shares memory with the reply's CPU tensor."""
    return ReplyWire(
        x0=encode_array(reply.x0),
        replica=reply.replica,
        seconds=reply.seconds,
        batch_items=reply.batch_items,
    )


def decode_reply(wire: ReplyWire) -> ScoreReply:
    """The reply of a wire record, on the CPU."""
    return ScoreReply(
        x0=decode_array(wire["x0"]),
        replica=wire["replica"],
        seconds=wire["seconds"],
        batch_items=wire["batch_items"],
    )
