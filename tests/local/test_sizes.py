"""Training on several sizes: what each family computes at another size than its own, and runs that mix them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from raydmd.errors import InputError
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions, Denoiser
from raydmd.models.sizes import size_notes, training_latents
from raydmd.models.untrained import CLASSES, PICTURED, PIPELINES, write
from raydmd.recipe import Recipe, derive
from raydmd.recipe_data import Data, Size
from raydmd.rewards.base import Reward
from raydmd.rewards.engine import RewardEngine
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.serving.messages import RewardRequest, ScoreRequest, WalkRequest
from raydmd.training.events import EventLog, read_lines
from raydmd.training.run import run
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker
from tests.local.test_families import GUIDED, SCALE, USUAL, WAN, keeping, model, ours, recipe, stock, theirs, times
from tests.pipelines import WORDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from raydmd.models.family import Family

pytestmark = pytest.mark.local
PROMPTS = ["a cat runs", "a dog", "a cat jumps"]
OTHERS = [kind for kind in PIPELINES if kind not in (*CLASSES, *PICTURED)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = write(kind, tmp_path_factory.mktemp(kind), WORDS)
        return made[kind]

    return folder


def tall(family: Family) -> Size:
    """A size that every small pipeline can make beside its own."""
    own = family.shape()
    return Size(height=own.height * 3 // 2, width=own.width)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_network_at_another_size_is_the_stock_pipelines(kind, folders, tmp_path):
    """Its latents, places, and what SDXL is told of the picture's size: of the sample, not of the recipe's model."""
    family = load_family(model(kind, folders(kind)))
    size, own = tall(family), family.shape()
    shape = family.sized(size.height, size.width, own.frames)
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    pipe, kept = stock(family, folders(kind)), []
    if kind in WAN:
        pipe.scheduler = type(family.scheduler(steps=3, shift=3.0, stochastic=False))(shift=3.0)
    noise = torch.randn(1, *shape.latent, generator=torch.Generator().manual_seed(2))

    call = family.sampling(steps=3) | GUIDED.get(kind, USUAL) | {"height": shape.height, "width": shape.width}
    call |= {"latents": theirs(kind, noise), "output_type": "latent", **keeping(pipe, kept)}
    pipe(PROMPTS[0], **call)
    assert len(kept) == 3
    table = Conditions.read(family.encode(PROMPTS, tmp_path))
    x, walk = noise, times(family, pipe)
    for after, now, nxt in zip(kept, walk, walk[1:], strict=False):
        t, s = torch.tensor([now]), torch.tensor([nxt])
        x0 = teacher.guided_x0(x, t, table.rows([1]), table.rows([0]), Guidance(SCALE), as_stock=True)
        torch.testing.assert_close(theirs(kind, family.process.step(x, x0, t, s)), after, rtol=0, atol=2e-5)
        x = ours(kind, after, noise)
    assert family.decode(x).shape == (1, own.frames, 3, shape.height, shape.width)


def mixed(kind: str, folder: Path, output: Path, **changes: Any) -> Recipe:
    r = recipe(kind, folder, output, {"name": "dmd2"}, None)
    family = load_family(r.model)
    own = family.shape()
    sizes = [Size(height=own.height, width=own.width, weight=2), tall(family)]
    return derive(
        r,
        {
            "data.sizes": [size.model_dump() for size in sizes],
            "training": {"cycles": 4, "fake_updates": 2, "fake_warmup": 1},
        }
        | changes,
    )


def work(r: Recipe, *, stop_at: int | None = None) -> tuple[Worker, str]:
    torch.set_num_threads(1)
    r.folder.mkdir(parents=True, exist_ok=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"))
    job = Job(recipe=r, family=family, conditions=table, stop_at=stop_at)
    client = LocalClient(TeacherEngine(teacher, table))
    worker = Worker(job, client, FolderSession(r.folder), EventLog(r.folder / "events.jsonl"))
    return worker, worker.run()


@pytest.fixture
def seen() -> Iterator[list[tuple[bool, bool, tuple[int, ...]]]]:
    """Of every forward: whether its network is trained, whether it has gradient, the shape of a latent."""
    found: list[tuple[bool, bool, tuple[int, ...]]] = []

    def note(module, inputs):
        if isinstance(module, Denoiser):
            found.append((module.training, torch.is_grad_enabled(), tuple(inputs[0].shape[1:])))

    handle = register_module_forward_pre_hook(note)
    yield found
    handle.remove()


@pytest.mark.parametrize("kind", ["wan22", "sd3"])
def test_a_run_of_several_sizes_sees_all_and_resumes_to_the_same_bits(kind, folders, tmp_path, seen):
    r = mixed(kind, folders(kind), tmp_path / "whole")
    whole, end = work(r)
    assert end == "finished"
    both = set(training_latents(whole.family, r.data))
    assert len(both) == 2
    for trained, grad in ((True, True), (True, False), (False, False)):
        assert {s for t, g, s in seen if (t, g) == (trained, grad)} == both, "a role has seen one size only"
    parts = derive(r, {"output": tmp_path / "parts"})
    assert work(parts, stop_at=2)[1] == "stopped"
    resumed, _ = work(parts)
    assert [e["event"] for e in read_lines(parts.folder / "events.jsonl")].count("resume") == 1
    same(resumed, whole)


def same(one: Worker, other: Worker) -> None:
    ours, theirs = one.state(), other.state()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("kind", ["sd3", "wan22"])
@pytest.mark.parametrize("method", ["phased", "decoupled", "dp_dmd"])
def test_methods_train_on_several_sizes(kind, folders, tmp_path, method):
    r = mixed(kind, folders(kind), tmp_path, method={"name": method, "steps": 2, "shift": 3.0})
    assert work(r)[1] == "finished"


def test_sizes_that_are_never_drawn_change_no_bit(folders, tmp_path):
    r = mixed("sd3", folders("sd3"), tmp_path / "mixed")
    own, other = r.data.sizes
    r = derive(r, {"data.sizes": [own.model_dump(), other.model_dump() | {"weight": 1e-12}]})
    same(work(r)[0], work(derive(r, {"output": tmp_path / "one", "data.sizes": ()}))[0])


def refusal(kind: str, folder: Path, *sizes: Size) -> str:
    own = model("wan22" if kind in PICTURED else kind, folder)
    with pytest.raises(InputError) as info:
        training_latents(load_family(own), Data(sizes=sizes))
    return str(info.value)


def test_sizes_that_a_family_cannot_make_are_refused_by_their_place(folders):
    small, sd3, wan = Size(height=16, width=16), folders("sd3"), folders("wan22")
    assert "data.sizes[1].height=17, data.sizes[1].width=16 do not fit" in refusal(
        "sd3", sd3, small, Size(height=17, width=16)
    )
    assert "both must be multiples of 4, at most 24" in refusal("sd3", sd3, Size(height=16, width=28))
    assert "data.sizes[0].frames=5 does not fit" in refusal("sd3", sd3, Size(height=16, width=16, frames=5))
    assert "data.sizes[0].frames=4, data.sizes[0].height=32" in refusal(
        "wan22", wan, Size(height=32, width=48, frames=4)
    )
    assert "frames are at most 253, height 1024, width 1024" in refusal("wan22", wan, Size(height=32, width=1040))
    assert "data.sizes[1]: this size is there already" in refusal("wan22", wan, *[Size(height=32, width=48)] * 2)
    assert "the model's own size alone" in refusal("sd3", sd3, small)


@pytest.mark.parametrize("kind", [*CLASSES, *PICTURED])
def test_families_of_one_size_refuse_others(kind, folders):
    says = refusal(kind, folders(kind), Size(height=64, width=32))
    wanted = "its network makes pictures of" if kind in CLASSES else "encoded once, at the model's own size"
    assert wanted in says
    assert says.startswith("data.sizes")


@pytest.mark.parametrize(("kind", "most"), [("lumina2", 2048), ("z-image", 256), ("wan21", 1024)])
def test_sizes_beyond_a_networks_places_are_refused(kind, most, folders):
    family = load_family(model(kind, folders(kind)))
    own = family.shape()
    assert family.sized(most, own.width, own.frames).height == most
    with pytest.raises(InputError, match=rf"k\.height={2 * most}, k\.width=\d+ do not fit .*\b{most}\b"):
        family.sized(2 * most, own.width, own.frames, key="k")


def test_sizes_whose_tokens_a_group_of_ranks_cannot_share_are_refused(folders):
    family = load_family(model("wan22", folders("wan22")))
    family.check_sequence(2, [family.sized(32, 64, 5).latent])
    with pytest.raises(InputError, match=r"1 tokens of latents \(16, 1, 2, 2\) do not divide by it"):
        family.check_sequence(2, [family.shape().latent, family.sized(16, 16, 1).latent])


def test_a_run_with_a_size_that_does_not_fit_starts_nothing(folders, tmp_path):
    r = derive(mixed("sd3", folders("sd3"), tmp_path), {"data.sizes": [{"height": 18, "width": 16}]})
    with pytest.raises(InputError, match=re.escape("data.sizes[0].height=18, data.sizes[0].width=16 do not fit")):
        run(r)
    assert not r.folder.exists()


class Area(Reward):
    """Rates a picture by how many pixels it has."""

    name = "area"

    def __call__(self, pixels: Tensor, prompts: Any) -> Tensor:
        return torch.full((len(prompts),), float(pixels.shape[-1] * pixels.shape[-2]))


def test_rewards_judge_every_size_of_a_run_and_no_other(folders):
    family = load_family(model("sd3", folders("sd3")))
    latents = training_latents(family, Data(sizes=(Size(height=16, width=16), Size(height=24, width=16))))
    engine = RewardEngine(Area(), family, ["", *PROMPTS], device="cpu", latents=latents)
    engine.warm_up()
    asked = [RewardRequest(x_t=torch.zeros(2, *latent), conditions=(1, 2), name="r") for latent in latents]
    assert [engine.answer([request])[0].value.tolist() for request in asked] == [[256.0] * 2, [384.0] * 2]
    other = RewardRequest(x_t=torch.zeros(1, 8, 12, 12), conditions=(1,), name="r")
    with pytest.raises(InputError, match=re.escape("a reward wants B of (8, 8, 8) or (8, 12, 8)")):
        engine.answer([other])
    assert len({engine.key(request) for request in asked}) == 2


def test_an_engine_tells_requests_of_several_sizes_apart(folders, tmp_path):
    family = load_family(model("sd3", folders("sd3")))
    table = Conditions.read(family.encode(PROMPTS, tmp_path))
    engine = TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table)
    small, large = torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 12, 8)
    t, more = torch.tensor([0.5]), {"conditions": (1,), "guidance": Guidance(2.0)}
    scores = [ScoreRequest(x_t=x, t=t, expert="transformer", **more) for x in (small, large)]
    walks = [WalkRequest(x_t=x, grid=(1.0, 0.5, 0.0), **more) for x in (small, large)]
    assert len({engine.key(request) for request in (*scores, *walks)}) == 4
    for pair in (scores, walks):
        with pytest.raises(InputError, match="cannot share a forward"):
            engine.answer(pair)


def test_a_run_that_is_evaluated_at_a_size_it_is_not_trained_at_says_so(folders):
    r = mixed("sd3", folders("sd3"), folders("sd3"))
    family = load_family(r.model)
    own = family.shape()
    sizes = [tall(family).model_dump()]
    (note,) = size_notes(family, derive(r, {"data.sizes": sizes}))
    assert f"does not have the model's own size, {own.width}x{own.height}" in note
    assert not size_notes(family, derive(r, {"data.sizes": [*sizes, {"height": own.height, "width": own.width}]}))
    assert not size_notes(family, derive(r, {"data.sizes": []}))
