"""The zoo's video world: coloured Fashion-MNIST items that move, with captions that leave words out.

A clip is 9 RGB frames of 32x32 pixels, values in [-0.8, 0.8], background -0.8. It has four
attributes: item, colour, direction, speed. Position, size, the item's instance and a sideways sway
are never captioned. A caption names each attribute with probability ``KEEP``; what it leaves open is
uniform in the data, so the distribution under an open prompt is known exactly.

This module owns attributes, captions and rendering. It knows nothing of networks.
"""

from __future__ import annotations

import gzip
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ITEMS = ("shirt", "trouser", "dress", "coat", "sandal", "sneaker", "bag", "boot")
COLOURS = ("red", "green", "blue", "yellow")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "fast")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "item": ITEMS,
    "colour": COLOURS,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
}

FRAMES, SIZE = 9, 32
LEVEL = 0.8
"""Clips are scaled to +-LEVEL: AutoencoderKLWan clamps at +-1 and a clamped pixel has no gradient."""
KEEP = 0.7
PIXELS_PER_FRAME = {"slowly": 0.7, "fast": 1.8}

_FASHION_LABEL = {
    "shirt": 0,
    "trouser": 1,
    "dress": 3,
    "coat": 4,
    "sandal": 5,
    "sneaker": 7,
    "bag": 8,
    "boot": 9,
}
_RGB = {
    "red": (1.0, 0.15, 0.1),
    "green": (0.1, 0.9, 0.2),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (1.0, 0.85, 0.1),
}
_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a prompt says of a clip; ``None`` leaves the attribute open."""

    item: str | None = None
    colour: str | None = None
    direction: str | None = None
    speed: str | None = None

    @property
    def text(self) -> str:
        """The prompt, e.g. ``a red sneaker moving left fast`` or ``something moving slowly``."""
        words = ["a", self.colour, self.item or "thing"] if self.item or self.colour else ["something"]
        if self.direction or self.speed:
            words += ["moving", self.direction, self.speed]
        return " ".join(w for w in words if w)

    @property
    def stated(self) -> dict[str, str]:
        """The attributes the prompt fixes."""
        return {k: v for k in ATTRIBUTES if (v := getattr(self, k)) is not None}

    @property
    def open(self) -> tuple[str, ...]:
        """The attributes the prompt leaves open."""
        return tuple(k for k in ATTRIBUTES if getattr(self, k) is None)


def parse(text: str) -> Caption:
    """Read a caption back from its text.

    Raises:
        ValueError: if the text is none of this world's captions.
    """
    found: dict[str, str] = {}
    for word in text.split():
        for name, values in ATTRIBUTES.items():
            if word in values:
                found[name] = word
    caption = Caption(**found)
    if caption.text != text:
        raise ValueError(f"not a caption of the zoo's world: {text!r} (closest: {caption.text!r})")
    return caption


def is_caption(text: str) -> bool:
    """Whether the text is one of this world's captions."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def all_captions() -> Iterator[Caption]:
    """Every caption there is, fully stated to fully open."""
    for values in itertools.product(*[(None, *v) for v in ATTRIBUTES.values()]):
        yield Caption(**dict(zip(ATTRIBUTES, values, strict=True)))


def sample_captions(count: int, *, seed: int, keep: float = KEEP) -> list[Caption]:
    """Draw captions as the training data has them: each attribute stated with probability ``keep``."""
    rng = np.random.default_rng(seed)
    return [
        Caption(**{k: str(rng.choice(v)) if rng.random() < keep else None for k, v in ATTRIBUTES.items()})
        for _ in range(count)
    ]


class World:
    """Renders clips from the items of Fashion-MNIST.

    Args:
        folder: the folder with Fashion-MNIST's IDX files.
        split: ``train`` or ``t10k`` (held-out items).

    Raises:
        FileNotFoundError: if the data set is absent; says how to get it.
    """

    def __init__(
        self, folder: Path = Path("/usr/share/datasets/fashion-mnist"), split: Literal["train", "t10k"] = "train"
    ) -> None:
        images, labels = (folder / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        if not images.is_file() or not labels.is_file():
            raise FileNotFoundError(
                f"Fashion-MNIST is not in {folder}. Install Debian's package with "
                "'apt-get install dataset-fashion-mnist', or give the folder of the .gz files."
            )
        pixels, targets = _read_idx(images), _read_idx(labels)
        self._items = {
            name: torch.from_numpy(pixels[targets == label]).float().div(255) for name, label in _FASHION_LABEL.items()
        }

    def clips(self, captions: Sequence[Caption], *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Render one clip per caption; open attributes are drawn uniformly.

        Returns:
            Clips of shape ``(B, 3, 9, 32, 32)`` in [-0.8, 0.8], and the attributes' indices ``(B, 4)``.
        """
        batch = len(captions)
        labels = torch.stack(
            [
                torch.tensor(
                    [
                        values.index(getattr(c, name))
                        if getattr(c, name)
                        else int(torch.randint(len(values), (), generator=generator))
                        for name, values in ATTRIBUTES.items()
                    ]
                )
                for c in captions
            ]
        )
        shape, rgb, step, speed = [], [], [], []
        for i, c, d, s in labels.tolist():
            pool = self._items[ITEMS[i]]
            shape.append(pool[int(torch.randint(len(pool), (), generator=generator))])
            rgb.append(_RGB[COLOURS[c]])
            step.append(_STEP[DIRECTIONS[d]])
            speed.append(PIXELS_PER_FRAME[SPEEDS[s]])
        along = torch.tensor(step, dtype=torch.float32)
        across = along.flip(1)
        noise = torch.rand(batch, 5, generator=generator)
        pixels_per_frame = torch.tensor(speed) * (0.9 + 0.2 * noise[:, 0])
        half_size = 8.5 + 1.5 * noise[:, 1]  # the item spans 17 to 20 pixels

        # The path is centred where it starts and ends equally far from the middle, then jittered.
        frame = torch.arange(FRAMES, dtype=torch.float32) - (FRAMES - 1) / 2
        travelled = frame[None] * pixels_per_frame[:, None]
        sway = 1.5 * torch.sin(math.tau * (noise[:, 2:3] + frame[None] / (2 * FRAMES)))
        drift = 3.0 * (torch.stack([noise[:, 3], noise[:, 4]], 1) - 0.5)
        centre = travelled[..., None] * along[:, None] + sway[..., None] * across[:, None] + drift[:, None]

        theta = torch.zeros(batch, FRAMES, 2, 3)
        zoom = (SIZE / 2) / half_size
        theta[..., 0, 0] = theta[..., 1, 1] = zoom[:, None]
        theta[..., :, 2] = -centre / (SIZE / 2) * zoom[:, None, None]
        grid = F.affine_grid(theta.flatten(0, 1), [batch * FRAMES, 1, SIZE, SIZE], align_corners=False)
        stack = torch.stack(shape)[:, None, None].expand(-1, FRAMES, -1, -1, -1).flatten(0, 1)
        grey = F.grid_sample(stack, grid, align_corners=False).view(batch, 1, FRAMES, SIZE, SIZE)
        # A floor under the item's brightness keeps dark garments visible in their colour.
        grey = torch.where(grey > 0.02, 0.25 + 0.75 * grey, grey)
        clip = grey * torch.tensor(rgb)[:, :, None, None, None]
        return clip * (2 * LEVEL) - LEVEL, labels


def _read_idx(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        raw = file.read()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
