"""Sequence parallelism: the ranks of a group hold the same samples and share their tokens.

The network does what diffusers' context parallelism makes of it: it splits tokens before its blocks, exchanges heads
for tokens around every attention (Ulysses, arXiv:2309.14509), and gathers them behind its last projection. Outside the
network every rank of a group computes the same. A rank's gradients are then of its own tokens alone, which leaves two
things to do: their mean over all ranks, which DDP and FSDP take, must be the sum over a group, and what flows on into
the network's input must be the whole group's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

if TYPE_CHECKING:
    from datetime import timedelta

    from torch import Tensor

    from raydmd.models.base import Denoiser


class TokenGroup:
    """This rank's group. All ranks make theirs together.

    Args:
        size: ranks of a group, neighbours; divides the world.
        device: this rank's.
        timeout: of what the group's ranks exchange; its own default knows nothing of the run's.

    Attributes:
        size: ranks of a group.
        group: the process group.
        leads: this rank is the group's first.
        leader: the global rank of the group's first.
    """

    def __init__(self, size: int, device: torch.device, timeout: timedelta) -> None:
        names = ("data", "ring", "ulysses")  # the last two by diffusers
        self._mesh = init_device_mesh(device.type, (dist.get_world_size() // size, 1, size), mesh_dim_names=names)
        self._device = device
        self.size = size
        self.group: dist.ProcessGroup = self._mesh["ulysses"].get_group()
        _set_pg_timeout(timeout, self.group)
        self.leader = dist.get_rank() - dist.get_rank(self.group)
        self.leads = dist.get_rank() == self.leader

    def share(self, denoiser: Denoiser) -> None:
        """Have a network's forward and backward pass shared by the group; before it is sharded."""
        network = denoiser.network
        if network._parallel_config is None:  # a tied network may have been given several roles
            split = ContextParallelConfig(ulysses_degree=self.size, mesh=self._mesh)
            config = ParallelConfig(context_parallel_config=split)
            # As network.enable_parallelism does, which asks for an accelerator.
            config.setup(dist.get_rank(), dist.get_world_size(), self._device, mesh=self._mesh)
            network._parallel_config = config
            for module in network.modules():
                if hasattr(getattr(module, "processor", None), "_parallel_config"):
                    module.processor._parallel_config = config
            apply_context_parallel(network, split, network._cp_plan)
        denoiser.tokens = self

    def enter(self, x: Tensor) -> Tensor:
        """What goes into the network: backward, the mean of the ranks' gradients."""
        entered: Tensor = _Enter.apply(x, self.group, self.size)  # type: ignore[no-untyped-call]
        return entered

    def leave(self, x: Tensor) -> Tensor:
        """What comes out of it: backward, the gradient times the size of the group."""
        left: Tensor = _Leave.apply(x, self.size)  # type: ignore[no-untyped-call]
        return left


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed / ctx.size, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.size, None
