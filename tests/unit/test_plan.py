"""The plan's memory against what others have met: reports of too little memory, and of runs that fit."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raydmd.cli import main
from raydmd.errors import InputError
from raydmd.planning import network
from raydmd.planning.answer import Option
from raydmd.planning.calls import PhaseCalls, count
from raydmd.planning.hardware import read_hardware
from raydmd.planning.known import family_of, known
from raydmd.planning.memory import RoleSize, Setting, trainer
from raydmd.planning.network import Network, Networks
from raydmd.planning.planner import Planner
from raydmd.planning.scaling import knee, sizes
from raydmd.planning.scaling import text as text_of_sizes
from raydmd.planning.search import options
from raydmd.planning.show import reason, text
from raydmd.planning.timing import Exchange, Step, step, tokens_sent, waited
from raydmd.planning.trace import Passes
from raydmd.recipe import Recipe, derive

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]

MODELS = {
    "wan": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", {"frames": 81, "height": 480, "width": 832}, 14.29),
    "qwen": ("Qwen/Qwen-Image", {"height": 1024, "width": 1024}, 20.43),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", {}, 2.567),
    "sd35": ("stabilityai/stable-diffusion-3.5-large", {}, 8.057),
}
LORA = {"rank": 64, "alpha": 64.0}


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDMD_CACHE", str(tmp_path_factory.mktemp("plans")))
        yield


def planner(model: str, *, lora: bool = False, batch: int = 64) -> Planner:
    path, size, _ = MODELS[model]
    role = {"rate": 1e-5, "lora": LORA if lora else None}
    method = {"name": "phased"} if model == "wan" else {"name": "dmd2", "shift": 1.0 if model == "sdxl" else 3.0}
    changes = {
        "model": {"path": path, **size},
        "method": method,
        "training": {
            "batch": batch,
            "student": role,
            "fake": role,
            "sharding": "fsdp",
            "gradient_checkpointing": True,
            "ema": 0.0,
        },
    }
    return Planner(derive(Recipe(), changes), read_hardware("h100"))


def peak(plan: Planner, placement: str, sharding: str, workers: int) -> tuple[bool, float]:
    teachers = 1 if placement == "remote" else 0
    found = plan.answer(Option(placement=placement, sharding=sharding, workers=workers, teachers=teachers))  # type: ignore[arg-type]
    return found.peak <= found.room, found.peak / 1e9


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_the_published_ones(model: str) -> None:
    size = planner(model).networks.size(None)
    assert size.parameters / 1e9 == pytest.approx(MODELS[model][2], rel=0.001)
    assert size.unit < size.parameters / 10


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("model", ["wan", "qwen"])
def test_14b_and_20b_in_full_fit_on_64_and_not_on_8(model: str) -> None:
    # NVlabs/FastGen#20, NVlabs/rcm#12 (8 x A100 80 GB): too little memory; the arithmetic: 16 bytes a parameter, twice
    plan = planner(model)
    for placement in ("local", "remote"):
        assert not peak(plan, placement, "fsdp", 8)[0]
        assert not peak(plan, placement, "ddp", 64)[0]  # hao-ai-lab/FastVideo#612: unsharded, on 8 x H200
    assert peak(plan, "remote", "fsdp", 64)[0]


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("model", ["wan", "qwen"])
def test_adapters_on_one_network_fit_on_one_node(model: str) -> None:
    plan = planner(model, lora=True, batch=8)
    assert peak(plan, "tied", "fsdp", 8)[0]
    tied, local = peak(plan, "tied", "ddp", 8)[1], peak(plan, "local", "ddp", 8)[1]
    experts, copies = (2, 4) if model == "wan" else (1, 2)
    size = MODELS[model][2] * 2
    # Wan's fake score has both experts in its last phase, and its student too: each is a copy
    assert local - tied == pytest.approx(copies * size, rel=0.1), experts


@pytest.mark.usefixtures("costs")
@pytest.mark.parametrize("model", ["sdxl", "sd35"])
def test_smaller_models_fit_on_8_if_sharded(model: str) -> None:
    # DMD2's own SDXL runs are FSDP on A100s; 32 bytes a parameter are more than one GPU has.
    plan = planner(model, batch=8)
    assert peak(plan, "local", "fsdp", 8)[0]
    assert not peak(plan, "remote", "ddp", 8)[0]


@pytest.mark.usefixtures("costs")
def test_a_plan_says_what_is_best_and_why() -> None:
    plan = planner("sdxl", batch=8)
    answer = plan.answer(Option(placement="remote", sharding="fsdp", workers=8, teachers=1))
    tops, best = plan.best(9)
    assert best is not None
    assert best.fits
    said = text(plan, answer, plan.simulated(answer), tops, best)
    for part in ("fits into", "a teacher's GPU", "US$", "GPU hours", f"Best: {best.option}"):
        assert part in said
    nothing = planner("qwen", batch=8)
    tops, best = nothing.best(8)
    assert best is None
    why = reason(nothing, tops, best)
    assert "None fits" in why
    assert "training.student.lora={}" in why
    assert "gradient_checkpointing" not in why, "it has that already"


@pytest.mark.usefixtures("costs")
def test_more_gpus_are_never_a_slower_plan() -> None:
    # A batch of 256 on 256 workers is one sample each, whose pass takes less than gathering the network for it.
    plan = planner("sdxl", batch=256)
    found = [plan.best(n)[1] for n in (32, 64, 128, 256, 512)]
    hours = [a.hours for a in found if a]
    assert len(hours) == len(found)
    assert all(after <= 1.01 * before for before, after in itertools.pairwise(hours))
    last = found[-1]
    assert last
    assert last.option.workers < 256
    assert last.option.teachers <= 4, "no pool that idles"
    tried = {o.workers for o in options(plan, 12) if o.placement == "local"}
    assert tried == {1, 2, 4, 8}, "all that divide the batch"


@pytest.mark.usefixtures("costs")
def test_hours_are_those_of_the_cycles_that_are_shown() -> None:
    plan = planner("sdxl", batch=8)
    bare = plan.answer(Option(placement="remote", sharding="fsdp", workers=8, teachers=1))
    answer, played = plan.played(bare)
    assert answer.hours > 1.01 * bare.hours, "workers wait for the slowest"
    shown = sum(o.step * p.cycles for o, p in zip(played, bare.phases, strict=True))
    assert answer.hours == pytest.approx(shown / 3600)
    assert answer.seconds * plan.recipe.training.cycles == pytest.approx(shown)
    assert plan.played(answer)[0].hours == pytest.approx(answer.hours), "once, not again"
    tops, best = plan.best(9, play=True)
    assert best in tops
    warm = Planner(derive(plan.recipe, {"training.fake_warmup": 100}), plan.hardware)
    longer = warm.played(warm.answer(bare.option))[0]
    assert longer.hours > answer.hours
    assert "100 fake updates before them" in text(warm, longer, played, tops, best)


@pytest.mark.usefixtures("costs")
def test_a_peak_is_no_less_than_what_is_recorded() -> None:
    # Unsharded masters are fp32, and autocast keeps a copy of each in bf16 until the forward pass has ended: at full
    # depth that is more than the backward pass ever needs, of two blocks it is not.
    plan = planner("wan")
    raw = plan.networks.cost(rows=1, latent=plan.largest, bits=32, autocast=16, lora=None, again=True, train=True)
    assert raw.recording > raw.peak
    option = Option(placement="remote", sharding="ddp", workers=64, teachers=1)
    role = plan.recipe.training.student
    for rows in (1, 4):
        found = plan._cost(role, rows, plan.largest, train=True, option=option)
        assert found.whole >= found.peak >= found.recording >= 2 * 14e9


def test_the_wait_is_expected_over_sizes() -> None:
    def at(fake: float, answer: float) -> Step:
        return Step(rollout=0, fake_updates=(fake, fake), generator=0, answer=answer, exchange=0)

    small, large = at(1.0, 2.0), at(4.0, 8.0)
    assert waited([small], [1.0], 1.0) == 0
    assert waited([small], [1.0], 3.0) == 4.0
    # Means hide it: 5 seconds of the teacher behind 5 of fake updates. A large one beside 2, 5 or 8 of them waits 6,
    # 3 or 0 seconds, with chances of 1/4, 1/2 and 1/4.
    assert waited([small, large], [1.0, 1.0], 1.0) == pytest.approx(0.5 * (6 / 4 + 3 / 2))
    assert waited([small, large], [3.0, 1.0], 1.0) == pytest.approx(0.25 * (6 * 9 / 16 + 3 * 6 / 16))


def test_tokens_that_workers_share_are_on_the_wire() -> None:
    each = 40 * 32760 * 5120 * 2 / 8  # a block's queries of a worker; so are keys, values, and what attention makes
    assert tokens_sent(40, 5120, 32760, 8, 2.0) == pytest.approx(4 * each * 7 / 8)
    [calls] = counted({"name": "dmd2", "steps": 1, "shift": 3.0}, updates=1)
    nothing = Exchange(pass_seconds={}, update_seconds={}, size=0.0)
    now = {"updates": {"student": 0.0, "fake": 0.0}, "traffic": nothing, "fake_updates": 1}

    def took(*, again: bool, here: bool = True) -> Step:
        return step(calls, lambda *_: 0.0, here=here, tokens=1.0, again=again, **now)  # type: ignore[arg-type]

    # of the student: two rollouts, one of them recorded; of the fake score: its update, and its own answer
    assert took(again=False).busy == 2 + 2 + 2 + 1 + 2 - 1
    assert took(again=True).busy == took(again=False).busy + 2, "two backward passes"
    assert took(again=False, here=False).busy == took(again=False).busy - 2, "a guided teacher elsewhere"
    assert took(again=True).exchange == took(again=True).busy
    assert nothing.with_tokens(10.0, calls, here=True, again=True).size == 10 * took(again=True).busy


def test_sums_are_those_of_the_trainers_tensors() -> None:
    net = Network(parameters=1000, precise=0, idle=0, adapters=10, unit=100, root=50, units=10)
    cost = Passes(rows=1, forward=0, kept=7, recording=9, peak=11, whole=12)
    full = RoleSize(network=net, experts=1, trained=1, full=True, average=True, passes=cost)
    fake = RoleSize(network=net, experts=1, trained=1, full=False, average=False, passes=cost)
    frozen = Passes(rows=1, forward=0, transient=5)

    def held(placement: str, sharding: str, workers: int) -> Any:
        setting = Setting(placement=placement, sharding=sharding, workers=workers, compute=2.0)  # type: ignore[arg-type]
        return trainer(full, fake, frozen, setting=setting, teacher_experts=2, adapters=2, held=1, fake_rows=1)

    alone = held("local", "single", 1)
    assert alone.of("student") == 1000 * (4 + 8 + 4)  # masters, Adam, average; gradients come and go
    assert alone.of("fake") == 1000 * 2 + 10 * (4 + 8)
    assert alone.of("teacher") == 2 * 1000 * 2
    assert alone.moments["fake score's update"] == 7 + 12
    assert alone.moments["student's update"] == 12
    assert alone.moments["teacher's answer"] == 7 + 2 * 5
    assert held("remote", "ddp", 2).of("student", "gradients") == 4000
    sharded = held("remote", "fsdp", 4)
    assert sharded.of("student") == 1000 * (4 + 8 + 4) / 4
    gathered = 2 * (50 + 2 * 100) + (2 + 4) * 100  # the root and two blocks, and a gradient before it is reduced
    assert sharded.moments["student's update"] == 11 + gathered + 4 * 1000 / 4
    assert held("remote", "fsdp", 4).of("teacher") == 0


def test_hardware_is_read_and_refused(tmp_path: Any) -> None:
    assert read_hardware("H100").per_node == 8
    own = tmp_path / "own.yaml"
    fields = {"name": "x", "memory_gib": 80, "bf16": 100, "fp32": 10, "hbm": 1000, "link": 100, "network": 50}
    own.write_text("\n".join(f"{k}: {v}" for k, v in fields.items()))
    assert read_hardware(str(own)).memory_gib == 80
    own.write_text("name: x\nmemory: 80\n")
    with pytest.raises(InputError, match="memory"):
        read_hardware(str(own))
    with pytest.raises(InputError, match="did you mean 'h100'"):
        read_hardware("h1000")


def test_the_table_of_models_has_a_source_for_each_id() -> None:
    assert {about["index"]["_class_name"] for about in known().values()} >= {"WanPipeline", "QwenImagePipeline"}


@pytest.mark.usefixtures("costs")
def test_what_is_shipped_is_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"latent": (16, 21, 60, 104), "bits": 16, "autocast": 16, "again": True, "train": True, "rows": 1}
    lora = planner("wan", lora=True).recipe.training.student.lora
    known_cost = planner("wan").networks.cost(lora=lora, **settings)  # type: ignore[arg-type]
    monkeypatch.setattr(network, "shipped", dict)
    traced = planner("wan").networks.cost(lora=lora, **settings)  # type: ignore[arg-type]
    for name, value in vars(traced).items():
        assert getattr(known_cost, name) == pytest.approx(value, rel=0.02), name
    # 40 blocks of checkpoints: one bf16 latent of 32760 tokens and 5120 channels each
    assert traced.kept == pytest.approx(40 * 32760 * 5120 * 2, rel=0.1)
    assert traced.backward / traced.forward == pytest.approx(2.8, abs=0.3)  # again, and to inputs, not to weights


@pytest.mark.usefixtures("costs")
def test_the_papers_recipe_at_the_front_door_fits_its_gpus() -> None:
    """As the README says; with the paper's largest sizes only since their activations wait elsewhere."""
    paper = runpy.run_path(str(ROOT / "experiments" / "phased_wan22.py"))["PAPER"]
    plan = Planner(paper, read_hardware("h100"))
    answer = plan.answer(plan.own)
    assert (answer.option.gpus, answer.fits) == (72, True)
    assert plan.largest == (16, 21, 90, 160)
    per_block = 21 * 45 * 80 * 5120 * 2  # tokens, channels, bf16
    assert answer.worst.host == pytest.approx(2 * 40 * per_block, rel=0.15)
    small = Planner(paper, read_hardware("h100").model_copy(update={"node_gib": 512}))
    answer = small.answer(small.own)
    assert answer.needs <= answer.room
    assert not answer.fits
    assert "its node lacks" in reason(small, [answer], None)
    here = Planner(derive(paper, {"training.offload_activations": False}), read_hardware("h100"))
    assert here.largest == plan.largest
    assert not here.answer(here.own).fits


def test_what_waits_in_the_hosts_memory_is_not_on_the_gpu() -> None:
    def at(offload: bool) -> Any:
        family, lengths = family_of(derive(Recipe(), {"model.path": "sd35-tiny"}).model)
        found = Networks(family, lengths)
        settings = {"rows": 256, "latent": family.shape().latent, "bits": 32, "autocast": 32, "lora": None}
        return found.cost(**settings, again=True, train=True, offload=offload)

    here, away = at(offload=False), at(offload=True)
    assert (away.forward, away.backward) == (here.forward, here.backward)
    assert here.moved == 0
    assert away.kept < 0.3 * here.kept, "what is small stays"
    assert away.moved >= here.kept - away.kept
    assert away.recording < here.recording
    assert away.peak < here.peak


def counted(method: dict[str, Any], model: str = "sd35-tiny", updates: int = 3) -> list[PhaseCalls]:
    recipe = derive(Recipe(), {"model.path": model, "method": method, "training.fake_updates": updates})
    return count(recipe, family_of(recipe.model)[0])


def test_calls_are_those_of_the_methods() -> None:
    [dmd2] = counted({"name": "dmd2", "steps": 4, "shift": 3.0})
    assert dmd2.total("teacher") == 2  # guided
    assert dmd2.total("student", "record") == dmd2.total("student", "backward") == 1
    assert dmd2.total("student", "forward") == 1.5 + 3 * 2.5  # of four steps, on average
    assert dmd2.total("fake", "backward") == 3
    assert dmd2.total("fake", "forward") == 1
    [decoupled] = counted({"name": "decoupled", "steps": 4, "shift": 3.0})
    assert decoupled.total("teacher") == 3  # matching unguided, augmentation in its halves
    assert (decoupled.queries, decoupled.answers) == (2, 3)
    [walked] = counted({"name": "dp_dmd", "steps": 4, "shift": 3.0})
    assert walked.total("teacher") == 2 + 5 * 2
    assert walked.held == walked.total("student", "backward") == 4
    first, second = counted({"name": "phased", "steps": 4, "shift": 5.0, "boundaries": (0.875,)}, "wan22-tiny")
    assert first.total("student", "forward") == 0.5 + 3 * 1.5
    assert second.total("student", "forward") == 2.5 + 3 * 3.5


def test_a_script_and_a_file_are_planned(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: {path: sd35-tiny}\nmethod: {name: dmd2, shift: 3.0}\ntraining: {cycles: 20}\n")
    with pytest.raises(SystemExit) as done:
        main(["plan", str(file), "--gpus", "8", "--json"])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["fits"]
    assert found["plan"]["gpus"] <= 8
    for given, said in (([], "which recipe"), (["no.py"], "no script"), ([str(file), "--cluster", "h10"], "h100")):
        with pytest.raises(SystemExit) as done:
            main(["plan", *given])
        assert done.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.usefixtures("costs")
def test_more_gpus_than_samples_are_past_the_knee() -> None:
    plan = planner("sdxl", batch=16)
    found = sizes(plan, (8, 16, 32, 64))
    assert [s.gpus for s in found] == [8, 16, 32, 64]
    assert knee(found) in (8, 16, 32)  # sixteen workers and a pool are all that a batch of 16 keeps busy
    assert found[-1].answer.option.workers == 16
    assert "The knee is at" in text_of_sizes(found)
    grown = sizes(plan, (8, 16, 32), grow=True)
    assert knee(grown) is None
    assert grown[-1].batch > 16


class TinyTransformerBlock(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))


def test_one_more_block_is_left_where_it_was_cut() -> None:
    def made() -> nn.ModuleDict:
        lists = {"refiner": [4, 4], "layers": [4] * 6 + [8]}  # as Lumina2's refiner is of its layers' kind
        return nn.ModuleDict({k: nn.ModuleList(TinyTransformerBlock(w) for w in v) for k, v in lists.items()})

    network_ = made()
    [(kind, gone)] = network.reduce(network_).items()
    assert gone == 4
    assert [len(network_[k]) for k in ("refiner", "layers")] == [2, 3]  # type: ignore[arg-type]
    other = made()
    network.reduce(other, kind)
    assert [len(other[k]) for k in ("refiner", "layers")] == [2, 4]  # type: ignore[arg-type]
