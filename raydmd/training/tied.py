"""Tied placement: teacher, student and fake score are one frozen network with adapters, and without.

Each of the teacher's experts is stored once in a worker. A role is a :class:`~raydmd.models.base.Denoiser` on it with
an adapter of its own; the teacher is the network with all adapters off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from raydmd.methods.presets import source_expert, student_routing
from raydmd.models.base import Experts
from raydmd.models.offload import offloaded
from raydmd.training.roles import add_adapter, own_parameters, shard

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from raydmd.models.base import Denoiser
    from raydmd.models.family import Family
    from raydmd.models.tokens import TokenGroup
    from raydmd.recipe import Recipe


class Tied:
    """The networks of a worker, and everything that shares them.

    All adapters that a run will need are made at once: a network that is sharded can be given no more. A phase's new
    fake score is the same adapter, put back to its start.

    Args:
        recipe: the run; both roles have adapters.
        family: the teacher's pipeline.
        device: where to.
        tokens: ranks that share each sample's tokens, if any do.
    """

    def __init__(self, recipe: Recipe, family: Family, device: torch.device, tokens: TokenGroup | None = None) -> None:
        training, self._family = recipe.training, family
        routing = family.routing()
        precision = torch.bfloat16 if training.precision == "bf16" else torch.float32
        sharded = training.sharding == "fsdp" and dist.is_initialized()
        with family.without_weights(sharded and dist.get_rank() > 0):  # they are sent rank 0's
            self._bases = {e: family.denoiser(e, dtype=precision, autocast=precision) for e in routing.experts}
        student = {e: source_expert(recipe.method, routing, e) for e in student_routing(recipe.method, routing).experts}
        self._roles: dict[tuple[str, str], Denoiser] = {}
        for role, lora, sources in (
            ("student", training.student.lora, student),
            ("fake", training.fake.lora, {e: e for e in routing.experts}),
        ):
            if lora is None:
                raise ValueError(f"the {role} has no adapter, so it cannot be tied")
            for expert, source in sources.items():
                mine = self._bases[source].beside(None, autocast=precision)
                mine.keeping = offloaded if training.offload_activations else None
                add_adapter(mine, lora, seed=recipe.seed, name=f"{role}_{expert}")
                self._roles[role, expert] = mine
        if tokens:  # with all adapters: peft wraps modules that tokens are gathered behind
            for denoiser in (*self._bases.values(), *self._roles.values()):
                tokens.share(denoiser)
        for base in self._bases.values():
            switch = AdapterSwitch(base.network)
            if training.gradient_checkpointing:
                base.network.enable_gradient_checkpointing(switch.checkpoint)
            base.switch = switch
            base.train()
            for mine in self._roles.values():
                if mine.network is base.network:
                    mine.switch = switch
            for name, p in base.network.named_parameters():
                p.requires_grad_("lora_" in name)
        for base in self._bases.values():
            if sharded:
                any_role = next(mine for mine in self._roles.values() if mine.network is base.network)
                shard(any_role, training.precision)
            else:
                base.to(device)
        self._starts = {
            key: {name: _local(p).to("cpu", copy=True) for name, p in own_parameters(mine).items()}
            for key, mine in self._roles.items()
        }

    @torch.no_grad()
    def expert(self, role: str, expert: str) -> Denoiser:
        """A role's expert, with its adapter as it was at the start."""
        found = self._roles[role, expert]
        for name, p in own_parameters(found).items():
            _local(p).copy_(self._starts[role, expert][name])
        return found

    def teacher(self) -> Experts:
        """The networks without adapters, computing as a teacher of its own would."""
        modules: dict[str, nn.Module] = {e: b.beside(None, autocast=torch.float32) for e, b in self._bases.items()}
        f = self._family
        return Experts(modules, f.routing(), f.process, f.prediction, f.rescale)


class AdapterSwitch:
    """Which adapter of a network is on.

    peft's own ``set_adapter`` and ``disable_adapters`` also switch gradients off, which would take them from a role
    whose forward pass is done and whose backward pass is not.

    Args:
        network: with all its adapters.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = tuple(m for m in network.modules() if isinstance(m, BaseTunerLayer))
        self.now: str | None = None
        self(None)

    def __call__(self, adapter: str | None) -> None:
        """Turn one on and the others off; ``None`` turns all off."""
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self.now = adapter

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """For diffusers' gradient checkpointing: what is computed again is so with the adapter of the first time."""
        adapter = self.now

        def again(*inputs: Any) -> Any:
            self(adapter)
            return function(*inputs)

        return checkpoint(again, *args, use_reentrant=False)


def _local(p: Tensor) -> Tensor:
    """What of a parameter lies here."""
    return p.to_local() if isinstance(p, DTensor) else p
