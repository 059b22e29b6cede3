"""Every family: what raydmd computes is what its stock pipeline computes, before training and after it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from PIL import Image

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.packing import pack, unpack
from raydmd.models.untrained import CLASSES, PICTURED, PIPELINES, write
from raydmd.planning.network import blank
from raydmd.process import VariancePreserving, step_grid
from raydmd.recipe import Model, Recipe, derive
from raydmd.sampling import sample
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog
from raydmd.training.export import export, load_student, student_experts
from raydmd.training.session import FolderSession
from raydmd.training.show import show
from raydmd.training.worker import Job, Worker
from tests.pipelines import WORDS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from raydmd.models.family import Family

pytestmark = pytest.mark.local
PROMPTS = ["a cat runs", "a dog", "a cat jumps"]
SCALE, STEPS, SEED = 3.5, 2, 7
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


@pytest.fixture(scope="module", params=[kind for kind in PIPELINES if kind not in (*CLASSES, *PICTURED)])
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


def keeping(pipe: Any, kept: list[Tensor]) -> dict[str, Any]:
    """What a stock call needs so that the latents after each step are kept."""

    def keep(_pipe, _step, _t, values):
        kept.append(values["latents"].clone())
        return values

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        return {"callback_on_step_end": keep}
    return {"callback": lambda _step, _t, latents: kept.append(latents.clone())}  # of older pipelines


def times(family: Family, pipe: Any) -> list[float]:
    """The times of the stock scheduler's walk, down to the last."""
    if isinstance(family.process, VariancePreserving):
        entries = family.process.entries
        found = [(int(i) + 1) / entries for i in pipe.scheduler.timesteps]
        # Without set_alpha_to_one a walk ends at the table's first entry.
        return [*found, 0.0 if pipe.scheduler.config.set_alpha_to_one else 1 / entries]
    return [float(s) for s in pipe.scheduler.sigmas]


def test_x0_is_what_the_stock_pipeline_computes(kind, folder, tmp_path):
    """Guidance included, at every step of the teacher's own walk, on conditions from raydmd's own table."""
    family = load_family(model(kind, folder))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    pipe, noise, kept = stock(family, folder), seeded(family), []
    if kind in WAN:  # a scheduler of the first order, whose steps tell x0
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    call = family.sampling(steps=5) | GUIDED.get(kind, USUAL) | {"latents": theirs(kind, noise)}
    pipe(PROMPTS[0], output_type="latent", **keeping(pipe, kept), **call)
    table = Conditions.read(family.encode(PROMPTS, tmp_path))
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
    table = Conditions.read(family.encode(PROMPTS, tmp_path))
    x = torch.randn(3, *family.shape().latent)
    t = torch.tensor([0.97, 0.95, 0.9])
    whole = teacher.raw(x, t, table.rows([1, 2, 3]))
    for i in range(3):
        alone = teacher.raw(x[i : i + 1], t[i : i + 1], table.rows([1 + i]))
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-5)
    assert (whole[0] - teacher.raw(x[:1], t[:1], table.rows([2]))[0]).abs().max() > 1e-6, "deaf to its prompt"


def final(r: Recipe) -> Path:
    return max(r.folder.glob("train/cycle-*-final"))


def sampled(r: Recipe, family: Family, prompt: str = PROMPTS[0]) -> Tensor:
    """What ``raydmd sample`` shows, with its file looked at."""
    (r.folder / "recipe.yaml").write_text(r.to_yaml(), encoding="utf-8")
    done = show(r.folder, [prompt], count=1, seeds=[SEED], output=None)
    whole = done.samples[0].clips[0]
    with Image.open(done.files[0]) as image:
        assert (image.width, image.height) == (family.shape().width, family.shape().height)
        assert getattr(image, "n_frames", 1) == len(whole)
    return whole


def recipe(kind: str, folder: Path, output: Path, method: dict[str, Any], lora: dict | None) -> Recipe:
    settings = Model(path=str(folder), **SIZES.get(kind, {}))
    shift = 1.0 if isinstance(load_family(settings).process, VariancePreserving) else 3.0
    training = {"cycles": 2, "batch": 4, "fake_updates": 1, "precision": "fp32", "fake": {"rate": 1e-3}}
    return derive(
        Recipe(name="run", output=output, deterministic=True),
        {
            "model": settings.model_dump(),
            "method": {"shift": shift, "steps": STEPS, **method},
            "training": training | {"student": {"rate": 1e-2, "lora": lora}},
        },
    )


def trained(r: Recipe, prompts: list[str] = PROMPTS) -> tuple[Family, Any]:
    torch.set_num_threads(1)
    (r.folder / "train").mkdir(parents=True)
    family = load_family(r.model)
    family.check(r.method)
    table = Conditions.read(family.encode(prompts, r.folder / "conditions"))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    client = LocalClient(TeacherEngine(teacher, table, sample_shape=family.shape().latent))
    job = Job(recipe=r, family=family, conditions=table)
    worker = Worker(job, client, FolderSession(r.folder / "train"), EventLog(r.folder / "events.jsonl"))
    assert worker.run() == "finished"
    return family, table


@pytest.mark.parametrize(
    ("method", "lora"),
    [({"name": "dmd2"}, {"rank": 4, "alpha": 2.0}), ({"name": "dp_dmd", "anchor": {"steps": 2, "of": 6}}, None)],
    ids=["dmd2-lora", "dp_dmd-full"],
)
def test_the_export_gives_stock_diffusers_the_same_picture(kind, folder, tmp_path, method, lora):
    r = recipe(kind, folder, tmp_path, method, lora)
    family, _ = trained(r)
    expected = sampled(r, family)
    export(r, family, load_student(r, family, final(r)), r.folder)

    def shown(pipe: Any) -> Tensor:
        torch.manual_seed(SEED)
        out = pipe(PROMPTS[0], output_type="pt", **family.sampling(steps=STEPS))
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
    denoisers = load_student(r, family, final(r))
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


def test_bf16_is_near_fp32(kind, folder, tmp_path):
    """Stored in bf16, as a teacher is, and as masters in fp32, as students are; what comes out is fp32."""
    family = load_family(model(kind, folder))
    table, expert = Conditions.read(family.encode(PROMPTS, tmp_path)), family.routing().experts[0]
    x, t = torch.randn(2, *family.shape().latent), torch.tensor([0.97, 0.95])
    cond, bf16 = table.rows([1, 2]), torch.bfloat16
    with torch.no_grad():
        exact = family.denoiser(expert, dtype=torch.float32)(x, t, cond)
        stored = load_teacher(family, "bf16", device=torch.device("cpu")).modules[expert]
        master = family.denoiser(expert, dtype=torch.float32, autocast=bf16)
        for denoiser in (stored, master):
            found = denoiser(x, t, cond)
            assert found.dtype == torch.float32
            assert (found - exact).norm() < 0.05 * exact.norm()
    assert {p.dtype for p in master.parameters()} == {torch.float32}
    assert bf16 in {p.dtype for p in stored.parameters()}


def test_every_parameter_that_trains_gets_a_gradient(kind, folder, tmp_path):
    """Or two ranks under DDP would wait for it."""
    family = load_family(model(kind, folder))
    denoiser = family.denoiser(family.routing().experts[0], dtype=torch.float32)
    table = Conditions.read(family.encode(PROMPTS, tmp_path))
    out = denoiser(torch.randn(2, *family.shape().latent), torch.tensor([0.9, 0.9]), table.rows([1, 2]))
    out.square().sum().backward()
    without = [n for n, p in denoiser.network.named_parameters() if p.grad is None]
    assert all(any(n.startswith(f"{module}.") for module in denoiser.idle) for n in without), without
    assert bool(without) == bool(denoiser.idle)


def test_every_target_of_adapters_is_there(kind, folder):
    """peft says nothing of one that is not."""
    family = load_family(model(kind, folder))
    denoiser = family.denoiser(family.routing().experts[0], dtype=torch.float32)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [f".{name}" for name, module in denoiser.network.named_modules() if isinstance(module, kinds)]
    assert not [t for t in denoiser.lora_targets if not any(name.endswith(f".{t}") for name in names)]


def test_a_plan_knows_what_conditions_are_like(kind, folder, tmp_path):
    family = load_family(model(kind, folder))
    told = blank(family, 2, family.shape().latent, {}).tensors()
    real = Conditions.read(family.encode(PROMPTS, tmp_path)).rows([1, 2]).tensors()
    assert {k: (v.ndim, v.dtype == torch.bool) for k, v in told.items()} == {
        k: (v.ndim, v.dtype == torch.bool) for k, v in real.items()
    }
    assert told["embeds"].shape[-1] == real["embeds"].shape[-1]


def test_a_shift_that_is_not_the_schedulers_is_noted(kind, folder):
    family = load_family(model(kind, folder))
    own = {"sd3": 3.0, "lumina2": 6.0, "z-image": 3.0, "wan21": 5.0, "wan22": 5.0}.get(
        kind
    )  # others have none, or move it
    for shift in (own or 1.0, 4.0):
        notes = family.notes(derive(Recipe(), {"method.name": "dmd2", "method.shift": shift}).method)
        assert bool(notes) == (own is not None and shift != own), notes
        assert not notes or f"has shift {own:g}, method.shift=4: the latter holds for all roles" in notes[0]


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
    with pytest.raises(InputError, match="prediction_type='flow_prediction', but a network"):
        load_family(Model(path=str(folder)))


def test_a_guidance_distilled_flux_is_not_guided_twice(tmp_path):
    folder = write("flux", tmp_path, WORDS, guidance_embeds=True)
    family = load_family(Model(path=str(folder), height=16, width=16))
    with pytest.raises(InputError, match=r"Set method\.guidance=1"):
        family.check(derive(Recipe(), {"method.name": "dmd2"}).method)
    family.check(derive(Recipe(), {"method.name": "dmd2", "method.guidance": 1.0}).method)
    denoiser = family.denoiser("transformer", dtype=torch.float32)
    table = Conditions.read(family.encode(PROMPTS, tmp_path / "conditions"))
    assert denoiser(seeded(family), torch.tensor([0.5]), table.rows([1])).shape == (1, 4, 8, 8)
    assert family.sampling(steps=4)["guidance_scale"] == 3.5


def test_a_missing_text_encoder_is_named(tmp_path):
    folder = write("sdxl", tmp_path, WORDS)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"text_encoder_2": [', '"text_encoder_9": ['))
    with pytest.raises(InputError, match="has no text_encoder_2; a whole pipeline is needed"):
        load_family(Model(path=str(folder)))
