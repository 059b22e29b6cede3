"""Tiny pipelines with random weights, one of every family: to try code on, not to look at.

Each is a whole pipeline of the stock classes, with text encoders and a tokenizer that knows the words it is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from raydmd import __version__
from raydmd.errors import InputError
from raydmd.models import untrained_pipelines as pipelines
from raydmd.models.untrained_parts import classifier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


PIPELINES: dict[str, Callable[..., Any]] = {
    "wan22": pipelines.wan,
    "wan22-i2v": partial(pipelines.wan, boundary=0.9, pictures=True),
    "wan21": partial(pipelines.wan, experts=1),
    "sd3": pipelines.sd3,
    "sd15": pipelines.sd15,
    "sdxl": pipelines.sdxl,
    "lumina2": pipelines.lumina2,
    "qwen-image": pipelines.qwen_image,
    "z-image": pipelines.z_image,
    "flux": pipelines.flux,
    "edm": pipelines.edm,
    "dit": pipelines.dit,
    "sit": partial(pipelines.dit, flow=True),
}
CLASSES = {"edm": 10, "dit": 1000, "sit": 1000}
"""Of pipelines whose prompts are numbers of classes."""
PICTURED = ("wan22-i2v",)
"""Those whose prompts have pictures."""
SIZES: dict[str, dict[str, int]] = {
    "wan22": {"frames": 9, "height": 32, "width": 32},
    "wan22-i2v": {"frames": 9, "height": 32, "width": 32},
    "wan21": {"frames": 9, "height": 32, "width": 32},
    "qwen-image": {"height": 32, "width": 32},
    "z-image": {"height": 16, "width": 16},
    "flux": {"height": 16, "width": 16},
}
"""Of samples, where a pipeline's own default is the real one's."""


def write(kind: str, folder: Path, words: Sequence[str], *, seed: int = 0, **settings: Any) -> Path:
    """Write a pipeline with random weights, the same for a seed, and return its folder.

    Args:
        kind: one of :data:`PIPELINES`.
        folder: made if it is not there.
        words: that its tokenizer knows.
        seed: of its weights.
        **settings: of the kind.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        PIPELINES[kind](words, **settings).save_pretrained(folder, safe_serialization=True)
    return folder


def kept(kind: str, *, like: Path) -> Path:
    """The folder of an untrained pipeline in this machine's cache, made on first use.

    Args:
        kind: one of :data:`PIPELINES`.
        like: a file of prompts, which its tokenizer knows the words of and which come with it.

    Raises:
        InputError: if there is no such kind.
    """
    if kind not in PIPELINES:
        raise InputError(f"there is no untrained pipeline {kind!r}; there are {', '.join(PIPELINES)}")
    root = Path(os.environ.get("RAYDMD_CACHE") or Path.home() / ".cache" / "raydmd") / "zoo"
    made_by = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("untrained*.py")))
    folder = root / f"{kind}-{__version__}-{hashlib.sha256(made_by).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    numbers = "".join(f"{k}\n" for k in range(CLASSES.get(kind, 0)))
    prompts = numbers or like.read_text(encoding="utf-8")
    made = Path(tempfile.mkdtemp(dir=root, prefix=f".{kind}-"))
    write(kind, made, sorted(set(prompts.split())))
    name = "prompts.jsonl" if kind in PICTURED else "prompts.txt"
    (made / name).write_text(_with_pictures(made, prompts) if kind in PICTURED else prompts, encoding="utf-8")
    about: dict[str, Any] = SIZES.get(kind, {}) | {"prompts": name}
    if CLASSES.get(kind) == 1000:
        classifier(made / "classifier", classes=1000)
        about["reward"] = "classifier"
    (made / "raydmd.json").write_text(json.dumps(about), encoding="utf-8")
    try:
        made.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(made)
    return folder


def _with_pictures(folder: Path, prompts: str) -> str:
    """A table of the first prompts, each with one of a few pictures of noise, written beside it."""
    names = [f"{k}.png" for k in range(4)]
    for k, name in enumerate(names):
        blocks = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(k)).mul(255).byte()
        Image.fromarray(blocks.numpy()).resize((32, 32), Image.Resampling.BILINEAR).save(folder / name)
    rows = [{"prompt": text, "image": names[k % 4]} for k, text in enumerate(prompts.splitlines()[:64])]
    return "".join(json.dumps(row) + "\n" for row in rows)
