"""LoRA files of strangers, fused into the networks that they were made for."""

from __future__ import annotations

import re
from inspect import signature
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

ADAPTER = "teacher"
DOWN, UP = ("lora_A", "lora.down"), ("lora_B", "lora.up")
MATRIX = re.compile(r"(.+)\.(lora_A|lora_B|lora\.down|lora\.up)\.weight")


def fuse(pipeline: Any, network: Any, file: Path, *, prefix: str) -> None:
    """Add a LoRA to a network's weights.

    Args:
        pipeline: the diffusers class, which knows how other tools name a LoRA's weights.
        network: of diffusers.
        file: safetensors.
        prefix: what names in the file begin with, e.g. ``transformer``.

    Raises:
        InputError: if the file is missing or no LoRA, or is for another network.
    """
    check_file(file)
    if not hasattr(pipeline, "lora_state_dict"):
        raise InputError(f"model.lora: diffusers reads no LoRA for a {pipeline.__name__}")
    # Where a pipeline can give a file's alphas apart, it otherwise drops them.
    asked = {"return_alphas": True} if "return_alphas" in signature(pipeline.lora_state_dict).parameters else {}
    try:
        # The folder and the name apart, or diffusers takes the path for a hub id's.
        found = pipeline.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            return_lora_metadata=True,
            **asked,
        )
    except Exception as error:  # whatever diffusers raises over a file's names, it means the same here
        raise InputError(f"model.lora: {file} is no LoRA of a {pipeline.__name__}: {error}") from None
    state, metadata = found[0], found[-1]
    alphas = found[1] if len(found) == 3 else None
    _check(network, state, file, prefix)
    network.load_lora_adapter(state, prefix=prefix, adapter_name=ADAPTER, network_alphas=alphas, metadata=metadata)
    network.fuse_lora(adapter_names=[ADAPTER])
    network.unload_lora()


def check_file(file: Path) -> None:
    """Refuse what is no safetensors file.

    Raises:
        InputError: if so.
    """
    if file.suffix != ".safetensors" or not file.is_file():
        raise InputError(f"model.lora: {file.absolute()} is no safetensors file")


def _check(network: nn.Module, state: Mapping[str, Tensor], file: Path, prefix: str) -> None:
    """Refuse what diffusers would load in part, with a warning."""
    matches = {name: MATRIX.fullmatch(name.removeprefix(f"{prefix}.")) for name in state}
    others = [name for name, match in matches.items() if match is None]
    elsewhere = [name for name in state if not name.startswith(f"{prefix}.")]
    if not any(matches.values()) or others or elsewhere:
        raise InputError(
            f"model.lora: {file} holds more than low-rank matrices of a {prefix}, or under names that diffusers does "
            f"not read, e.g. {(others or elsewhere or ['nothing'])[0]}"
        )
    modules, wrong = dict(network.named_modules()), []
    for name, match in matches.items():
        if match is None:
            continue
        weight = getattr(modules.get(match[1]), "weight", None)
        matrix = state[name]
        if weight is None:
            wrong.append(f"{match[1]}, which is not there")
        elif match[2] in DOWN and matrix.shape[1] != weight.shape[1]:
            wrong.append(f"{match[1]} of {matrix.shape[1]} inputs, here {weight.shape[1]}")
        elif match[2] in UP and matrix.shape[0] != weight.shape[0]:
            wrong.append(f"{match[1]} of {matrix.shape[0]} outputs, here {weight.shape[0]}")
    if wrong:
        raise InputError(
            f"model.lora: {file} is for another base than this {type(network).__name__}: {len(wrong)} of its "
            f"{len(state)} matrices do not fit, e.g. {wrong[0]}"
        )
