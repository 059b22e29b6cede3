"""Distances of two sets of pictures, and the variety of one, in the features of any network.

Pure functions of features ``(N, D)``, which :func:`embed` makes with a network that is passed in: the
zoo's judge, or those of ``features``. This module owns no network and knows no prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from raydmd.errors import InputError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Iterable

Network = Callable[[Tensor], Tensor]
"""Clips ``(B, F, 3, H, W)`` in [0, 1] to features ``(B, D)``."""

_BLOCK = 2**24
"""Distances that are held at once: 128 MiB in float64."""


class Overlap(NamedTuple):
    """How two sets cover each other, both in [0, 1].

    Attributes:
        precision: share of the made samples that lie on the real ones' manifold: quality.
        recall: share of the real samples that lie on the made ones' manifold: variety.
    """

    precision: float
    recall: float


class _Identity(nn.Module):
    """Hands features through where torchmetrics expects a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def embed(network: Network, clips: Tensor | Iterable[Tensor], *, batch: int = 32) -> Tensor:
    """Features of clips, made batch by batch without gradients and kept on the CPU.

    Args:
        network: any feature network.
        clips: ``(N, F, 3, H, W)`` in [0, 1], or an iterable of such for more than memory holds.
        batch: clips per call of the network.

    Returns:
        ``(N, D)``, float64.

    Raises:
        InputError: if there are no clips or the network's output is not one row per clip.
        NonFiniteError: if a feature is NaN or infinite; names the first clip.
    """
    rows: list[Tensor] = []
    for given in [clips] if isinstance(clips, Tensor) else clips:
        for part in torch.split(given, batch):
            with torch.no_grad():
                found = network(part)
            if found.ndim != 2 or len(found) != len(part):
                raise InputError(
                    f"a feature network must return one row per clip, given {len(part)} clips "
                    f"it returned {tuple(found.shape)}"
                )
            rows.append(found.double().cpu())
    if not rows:
        raise InputError("there are no clips to embed")
    features = torch.cat(rows)
    finite = torch.isfinite(features).all(1)
    if not bool(finite.all()):
        raise NonFiniteError(f"the features of clip {int((~finite).nonzero()[0])} are not finite")
    return features


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of two sets of features, each taken as a Gaussian (arXiv:1706.08500, eq. 6).

    With Inception's features it is the FID; papers' values also depend on how pictures were resized.

    Args:
        features_a: ``(N, D)``.
        features_b: ``(M, D)``.

    Returns:
        The squared distance, in squared units of the features, never below 0.

    Raises:
        InputError: if shapes differ or a set has fewer than 2 rows.
    """
    _check_pair(features_a, features_b, least=2)
    metric = FrechetInceptionDistance(feature=_Identity(features_a.shape[1])).to(features_a.device)
    metric.update(features_a.double(), real=True)
    metric.update(features_b.double(), real=False)
    return max(0.0, float(metric.compute()))


def precision_recall(real: Tensor, made: Tensor, *, neighbours: int = 3) -> Overlap:
    """Improved precision and recall (Kynkaanniemi et al., arXiv:1904.06991, eq. 1 and 2).

    A set's manifold is the union of balls around its samples, each as large as the distance to its
    k-th nearest neighbour within the set.

    Args:
        real: ``(N, D)``.
        made: ``(M, D)``; the paper takes as many as real ones, for the balls shrink with the number.
        neighbours: k; the paper's is 3.

    Returns:
        Precision and recall.

    Raises:
        InputError: if shapes differ, or a set has not more than ``neighbours`` rows.
    """
    if neighbours < 1:
        raise InputError(f"neighbours must be at least 1, given {neighbours}")
    _check_pair(real, made, least=neighbours + 1)
    real, made = real.double(), made.double()
    return Overlap(
        precision=_covered(made, real, _radii(real, neighbours)),
        recall=_covered(real, made, _radii(made, neighbours)),
    )


def vendi(features: Tensor) -> float:
    """Vendi score under the cosine kernel: the effective number of different samples.

    Args:
        features: ``(N, D)``; rows are normalised here.

    Returns:
        From 1, all alike, to at most ``min(N, D)``; see :func:`vendi_of_kernel`.

    Raises:
        InputError: if the shape is another.
    """
    if features.ndim != 2 or len(features) == 0:
        raise InputError(f"features must be (N, D), given {tuple(features.shape)}")
    unit = F.normalize(features.double(), dim=1)
    # X X^T and X^T X share their non-zero eigenvalues; the smaller one is enough (section 3 of the paper).
    gram = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit
    return _spectral_count(gram / len(unit))


def vendi_of_kernel(kernel: Tensor) -> float:
    """Vendi score (Friedman & Dieng, arXiv:2210.02410, eq. 2): ``exp(-sum l log l)``, ``l`` the eigenvalues of K / N.

    Args:
        kernel: ``(N, N)``, similarities of N samples, positive semi-definite, 1 on the diagonal.

    Returns:
        The effective number of different samples, in [1, N].

    Raises:
        InputError: if the matrix is no such kernel.
    """
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1] or len(kernel) == 0:
        raise InputError(f"a kernel must be (N, N), given {tuple(kernel.shape)}")
    matrix = kernel.double()
    if not torch.allclose(matrix, matrix.T, atol=1e-6) or not torch.allclose(
        matrix.diagonal(), torch.ones_like(matrix.diagonal()), atol=1e-6
    ):
        raise InputError("a kernel must be symmetric with 1 on its diagonal")
    return _spectral_count(matrix / len(matrix))


def _spectral_count(density: Tensor) -> float:
    values = torch.linalg.eigvalsh(density)
    if float(values[0]) < -1e-6:
        raise InputError(f"a kernel must be positive semi-definite, its least eigenvalue over N is {float(values[0])}")
    return float(torch.special.entr(values.clamp(min=0)).sum().exp())


def _check_pair(features_a: Tensor, features_b: Tensor, *, least: int) -> None:
    if features_a.ndim != 2 or features_a.shape[1:] != features_b.shape[1:]:
        raise InputError(
            f"features must be (N, D) and (M, D), given {tuple(features_a.shape)} and {tuple(features_b.shape)}"
        )
    if min(len(features_a), len(features_b)) < least:
        raise InputError(
            f"this distance needs at least {least} samples on either side, "
            f"given {len(features_a)} and {len(features_b)}"
        )


def _distances(queries: Tensor, anchors: Tensor) -> Tensor:
    # The fast way by a matrix product leaves equal points 1e-8 apart, and a collapsed set's balls have radius 0.
    return torch.cdist(queries, anchors, compute_mode="donot_use_mm_for_euclid_dist")


def _blocks(queries: Tensor, anchors: Tensor) -> tuple[Tensor, ...]:
    return torch.split(queries, max(1, _BLOCK // len(anchors)))


def _radii(anchors: Tensor, neighbours: int) -> Tensor:
    """Distance of each anchor to its k-th nearest neighbour, ``(N,)``."""
    found = []
    for block in _blocks(anchors, anchors):
        nearest = _distances(block, anchors).topk(neighbours + 1, dim=1, largest=False).values
        found.append(nearest[:, neighbours])  # the nearest of all is the point itself
    return torch.cat(found)


def _covered(queries: Tensor, anchors: Tensor, radii: Tensor) -> float:
    inside = [(_distances(block, anchors) <= radii).any(1) for block in _blocks(queries, anchors)]
    return float(torch.cat(inside).double().mean())
