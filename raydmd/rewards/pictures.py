"""From clips to what an image encoder reads, in torch and where the clip is.

The result is that of transformers' image processors for PIL, which saved pictures go through when a
paper's table is made: 8 bits, and PIL's filter along rows, then columns. Measured against them
(transformers 5.23, Pillow 13.0) where the aspect ratio is kept: one of 255 levels apart in 0.2 % of
the values of white noise, the others equal. Where a resize changes the aspect ratio, Pillow 13 sometimes
filters columns first; what is smooth then differs by one level, white noise by up to 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.image_processing_base import ImageProcessingMixin

from raydmd.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FILTERS = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of resampling filters, to torch's names."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, crop, normalise.

    Attributes:
        size: a number is the length of the shorter edge, a pair is (height, width).
        crop: (height, width) cut from the middle, or ``None``.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        filter: of the resize.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    filter: str = FILTERS[3]

    def __post_init__(self) -> None:
        """Refuse a crop that would reach over the edge."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        if self.crop is not None and (self.crop[0] > height or self.crop[1] > width):
            raise InputError(f"a crop of {self.crop} is larger than the picture, resized to {self.size}")

    @classmethod
    def read(cls, path: str) -> Preprocess:
        """Read the image processor's settings of a folder or hub id; the processor itself isn't needed.

        Raises:
            InputError: if there are none, or they ask for more than resize (bicubic or bilinear), crop and normalise.
        """
        try:
            settings: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(path)[0]
        except (OSError, ValueError) as error:
            raise InputError(f"no image processor's settings can be read from {path!r}: {error}") from None
        # Old files leave out what is true.
        odd = {k: settings[k] for k, v in _FIXED.items() if settings.get(k, v) != v}
        if settings.get("resample", 3) not in FILTERS:
            odd["resample"] = settings["resample"]
        missing = [k for k in ("size", "image_mean", "image_std") if k not in settings]
        if odd or missing:
            raise InputError(f"image processor of {path!r}: not supported {odd}, missing {missing}")
        size = settings["size"]
        crop = settings.get("crop_size") if settings.get("do_center_crop", "crop_size" in settings) else None
        return cls(
            size=_edge(size, path),
            crop=None if crop is None else _pair(crop, path),
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
            filter=FILTERS[settings.get("resample", 3)],
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Prepare pictures.

        Args:
            pixels: ``(N, 3, H, W)`` in [0, 1].

        Returns:
            ``(N, 3, h, w)``, fp32, normalised, on the same device.
        """
        height, width = self._resized(pixels.shape[2], pixels.shape[3])
        levels = _levels(pixels.float() * 255)
        # PIL rounds to 8 bits between the passes too: overshoot is cut twice, and both cuts show.
        levels = _levels(F.interpolate(levels, (pixels.shape[2], width), mode=self.filter, antialias=True))
        levels = _levels(F.interpolate(levels, (height, width), mode=self.filter, antialias=True))
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            levels = levels[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (levels / 255 - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        # The longer edge is rounded down, as transformers does.
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size


def pick_frames(pixels: Tensor, count: int) -> Tensor:
    """Evenly spaced frames of clips: the middles of ``count`` equal parts.

    Args:
        pixels: ``(B, F, 3, H, W)``.
        count: how many; all if there are fewer.

    Returns:
        ``(B, min(count, F), 3, H, W)``.
    """
    there = pixels.shape[1]
    count = min(count, there)
    return pixels[:, [(2 * k + 1) * there // (2 * count) for k in range(count)]]


def _levels(values: Tensor) -> Tensor:
    # Halves go up, as in PIL; torch's round takes them to the even neighbour.
    return values.clamp(0, 255).add(0.5).floor()


def _edge(size: int | dict[str, int], path: str) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    return size["shortest_edge"] if size.keys() == {"shortest_edge"} else _pair(size, path)


def _pair(size: int | dict[str, int], path: str) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if size.keys() != {"height", "width"}:
        raise InputError(f"image processor of {path!r}: a size of {size} is not supported")
    return size["height"], size["width"]
