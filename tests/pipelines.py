"""Tiny random pipelines, as strangers would have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raydmd.models.untrained import write

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ("a", "cat", "dog", "runs", "jumps")


def wan_pipeline(folder: Path, **settings: Any) -> Path:
    """Write a WanPipeline with random weights and return its folder."""
    return write("wan22", folder, WORDS, **settings)


def sd3_pipeline(folder: Path, *, t5: bool = True, **settings: Any) -> Path:
    """Write a StableDiffusion3Pipeline of 16x16 pixels with random weights, with T5 or without; its folder."""
    return write("sd3", folder, WORDS, with_t5=t5, **settings)
