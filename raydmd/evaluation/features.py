"""Image features of pretrained transformers, for distances and diversity: DINO, CLIP and their kin.

Pictures are prepared in torch on their device, from what the model's folder says of itself
(``preprocessor_config.json``): transformers' own fast preprocessing would need torchvision. This module
owns loading and preparing; what features are for is the callers' business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Pooling = Literal["pooled", "tokens", "cls", "projection"]
"""What of a model's output is the feature: ``pooled``, its ``pooler_output``, else the mean of its
tokens (DINO in DP-DMD's test); ``tokens``, their mean; ``cls``, the first of the last hidden state (CLIP
in DP-DMD's test); ``projection``, CLIP's image embedding."""

_MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of resampling filters, which configs use, to torch's names."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a network wants its pictures.

    Attributes:
        height: pixels after resizing; ``None`` scales the shorter side to ``shortest``.
        width: as ``height``.
        shortest: pixels of the shorter side after resizing, where the aspect ratio is kept.
        crop: height and width of the centre that is cut out after resizing, or ``None``.
        mean: subtracted, per channel.
        std: divided by, per channel.
        mode: resampling filter.
    """

    height: int | None = None
    width: int | None = None
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    mode: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Resize with antialiasing, cut the centre out and normalise; differentiable.

        Args:
            images: ``(B, 3, H, W)`` in [0, 1].

        Returns:
            ``(B, 3, H', W')``, float32.

        Raises:
            InputError: if the crop is larger than the resized picture.
        """
        images = images.float()
        size = self._size(images.shape[-2], images.shape[-1])
        # Cubic interpolation overshoots. Pillow, with which these networks were trained, resizes the width,
        # clips, resizes the height, and clips again.
        for target in ((images.shape[-2], size[1]), size):
            if target != tuple(images.shape[-2:]):
                images = F.interpolate(images, target, mode=self.mode, align_corners=False, antialias=True)
                images = images.clamp(0, 1)
        if self.crop is not None:
            if self.crop[0] > size[0] or self.crop[1] > size[1]:
                raise InputError(f"a crop of {self.crop} does not fit into pictures resized to {size}")
            top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.height is not None and self.width is not None:
            return self.height, self.width
        if self.shortest is None:
            return height, width
        # As transformers does it: the longer side is cut down, not rounded.
        if height <= width:
            return self.shortest, int(self.shortest * width / height)
        return int(self.shortest * height / width), self.shortest


class ImageFeatures(nn.Module):
    """A pretrained image network with its preparation; a clip's feature is the mean of its frames'.

    The mean over frames is this project's reading: the papers take features of images.

    Args:
        network: a transformers vision model.
        preparation: of its pictures.
        pooling: what of its output is the feature.
        projection: from the pooled output to CLIP's embedding; for ``projection`` only.
    """

    def __init__(
        self, network: nn.Module, preparation: Preparation, pooling: Pooling, projection: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.preparation = preparation
        self.pooling: Pooling = pooling
        self.projection = projection

    def forward(self, clips: Tensor) -> Tensor:
        """Features of clips; frames are prepared on the network's device.

        Args:
            clips: ``(B, F, 3, H, W)`` in [0, 1].

        Returns:
            ``(B, D)``, float32, not normalised.

        Raises:
            InputError: if the clips have another shape.
        """
        frames, shape = _frames(clips)
        parameter = next(self.network.parameters())
        pixels = self.preparation(frames.to(parameter.device)).to(parameter.dtype)
        found = _pool(self.network(pixel_values=pixels), self.pooling)
        if self.projection is not None:
            found = self.projection(found)
        found = found.float()
        return found.view(*shape, -1).mean(1)


def load_features(
    source: str | Path, pooling: Pooling, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ImageFeatures:
    """A pretrained image network, frozen.

    Args:
        source: a folder or a name on the Hugging Face hub, e.g. ``facebook/dinov2-base``.
        pooling: what of its output is the feature; see ``Pooling``.
        device: where it runs.
        dtype: of its weights.

    Returns:
        The network with the preparation that its folder states.

    Raises:
        InputError: if it cannot be read, or lacks weights that the feature needs.
    """
    from transformers import AutoModel, CLIPModel

    # Not CLIPVisionModelWithProjection: of LAION's CLIPs the towers' own configs state another width.
    loader = CLIPModel if pooling == "projection" else AutoModel
    network = read_pretrained(loader, source, dtype=dtype, unused=("pooler.",) if pooling in ("tokens", "cls") else ())
    projection = network.visual_projection if pooling == "projection" else None
    if "vision_config" in network.config.to_dict():
        network = network.vision_model  # a model of two towers, such as CLIP
    features = ImageFeatures(network, read_preparation(source), pooling, projection)
    return features.to(device).eval().requires_grad_(False)


def read_pretrained(loader: Any, source: str | Path, *, dtype: torch.dtype, unused: tuple[str, ...] = ()) -> Any:
    """A model from a folder or the hub, refused if any of its weights would be random.

    Args:
        loader: a transformers class with ``from_pretrained``.
        source: a folder or a hub name.
        dtype: of its weights.
        unused: beginnings of the names of weights that may lack.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: if it cannot be read or lacks weights.
    """
    try:
        model, info = loader.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"no {loader.__name__} can be read from {source}: {error}") from None
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith(unused))
    if lacking:
        raise InputError(f"{source} lacks weights of {type(model).__name__}, which would be random: {lacking[:3]}")
    return model.eval()


def read_preparation(source: str | Path) -> Preparation:
    """How a model's folder wants its pictures, from ``preprocessor_config.json``.

    Args:
        source: a folder or a hub name.

    Raises:
        InputError: if the file is missing or asks for what is not known here.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError) as error:
        raise InputError(f"no preprocessor_config.json can be read from {source}: {error}") from None
    return preparation(config)


def preparation(config: Mapping[str, Any]) -> Preparation:
    """A preparation from the contents of ``preprocessor_config.json``.

    Args:
        config: as transformers writes it.

    Raises:
        InputError: if it asks for a size, filter or scale that is not known here.
    """
    factor = config.get("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise InputError(f"only a rescale_factor of 1/255 is known, the config asks for {factor}")
    size, crop = config.get("size") or {}, config.get("crop_size")
    if isinstance(size, int):  # old configs
        size = {"shortest_edge": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    mode = _MODES.get(config.get("resample", 3))
    if mode is None or not (size.keys() == {"shortest_edge"} or size.keys() == {"height", "width"}):
        raise InputError(
            "a preparation must resize to 'shortest_edge' or 'height' and 'width' by filter 2 or 3, "
            f"the config asks for size={size} and resample={config.get('resample')}"
        )
    resizes, normalises = config.get("do_resize", True), config.get("do_normalize", True)
    return Preparation(
        height=size.get("height") if resizes else None,
        width=size.get("width") if resizes else None,
        shortest=size.get("shortest_edge") if resizes else None,
        crop=(crop["height"], crop["width"]) if crop and config.get("do_center_crop", False) else None,
        mean=_triple(config["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        std=_triple(config["image_std"]) if normalises else (1.0, 1.0, 1.0),
        mode=mode,
    )


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _frames(clips: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """All frames ``(B * F, 3, H, W)`` of clips, and ``(B, F)``."""
    if clips.ndim != 5 or clips.shape[2] != 3:
        raise InputError(f"clips must be (B, F, 3, H, W), given {tuple(clips.shape)}")
    return clips.flatten(0, 1), (clips.shape[0], clips.shape[1])


def _pool(output: Any, pooling: Pooling) -> Tensor:
    tokens: Tensor = output.last_hidden_state
    if pooling == "cls":
        return tokens[:, 0]
    pooled: Tensor | None = output.get("pooler_output")
    return tokens.mean(1) if pooling == "tokens" or pooled is None else pooled
