"""Class-conditional families, whose prompts are numbers: EDM, DiT, SiT, against their stock pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.untrained import CLASSES, write
from raydmd.recipe import Model, Recipe, derive
from raydmd.sampling import sample
from raydmd.training.export import export, load_student
from tests.local.test_families import SEED, final, recipe, sampled, stock, times, trained
from tests.pipelines import WORDS

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.models.family import Family

pytestmark = pytest.mark.local
NUMBERS = ["7", "1", "3"]
STEPS = {"edm": 1, "dit": 2, "sit": 2}
METHODS: dict[str, list[dict[str, Any]]] = {
    "edm": [{"name": "dmd2"}],  # a ConsistencyModelPipeline holds one kind of student: of one step
    "dit": [{"name": "dmd2"}, {"name": "decoupled", "decouple": {"schedule": "full"}}],
    "sit": [{"name": "dmd2", "solver": "euler"}, {"name": "dp_dmd", "anchor": {"steps": 2, "of": 6}}],
}


@pytest.fixture(scope="module", params=list(CLASSES))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    return write(kind, tmp_path_factory.mktemp(kind), WORDS)


def recipe_of(kind: str, folder: Path, output: Path, method: dict[str, Any]) -> Recipe:
    settings = {"shift": 3.0 if kind == "sit" else 1.0, "guidance": 1.0 if kind == "edm" else 2.0}
    return recipe(kind, folder, output, {**method, **settings, "steps": STEPS[kind]}, None)


def seeded(family: Family) -> torch.Tensor:
    torch.manual_seed(SEED)
    return torch.randn(1, *family.shape().latent)


@pytest.mark.parametrize("kind", ["dit", "sit"], indirect=True)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_guided_walk_is_the_stock_pipelines(kind, folder, tmp_path, scale):
    family = load_family(Model(path=str(folder)))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    pipe, noise = stock(family, folder), seeded(family)
    torch.manual_seed(SEED)
    shown = pipe(class_labels=[7], num_inference_steps=5, guidance_scale=scale, output_type="pt").images
    table = Conditions.read(family.encode(NUMBERS, tmp_path))
    cond, uncond = table.rows([1]), table.rows([0])
    walked = sample(teacher, noise, cond, uncond, grid=times(family, pipe), guidance=Guidance(scale))
    assert (family.decode(walked)[0] - shown).abs().max() < 1e-5
    other = sample(teacher, noise, table.rows([2]), uncond, grid=times(family, pipe), guidance=Guidance(scale))
    assert (other - walked).abs().max() > 1e-5, "deaf to its class"


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind, methods in METHODS.items() for method in methods],
    ids=[f"{kind}-{method['name']}" for kind, methods in METHODS.items() for method in methods],
    indirect=["kind"],
)
def test_the_export_gives_stock_diffusers_the_same_picture(kind, folder, tmp_path, method):
    r = recipe_of(kind, folder, tmp_path, method)
    family, _ = trained(r, NUMBERS)
    expected = sampled(r, family, NUMBERS[0])
    export(r, family, load_student(r, family, final(r)), r.folder)

    def shown(pipe: Any) -> torch.Tensor:
        torch.manual_seed(SEED)
        return pipe(class_labels=[7], output_type="pt", **family.sampling(steps=STEPS[kind])).images

    pipe, undistilled = stock(family, r.folder / "pipeline"), stock(family, folder)
    assert (shown(pipe) - expected).abs().max() < 1e-4
    undistilled.scheduler = pipe.scheduler
    assert (shown(undistilled) - expected).abs().max() > 1e-3, "the test would not see an untrained export"
    assert "class_labels=[0]" in (r.folder / "pipeline" / "README.md").read_text()


def test_training_drops_no_classes(tmp_path):
    """The stock label embedding would, at random, for guidance's sake."""
    family = load_family(Model(path=str(write("dit", tmp_path, WORDS))))
    denoiser = family.denoiser("transformer", dtype=torch.float32, autocast=torch.float32).train()
    table = Conditions.read(family.encode(NUMBERS, tmp_path / "conditions"))
    x, t, cond = torch.randn(1, 4, 8, 8).expand(64, -1, -1, -1), torch.full((64,), 0.5), table.rows([1] * 64)
    out = denoiser(x, t, cond)
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=0, atol=1e-5)


def test_what_a_sits_pipeline_cannot_run_is_refused(tmp_path):
    family = load_family(Model(path=str(write("sit", tmp_path, WORDS))))
    with pytest.raises(InputError, match=r"Set method\.solver=euler"):
        family.check(derive(Recipe(), {"method.name": "dmd2"}).method)


@pytest.mark.parametrize("kind", ["edm", "dit"], indirect=True)
def test_a_prompt_that_is_no_class_is_refused(kind, folder, tmp_path):
    family = load_family(Model(path=str(folder)))
    with pytest.raises(InputError, match=f"prompt 'a cat' is no class of .*, which has 0 to {CLASSES[kind] - 1}"):
        family.encode(["a cat"], tmp_path)


def test_a_size_that_is_not_the_networks_is_refused(kind, folder):
    with pytest.raises(InputError, match="its network makes pictures of 16x16"):
        load_family(Model(path=str(folder), height=32, width=32))


def test_an_edm_networks_x0_is_its_own_preconditioning(tmp_path):
    """D = c_skip x + c_out F(c_in x, 250 log sigma), table 1 of the paper, in the stock scheduler's terms."""
    folder = write("edm", tmp_path, WORDS)
    family = load_family(Model(path=str(folder)))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    table = Conditions.read(family.encode(["3", "4"], tmp_path / "conditions"))
    t, x = torch.tensor([0.9, 0.4]), 3 * torch.randn(2, 3, 16, 16)
    ours = teacher.x0(x, t, table.rows([1, 2])) * 0.5
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    sigma = ((low + t * (high - low)) ** 7).view(-1, 1, 1, 1)
    unet, pixels = teacher.modules["unet"].network, x * 0.5
    out = unet(
        pixels / (sigma**2 + 0.25).sqrt(),
        250 * sigma.view(-1).log(),
        class_labels=torch.tensor([3, 4]),
        return_dict=False,
    )[0]
    theirs = 0.25 / (sigma**2 + 0.25) * pixels + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * out
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"guidance": 2.0}, r"Set method\.guidance=1"), ({"steps": 2}, r"Set method\.steps=1")],
)
def test_what_an_edm_pipeline_cannot_do_is_refused(tmp_path, settings, says):
    folder = write("edm", tmp_path, WORDS)
    family = load_family(Model(path=str(folder)))
    method = derive(recipe_of("edm", folder, tmp_path, {"name": "dmd2"}), {"method": settings}).method
    with pytest.raises(InputError, match=says):
        family.check(method)
