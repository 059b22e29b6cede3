"""Model families: what each diffusers pipeline needs to be loaded, conditioned, called, decoded and exported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from raydmd.errors import InputError
from raydmd.models.base import Conditions, Experts
from raydmd.models.places import locate, read_index

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.models.family import Family
    from raydmd.recipe import Model


FAMILIES = {
    "WanPipeline": ("wan", "Wan"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "Lumina2Pipeline": ("lumina2", "Lumina2"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "FluxPipeline": ("flux", "Flux"),
    "ConsistencyModelPipeline": ("edm", "Edm"),
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
    if kind not in FAMILIES:
        raise InputError(f"model {located.path!r} is a {kind}; this version of raydmd distils {', '.join(FAMILIES)}")
    module, name = FAMILIES[kind]
    family: type[Family] = getattr(import_module(f"raydmd.models.{module}"), name)
    return family(located, index)


def load_teacher(family: Family, precision: str, *, device: torch.device) -> Experts:
    """The frozen teacher, in evaluation mode on ``device``.

    Args:
        family: its pipeline.
        precision: ``bf16`` stores and runs it in bf16, ``fp32`` in fp32.
        device: where.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    modules = {
        name: family.denoiser(name, dtype=dtype).to(device).eval().requires_grad_(False)
        for name in family.routing().experts
    }
    return Experts(modules, family.routing(), family.process, family.prediction, family.rescale)


def load_conditions(file: Path) -> Conditions:
    """The condition table, as :meth:`Conditions.save` writes it.

    Raises:
        InputError: if the file is missing or holds no conditions.
    """
    try:
        # Mapped, not read: processes of a node share its pages.
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not iterable
        if "embeds" not in found or found.keys() - {"embeds", "pooled", "mask"}:
            raise InputError(f"holds {', '.join(found) or 'nothing'} instead of embeds, pooled and mask")
        return Conditions(**found)
    except (OSError, SafetensorError, InputError) as error:
        raise InputError(f"conditions {file}: {error}") from None
