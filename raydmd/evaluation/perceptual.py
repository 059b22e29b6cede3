"""Perceptual distances of image pairs, differentiable: LPIPS (arXiv:1801.03924) and SSIM.

LPIPS needs a backbone trained on ImageNet and linear heads trained on people's judgements. The heads,
a few kilobytes, come with torchmetrics, which took them from the ``lpips`` package (v0.1). The
backbones are torchvision's weights in networks built here, for torchvision itself breaks beside a torch
built for another device. Images here lie in [0, 1]; the ``lpips`` package takes [-1, 1].
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

Net = Literal["alex", "vgg"]
"""AlexNet, which LPIPS' authors report with, or VGG16, which DMD's regression loss takes."""

BACKBONES: dict[str, str] = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
"""Where torchvision gets its ImageNet weights from."""

CHANNELS: dict[str, tuple[int, ...]] = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
"""Channels of the layers that are compared."""

_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_LEAST_SIDE = {"alex": 31, "vgg": 16}
"""Smaller pictures shrink to nothing before the last layer."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Learned perceptual distance, eq. 1 of arXiv:1801.03924; frozen, and differentiable in its inputs.

    Args:
        net: which backbone.
        backbone: its layers, as :func:`backbone` makes them.
        heads: one weight of shape ``(1, C, 1, 1)`` per compared layer, see ``CHANNELS``.

    Raises:
        InputError: if the heads do not fit the backbone.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net, backbone: nn.Sequential, heads: Sequence[Tensor]) -> None:
        super().__init__()
        expected = [(1, channels, 1, 1) for channels in CHANNELS[net]]
        if [tuple(head.shape) for head in heads] != expected:
            raise InputError(f"LPIPS' heads for '{net}' must be {expected}, given {[tuple(h.shape) for h in heads]}")
        self.net: Net = net
        self.backbone = backbone
        self.heads = nn.ParameterList([nn.Parameter(head.detach().float()) for head in heads])
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distance of each pair.

        Args:
            first: images ``(B, 3, H, W)`` in [0, 1], sides of at least 31 (alex) or 16 (vgg) pixels.
            second: the same shape.

        Returns:
            ``(B,)``, 0 for equal images.

        Raises:
            InputError: if shapes differ or pictures are too small.
        """
        _check_images(first, second, least=_LEAST_SIDE[self.net])
        total = first.new_zeros(len(first))
        for a, b, head in zip(self._maps(first), self._maps(second), self.heads, strict=True):
            total = total + F.conv2d((a - b).square(), head).mean((1, 2, 3))
        return total

    def _maps(self, images: Tensor) -> list[Tensor]:
        hidden, found = (images * 2 - 1 - self.shift) / self.scale, []
        for index, layer in enumerate(self.backbone):
            hidden = layer(hidden)
            if index in _TAPS[self.net]:
                # The root's gradient is not finite where no channel responds, but the activation before
                # it passes none on there, so the small term can stand where the reference code has it.
                norm = hidden.square().sum(1, keepdim=True).sqrt()
                found.append(hidden / (norm + 1e-10))
        return found


def load_lpips(net: Net = "vgg", *, weights: str | Path | None = None, heads: Path | None = None) -> Lpips:
    """LPIPS with trained weights, on the CPU.

    Args:
        net: which backbone.
        weights: the backbone's, a state dict as torchvision publishes it: a file, or a URL to be
            fetched. Default: what torch hub's cache holds; nothing is fetched then.
        heads: a file as the ``lpips`` package ships it; default: torchmetrics' copy.

    Raises:
        InputError: if weights are absent or do not fit; says where to get them.
    """
    layers = backbone(net)
    state = _backbone_state(net, weights)
    wanted = layers.state_dict()
    # The files hold the classifier too, and the last pooling layer that LPIPS leaves out has no weights.
    found = {key: state[f"features.{key}"] for key in wanted if f"features.{key}" in state}
    if wanted.keys() - found.keys():
        raise InputError(f"the backbone weights {weights or ''} hold no 'features.{min(wanted.keys() - found.keys())}'")
    try:
        layers.load_state_dict(found)
    except RuntimeError as error:
        raise InputError(f"the backbone weights {weights or ''} do not fit '{net}': {error}") from None
    return Lpips(net, layers, load_heads(net, heads))


def load_heads(net: Net, path: Path | None = None) -> list[Tensor]:
    """LPIPS' linear heads, v0.1.

    Args:
        net: for which backbone.
        path: a file as the ``lpips`` package ships it; default: torchmetrics' copy.

    Returns:
        One weight of shape ``(1, C, 1, 1)`` per compared layer.

    Raises:
        InputError: if there is no such file or it holds no heads.
    """
    path = path or Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
    if not path.is_file():
        raise InputError(
            f"LPIPS' linear heads are not at {path}. torchmetrics ships them, as does 'pip install --no-deps lpips' "
            f"(weights/v0.1/{net}.pth); give such a file as 'heads'"
        )
    state = _read(path)
    keys = [f"lin{index}.model.1.weight" for index in range(len(CHANNELS[net]))]
    if not set(keys) <= state.keys():
        raise InputError(f"{path} holds no LPIPS heads for '{net}': {sorted(set(keys) - state.keys())} are missing")
    return [state[key] for key in keys]


def backbone(net: Net) -> nn.Sequential:
    """The convolutional layers of torchvision's AlexNet or VGG16 up to the last that LPIPS compares, random."""
    if net == "alex":
        return nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
    layers: list[nn.Module] = []
    inputs = 3
    for stage, (channels, depth) in enumerate(zip(CHANNELS["vgg"], (2, 2, 3, 3, 3), strict=True)):
        if stage:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
            inputs = channels
    return nn.Sequential(*layers)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of image pairs (Wang et al. 2004), with torchmetrics' defaults; differentiable.

    Args:
        first: images ``(B, 3, H, W)`` in [0, 1], sides of at least 11 pixels, the window's.
        second: the same shape.

    Returns:
        ``(B,)``, at most 1, which equal images have.

    Raises:
        InputError: if shapes differ or pictures are too small.
    """
    _check_images(first, second, least=11)
    found = structural_similarity_index_measure(first, second, data_range=1.0, reduction="none")
    if isinstance(found, tuple):  # only with settings that are not used here
        found = found[0]
    return found.reshape(len(first))


def _check_images(first: Tensor, second: Tensor, *, least: int) -> None:
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3:
        raise InputError(f"images must be two of (B, 3, H, W), given {tuple(first.shape)} and {tuple(second.shape)}")
    if min(first.shape[-2:]) < least:
        raise InputError(f"images must have sides of at least {least} pixels, given {tuple(first.shape[-2:])}")


def _backbone_state(net: Net, weights: str | Path | None) -> dict[str, Any]:
    url = BACKBONES[net]
    if isinstance(weights, str) and weights.startswith(("https://", "http://", "file://")):
        try:
            fetched: dict[str, Any] = torch.hub.load_state_dict_from_url(
                weights, map_location="cpu", weights_only=True, progress=False
            )
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(f"the backbone weights cannot be fetched from {weights}: {error}") from None
        return fetched
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        raise InputError(f"LPIPS' backbone is not at {path}. Give a file with the weights of {url}, or that URL")
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"no weights can be read from {path}: {error}") from None
    return state
