"""Tensors from one process to another over NIXL, by Ray's direct transport: from GPU to GPU, with no copy between.

Shown on CPUs, not yet on GPUs. Ray's transport is young: each tensor leaves a kilobyte of notes in whoever fetched it
(ray#57962), and an actor's method that runs for ever keeps all that it has lent.

The object store moves what lies in a node's memory; here a tensor stays where it is until its reader fetches it. All
calls of a process must come from one thread: NIXL's agent knows no other.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

import ray

from raydmd.errors import InputError
from raydmd.serving.client import TransferFailed

if TYPE_CHECKING:
    from torch import Tensor

Wire = Literal["plasma", "nixl"]
FETCH = 5.0
"""Seconds that a transfer may take, and"""
SLOWEST = 100e6
"""bytes a second on top of them."""


def check_wire(wire: Wire) -> None:
    """See that NIXL can be had.

    Raises:
        InputError: if it is not installed.
    """
    if wire == "nixl" and importlib.util.find_spec("nixl") is None:
        raise InputError("placement.wire=nixl needs NIXL in every process of the run: pip install nixl")


def lend(tensor: Tensor) -> Any:
    """Hold a copy of a tensor, on its device, for whoever fetches it; it is freed when nobody holds what this returns.

    Raises:
        TransferFailed: if NIXL refuses it.
    """
    try:
        # Its own memory: a part of a batch would be registered with all of it, and its owner may write to it.
        return ray.put(tensor.detach().clone().contiguous(), _tensor_transport="nixl"), tensor.nbytes
    except Exception as error:  # NIXL's errors and Ray's have no common type
        raise TransferFailed(f"NIXL cannot lend a tensor: {type(error).__name__}: {error}") from error


def fetch(lent: Any) -> Tensor:
    """A tensor that :func:`lend` has lent elsewhere; on the device that it was lent on.

    Args:
        lent: as :func:`lend` returns it.

    Raises:
        TransferFailed: if it does not come in time, e.g. because its process has died.
    """
    try:
        tensor: Tensor = ray.get(lent[0], timeout=FETCH + lent[1] / SLOWEST)
    except Exception as error:
        raise TransferFailed(f"a tensor did not come over NIXL: {type(error).__name__}: {error}") from error
    return tensor
