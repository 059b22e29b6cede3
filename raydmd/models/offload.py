"""Activations that wait for their backward pass in the host's memory.

With gradient checkpointing a pass keeps little but the input of each block. For a long clip that is still tens of GB,
and the student's wait while the fake score trains. They cross to the host and back on the stream that computes, so
nothing is waited for but the copy itself.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LEAST = 1 << 20
"""Bytes; what is smaller stays."""
CHUNK = 64 << 20
"""Bytes of a block of pinned memory. torch rounds blocks up to powers of two and keeps those that are freed, each size
for itself: tensors of several sizes share blocks of one."""


class Away:
    """A tensor that is elsewhere."""

    def __init__(self, tensor: Tensor) -> None:
        form = torch.empty_like(tensor, device="meta")
        if form.stride() == tensor.stride():  # without gaps, in whatever order
            flat = tensor.as_strided((tensor.numel(),), (1,))
        else:
            flat, form = tensor.reshape(-1), form.contiguous()
        self._device, self._form = tensor.device, form
        pinned = tensor.device.type == "cuda"
        self._parts: list[Tensor] = []
        for part in torch.split(flat, max(CHUNK // tensor.element_size(), 1)):
            own = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
            # On the stream that computes: whoever takes the tensor's memory next, and the copy back, come after it.
            self._parts.append(own.copy_(part, non_blocking=True))

    def back(self) -> Tensor:
        """It again."""
        flat = torch.empty(self._form.numel(), dtype=self._form.dtype, device=self._device)
        start = 0
        for part in self._parts:
            flat[start : start + len(part)].copy_(part, non_blocking=True)
            start += len(part)
        return flat.as_strided(self._form.shape, self._form.stride())


@contextmanager
def offloaded(away: Callable[[Tensor], Any] = Away) -> Iterator[None]:
    """What passes in this context keep for their backward passes is moved to the host's memory.

    A tensor that several operations keep is moved once. Parameters and what is small stay where they are.

    Args:
        away: moves a tensor; its result's ``back`` brings it again.
    """
    # A storage that is only weakly held keeps its address, so that a new one is never taken for it.
    seen: dict[int, tuple[StorageWeakRef, dict[tuple[Any, ...], Any]]] = {}

    def pack(tensor: Tensor) -> Any:
        owner = tensor if tensor._base is None else tensor._base  # a linear keeps its weight turned round
        if isinstance(owner, (nn.Parameter, DTensor)) or tensor.numel() * tensor.element_size() < LEAST:
            return tensor.detach()  # as it is would be a circle where it is an operation's own result
        storage = tensor.untyped_storage()
        held, copies = seen.get(storage._cdata, (None, {}))
        if held is None or held.expired():  # type: ignore[no-untyped-call]
            copies = {}
            seen[storage._cdata] = StorageWeakRef(storage), copies  # type: ignore[no-untyped-call]
        key = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        if key not in copies:
            copies[key] = away(tensor.detach())
        return copies[key]

    def unpack(kept: Any) -> Tensor:
        found: Tensor = kept if isinstance(kept, Tensor) else kept.back()
        return found

    with saved_tensors_hooks(pack, unpack):
        yield
