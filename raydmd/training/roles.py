"""A trainable role: its experts, optimizer, moving average, sharding and adapters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from raydmd.errors import NonFiniteError, RunFailed
from raydmd.models.base import Denoiser, Experts, Routing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from raydmd import recipe as recipes
    from raydmd.process import Prediction, Process

ADAPTER = "student"


class TrainedRole:
    """Student or fake score during one phase.

    Args:
        name: for messages and checkpoint keys.
        experts: every expert of the role; those not in ``trained`` are frozen. On the device, but for FSDP,
            which takes them there block by block.
        trained: experts whose parameters move in this phase.
        finished: experts that earlier phases trained; they belong in the checkpoint.
        settings: optimizer and adapters.
        average: decay of the moving average; 0 keeps none.
        routing: which expert serves which time.
        process: the noise process.
        prediction: what the networks predict.
        sharding: ``ddp`` or ``fsdp``; ignored by a single process.
        precision: of FSDP's gathered parameters.
        heads: modules that learn with the experts of their names and are kept with them, on the device.
        head_rate: of the heads; default: the role's.
    """

    def __init__(
        self,
        name: str,
        experts: Mapping[str, Denoiser],
        *,
        trained: tuple[str, ...],
        finished: tuple[str, ...] = (),
        settings: recipes.Role,
        average: float,
        routing: Routing,
        process: Process,
        prediction: Prediction,
        sharding: str = "ddp",
        precision: str = "fp32",
        heads: Mapping[str, nn.Module] | None = None,
        head_rate: float | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.denoisers = dict(experts)
        self.bare_heads = dict(heads or {})
        self._kept = tuple(e for e in experts if e in (*finished, *trained))
        self._decay = average
        for expert, denoiser in experts.items():
            _select(denoiser, train=expert in trained)
        if sharding == "fsdp" and dist.is_initialized():
            for denoiser in experts.values():
                if not isinstance(denoiser.network, FSDPModule):  # experts of earlier phases come sharded
                    shard(denoiser, precision)
            for head in self.bare_heads.values():
                fully_shard(head, reshard_after_forward=True)
        self.parameters = {
            f"{e}.{n}": p for e in trained for n, p in own_parameters(experts[e]).items() if p.requires_grad
        }
        groups = [{"params": list(self.parameters.values()), "full_rate": settings.rate}]
        if self.bare_heads:
            of_heads = {f"{e}.head.{n}": p for e, head in self.bare_heads.items() for n, p in head.named_parameters()}
            groups.append({"params": list(of_heads.values()), "full_rate": head_rate or settings.rate})
            self.parameters |= of_heads
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=settings.rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for p in self.parameters.values():  # made now, so that a checkpoint always has the same keys
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if average else {}
        self.updates = torch.zeros((), dtype=torch.int64)
        modules: dict[str, nn.Module] = dict(experts)
        self.heads = dict(self.bare_heads)
        if sharding == "ddp" and dist.is_initialized() and dist.get_world_size() > 1:
            modules |= {expert: _parallel(experts[expert]) for expert in trained}
            self.heads = {expert: _parallel(head) for expert, head in self.heads.items()}
        self.experts = Experts(modules, routing, process, prediction)

    def set_rate(self, factor: float) -> float:
        """Scale the rate by a schedule's factor; returns the rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_rate"] * factor
        return self.settings.rate * factor

    def update(self, loss: Tensor, *, where: str) -> float:
        """Backward, clip, step, average.

        Args:
            loss: a scalar with gradient.
            where: for the message, e.g. ``cycle 12``.

        Returns:
            The gradient norm before clipping, the same on all ranks.

        Raises:
            NonFiniteError: on every rank alike and before any parameter moves.
        """
        torch.autograd.backward(loss)
        total = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        every = loss.detach().clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(every)
        if not (math.isfinite(norm) and math.isfinite(every)):
            # Averaging over ranks has spread the bad value to all of them: all of them raise.
            self.optimizer.zero_grad(set_to_none=True)
            what = f"loss is {float(every)}" if math.isfinite(norm) else f"gradient is {norm}"
            raise NonFiniteError(
                f"the {self.name}'s {what} in {where}; no parameter moved. Start anew under another --name with a "
                f"lower training.{self.name}.rate or a higher method.normaliser_floor"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.average:
            # A young average would otherwise be mostly the starting point.
            done = int(self.updates)
            decay = min(self._decay, (1 + done) / (10 + done))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return norm

    @torch.no_grad()
    def settle(self) -> None:
        """Put the moving average in place of the parameters: what later phases build on is what is exported."""
        self.reshard()
        for name, value in self.average.items():
            self.parameters[name].copy_(value)

    def reshard(self) -> None:
        """Free what FSDP has gathered, so that parameters are the fp32 masters again."""
        for root in (*(d.network for d in self.denoisers.values()), *self.bare_heads.values()):
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def tensors(self) -> dict[str, Tensor]:
        """Everything of this role that a checkpoint needs, by a stable name; loaded in place."""
        self.reshard()
        found = {f"{self.name}.{n}": p for n, p in self._kept_parameters()}
        for name, p in self.parameters.items():
            found |= {f"{self.name}.optimizer.{name}.{k}": v for k, v in self.optimizer.state[p].items()}
        found |= {f"{self.name}.average.{n}": v for n, v in self.average.items()}
        return found | {f"{self.name}.updates": self.updates}

    def written(self) -> int:
        """Bytes that :meth:`write` writes, about."""
        each = (p for d in self.denoisers.values() for p in own_parameters(d).values())
        return sum(p.numel() * p.element_size() for p in each)

    def write(self, folder: Path, *, rank: int, average: bool = False) -> None:
        """Gather what trains of every expert, and write it on rank 0: a safetensors file for each.

        Args:
            folder: for them.
            rank: of this process; all call it.
            average: the moving average, where there is one, in place of what trains.
        """
        self.reshard()
        error: Exception | None = None
        for expert, denoiser in self.denoisers.items():
            found = {}
            for name, own in own_parameters(denoiser).items():
                p = self.average.get(f"{expert}.{name}", own) if average else own
                whole = p.full_tensor() if isinstance(p, DTensor) else p
                if rank == 0:
                    found[name] = whole.detach().cpu().contiguous()
            if rank == 0 and error is None:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    save_file(found, folder / f"{expert}.safetensors")
                except Exception as e:  # of any kind; the others still gather
                    error = e
        if error is not None:
            raise error

    def _kept_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for expert in self._kept:
            for name, p in own_parameters(self.denoisers[expert]).items():
                yield f"{expert}.{name}", p.detach()
        for expert, head in self.bare_heads.items():
            for name, p in head.named_parameters():
                yield f"{expert}.head.{name}", p.detach()


def own_parameters(denoiser: Denoiser) -> dict[str, nn.Parameter]:
    """What may train of a network, by name: all of it, or its role's adapter, whose own name is left out."""
    found = dict(denoiser.network.named_parameters())
    if denoiser.adapter is None:
        return found
    mark = f".{denoiser.adapter}."
    return {name.replace(mark, "."): p for name, p in found.items() if "lora_" in name and mark in name}


def add_adapter(denoiser: Denoiser, lora: recipes.Lora, *, seed: int, name: str = ADAPTER) -> None:
    """Give a network low-rank adapters in fp32, whose start depends on the seed alone.

    Raises:
        RunFailed: if a target that the recipe names is no module's.
    """
    modules = [module for module, _ in denoiser.network.named_modules()]
    for target in lora.targets or ():  # peft is content if any of them is found
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            raise RunFailed(f"lora.targets: no module of {type(denoiser.network).__name__} ends in {target!r}")
    targets = list(lora.targets or denoiser.lora_targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser.network.add_adapter(config, adapter_name=name)
    denoiser.adapter = name
    for p in own_parameters(denoiser).values():  # peft makes them of the network's dtype
        p.data = p.data.float()


def adapter_weights(denoiser: Denoiser) -> dict[str, Tensor]:
    """The adapter's weights under peft's names."""
    state = get_peft_model_state_dict(denoiser.network, adapter_name=ADAPTER)
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def _parallel(module: nn.Module) -> DistributedDataParallel:
    if isinstance(module, Denoiser) and module.switch is not None:  # other roles' adapters are theirs to reduce
        mine = {id(p) for p in own_parameters(module).values()}
        others = [name for name, p in module.named_parameters() if id(p) not in mine]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, others)  # type: ignore[no-untyped-call]
    # One bucket, so that the order of sums does not depend on timing (shown for two ranks, where
    # addition commutes; a ring of more may differ in the last bit after a resume).
    return DistributedDataParallel(module, broadcast_buffers=False, bucket_cap_mb=4096, gradient_as_bucket_view=True)


def _select(denoiser: Denoiser, *, train: bool) -> None:
    if denoiser.adapter is not None:
        for name, p in denoiser.network.named_parameters():
            if "lora_" not in name:
                p.requires_grad_(False)
    for name, p in own_parameters(denoiser).items():
        idle = any(name.startswith(f"{module}.") for module in denoiser.idle)
        p.requires_grad_(train and not idle)


def shard(denoiser: Denoiser, precision: str) -> None:
    """FSDP2, per block; the network's own list says what a block is. All ranks get rank 0's weights.

    Args:
        denoiser: with its adapters, if it is to have any.
        precision: of the forward pass. What is gathered has it too, but where adapters train: a frozen network is
            of that dtype already, and adapters stay fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" and denoiser.adapter is None else None,
        reduce_dtype=torch.float32,
        # Casting inputs would round the timestep: bf16 knows no number between 936 and 940.
        cast_forward_inputs=False,
    )
    network = denoiser.network
    whole = network.state_dict() if dist.get_rank() == 0 else {}
    blocks = set(network._no_split_modules or ()) or {type(block).__name__ for block in denoiser.blocks}
    for module in reversed(list(network.modules())):  # a U-Net's blocks lie in each other: inner ones first
        if type(module).__name__ in blocks:
            fully_shard(module, mp_policy=policy)
    # A root that stays gathered after a forward without backward would show bf16 copies to a checkpoint.
    fully_shard(network, mp_policy=policy, reshard_after_forward=True)
    if dist.get_world_size() > 1:  # rank 0 alone has read weights
        sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(network, whole, options=sent)
