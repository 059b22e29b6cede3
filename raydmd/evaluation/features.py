"""Image features of pretrained transformers, for distances and diversity: DINO, CLIP and their kin.

Pictures are prepared in torch on their device, from what the model's folder says of itself: transformers' own fast
preprocessing would need torchvision. What features are for is the callers' business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from raydmd.errors import InputError
from raydmd.rewards.pictures import Preprocess

if TYPE_CHECKING:
    from pathlib import Path

Pooling = Literal["pooled", "tokens", "cls", "projection"]
"""What of a model's output is the feature: ``pooled``, its ``pooler_output``, else the mean of its
tokens (DINO in DP-DMD's test); ``tokens``, their mean; ``cls``, the first of the last hidden state (CLIP
in DP-DMD's test); ``projection``, CLIP's image embedding."""


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
        self, network: nn.Module, preparation: Preprocess, pooling: Pooling, projection: nn.Module | None = None
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
    features = ImageFeatures(network, Preprocess.read(str(source)), pooling, projection)
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
        model, info = loader.from_pretrained(
            source, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"no {loader.__name__} can be read from {source}: {error}") from None
    lacking = sorted(name for name in info["missing_keys"] if not name.startswith(unused))
    if lacking:
        raise InputError(f"{source} lacks weights of {type(model).__name__}, which would be random: {lacking[:3]}")
    return model.eval()


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
