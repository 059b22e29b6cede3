"""Every family: what raydmd computes is what its stock pipeline computes, before training and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.models import load_conditions, load_family, load_teacher
from raydmd.models.packing import pack, unpack
from raydmd.models.untrained import PIPELINES, write
from raydmd.process import VariancePreserving, step_grid
from raydmd.recipe import Model, Recipe, derive
from raydmd.sampling import sample
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog
from raydmd.training.export import export, load_student, student_experts
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker
from tests.pipelines import WORDS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from raydmd.models.family import Family

pytestmark = pytest.mark.local
PROMPTS = ["a cat runs", "a dog", "a cat jumps"]
SCALE, STEPS = 3.5, 2
SIZES: dict[str, dict[str, int]] = {
    "wan22": {"frames": 5, "height": 32, "width": 32},
    "wan21": {"frames": 5, "height": 32, "width": 32},
    "qwen-image": {"height": 32, "width": 32},
    "z-image": {"height": 16, "width": 16},
    "flux": {"height": 16, "width": 16},
}
"""Where a pipeline's own default is too large for a test."""
GUIDED: dict[str, dict[str, Any]] = {
    "sdxl": {"guidance_scale": SCALE},
    "qwen-image": {"true_cfg_scale": SCALE, "negative_prompt": ""},
    "z-image": {"guidance_scale": SCALE - 1, "negative_prompt": ""},  # cond + scale (cond - uncond)
    "flux": {"true_cfg_scale": SCALE, "negative_prompt": ""},
}
USUAL = {"guidance_scale": SCALE, "negative_prompt": ""}
PACKED, WAN = ("qwen-image", "flux"), ("wan21", "wan22")


@pytest.fixture(scope="module", params=[kind for kind in PIPELINES if kind != "edm"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory) -> Path:
    return write(kind, tmp_path_factory.mktemp(kind), WORDS)


def model(kind: str, folder: Path) -> Model:
    return Model(path=str(folder), **SIZES.get(kind, {}))


def stock(family: Family, folder: Path) -> Any:
    pipeline = getattr(diffusers, family.pipeline.__name__)
    pipe = pipeline.from_pretrained(folder, **dict.fromkeys(family.absent()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(kind: str, x: Tensor) -> Tensor:
    return pack(x) if kind in PACKED else x


def ours(kind: str, x: Tensor, like: Tensor) -> Tensor:
    return unpack(x, like) if kind in PACKED else x


def seeded(family: Family) -> Tensor:
    return torch.randn(1, *family.shape().latent, generator=torch.Generator().manual_seed(2))


def times(family: Family, pipe: Any) -> list[float]:
    """The times of the stock scheduler's walk, down to the last."""
    if isinstance(family.process, VariancePreserving):
        entries = family.process.entries
        found = [(int(i) + 1) / entries for i in pipe.scheduler.timesteps]
        return [*found, 1 / entries]  # without set_alpha_to_one a walk ends at the table's first entry
    return [float(s) for s in pipe.scheduler.sigmas]


def test_x0_is_what_the_stock_pipeline_computes(kind, folder, tmp_path):
    """Guidance included, at every step of the teacher's own walk, on conditions from raydmd's own table."""
    family = load_family(model(kind, folder))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    pipe, noise, kept = stock(family, folder), seeded(family), []
    if kind in WAN:  # a scheduler of the first order, whose steps tell x0
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def keep(_pipe, _step, _t, values):
        kept.append(values["latents"].clone())
        return values

    call = family.sampling(steps=5) | GUIDED.get(kind, USUAL) | {"latents": theirs(kind, noise)}
    pipe(PROMPTS[0], output_type="latent", callback_on_step_end=keep, **call)
    table = load_conditions(family.encode(PROMPTS, tmp_path))
    x, walk = noise, times(family, pipe)
    assert len(kept) == len(walk) - 1 == 5
    for after, now, nxt in zip(kept, walk, walk[1:], strict=False):
        t, s = torch.tensor([now]), torch.tensor([nxt])
        x0 = teacher.guided_x0(x, t, table.rows([1]), table.rows([0]), Guidance(SCALE), as_stock=True)
        x = family.process.step(x, x0, t, s)
        torch.testing.assert_close(theirs(kind, x), after, rtol=0, atol=2e-5)
        x = ours(kind, after, noise)
    shown = pipe(PROMPTS[0], output_type="pt", **call)
    pixels = shown.frames[0] if kind in WAN else shown.images
    decoded = family.decode(x)[0] if kind in WAN else family.decode(x)[:, 0]
    torch.testing.assert_close(decoded, pixels, rtol=0, atol=1e-5)


def test_a_batch_is_what_its_samples_are_alone(kind, folder, tmp_path):
    """Prompts of other lengths beside it change nothing: padding is masked, or the same everywhere."""
    family = load_family(model(kind, folder))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    table = load_conditions(family.encode(PROMPTS, tmp_path))
    x = torch.randn(3, *family.shape().latent)
    t = torch.tensor([0.97, 0.95, 0.9])
    whole = teacher.raw(x, t, table.rows([1, 2, 3]))
    for i in range(3):
        alone = teacher.raw(x[i : i + 1], t[i : i + 1], table.rows([1 + i]))
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-5)
    assert (whole[0] - teacher.raw(x[:1], t[:1], table.rows([2]))[0]).abs().max() > 1e-6, "deaf to its prompt"


def recipe(kind: str, folder: Path, output: Path, method: dict[str, Any], lora: dict | None) -> Recipe:
    shift = 1.0 if kind in ("sd15", "sdxl") else 3.0
    training = {"cycles": 2, "batch": 4, "fake_updates": 1, "precision": "fp32", "fake": {"rate": 1e-3}}
    return derive(
        Recipe(name="run", output=output, deterministic=True),
        {
            "model": {"path": str(folder), **SIZES.get(kind, {})},
            "method": {"shift": shift, "steps": STEPS, **method},
            "training": training | {"student": {"rate": 1e-2, "lora": lora}},
        },
    )


def trained(r: Recipe) -> tuple[Family, Any]:
    torch.set_num_threads(1)
    r.folder.mkdir(parents=True)
    family = load_family(r.model)
    family.check(r.method)
    table = load_conditions(family.encode(PROMPTS, r.folder / "conditions"))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    client = LocalClient(TeacherEngine(teacher, table, sample_shape=family.shape().latent))
    job = Job(recipe=r, family=family, conditions=table)
    worker = Worker(job, client, FolderSession(r.folder), EventLog(r.folder / "events.jsonl"))
    assert worker.run() == "finished"
    return family, table


@pytest.mark.parametrize(
    ("method", "lora"),
    [({"name": "dmd2"}, {"rank": 4, "alpha": 2.0}), ({"name": "dp_dmd", "anchor": {"steps": 2, "of": 6}}, None)],
    ids=["dmd2-lora", "dp_dmd-full"],
)
def test_the_export_gives_stock_diffusers_the_same_picture(kind, folder, tmp_path, method, lora):
    r = recipe(kind, folder, tmp_path, method, lora)
    family, table = trained(r)
    denoisers = load_student(r, family, max(r.folder.glob("cycle-*-final")))
    student, noise, cond = student_experts(r, family, denoisers), seeded(family), table.rows([1])

    def fresh(_: int) -> Tensor:  # as the stock scheduler draws it, from torch's global generator
        return ours(kind, torch.randn(theirs(kind, noise).shape), noise)

    torch.manual_seed(0)
    stochastic = r.method.solver == "renoise"
    grid = step_grid(STEPS, r.method.shift)
    latents = sample(student, noise, cond, cond, grid=grid, guidance=Guidance(), fresh=fresh if stochastic else None)
    expected = family.decode(latents)[0]
    export(r, family, denoisers, r.folder)

    def shown(pipe: Any) -> Tensor:
        torch.manual_seed(0)
        out = pipe(PROMPTS[0], latents=theirs(kind, noise), output_type="pt", **family.sampling(steps=STEPS))
        return out.frames[0] if kind in WAN else out.images

    pipe = stock(family, r.folder / "pipeline")
    assert (shown(pipe) - expected).abs().max() < 1e-4
    undistilled = stock(family, folder)
    undistilled.scheduler = pipe.scheduler
    assert (shown(undistilled) - expected).abs().max() > 1e-3, "the test would not see an untrained export"
    if lora is not None and kind not in WAN:  # whose experts take a file each
        undistilled.load_lora_weights(r.folder / "lora", weight_name=f"{family.network}.safetensors")
        assert (shown(undistilled) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["sd3", "sdxl", "qwen-image"], indirect=True)
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 2.0}], ids=["full", "lora"])
def test_two_phases_of_one_network_take_turns_as_the_model_card_says(kind, folder, tmp_path, lora):
    shift, boundary = (1.0, 0.6) if kind == "sdxl" else (3.0, 0.8)
    r = recipe(kind, folder, tmp_path, {"name": "phased", "boundaries": [boundary], "shift": shift, "steps": 3}, lora)
    if kind == "sdxl":
        r = derive(r, {"method.steps": 4})
    family, table = trained(r)
    denoisers = load_student(r, family, max(r.folder.glob("cycle-*-final")))
    assert len(denoisers) == 2
    student, noise, cond = student_experts(r, family, denoisers), seeded(family), table.rows([1])
    steps = r.method.steps
    latents = sample(student, noise, cond, cond, grid=step_grid(steps, shift), guidance=Guidance())
    expected = family.decode(latents)[0]
    export(r, family, denoisers, r.folder)
    code = (r.folder / "pipeline" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("this/folder", str(r.folder / "pipeline")).replace("your prompt", PROMPTS[0])
    known: dict[str, Any] = {"noise": theirs(kind, noise)}
    exec(code.replace("callback_on_step_end", 'output_type="pt", latents=noise, callback_on_step_end'), known)
    assert (known["image"] - expected[0]).abs().max() < 1e-4
    if lora is None:  # two such small adapters differ by less than a picture shows
        first = known["pipe"](
            PROMPTS[0], latents=known["noise"], output_type="pt", **family.sampling(steps=steps)
        ).images
        assert (first - expected).abs().max() > 2e-4, "the first expert alone would do"


def test_every_parameter_that_trains_gets_a_gradient(kind, folder, tmp_path):
    """Or two ranks under DDP would wait for it."""
    family = load_family(model(kind, folder))
    denoiser = family.denoiser(family.routing().experts[0], dtype=torch.float32)
    table = load_conditions(family.encode(PROMPTS, tmp_path))
    out = denoiser(torch.randn(2, *family.shape().latent), torch.tensor([0.9, 0.9]), table.rows([1, 2]))
    out.square().sum().backward()
    without = [n for n, p in denoiser.network.named_parameters() if p.grad is None]
    assert all(any(n.startswith(f"{module}.") for module in denoiser.idle) for n in without), without
    assert bool(without) == bool(denoiser.idle)


def test_pixels_survive_their_autoencoders_shapes(kind, folder):
    family = load_family(model(kind, folder))
    shape = family.shape()
    pixels = torch.rand(2, shape.frames, 3, shape.height, shape.width)
    latents = family.encode_pixels(pixels)
    assert latents.shape == (2, *shape.latent)
    assert family.decode(latents).shape == pixels.shape


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shift": 3.0}, "method.shift=3 does not fit"),
        ({"shift": 1.0, "steps": 3}, "method.steps=3 does not fit"),
    ],
)
def test_grids_that_no_table_scheduler_walks_are_refused(tmp_path, settings, says):
    folder = write("sdxl", tmp_path, WORDS)
    method = derive(Recipe(), {"method.name": "dmd2", "method": settings}).method
    with pytest.raises(InputError, match=says):
        load_family(Model(path=str(folder))).check(method)


def test_a_v_predicting_unet_and_one_declared_flow(tmp_path):
    folder = write("sd15", tmp_path / "v", WORDS, prediction="v_prediction")
    assert load_family(Model(path=str(folder))).prediction == "v"
    told = folder / "scheduler" / "scheduler_config.json"
    told.write_text(told.read_text().replace("v_prediction", "flow_prediction"))
    with pytest.raises(InputError, match="prediction_type='flow_prediction', but a U-Net"):
        load_family(Model(path=str(folder)))


def test_a_guidance_distilled_flux_is_not_guided_twice(tmp_path):
    folder = write("flux", tmp_path, WORDS, guidance_embeds=True)
    family = load_family(Model(path=str(folder), height=16, width=16))
    with pytest.raises(InputError, match=r"Set method\.guidance=1"):
        family.check(derive(Recipe(), {"method.name": "dmd2"}).method)
    family.check(derive(Recipe(), {"method.name": "dmd2", "method.guidance": 1.0}).method)
    denoiser = family.denoiser("transformer", dtype=torch.float32)
    table = load_conditions(family.encode(PROMPTS, tmp_path / "conditions"))
    assert denoiser(seeded(family), torch.tensor([0.5]), table.rows([1])).shape == (1, 4, 8, 8)
    assert family.sampling(steps=4)["guidance_scale"] == 3.5


def test_a_missing_text_encoder_is_named(tmp_path):
    folder = write("sdxl", tmp_path, WORDS)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"text_encoder_2": [', '"text_encoder_9": ['))
    with pytest.raises(InputError, match="has no text_encoder_2; a whole pipeline is needed"):
        load_family(Model(path=str(folder)))


def edm_recipe(folder: Path, output: Path, steps: int) -> Recipe:
    method = {"name": "dmd2", "guidance": 1.0, "steps": steps, "shift": 1.0}
    return derive(recipe("sdxl", folder, output, method, None), {"model.path": str(folder)})


def test_an_edm_student_is_what_the_stock_consistency_pipeline_samples(tmp_path):
    steps = 1
    folder = write("edm", tmp_path / "edm", WORDS)
    r = edm_recipe(folder, tmp_path, steps)
    r.folder.mkdir(parents=True)
    family = load_family(r.model)
    family.check(r.method)
    table = load_conditions(family.encode([str(k) for k in range(10)], r.folder / "conditions"))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    job = Job(recipe=r, family=family, conditions=table)
    client = LocalClient(TeacherEngine(teacher, table, sample_shape=family.shape().latent))
    assert Worker(job, client, FolderSession(r.folder), EventLog(r.folder / "events.jsonl")).run() == "finished"
    denoisers = load_student(r, family, max(r.folder.glob("cycle-*-final")))
    noise, cond = seeded(family), table.rows([1 + 7])

    def walked(experts: Any) -> Tensor:
        torch.manual_seed(0)

        def draw(_: int) -> Tensor:
            return torch.randn(noise.shape)

        grid = step_grid(steps, 1.0)
        return family.decode(sample(experts, noise, cond, cond, grid=grid, guidance=Guidance(), fresh=draw))[0]

    expected = walked(student_experts(r, family, denoisers))
    export(r, family, denoisers, r.folder)
    pipe = stock(family, r.folder / "pipeline")
    torch.manual_seed(0)
    shown = pipe(class_labels=[7], latents=noise, output_type="pt", **family.sampling(steps=steps)).images
    assert (shown - expected).abs().max() < 1e-4
    assert (walked(teacher) - expected).abs().max() > 1e-3, "the test would not see an untrained export"
    assert "class_labels=[0]" in (r.folder / "pipeline" / "README.md").read_text()


def test_an_edm_networks_x0_is_its_own_preconditioning(tmp_path):
    """D = c_skip x + c_out F(c_in x, 250 log sigma), table 1 of the paper, in the stock scheduler's terms."""
    folder = write("edm", tmp_path, WORDS)
    family = load_family(Model(path=str(folder)))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    table = load_conditions(family.encode(["3", "4"], tmp_path / "conditions"))
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
    method = derive(edm_recipe(folder, tmp_path, 1), {"method": settings}).method
    with pytest.raises(InputError, match=says):
        family.check(method)
    with pytest.raises(InputError, match="prompt 'a cat' is no class"):
        family.encode(["a cat"], tmp_path / "conditions")
