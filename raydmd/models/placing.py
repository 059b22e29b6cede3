"""Where a network lies: on one device, or block by block on several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from raydmd.errors import RunFailed

if TYPE_CHECKING:
    from torch import nn


def place(denoiser: nn.Module, device: torch.device, *, spread: bool = False) -> None:
    """Take a network to a device.

    Args:
        denoiser: with its network, on the CPU.
        device: where to.
        spread: block by block over all GPUs that this process sees, where there are several.

    Raises:
        RunFailed: if it does not fit on them.
    """
    if not (spread and device.type == "cuda" and torch.cuda.device_count() > 1):
        denoiser.to(device)
        return
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    network: Any = denoiser.network
    whole = {"no_split_module_classes": network._no_split_modules}
    limits = {k: v for k, v in get_balanced_memory(network, **whole).items() if k != "cpu"}
    where = infer_auto_device_map(network, max_memory=limits, **whole)
    if not_there := sorted({str(v) for v in where.values() if not isinstance(v, int)}):
        raise RunFailed(
            f"{type(network).__name__} does not fit on the {len(limits)} GPUs that are left to it here: parts would go "
            f"to {', '.join(not_there)}. Set a larger placement.teacher_gpus"
        )
    dispatch_model(network, device_map=where)


def take_back(denoiser: nn.Module) -> None:
    """Take a network back to the CPU, wherever :func:`place` took it."""
    network: Any = denoiser.network
    if getattr(network, "hf_device_map", None):
        from accelerate.hooks import remove_hook_from_submodules

        remove_hook_from_submodules(network)
        del network.hf_device_map
    denoiser.to("cpu")
