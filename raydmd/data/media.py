"""Images and videos as pixels: which files there are, whether they will do, and what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from raydmd.models.base import Shape

Kind = Literal["image", "video", "latents"]
EXTENSIONS: dict[str, Kind] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "image"),
    **dict.fromkeys((".mp4", ".mov", ".webm", ".mkv", ".avi"), "video"),
    ".safetensors": "latents",
}
LATENTS = "latents"
"""The tensor's name in a file of latents."""


def find(data: Path) -> tuple[Kind, list[Path]]:
    """The files of a folder and of all below it, by name, or the one file; all of one kind.

    Raises:
        InputError: if there are none, or several kinds.
    """
    if not data.exists():
        raise InputError(f"method.gan.data: {data} does not exist")
    every = sorted(p for p in data.rglob("*") if p.is_file()) if data.is_dir() else [data]
    files = [p for p in every if p.suffix.lower() in EXTENSIONS]
    if not files:
        raise InputError(f"method.gan.data: {data} holds no files of these kinds: {', '.join(EXTENSIONS)}")
    first = {EXTENSIONS[p.suffix.lower()]: p for p in reversed(files)}
    if len(first) > 1:
        examples = ", ".join(f"{kind} ({file.name})" for kind, file in sorted(first.items()))
        raise InputError(f"method.gan.data: {data} mixes kinds of files: {examples}; give each run one kind")
    return next(iter(first)), files


def check(kind: Kind, files: Sequence[Path], shape: Shape) -> list[int]:
    """Look into every file's head.

    Returns:
        How many samples each holds.

    Raises:
        InputError: naming the files that can't be read or don't fit the sample's shape.
    """
    if kind == "image" and shape.frames > 1:
        raise InputError(
            f"method.gan.data holds images, but samples are clips of {shape.frames} frames; give videos or latents"
        )
    counts, bad = [], []
    looks: dict[Kind, Callable[[Path, Shape], int]] = {
        "image": _look_at_image,
        "video": _look_at_video,
        "latents": _look_at_latents,
    }
    for file in files:
        try:
            counts.append(looks[kind](file, shape))
        except ValueError as error:
            bad.append(f"{file} ({error})")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InputError(f"method.gan.data: unfit files: {'; '.join(bad[:5])}{more}")
    return counts


def pixels(kind: Kind, file: Path, shape: Shape) -> Tensor:
    """One sample in [0, 1], ``(frames, 3, H, W)``, fp32: scaled to cover the sample's size, its middle cut out.

    Of a video the first frames are taken, at its own rate.

    Raises:
        InputError: if the file can't be decoded.
    """
    try:
        frames = [_open(file)] if kind == "image" else _frames(file, shape.frames)
    except (ValueError, OSError, SyntaxError) as error:
        raise InputError(f"method.gan.data: {file} can't be decoded: {error}") from None
    size = (shape.width, shape.height)
    fitted = [np.asarray(ImageOps.fit(frame, size, Image.Resampling.BICUBIC)) for frame in frames]
    return torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).float() / 255


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _look_at_image(file: Path, shape: Shape) -> int:
    try:
        with Image.open(file) as image:
            _large_enough(*image.size, shape)
            image.verify()
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise ValueError(f"no readable image: {error}") from None
    return 1


def _look_at_video(file: Path, shape: Shape) -> int:
    frames = _frames(file, 1)
    _large_enough(*frames[0].size, shape)
    _frames(file, shape.frames)
    return 1


def _look_at_latents(file: Path, shape: Shape) -> int:
    try:
        with safe_open(file, framework="pt") as f:
            found = list(f.keys())
            if LATENTS not in found:
                raise ValueError(f"has no tensor {LATENTS!r}, but {found[:3]}")
            size = tuple(f.get_slice(LATENTS).get_shape())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"no readable safetensors: {error}") from None
    if len(size) != 1 + len(shape.latent) or size[1:] != shape.latent or not size[0]:
        raise ValueError(f"latents are {size}, not (N, {', '.join(map(str, shape.latent))}) with N above 0")
    return int(size[0])


def _large_enough(width: int, height: int, shape: Shape) -> None:
    if width < shape.width or height < shape.height:
        raise ValueError(f"{width} x {height} pixels, samples have {shape.width} x {shape.height}")


def _frames(file: Path, count: int) -> list[Image.Image]:
    """The first frames of a video.

    Raises:
        ValueError: if it has fewer.
    """
    import cv2  # heavy, and no other data needs it

    capture = cv2.VideoCapture(str(file))
    try:
        found: list[Image.Image] = []
        while len(found) < count:
            there, frame = capture.read()
            if not there:
                break
            found.append(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
    finally:
        capture.release()
    if not found:
        raise ValueError("no readable video")
    if len(found) < count:
        raise ValueError(f"{len(found)} frames, samples have {count}")
    return found
