"""The networks and rewards that an evaluation measures with, beside a zoo model's judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from raydmd.evaluation.distances import embed, frechet, precision_recall, vendi
from raydmd.evaluation.diversity import distance_diversity, pairwise_diversity
from raydmd.evaluation.features import ImageFeatures, load_features
from raydmd.evaluation.table import LPIPS, NETWORKS, REWARD, named
from raydmd.rewards.build import load

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from raydmd.evaluation.perceptual import Lpips
    from raydmd.evaluation.samples import Samples
    from raydmd.evaluation.table import Column
    from raydmd.recipe_evaluation import Evaluation as Settings
    from raydmd.rewards.base import Reward

AT_ONCE = 16
"""Clips in one forward."""
LEAST = 5
"""Clips below which precision and recall, by third neighbours, say nothing."""


@dataclass
class Instruments:
    """Measures samplers one after another, the reference first.

    Attributes:
        networks: for features, by name.
        rewards: held out, by name.
        lpips: distance between pictures.
        device: of all of them.
    """

    networks: dict[str, ImageFeatures] = field(default_factory=dict)
    rewards: dict[str, Reward] = field(default_factory=dict)
    lpips: Lpips | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _reference: dict[str, Tensor] = field(default_factory=dict)

    def columns(self) -> tuple[Column, ...]:
        """What :meth:`measure` finds."""
        found = [named(column, name) for name in self.networks for column in NETWORKS]
        if self.lpips is not None:
            found.append(LPIPS)
        return (*found, *(named(REWARD, n) for n in self.rewards))

    def measure(self, samples: Samples) -> dict[str, float | None]:
        """Figures of one sampler; the first one measured is the reference of all.

        Raises:
            InputError: or RewardError or NonFiniteError, naming network or reward and the sample.
        """
        row: dict[str, float | None] = {}
        for name, network in self.networks.items():
            features = embed(network, samples.clips, batch=AT_ONCE)
            reference = self._reference.setdefault(name, features)
            many = min(len(features), len(reference))
            row[f"frechet_{name}"] = frechet(reference, features) if many > 1 else None
            row[f"diversity_{name}"] = pairwise_diversity(features, samples.prompts)
            overlap = precision_recall(reference, features) if many >= LEAST else None
            row[f"precision_{name}"] = overlap.precision if overlap else None
            row[f"recall_{name}"] = overlap.recall if overlap else None
            row[f"vendi_{name}"] = vendi(features)
        if self.lpips is not None:
            row["diversity_lpips"] = distance_diversity(samples.clips.to(self.device), samples.prompts, self.lpips)
        rows = range(len(samples))
        for name, reward in self.rewards.items():
            parts = [rows[i : i + AT_ONCE] for i in rows[::AT_ONCE]]
            found = [
                reward.score(samples.clips[p.start : p.stop], samples.prompts[p.start : p.stop], p).cpu() for p in parts
            ]
            row[f"reward_{name}"] = float(torch.cat(found).double().mean())
        return row


def load_instruments(settings: Settings, *, judge: Path | None, device: torch.device) -> Instruments:
    """What an evaluation's settings name, frozen, on a device.

    Args:
        settings: the recipe's ``evaluation`` section.
        judge: for a zoo reward without a path.
        device: where.

    Raises:
        InputError: if one is missing, damaged or of another class.
    """
    rewards: dict[str, Reward] = {}
    for i, spec in enumerate(settings.rewards):
        alike = sum(other.kind == spec.kind for other in settings.rewards[:i])
        rewards[f"{spec.kind}_{alike + 1}" if alike else spec.kind] = load(spec, judge=judge, device=device)
    lpips: Lpips | None = None
    if settings.lpips:
        from raydmd.evaluation.perceptual import load_lpips

        lpips = load_lpips("vgg", weights=settings.lpips.weights).to(device)
    networks = {n.name: load_features(n.path, n.pooling, device=device) for n in settings.networks}
    return Instruments(networks, rewards, lpips, device)
