"""The zoo's world of pictures: coloured Fashion-MNIST items at a place, in a size.

A picture is RGB, 32x32 pixels, values in [-0.8, 0.8], background -0.8. It has four attributes: item,
colour, place, size. The item's instance and small shifts of place and size are never captioned. Captions
leave attributes open as those of :mod:`raydmd.zoo.world` do, and what they leave open is uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from raydmd.zoo.world import COLOURS, ITEMS, LEVEL, Caption, Items, paste

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZES = ("small", "large")
HALF_SIZE = {"small": 6.2, "large": 9.6}
"""Half an item's side in pixels, give or take half a pixel."""

_OFFSET = 5.5
_CORNER = {"top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1)}


@dataclass(frozen=True, kw_only=True)
class StillCaption(Caption):
    """What a prompt says of a picture."""

    attributes = {"item": ITEMS, "colour": COLOURS, "place": PLACES, "size": SIZES}  # noqa: RUF012  # a ClassVar above
    frames = 1

    place: str | None = None
    size: str | None = None

    @property
    def text(self) -> str:
        """The prompt, e.g. ``a red sneaker top left small`` or ``something large``."""
        return " ".join([*self.subject, *(w for w in (self.place, self.size) if w)])


class StillWorld(Items):
    """Renders pictures."""

    language = StillCaption

    def clips(self, captions: Sequence[Caption], *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures ``(B, 3, 32, 32)`` and labels; see :meth:`raydmd.zoo.world.Items.clips`."""
        labels, shape, rgb = self._cast(captions, generator)
        noise = 2 * torch.rand(len(captions), 3, generator=generator) - 1
        corner = torch.tensor([_CORNER[PLACES[p]] for p in labels[:, 2].tolist()])
        half_size = torch.tensor([HALF_SIZE[SIZES[s]] for s in labels[:, 3].tolist()]) + 0.5 * noise[:, 0]
        grey = paste(shape, _OFFSET * corner + noise[:, 1:], half_size)
        return grey * rgb[:, :, None, None] * (2 * LEVEL) - LEVEL, labels
