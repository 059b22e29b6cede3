"""A family's networks, measured without their weights: parameters, units of sharding, and what passes cost."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from raydmd import __version__
from raydmd.models.base import Conditions
from raydmd.models.discriminator import Head
from raydmd.models.hollow import cast
from raydmd.planning import trace
from raydmd.planning.trace import Passes, passes, weightless
from raydmd.training.roles import add_adapter, own_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from raydmd.models.base import Denoiser
    from raydmd.models.family import Family
    from raydmd.recipe import Lora

SHIPPED = Path(__file__).parent / "data" / "costs.json"
KEPT = 2
"""Blocks that are left of many alike; what more of them cost is told from one more."""
Signature = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Network:
    """One expert of a family.

    Attributes:
        parameters: of the bare network.
        precise: those that its class keeps in fp32 whatever it is asked.
        idle: those that never train.
        adapters: of a role's adapter; 0 without one.
        unit: of the largest block that FSDP gathers at once.
        root: of what is in no block.
        units: blocks, and the rest.
    """

    parameters: int
    precise: int
    idle: int
    adapters: int
    unit: int
    root: int
    units: int

    def stored(self, size: float) -> float:
        """Bytes of the frozen network with so many bytes for each parameter."""
        return size * (self.parameters - self.precise) + 4 * self.precise


class Networks:
    """What a family's networks cost; each question is answered once, and kept on disk.

    Args:
        family: of the pipeline.
        lengths: of its prompts, where the family has no tokenizer to ask: see :mod:`raydmd.planning.known`.

    Attributes:
        asked: what was answered so far, by a key of what decides it.
    """

    def __init__(self, family: Family, lengths: Mapping[str, int]) -> None:
        self._family, self._lengths = family, dict(lengths)
        self._expert = family.routing().experts[0]
        config = family._config(family._kind(), self._expert)
        self._facts = [config, family.prompt_tokens(self._lengths)]
        self._first: Denoiser | None = None
        self.asked: dict[str, dict[str, Any]] = {}

    def size(self, lora: Lora | None) -> Network:
        """Parameters of an expert, with a role's adapter if it has one."""
        return Network(**self._found("size", lora, lambda: asdict(self._size(lora))))

    def cost(
        self,
        *,
        rows: int,
        latent: tuple[int, ...],
        bits: int,
        autocast: int,
        lora: Lora | None,
        again: bool,
        train: bool,
        offload: bool = False,
    ) -> Passes:
        """What passes cost.

        Args:
            rows: of the batch.
            latent: shape of one latent.
            bits: of the parameters.
            autocast: bits of the forward pass.
            lora: adapters that alone are trained.
            again: whether gradient checkpointing computes activations again.
            train: whether to count a backward pass.
            offload: whether what is kept for it is in the host's memory.
        """
        told = {
            "rows": rows,
            "latent": list(latent),
            "bits": bits,
            "autocast": autocast,
            "again": again,
            "train": train,
        }
        if offload:
            told["offload"] = True

        def find() -> dict[str, Any]:
            def run(more: Signature | None) -> tuple[Passes, dict[Signature, int]]:
                denoiser = self._hollow(torch.bfloat16 if bits == 16 else torch.float32, autocast)
                cut = reduce(denoiser.network, more)
                self._roles(denoiser, lora, again=again, train=train)
                mode = weightless(denoiser)
                with mode:
                    conditions = blank(self._family, rows, latent, self._lengths)
                return passes(denoiser, mode, conditions, latent, train=train, offload=offload), cut

            found, cut = run(None)
            whole = found
            for signature, missing in cut.items():
                larger, _ = run(signature)
                whole = Passes(
                    rows=rows,
                    **{
                        k: v + missing * (getattr(larger, k) - getattr(found, k))
                        for k, v in vars(whole).items()
                        if k != "rows"
                    },
                )
            return asdict(whole)

        return Passes(**self._found("cost", lora, find, **told))

    def head(self, blocks: int) -> int:
        """Parameters of a discriminator's head on so many blocks."""
        width = self._hollow(torch.bfloat16, 16).width
        with torch.device("meta"):
            return sum(p.numel() for p in Head(width, blocks).parameters())

    def _size(self, lora: Lora | None) -> Network:
        denoiser = self._hollow(torch.bfloat16, 16)
        network = denoiser.network
        named = dict(network.named_parameters())
        precise = sum(p.numel() for p in named.values() if p.dtype == torch.float32)
        idle = sum(p.numel() for n, p in named.items() if any(n.startswith(f"{m}.") for m in denoiser.idle))
        blocks = set(network._no_split_modules or ()) or {type(block).__name__ for block in denoiser.blocks}
        units = [m for m in network.modules() if type(m).__name__ in blocks]
        own = [_own(m, blocks) for m in units]
        whole = sum(p.numel() for p in named.values())
        adapters = 0
        if lora is not None:
            with torch.device("meta"):
                add_adapter(denoiser, lora, seed=0)
            adapters = sum(p.numel() for p in own_parameters(denoiser).values())
        return Network(
            parameters=whole,
            precise=precise,
            idle=idle,
            adapters=adapters,
            unit=max(own, default=0),
            root=whole - sum(own),
            units=len(units) + 1,
        )

    def _hollow(self, dtype: torch.dtype, autocast: int) -> Denoiser:
        """A network without memory, to be changed at will; building one anew can take seconds of position tables."""
        if self._first is None:
            with self._family.without_weights():
                self._first = self._family.denoiser(self._expert, dtype=torch.float32)
        denoiser = copy.deepcopy(self._first)
        cast(denoiser.network, dtype)
        return denoiser.beside(None, autocast=torch.bfloat16 if autocast == 16 else torch.float32)

    def _roles(self, denoiser: Denoiser, lora: Lora | None, *, again: bool, train: bool) -> None:
        """Make a network a role's, as :mod:`raydmd.training.build` does."""
        if lora is not None:
            with torch.device("meta"):
                add_adapter(denoiser, lora, seed=0)
        denoiser.network.requires_grad_(False)
        if train:
            for name, p in own_parameters(denoiser).items():
                p.requires_grad_(not any(name.startswith(f"{module}.") for module in denoiser.idle))
        if again:
            denoiser.network.enable_gradient_checkpointing()
        denoiser.train(train)

    def _found(self, what: str, lora: Lora | None, find: Callable[[], dict[str, Any]], **told: Any) -> dict[str, Any]:
        """What comes with the package, what was found before, or what is found now."""
        adapters = [lora.rank, lora.targets] if lora else None
        key = _digest([what, *self._facts, adapters, told])
        found = self.asked.get(key) or shipped().get(key)
        if found is None:
            found = kept(_digest([key, __version__, torch.__version__, diffusers.__version__, _code()]), find)
        self.asked[key] = found
        return found


def reduce(network: nn.Module, more: Signature | None = None) -> dict[Signature, int]:
    """Leave a few of a network's blocks of each kind; returns how many of each kind went.

    Args:
        network: changed in place.
        more: a kind of which one more is left, in the first list that has it.
    """
    gone: dict[Signature, int] = {}
    for module in list(network.modules()):
        for name, blocks in list(module.named_children()):
            kinds = {type(b).__name__ for b in blocks} if isinstance(blocks, nn.ModuleList) else set()
            if len(kinds) != 1 or not next(iter(kinds)).endswith("TransformerBlock"):
                continue
            left, seen, cut = [], dict[Signature, int](), set[Signature]()
            for block in blocks.children():
                kind = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
                seen[kind] = seen.get(kind, 0) + 1
                if seen[kind] <= KEPT + (kind == more):
                    left.append(block)
                else:
                    gone[kind] = gone.get(kind, 0) + 1
                    cut.add(kind)
                if kind == more and seen[kind] > KEPT:
                    cut.add(kind)
            if more in cut:  # a list that had no more than is left of it can't show what one more costs
                more = None
            setattr(module, name, nn.ModuleList(left))
    return gone


def blank(family: Family, rows: int, latent: tuple[int, ...], lengths: Mapping[str, int]) -> Conditions:
    """Conditions of the shapes that a family's prompts have, nothing masked."""
    if not family.text_width:
        return Conditions(embeds=torch.zeros(rows, 1, 1))
    config = family._config(family._kind(), family.routing().experts[0])
    length = family.prompt_tokens(lengths)
    found: dict[str, torch.Tensor] = {"embeds": torch.zeros(rows, length, config[family.text_width])}
    if family.masked:
        found["mask"] = torch.ones(rows, length, dtype=torch.bool)
    if pooled := family.pooled_width():
        found["pooled"] = torch.zeros(rows, pooled)
    if family.pictures:
        found["picture"] = torch.zeros(rows, *latent)
    return Conditions(**found)


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """What comes with the package, for the well-known pipelines; ``benchmarks/planning_costs.py`` makes it."""
    found: dict[str, dict[str, Any]] = json.loads(SHIPPED.read_text(encoding="utf-8")) if SHIPPED.is_file() else {}
    return found


def kept(key: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found before under a key, or is found now."""
    root = Path(os.environ.get("RAYDMD_CACHE") or Path.home() / ".cache" / "raydmd") / "plans"
    file = root / f"{key}.json"
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return known
    except (OSError, ValueError):
        pass
    found: dict[str, Any] = find()
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(file)
    except OSError:  # a read-only home costs time, nothing else
        pass
    return found


def _own(module: nn.Module, blocks: set[str]) -> int:
    """Parameters of a block that lie in none of the blocks within it."""
    inner = {id(p) for m in _inner(module) if type(m).__name__ in blocks for p in m.parameters()}
    return sum(p.numel() for p in module.parameters() if id(p) not in inner)


def _inner(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if m is not module)


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _code() -> str:
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in (__file__, trace.__file__))).hexdigest()[:8]
