"""The zoo's video world: coloured Fashion-MNIST items that move, with captions that leave words out.

A clip is 9 RGB frames of 32x32 pixels, values in [-0.8, 0.8], background -0.8. It has four
attributes: item, colour, direction, speed. Position, size, the item's instance and a sideways sway
are never captioned. A caption names each attribute with probability ``KEEP``; what it leaves open is
uniform in the data, so the distribution under an open prompt is known exactly.

Captions and items are what this world shares with the one of pictures in :mod:`raydmd.zoo.still`.
Neither knows anything of networks.
"""

from __future__ import annotations

import gzip
import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

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
class Caption(ABC):
    """What a prompt says of a sample; ``None`` leaves an attribute open. A subclass is a world's language.

    Attributes:
        attributes: the world's attributes and their values, in the order of its labels.
        frames: pixel frames of a sample.
    """

    attributes: ClassVar[dict[str, tuple[str, ...]]]
    frames: ClassVar[int]

    item: str | None = None
    colour: str | None = None

    @property
    @abstractmethod
    def text(self) -> str:
        """The prompt; no two captions of a world have the same."""

    @property
    def subject(self) -> list[str]:
        """How a prompt begins, e.g. ``a red sneaker`` or ``something``."""
        return [w for w in ("a", self.colour, self.item or "thing") if w] if self.item or self.colour else ["something"]

    @property
    def stated(self) -> dict[str, str]:
        """The attributes the prompt fixes."""
        return {k: v for k in self.attributes if (v := getattr(self, k)) is not None}

    @property
    def open(self) -> tuple[str, ...]:
        """The attributes the prompt leaves open."""
        return tuple(k for k in self.attributes if getattr(self, k) is None)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a caption back from its text.

        Args:
            text: as :attr:`text` says it.

        Returns:
            The caption.

        Raises:
            ValueError: if the text is none of this world's captions.
        """
        found = cls._by_text().get(text)
        if found is None:
            raise ValueError(f"not a caption of the zoo's world of {'/'.join(cls.attributes)}: {text!r}")
        return found

    @classmethod
    def knows(cls, text: str) -> bool:
        """Whether the text is one of this world's captions."""
        return text in cls._by_text()

    @classmethod
    def every(cls) -> Iterator[Self]:
        """Every caption there is, fully stated to fully open."""
        for values in itertools.product(*[(None, *v) for v in cls.attributes.values()]):
            yield cls(**dict(zip(cls.attributes, values, strict=True)))

    @classmethod
    def draw(cls, count: int, *, seed: int, keep: float = KEEP) -> list[Self]:
        """Draw captions as the training data has them: each attribute stated with probability ``keep``."""
        rng = np.random.default_rng(seed)
        return [
            cls(**{k: str(rng.choice(v)) if rng.random() < keep else None for k, v in cls.attributes.items()})
            for _ in range(count)
        ]

    @classmethod
    @cache
    def _by_text(cls) -> dict[str, Self]:
        return {caption.text: caption for caption in cls.every()}


@dataclass(frozen=True, kw_only=True)
class MovingCaption(Caption):
    """What a prompt says of a clip."""

    attributes = ATTRIBUTES
    frames = FRAMES

    direction: str | None = None
    speed: str | None = None

    @property
    def text(self) -> str:
        """The prompt, e.g. ``a red sneaker moving left fast`` or ``something moving slowly``."""
        motion = [w for w in (self.direction, self.speed) if w]
        return " ".join([*self.subject, *(["moving", *motion] if motion else [])])


class Items(ABC):
    """The items of Fashion-MNIST, and a world that is made of them.

    Args:
        folder: the folder with Fashion-MNIST's IDX files.
        split: ``train`` or ``t10k`` (held-out items).

    Attributes:
        language: the captions of the world.

    Raises:
        FileNotFoundError: if the data set is absent; says how to get it.
    """

    language: ClassVar[type[Caption]]

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

    @abstractmethod
    def clips(self, captions: Sequence[Caption], *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Render one sample per caption; open attributes are drawn uniformly.

        Args:
            captions: of the world's language.
            generator: of everything that is not captioned.

        Returns:
            Pixels in [-0.8, 0.8] as the world's autoencoder reads them, ``(B, 3, 9, 32, 32)`` for clips and
            ``(B, 3, 32, 32)`` for pictures, and the attributes' indices ``(B, 4)``.
        """

    def _cast(self, captions: Sequence[Caption], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Labels ``(B, 4)``, an instance of each caption's item ``(B, 28, 28)``, its colour ``(B, 3)``."""
        attributes = self.language.attributes
        labels = torch.stack(
            [
                torch.tensor(
                    [
                        values.index(getattr(c, name))
                        if getattr(c, name)
                        else int(torch.randint(len(values), (), generator=generator))
                        for name, values in attributes.items()
                    ]
                )
                for c in captions
            ]
        )
        shape, rgb = [], []
        for i, c in labels[:, :2].tolist():
            pool = self._items[ITEMS[i]]
            shape.append(pool[int(torch.randint(len(pool), (), generator=generator))])
            rgb.append(_RGB[COLOURS[c]])
        return labels, torch.stack(shape), torch.tensor(rgb)


def paste(shape: Tensor, centre: Tensor, half_size: Tensor) -> Tensor:
    """Put each item on an empty 32x32 canvas.

    Args:
        shape: items ``(N, 28, 28)`` in [0, 1].
        centre: ``(N, 2)``, pixels right and down from the canvas's middle.
        half_size: ``(N,)``, half the item's side in pixels.

    Returns:
        Brightness ``(N, 1, 32, 32)`` in [0, 1].
    """
    theta = torch.zeros(len(shape), 2, 3)
    zoom = (SIZE / 2) / half_size
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = -centre / (SIZE / 2) * zoom[:, None]
    grid = F.affine_grid(theta, [len(shape), 1, SIZE, SIZE], align_corners=False)
    grey = F.grid_sample(shape[:, None], grid, align_corners=False)
    # A floor under the item's brightness keeps dark garments visible in their colour.
    return torch.where(grey > 0.02, 0.25 + 0.75 * grey, grey)


class World(Items):
    """Renders clips: each item moves."""

    language = MovingCaption

    def clips(self, captions: Sequence[Caption], *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips ``(B, 3, 9, 32, 32)`` and labels; see :meth:`Items.clips`."""
        batch = len(captions)
        labels, shape, rgb = self._cast(captions, generator)
        step = [_STEP[DIRECTIONS[d]] for d in labels[:, 2].tolist()]
        speed = [PIXELS_PER_FRAME[SPEEDS[s]] for s in labels[:, 3].tolist()]
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

        stack, sizes = shape.repeat_interleave(FRAMES, 0), half_size.repeat_interleave(FRAMES)
        grey = paste(stack, centre.flatten(0, 1), sizes).view(batch, 1, FRAMES, SIZE, SIZE)
        clip = grey * rgb[:, :, None, None, None]
        return clip * (2 * LEVEL) - LEVEL, labels


def _read_idx(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        raw = file.read()
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
