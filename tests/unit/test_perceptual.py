"""LPIPS and SSIM: against definitions written out here, with random backbones and real or all-ones heads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raydmd.errors import InputError
from raydmd.evaluation.perceptual import CHANNELS, Lpips, Net, backbone, load_heads, load_lpips, ssim

pytestmark = pytest.mark.unit

NETS: list[Net] = ["alex", "vgg"]


def images(count: int = 2, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def random_lpips(net: Net, heads: list[Tensor] | None = None) -> Lpips:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = backbone(net)
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):  # as made, the deep maps are nearly the same for all pictures
            layer.weight.data.mul_(6**0.5)
    return Lpips(net, layers, heads or [torch.ones(1, c, 1, 1) for c in CHANNELS[net]])


@pytest.mark.parametrize("net", NETS)
def test_lpips_with_heads_of_one_is_the_squared_distance_of_normalised_maps(net: Net) -> None:
    lpips, (a, b) = random_lpips(net), (images(), images(seed=1))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    total = torch.zeros(2)
    # LPIPS' constants for [-1, 1] are ImageNet's for [0, 1].
    x, y = ((i - mean.view(3, 1, 1)) / std.view(3, 1, 1) for i in (a, b))
    for layer, following in zip(lpips.backbone, [*list(lpips.backbone)[1:], None], strict=True):
        x, y = layer(x), layer(y)
        last_of_stage = net == "alex" or following is None or isinstance(following, torch.nn.MaxPool2d)
        if isinstance(layer, torch.nn.ReLU) and last_of_stage:
            total += (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean((1, 2))
    assert total.min() > 0.01
    torch.testing.assert_close(lpips(a, b), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
def test_lpips_is_a_distance_with_the_shipped_heads(net: Net) -> None:
    lpips, (a, b) = random_lpips(net, load_heads(net)), (images(), images(seed=1))
    assert lpips(a, a).tolist() == [0.0, 0.0]
    torch.testing.assert_close(lpips(a, b), lpips(b, a))
    near = lpips(a, (a + 0.1 * b).clamp(0, 1))
    assert (near < lpips(a, b)).all()
    assert (near > 0).all()
    torch.testing.assert_close(lpips(a, b)[1:], lpips(a[1:], b[1:]))


def test_lpips_is_differentiable_in_pictures_and_in_nothing_else() -> None:
    lpips, target = random_lpips("vgg"), images(1, side=16)
    start = images(1, side=16, seed=1).requires_grad_()
    before = lpips(start, target).sum()
    (gradient,) = torch.autograd.grad(before, start)
    after = lpips((start - 1e-2 * gradient / gradient.norm()).detach(), target).sum()
    assert after < before
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_has_finite_gradients_where_no_channel_responds() -> None:
    lpips = random_lpips("alex")
    first = lpips.backbone[0]
    assert isinstance(first, torch.nn.Conv2d)
    assert first.bias is not None
    first.weight.data.zero_()
    first.bias.data.fill_(-1.0)  # all of the first layer's responses are 0
    picture = images(1).requires_grad_()
    lpips(picture, images(1, seed=1)).sum().backward()
    assert picture.grad is not None
    assert bool(picture.grad.isfinite().all())


@pytest.mark.parametrize("net", NETS)
def test_weights_come_from_a_file_of_torchvision_s_form(net: Net, tmp_path: Path) -> None:
    made = random_lpips(net, load_heads(net))
    state = {f"features.{k}": v for k, v in made.backbone.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "net.pth")
    for weights in (tmp_path / "net.pth", (tmp_path / "net.pth").as_uri()):
        again = load_lpips(net, weights=weights if isinstance(weights, Path) else str(weights))
        assert torch.equal(again(images(), images(seed=1)), made(images(), images(seed=1)))


@pytest.fixture(autouse=True)
def _own_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_absent_or_wrong_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"checkpoints/alexnet-owt-7be5be79.pth.*https://download"):
        load_lpips("alex")
    with pytest.raises(InputError, match=r"none\.pth"):
        load_lpips("alex", weights=tmp_path / "none.pth")
    with pytest.raises(InputError, match="fetched"):
        load_lpips("alex", weights=(tmp_path / "none.pth").as_uri())
    torch.save({f"features.{k}": v for k, v in backbone("alex").state_dict().items()}, tmp_path / "alex.pth")
    with pytest.raises(InputError, match=r"hold no 'features\.12\.bias'"):
        load_lpips("vgg", weights=tmp_path / "alex.pth")
    state = torch.load(tmp_path / "alex.pth", weights_only=True)
    torch.save(state | {"features.3.bias": torch.zeros(5)}, tmp_path / "wide.pth")
    with pytest.raises(InputError, match="do not fit 'alex'"):
        load_lpips("alex", weights=tmp_path / "wide.pth")
    with pytest.raises(InputError, match="heads"):
        load_lpips("alex", weights=tmp_path / "alex.pth", heads=tmp_path / "heads.pth")
    with pytest.raises(InputError, match="holds no LPIPS heads"):
        load_heads("alex", tmp_path / "alex.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="broken"):
        load_heads("alex", tmp_path / "broken.pth")
    with pytest.raises(InputError, match="'vgg' must be"):
        Lpips("vgg", backbone("vgg"), load_heads("alex"))


def test_pictures_that_are_too_small_or_unequal_are_refused() -> None:
    lpips = random_lpips("alex")
    assert lpips(images(side=31), images(side=31, seed=1)).shape == (2,)
    with pytest.raises(InputError, match="at least 31"):
        lpips(images(side=30), images(side=30))
    with pytest.raises(InputError, match="two of"):
        lpips(images(side=32), images(side=40))


@pytest.mark.parametrize("net", NETS)
def test_heads_are_those_of_the_lpips_package(net: Net) -> None:
    pytest.importorskip("lpips")
    spec = importlib.util.find_spec("lpips")
    assert spec is not None
    assert spec.origin is not None
    theirs = load_heads(net, Path(spec.origin).parent / "weights" / "v0.1" / f"{net}.pth")
    for ours, their in zip(load_heads(net), theirs, strict=True):
        assert torch.equal(ours, their)


def test_ssim_is_one_for_equals_and_the_closed_form_for_flat_pictures() -> None:
    a = images()
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    assert (ssim(a, images(seed=1)) < 0.3).all()
    dark, bright = torch.full((1, 3, 16, 16), 0.02), torch.full((1, 3, 16, 16), 0.08)
    luminance = (2 * 0.02 * 0.08 + 1e-4) / (0.02**2 + 0.08**2 + 1e-4)  # contrast and structure are 1
    assert float(ssim(dark, bright)) == pytest.approx(luminance, rel=1e-3)
    start = images(1, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(ssim(start, images(1)).sum(), start)
    assert ssim((start + 1e-2 * gradient / gradient.norm()).detach(), images(1)) > ssim(start, images(1))
    with pytest.raises(InputError, match="at least 11"):
        ssim(images(side=10), images(side=10))
