"""Model families: what each diffusers pipeline needs to be loaded, conditioned, called, decoded and exported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from raydmd.errors import InputError
from raydmd.models.base import Experts
from raydmd.models.places import locate, read_index
from raydmd.models.placing import place
from raydmd.models.reading import understood
from raydmd.models.speed import hasten

if TYPE_CHECKING:
    from raydmd.models.family import Family
    from raydmd.recipe import Model


FAMILIES = {
    "WanPipeline": ("wan", "Wan"),
    "WanImageToVideoPipeline": ("wan_i2v", "WanImage"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "Lumina2Pipeline": ("lumina2", "Lumina2"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "FluxPipeline": ("flux", "Flux"),
    "ConsistencyModelPipeline": ("edm", "Edm"),
    "DiTPipeline": ("dit", "Dit"),
}
"""Module and class of each diffusers pipeline's family; one alone is imported, since each brings much along."""


def load_family(settings: Model) -> Family:
    """The family of a pipeline.

    Args:
        settings: the recipe's ``model`` section.

    Raises:
        InputError: if the pipeline is missing, incomplete or of a family that raydmd does not know.
    """
    located = locate(settings).settings
    index = read_index(located)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise InputError(f"model {located.path!r} is a {kind}; this version of raydmd distils {', '.join(FAMILIES)}")
    module, name = FAMILIES[kind]
    family: type[Family] = getattr(import_module(f"raydmd.models.{module}"), name)
    with understood(f"model {located.path!r}"):
        return family(located, index)


def load_teacher(
    family: Family,
    precision: str,
    *,
    device: torch.device,
    spread: bool = False,
    experts: tuple[str, ...] = (),
    compile_mode: str | None = None,
    quantize: str | None = None,
) -> Experts:
    """The frozen teacher, in evaluation mode on ``device``.

    Args:
        family: its pipeline.
        precision: ``bf16`` stores and runs it in bf16, ``fp32`` in fp32.
        device: where.
        spread: over all GPUs that this process sees, where there are several.
        experts: to load; default: all.
        compile_mode: see :func:`raydmd.models.speed.hasten`.
        quantize: see there.

    Raises:
        InputError: if it cannot be made faster in these ways here.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with understood(f"model {family.path!r}"):
        modules = {name: family.denoiser(name, dtype=dtype) for name in experts or family.routing().experts}
    for module in modules.values():
        place(module.eval().requires_grad_(False), device, spread=spread)
        hasten(module, compile_mode=compile_mode, quantize=quantize)
    return Experts(modules, family.routing(), family.process, family.prediction, family.rescale)
