"""Reading folders in transformers' format, with errors that say what is wrong with the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPConfig

from raydmd.errors import InputError

BROKEN = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
"""What transformers and safetensors raise over files they can't read."""


def check_kind(path: str, kind: str) -> None:
    """Refuse a path that holds no model of this kind, before its weights are read.

    transformers itself would only warn, and fill a model of the wrong class with random weights.

    Args:
        path: a folder, or a hub id.
        kind: the ``model_type`` in its config.json, e.g. ``clip``.

    Raises:
        InputError: if there is no such folder, no configuration, or it is another model's.
    """
    # A hub id has one slash and starts with a word; anything else is meant to be a folder.
    if not Path(path).is_dir() and (path.count("/") != 1 or path[0] in "./~"):
        raise InputError(f"there is no folder {path!r}")
    try:
        found: dict[str, Any] = CLIPConfig.get_config_dict(path)[0]
    except BROKEN as error:
        raise InputError(f"no model's config.json can be read from {path!r}: {error}") from None
    if not found:  # transformers' answer for a folder without the file
        raise InputError(f"there is no config.json in {path!r}")
    if found.get("model_type") != kind:
        raise InputError(f"{path!r} holds a model of type {found.get('model_type')!r}, not {kind!r}")


def read_model(model_class: Any, path: str) -> Any:
    """Read a whole model: a weight that the files lack is an error, not a random number.

    Args:
        model_class: of transformers.
        path: a folder, or a hub id.

    Returns:
        The model in evaluation mode, fp32, frozen, on the CPU.

    Raises:
        InputError: if files are missing, damaged or of other shapes.
    """
    try:
        model, about = model_class.from_pretrained(path, output_loading_info=True, use_safetensors=True)
    except BROKEN as error:
        raise InputError(f"no {model_class.__name__} can be read from {path!r}: {error}") from None
    missing = sorted(about["missing_keys"])
    if missing:
        raise InputError(f"{path!r} lacks {len(missing)} weights of {model_class.__name__}, e.g. {missing[:3]}")
    return model.float().eval().requires_grad_(False)


def read_tokenizer(path: str) -> Any:
    """Read a tokenizer from a folder or a hub id.

    Raises:
        InputError: if there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except BROKEN as error:
        raise InputError(f"no tokenizer can be read from {path!r}: {error}") from None
    # Without a vocabulary's file transformers makes one of nothing but special tokens, and every prompt is alike.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise InputError(f"the tokenizer of {path!r} has no vocabulary: are its files there?")
    return tokenizer
