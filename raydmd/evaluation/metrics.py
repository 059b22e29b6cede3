"""Checks against the zoo's known truth, and colours: pure functions of predictions, prompts and pixels.

What a caption of the zoo's world leaves open is uniform in truth (``world``), so coverage is
measured against a known distribution. Groups are small: even uniform draws miss modes in a group of
8. Read coverage beside the teacher's own and beside ``missing_by_chance``.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydmd.evaluation.samples import groups
from raydmd.zoo.world import MovingCaption

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from raydmd.zoo.world import Caption

Table = dict[str, dict[str, float]]
"""Attribute, or ``mean`` over those that were left open, to figures by name."""

SMALLEST_GROUP = 4
"""Clips a prompt needs for its own coverage to count."""


def attribute_accuracy(
    prompts: Sequence[str], predictions: Mapping[str, Tensor], language: type[Caption] = MovingCaption
) -> dict[str, float | None]:
    """How often the stated attributes are there.

    Args:
        prompts: ``N`` prompts; those that are no captions of the zoo's world are left out.
        predictions: indices ``(N,)`` per attribute, see :meth:`Judge.predict`.
        language: the world's captions, see :attr:`Judge.language`.

    Returns:
        Per attribute the share of right clips among those whose prompt states it, and ``joint``,
        the share of clips with all stated attributes right among those that state any. ``None``
        where nothing was stated.
    """
    right: dict[str, list[bool]] = {name: [] for name in (*language.attributes, "joint")}
    for index, prompt in enumerate(prompts):
        if not language.knows(prompt):
            continue
        hits = {
            name: int(predictions[name][index]) == language.attributes[name].index(value)
            for name, value in language.parse(prompt).stated.items()
        }
        for name, hit in hits.items():
            right[name].append(hit)
        if hits:
            right["joint"].append(all(hits.values()))
    return {name: fmean(hits) if hits else None for name, hits in right.items()}


def accuracy_by_stated(
    prompts: Sequence[str], predictions: Mapping[str, Tensor], language: type[Caption] = MovingCaption
) -> dict[int, dict[str, float | None]]:
    """Accuracy by how much a prompt asks for, as GenEval goes from single objects to bound attributes.

    Args:
        prompts: ``N`` prompts; those that are no captions of the zoo's world are left out.
        predictions: indices ``(N,)`` per attribute, see :meth:`Judge.predict`.
        language: the world's captions, see :attr:`Judge.language`.

    Returns:
        For each number of stated attributes from 1 to 4 the figures of :func:`attribute_accuracy`
        over the prompts that state as many; numbers that do not occur are absent.
    """
    found: dict[int, dict[str, float | None]] = {}
    stated = [len(language.parse(prompt).stated) if language.knows(prompt) else 0 for prompt in prompts]
    for count in sorted(set(stated) - {0}):
        rows = [index for index, number in enumerate(stated) if number == count]
        found[count] = attribute_accuracy(
            [prompts[index] for index in rows], {name: values[rows] for name, values in predictions.items()}, language
        )
    return found


def coverage(
    prompts: Sequence[str], predictions: Mapping[str, Tensor], language: type[Caption] = MovingCaption
) -> dict[str, Table]:
    """How what prompts leave open is spread, against the uniform truth.

    Args:
        prompts: ``N`` prompts; those that are no captions of the zoo's world are left out.
        predictions: indices ``(N,)`` per attribute, see :meth:`Judge.predict`.
        language: the world's captions, see :attr:`Judge.language`.

    Returns:
        ``grouped``: averages over groups of at least 4 clips with one prompt; ``pooled``: over all
        clips that leave the attribute open. Each maps attributes, and ``mean``, to

        - ``entropy``: of the histogram over the log of the number of values; 1 is uniform;
        - ``distance``: total variation to uniform; 0 is uniform;
        - ``missing``: share of values that never occur;
        - ``missing_by_chance``: what ``missing`` is on average for uniform draws of that size.

        Attributes that no prompt leaves open are absent.
    """
    known = [i for i, prompt in enumerate(prompts) if language.knows(prompt)]
    texts = [prompts[i] for i in known]
    together = [[known[i] for i in group] for group in groups(texts, least=SMALLEST_GROUP)]
    grouped: Table = {}
    pooled: Table = {}
    for name, values in language.attributes.items():
        found = predictions[name]
        spreads = [
            _spread(found[group], len(values)) for group in together if name in language.parse(prompts[group[0]]).open
        ]
        if spreads:
            grouped[name] = _mean(spreads)
        left_open = [i for i in known if name in language.parse(prompts[i]).open]
        if left_open:
            pooled[name] = _spread(found[left_open], len(values))
    for table in (grouped, pooled):
        if table:
            table["mean"] = _mean(list(table.values()))
    return {"grouped": grouped, "pooled": pooled}


def brightness(clips: Tensor) -> float:
    """Mean pixel value of clips ``(N, F, 3, H, W)`` in [0, 1]."""
    return float(clips.mean(dtype=torch.float64))


def saturation(clips: Tensor) -> float:
    """Mean chroma, largest minus smallest channel, of clips ``(N, F, 3, H, W)`` in [0, 1].

    HSV's saturation divides by the value and is undefined on a black background; this one is not.
    """
    return float((clips.amax(2) - clips.amin(2)).mean(dtype=torch.float64))


def _spread(indices: Tensor, modes: int) -> dict[str, float]:
    counts = torch.bincount(indices.long().cpu(), minlength=modes).double()
    share = counts / counts.sum()
    entropy = float(torch.special.entr(share).sum()) / math.log(modes)
    return {
        "entropy": entropy,
        "distance": float((share - 1 / modes).abs().sum()) / 2,
        "missing": float((counts == 0).double().mean()),
        "missing_by_chance": (1 - 1 / modes) ** len(indices),
    }


def _mean(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(f[name] for f in figures) for name in figures[0]}
