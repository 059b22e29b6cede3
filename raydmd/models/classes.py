"""Prompts of class-conditional networks: numbers of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from raydmd.errors import InputError
from raydmd.models.base import Conditions

if TYPE_CHECKING:
    from collections.abc import Sequence


def class_rows(texts: Sequence[str], *, classes: int, none: int, path: str) -> Conditions:
    """A condition table of class numbers, ``(1 + N, 1, 1)``.

    Args:
        texts: the negative prompt, which is not read, and N class numbers.
        classes: how many there are.
        none: the class in the negative prompt's place.
        path: of the pipeline, for messages.

    Raises:
        InputError: if a text is no class.
    """
    labels = [none]
    for text in texts[1:]:
        if not text.strip().isdecimal() or int(text) >= classes:
            raise InputError(f"prompt {text!r} is no class of {path!r}, which has 0 to {classes - 1}")
        labels.append(int(text))
    return Conditions(embeds=torch.tensor(labels, dtype=torch.float32).view(-1, 1, 1))


def labels_of(cond: Conditions) -> torch.Tensor:
    """The class numbers ``(B,)`` of rows of such a table."""
    return cond.embeds[:, 0, 0].long()
