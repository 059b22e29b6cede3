"""Model families: what each diffusers pipeline needs to be loaded, conditioned, called, decoded and exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from raydmd.models.base import Conditions, Experts, Family
from raydmd.models.places import locate

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.recipe import Model


def load_family(settings: Model) -> Family:
    """The family of a pipeline.

    Args:
        settings: the recipe's ``model`` section.

    Raises:
        InputError: if the pipeline is missing, incomplete or of a family that raydmd does not know.
    """
    from raydmd.models.wan import Wan  # heavy: imports diffusers and transformers

    return Wan(locate(settings).settings)


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
    return Experts(modules, family.routing(), family.process, family.prediction)


def load_conditions(file: Path) -> Conditions:
    """The condition table; memory-mapped, rows are read when they are used."""
    return Conditions(embeds=load_file(file)["embeds"])
