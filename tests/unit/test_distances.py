"""Distances and the Vendi score against closed forms, brute force and torchmetrics itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from raydmd.errors import InputError, NonFiniteError
from raydmd.evaluation import distances
from raydmd.evaluation.distances import embed, frechet, precision_recall, vendi, vendi_of_kernel

pytestmark = pytest.mark.unit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Means(nn.Module):
    """A feature network: mean colours of all frames and of the first."""

    num_features = 6

    def forward(self, clips: Tensor) -> Tensor:
        return torch.cat([clips.mean((1, 3, 4)), clips[:, 0].mean((2, 3))], 1)


def test_frechet_of_a_mean_shift_is_its_square() -> None:
    features = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    assert frechet(features, features + shift) == pytest.approx(25.0, abs=1e-3)
    assert frechet(features, features) == pytest.approx(0.0, abs=1e-3)


def test_frechet_of_a_scaled_gaussian_is_its_closed_form() -> None:
    features = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    features = features - features.mean(0)
    trace = float(features.T.cov().trace())
    assert frechet(features, 3 * features) == pytest.approx((3 - 1) ** 2 * trace, rel=1e-4)


@pytest.mark.parametrize(("a", "b"), [((1, 3), (9, 3)), ((9, 3), (9, 4)), ((9,), (9,))])
def test_frechet_refuses_what_has_no_covariance(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        frechet(torch.zeros(a), torch.zeros(b))


def test_frechet_of_embedded_clips_is_torchmetrics_with_the_network_inside() -> None:
    real, made = normal(40, 2, 3, 4, 4).sigmoid(), normal(30, 2, 3, 4, 4, seed=1).sigmoid().square()
    metric = FrechetInceptionDistance(feature=Means()).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    ours = frechet(embed(Means(), real.double(), batch=7), embed(Means(), made.double()))
    assert ours > 0.01
    assert ours == pytest.approx(float(metric.compute()), rel=1e-9)


def test_embedding_in_parts_changes_nothing_and_takes_no_gradients() -> None:
    clips = normal(10, 2, 3, 4, 4).requires_grad_()
    whole = embed(Means(), clips)
    assert torch.equal(whole, embed(Means(), [clips[:3], clips[3:]], batch=2))
    assert whole.dtype is torch.float64
    assert not whole.requires_grad


def test_embedding_names_what_is_wrong() -> None:
    clips = normal(5, 1, 3, 4, 4)
    clips[3, 0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="clip 3"):
        embed(Means(), clips, batch=2)
    with pytest.raises(InputError, match="one row per clip"):
        embed(lambda part: part.mean((0, 1))[None].flatten(1), clips)
    with pytest.raises(InputError, match="no clips"):
        embed(Means(), [])


def brute_share(queries: Tensor, anchors: Tensor, k: int) -> float:
    """Eq. 1 and 2 of arXiv:1904.06991, point by point."""
    inside = 0
    for query in queries.tolist():
        for index, anchor in enumerate(anchors.tolist()):
            others = sorted(math.dist(anchor, other) for j, other in enumerate(anchors.tolist()) if j != index)
            if math.dist(query, anchor) <= others[k - 1]:
                inside += 1
                break
    return inside / len(queries)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [7, 2**24])
def test_precision_and_recall_are_brute_force(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK", block)
    real, made = normal(30, 3).double(), 0.7 * normal(24, 3, seed=1).double() + 0.6
    found = precision_recall(real, made, neighbours=k)
    assert found.precision == pytest.approx(brute_share(made, real, k))
    assert found.recall == pytest.approx(brute_share(real, made, k))
    assert found.precision != found.recall


def test_a_collapsed_student_is_precise_and_recalls_nothing() -> None:
    real = 100 + normal(50, 40)
    found = precision_recall(real, real[:1].expand(20, -1))
    assert found.precision == 1.0
    assert found.recall == 1 / 50  # its balls have no size, and one real sample is their centre
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1e3) == (0.0, 0.0)


def test_equal_points_are_at_distance_zero() -> None:
    points = 100 + normal(50, 40).double()
    assert distances._distances(points, points.clone()).diagonal().tolist() == [0.0] * 50


def test_precision_and_recall_refuse_too_few() -> None:
    with pytest.raises(InputError, match="at least 4"):
        precision_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(InputError, match="neighbours"):
        precision_recall(normal(9, 2), normal(9, 2), neighbours=0)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("modes", [1, 2, 5])
def test_vendi_counts_orthogonal_modes(modes: int, copies: int) -> None:
    features = 7 * torch.eye(8)[:modes].repeat(copies, 1)
    assert vendi(features) == pytest.approx(modes)
    assert vendi_of_kernel(torch.eye(8)[:modes].repeat(copies, 1) @ torch.eye(8)[:modes].repeat(copies, 1).T) == (
        pytest.approx(modes)
    )


def test_vendi_of_two_is_the_closed_form() -> None:
    for cosine in (0.0, 0.3, 0.9):
        shares = [(1 + cosine) / 2, (1 - cosine) / 2]
        expected = math.exp(-sum(s * math.log(s) for s in shares))
        assert vendi_of_kernel(torch.tensor([[1, cosine], [cosine, 1]])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_vendi_of_features_is_that_of_their_kernel(shape: tuple[int, int]) -> None:
    features = normal(*shape).double()
    kernel = torch.tensor(
        [[float(torch.cosine_similarity(a, b, dim=0)) for b in features] for a in features], dtype=torch.float64
    )
    assert vendi(features) == pytest.approx(vendi_of_kernel(kernel), rel=1e-9)


@pytest.mark.parametrize(
    ("kernel", "word"),
    [
        (torch.ones(2, 3), "N, N"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        (2 * torch.eye(2), "diagonal"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "semi-definite"),
    ],
)
def test_vendi_refuses_what_is_no_kernel(kernel: Tensor, word: str) -> None:
    with pytest.raises(InputError, match=word):
        vendi_of_kernel(kernel)


def test_a_vendi_score_of_nothing_is_an_error() -> None:
    for shape in [(0, 3), (3,)]:
        with pytest.raises(InputError):
            vendi(torch.zeros(shape))
