"""Paired regression with a real decoder: gradients through it, checks before the start, runs that resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydmd.errors import InputError
from raydmd.evaluation.perceptual import backbone, load_lpips, ssim
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.places import locate
from raydmd.pairs.make import begin, make_pairs
from raydmd.pairs.manifest import PairsError
from raydmd.pairs.origin import folder_of, origin_of
from raydmd.recipe import Model, Recipe, derive
from raydmd.recipe_regression import Regression
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog, read_lines
from raydmd.training.pairing import check_pairs, distance_of, open_pairs
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker

pytestmark = pytest.mark.local
PROMPTS = ["a red bag moving left fast", "something moving up", "something"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family():
    return load_family(Model())


@pytest.fixture(scope="module")
def teacher(family, tmp_path_factory):
    table = Conditions.read(family.encode(PROMPTS, tmp_path_factory.mktemp("conditions")))
    return LocalClient(TeacherEngine(load_teacher(family, "fp32", device=CPU), table)), table


def recipe(output: Path, pairs: Path, **changes) -> Recipe:
    base = derive(
        Recipe(name="run", output=output, deterministic=True),
        {
            "training": {
                "cycles": 4,
                "batch": 4,
                "fake_updates": 1,
                "precision": "fp32",
                "report_every": 1,
                "student": {"rate": 1e-3, "lora": None},
                "fake": {"rate": 1e-3},
            },
            "checkpoints.every": 1,
            "method": {"name": "dmd", "regression": {"pairs": str(pairs), "loss": "l2", "steps": 3}},
        },
    )
    return derive(base, changes)


@pytest.fixture(scope="module")
def made(family, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "pairs"
    r = recipe(folder.parent, folder)
    folder.mkdir()
    make_pairs(folder, begin(folder, origin_of(r, family, PROMPTS, 10, shard=4), "", PROMPTS), 3, teacher[0], ahead=2)
    return folder


def work(r: Recipe, family, teacher, *, stop_at: int | None = None) -> tuple[Worker, str]:
    r.folder.mkdir(parents=True, exist_ok=True)
    client, table = teacher
    pairing = None
    if prompts := check_pairs(r, family):
        pairing = open_pairs(r, family, family.encode(prompts, r.folder / "conditions"), CPU)
    job = Job(recipe=r, family=family, conditions=table, stop_at=stop_at, pairing=pairing)
    worker = Worker(job, client, FolderSession(r.folder), EventLog(r.folder / "events.jsonl"))
    return worker, worker.run()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], v) for k, v in b.items())


def test_weight_zero_is_dmd2_with_one_step_bit_for_bit(family, teacher, made, tmp_path):
    dmd2 = {"name": "dmd2", "steps": 1}
    plain, _ = work(derive(recipe(tmp_path / "a", made), {"method": dmd2}), family, teacher)
    zero, _ = work(recipe(tmp_path / "b", made, **{"method.regression.weight": 0.0}), family, teacher)
    some, _ = work(recipe(tmp_path / "c", made), family, teacher)
    assert same(plain.state(), zero.state())
    assert not same(plain.state(), some.state())


def test_a_stopped_and_resumed_run_with_resampling_ends_bit_identical(family, teacher, made, tmp_path):
    resample = {"method.regression.resample": 0.7}
    whole, _ = work(recipe(tmp_path / "whole", made, **resample), family, teacher)
    r = recipe(tmp_path / "parts", made, **resample)
    assert work(r, family, teacher, stop_at=1)[1] == work(r, family, teacher, stop_at=3)[1] == "stopped"
    parts, end = work(r, family, teacher)
    assert end == "finished"
    assert [e["event"] for e in read_lines(r.folder / "events.jsonl")].count("resume") == 2
    assert "pairs.errors" in whole.state()
    assert (whole.state()["pairs.errors"] >= 0).any()
    assert same(parts.state(), whole.state())


def test_rendering_is_differentiable_and_decoding_is_its_clamp(family):
    latents = 0.5 * torch.randn(2, *family.shape().latent, generator=torch.Generator().manual_seed(0))
    latents.requires_grad_()
    pixels = family.render(latents)
    assert torch.equal(family.decode(latents), pixels.detach().clamp(0, 1))
    assert not family.decode(latents).requires_grad
    way, probe = (torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in (latents.shape, pixels.shape))
    (gradient,) = torch.autograd.grad((pixels * probe).sum(), latents)
    with torch.no_grad():
        ends = [(family.render(latents + h * way) * probe).double().sum() for h in (1e-3, -1e-3)]
    assert float((gradient * way).sum()) == pytest.approx(float((ends[0] - ends[1]) / 2e-3), rel=2e-2)


def test_picture_losses_are_means_over_frames_of_decoded_clips(family, tmp_path):
    torch.manual_seed(0)
    torch.save({f"features.{k}": v for k, v in backbone("vgg").state_dict().items()}, tmp_path / "vgg.pth")
    weights = str(tmp_path / "vgg.pth")
    x, y = 0.7 * torch.randn(2, 2, *family.shape().latent)
    ours, theirs = family.render(x), family.render(y)
    lpips, kept = load_lpips("vgg", weights=weights), [0, 4, 8]
    found = distance_of(Regression(loss="lpips", weights=weights, side=None, frames=3), family.render, CPU)(x, y)
    expected = torch.stack([lpips(ours[:, k], theirs[:, k]) for k in kept]).mean(0)
    torch.testing.assert_close(found, expected)
    enlarged = distance_of(Regression(loss="lpips", weights=weights, side=48, frames=1), family.render, CPU)
    a, b = (
        torch.nn.functional.interpolate(v[:, 0], size=(48, 48), mode="bilinear", align_corners=False)
        for v in (ours, theirs)
    )
    torch.testing.assert_close(enlarged(x, y), lpips(a, b))
    found = distance_of(Regression(loss="ssim"), family.render, CPU)(x, y)
    torch.testing.assert_close(found, 1 - torch.stack([ssim(ours[:, k], theirs[:, k]) for k in range(9)]).mean(0))
    for settings in (Regression(loss="lpips", weights=weights, side=None, frames=1), Regression(loss="ssim", frames=2)):
        distance, start = distance_of(settings, family.render, CPU), x.clone().requires_grad_()
        before = distance(start, y)
        (gradient,) = torch.autograd.grad(before.sum(), start)
        with torch.no_grad():
            after = distance(start - 0.05 * gradient / gradient.norm(), y)
        assert after.sum() < before.sum()
        torch.testing.assert_close(distance(y, y), torch.zeros(2), atol=1e-5, rtol=0)


def test_pairs_that_do_not_fit_a_run_are_refused_before_it_starts(family, made, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    good = recipe(tmp_path, made)
    assert check_pairs(good, family) == PROMPTS
    assert check_pairs(derive(good, {"seed": 9}), family) == PROMPTS, "pairs of another seed will do"
    for changes, says in (
        ({"method.regression.guidance": 2.0}, "guidance differs: they were made with 4.0, the recipe has 2.0"),
        ({"method.regression.steps": 4}, "steps differs"),
        ({"training.batch": 12}, "10 are too few for a batch of 12"),
        ({"method.regression.batch": 11}, "10 are too few for a batch of 11"),
        ({"method.regression.pairs": str(tmp_path)}, "no noise-image pairs in"),
        ({"method.regression.loss": "lpips"}, r"loss=lpips: .*vgg16.*method\.regression\.weights"),
    ):
        with pytest.raises(InputError, match=says):
            check_pairs(derive(good, changes), family)
    beside = f"pairs-{Path(good.model.path).name}"
    assert folder_of(derive(good, {"method.regression.pairs": None})) == tmp_path / beside
    with pytest.raises(InputError, match=r"method\.regression\.batch=5 does not divide"):
        derive(good, {"method.regression.batch": 5, "placement.workers": 2})
    small = derive(good, {"model": {"frames": 1, "height": 16, "width": 16}})
    with pytest.raises(PairsError, match=r"latent differs: .*\(16, 3, 4, 4\).*\(16, 1, 2, 2\)"):
        check_pairs(small, load_family(small.model))

    other = tmp_path / "other"
    shutil.copytree(locate(Model()).settings.path, other)
    file = other / "transformer_2" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    name = min(state)
    file.unlink()
    save_file({**state, name: state[name] + 1e-3}, file)
    r = derive(good, {"model.path": str(other)})
    says = r"another teacher: transformer_2/diffusion_pytorch_model\.safetensors differs$"
    with pytest.raises(PairsError, match=says):
        check_pairs(r, load_family(r.model))

    harmed = tmp_path / "harmed"
    shutil.copytree(made, harmed)
    shard = harmed / "pairs-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    r = derive(good, {"method.regression.pairs": str(harmed)})
    with pytest.raises(PairsError, match=r"pairs-00001\.safetensors is corrupt"):
        check_pairs(r, family)
    assert check_pairs(derive(r, {"method.regression.verify": False}), family) == PROMPTS


def test_shards_are_whole_numbers_of_requests(family, tmp_path):
    r = recipe(tmp_path, tmp_path, **{"placement.batch_items": 4})
    assert origin_of(r, family, PROMPTS, 100).shard == 4096
    assert origin_of(r, family, PROMPTS, 100, shard=3).request == 3
    with pytest.raises(InputError, match=r"--shard=6 is no multiple of placement\.batch_items=4"):
        origin_of(r, family, PROMPTS, 100, shard=6)
    plain = derive(r, {"method": {"name": "dmd2"}})
    made = origin_of(plain, family, PROMPTS, 100)
    assert made == replace(origin_of(r, family, PROMPTS, 100), steps=50)
