"""Pipelines whose settings come with the package, so that runs of them can be planned without a hub."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from raydmd.models import load_family

if TYPE_CHECKING:
    from raydmd.models.family import Family
    from raydmd.recipe import Model

TABLE = Path(__file__).parent / "data" / "models.yaml"
TEXT = {
    "WanPipeline": ("text_encoder", "tokenizer"),
    "WanImageToVideoPipeline": ("text_encoder", "tokenizer"),
    "QwenImagePipeline": ("text_encoder", "tokenizer"),
    "Lumina2Pipeline": ("text_encoder", "tokenizer"),
    "StableDiffusionPipeline": ("text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "StableDiffusion3Pipeline": tuple(f"{p}{n}" for n in ("", "_2", "_3") for p in ("text_encoder", "tokenizer")),
}
"""Parts of text that families want to see in a pipeline's index."""


@cache
def known() -> dict[str, dict[str, Any]]:
    """The table, by hub id."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {hub: about for about in table.values() for hub in about["ids"]}


def family_of(model: Model) -> tuple[Family, dict[str, int]]:
    """The family of a recipe's model, and what the table knows of its prompts' lengths.

    A folder or zoo name is read where it lies; a hub id that the table has is not asked for.

    Raises:
        InputError: as :func:`raydmd.models.load_family`.
    """
    about = None if Path(model.path).is_dir() else known().get(model.path)
    if about is None:
        return load_family(model), {}
    lengths: dict[str, int] = {k: about[k] for k in ("text", "clip") if k in about}
    settings = model.model_copy(update={"path": str(_folder(model.path)), "revision": None, "lora": {}})
    return load_family(settings), lengths


@cache
def _folder(hub: str) -> Path:
    """A pipeline's settings as files, for as long as this process lives."""
    about = known()[hub]
    folder = Path(tempfile.mkdtemp(prefix="raydmd-plan-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    index = dict(about["index"])
    for part, settings in about["parts"].items():
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir()
        (folder / part / file).write_text(json.dumps(settings), encoding="utf-8")
        index[part] = ["diffusers", settings["_class_name"]]
    index |= {part: ["transformers", "PreTrainedModel"] for part in TEXT[index["_class_name"]]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
