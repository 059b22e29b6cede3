"""What passes through a network cost, without its weights: run on tensors that have a shape and no memory.

Nothing is estimated by formulas: the networks' own code runs, under the same autocast and with the same gradient
checkpointing as in training, and every operation's arithmetic and every live tensor is counted. Attention is taken to
be fused, as it is on a GPU. On real tensors the same counter says what a process holds.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from raydmd.models.offload import offloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from raydmd.models.base import Conditions, Denoiser

_ATEN = torch.ops.aten


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


def _attention_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> float:
    return float(sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape))  # type: ignore[no-untyped-call]


_ON_CPU: dict[Any, Callable[..., float]] = {  # which torch's own table leaves out
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations, and bytes of live tensors that were made while it is on.

    Args:
        before: tensors that were there before, and are not counted.

    Attributes:
        flops: so far; of multiplications and additions in products of matrices, convolutions and attention.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0
        self._before = {t.untyped_storage()._cdata for t in before}
        self._live: dict[int, tuple[int, int]] = {}
        self._log: list[tuple[int, int]] = []  # which storage, bytes that came or went

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count it."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _ON_CPU:
            self.flops += _ON_CPU[packet](*args, **(kwargs or {}))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        tree_map_only(Tensor, self._seen, out)
        return out

    def _seen(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live and key not in self._before and (size := storage.nbytes()):
            place = len(self._log)
            self._live[key] = place, size
            self._log.append((place, size))
            weakref.finalize(storage, self._gone, key)
        return tensor

    def _gone(self, key: int) -> None:
        place, size = self._live.pop(key)
        self._log.append((place, -size))

    def now(self) -> int:
        """Bytes that are live."""
        return sum(size for _, size in self._live.values())

    def peak(self, but: Iterable[Tensor] = ()) -> int:
        """The most bytes that were live at once, some tensors left out."""
        out = {self._live[t.untyped_storage()._cdata][0] for t in but if t.untyped_storage()._cdata in self._live}
        most = now = 0
        for place, change in self._log:
            now += 0 if place in out else change
            most = max(most, now)
        return most


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What a network's passes cost, for one number of rows.

    Attributes:
        rows: of the batch.
        forward: operations of a forward pass.
        backward: of a backward pass, with what gradient checkpointing computes again.
        transient: bytes that a forward pass without gradient needs at most; of networks that do not train.
        kept: bytes that a forward pass keeps for its backward pass.
        recording: bytes at most while it does.
        peak: bytes at most over forward and backward pass, parameters' gradients left out.
        whole: the same with them.
        moved: bytes that wait for the backward pass in the host's memory, and are none of the above.
    """

    rows: int
    forward: float
    backward: float = 0.0
    transient: float = 0.0
    kept: float = 0.0
    recording: float = 0.0
    peak: float = 0.0
    whole: float = 0.0
    moved: float = 0.0

    def sound(self) -> Passes:
        """The same where no part is more than its whole.

        A peak is the larger one of two moments, and of few blocks or rows it can be another one than of many: what many
        need while they are recorded can't be told from the peaks of few.
        """
        peak = max(self.peak, self.recording)
        return replace(self, peak=peak, whole=max(self.whole, peak))


def stretched(one: Passes, two: Passes, rows: int) -> Passes:
    """What many rows cost, from what one and two do."""
    found = {k: v + (rows - 1) * (getattr(two, k) - v) for k, v in vars(one).items() if k != "rows"}
    return Passes(rows=rows, **found)


class _Away:
    """A tensor that is in the host's memory, of which the device's meter sees nothing."""

    def __init__(self, tensor: Tensor) -> None:
        self._form = tensor.shape, tensor.stride(), tensor.dtype
        self.size = tensor.numel() * tensor.element_size()

    def back(self) -> Tensor:
        shape, stride, dtype = self._form
        return torch.empty_strided(shape, stride, dtype=dtype)


class _Full(TorchFunctionMode):
    """Says of masks, whose values tensors without memory do not have, that nothing is masked."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer ``tolist`` and ``item`` of such a tensor."""
        if args and isinstance(args[0], FakeTensor):
            if func is Tensor.tolist:
                return [self._length] * args[0].shape[0]
            if func in (Tensor.item, Tensor.__int__):
                return self._length
        return func(*args, **(kwargs or {}))


def weightless(denoiser: Denoiser) -> FakeTensorMode:
    """Give a hollow network parameters that have a device and a dtype, and still no memory; returns their mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in denoiser.network.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return mode


def passes(
    denoiser: Denoiser,
    mode: FakeTensorMode | None,
    conditions: Conditions,
    latent: tuple[int, ...],
    *,
    train: bool,
    offload: bool = False,
) -> Passes:
    """Run a network once forward, and once forward and backward.

    Args:
        denoiser: on tensors of ``mode``, or real ones.
        mode: of tensors without memory.
        conditions: one for each row of the batch.
        latent: shape of one latent.
        train: whether to run it backward too, if any of its parameters trains.
        offload: whether what is kept for that goes to the host's memory.

    Returns:
        What was counted; parameters are not among it.
    """
    rows = len(conditions)
    own = [p for p in denoiser.network.parameters() if p.requires_grad]
    moved: list[int] = []

    def away(tensor: Tensor) -> _Away:
        gone = _Away(tensor)
        moved.append(gone.size)
        return gone

    if offload:
        denoiser.keeping = lambda: offloaded(away)
    with mode or contextlib.nullcontext():
        x, t = torch.randn(rows, *latent), torch.rand(rows)
        before = [x, t, *conditions.tensors().values(), *denoiser.network.parameters(), *denoiser.network.buffers()]
        if not train or not own:
            with _counted(conditions, before) as meter, torch.no_grad():
                denoiser(x, t, conditions)
            return Passes(rows=rows, forward=meter.flops, transient=meter.peak())
        with _counted(conditions, before) as meter:
            out = denoiser(x, t, conditions)
            forward, kept, recording = meter.flops, meter.now(), meter.peak()
            out.backward(torch.zeros_like(out))
        gradients = [p.grad for p in own if p.grad is not None]
        peak, whole = meter.peak(gradients), meter.peak()
        for p in own:
            p.grad = None
    return Passes(
        rows=rows,
        forward=forward,
        backward=meter.flops - forward,
        kept=kept,
        recording=recording,
        peak=peak,
        whole=whole,
        moved=float(sum(moved)),
    )


@contextlib.contextmanager
def _counted(conditions: Conditions, before: Iterable[Tensor]) -> Iterator[Meter]:
    with Meter(before) as meter, _Full(conditions.embeds.shape[1]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that would be slow here; nothing is run
        yield meter
