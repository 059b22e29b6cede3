"""Tied placement: one frozen network is teacher, student and fake score, and nothing else changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.untrained import write
from raydmd.recipe import Recipe, Role, Training, derive
from raydmd.recipe_placement import Placement
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.events import EventLog
from raydmd.training.export import load_student
from raydmd.training.session import FolderSession, Session
from raydmd.training.tied import Tied
from raydmd.training.worker import Job, Worker
from tests.local.test_families import PROMPTS, SIZES
from tests.local.test_two_ranks import port
from tests.pipelines import WORDS
from tests.ranks import OneOfSome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from raydmd.models.base import Experts

pytestmark = pytest.mark.local
LORA = {"rank": 4, "alpha": 4.0}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "two experts, a phase each": ("wan22", {"name": "phased", "boundaries": [0.875], "steps": 4, "shift": 5.0}, {}),
    "two phases on one network": ("wan21", {"name": "phased", "boundaries": [0.8], "steps": 3, "shift": 3.0}, {}),
    "checkpointed, an anchor": (
        "sd3",
        {"name": "dp_dmd", "steps": 2, "anchor": {"steps": 2, "of": 6}},
        {"gradient_checkpointing": True},
    ),
    "U-Net, decoupled": ("sdxl", {"name": "decoupled", "steps": 2, "shift": 1.0}, {}),
    "bf16": ("sd3", {"name": "dmd2", "steps": 2}, {"precision": "bf16"}),
}


def recipe(name: str, kind: str, output: Path, method: dict[str, Any], training: dict[str, Any]) -> Recipe:
    role = {"rate": 1e-3, "lora": LORA, "eps": 1e-5}
    settings = {"cycles": 4, "batch": 4, "fake_updates": 2, "precision": "fp32", "student": role, "fake": role}
    return derive(
        Recipe(name=name, output=output, deterministic=True),
        {
            "model": {"path": str(output / kind), **SIZES.get(kind, {})},
            "method": method,
            "training": settings | training,
        },
    )


def job(r: Recipe, *, tied: bool) -> tuple[Job, Callable[[], Experts]]:
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.output / f"conditions-{r.name}"))
    cpu = torch.device("cpu")
    shared = Tied(r, family, cpu) if tied else None
    precision = r.training.precision
    return (
        Job(recipe=r, family=family, conditions=table, tied=shared),
        shared.teacher if shared else lambda: load_teacher(family, precision, device=cpu),
    )


def train(r: Recipe, session: Session, *, tied: bool) -> Worker:
    r.folder.mkdir(parents=True, exist_ok=True)
    task, teacher = job(r, tied=tied)
    worker = Worker(
        task, LocalClient(TeacherEngine(teacher(), task.conditions)), session, EventLog(r.folder / "events.jsonl")
    )
    assert worker.run() == "finished"
    return worker


@pytest.mark.parametrize("name", RUNS)
def test_a_tied_run_is_the_untied_run_bit_by_bit(name, tmp_path):
    """Weights, moments of the optimizers (of beta 0: the last gradients) and what is exported."""
    torch.set_num_threads(1)
    kind, method, training = RUNS[name]
    write(kind, tmp_path / kind, WORDS)
    untied = recipe("untied", kind, tmp_path, method, training)
    expected = train(untied, FolderSession(untied.folder), tied=False)
    shared = recipe("tied", kind, tmp_path, method, training)
    found = train(shared, FolderSession(shared.folder), tied=True)
    ours, theirs = found.state(), expected.state()
    assert ours.keys() == theirs.keys()
    moved = [float(value.abs().max()) > 0 for key, value in theirs.items() if key.endswith("lora_B.weight")]
    assert sum(moved) > 0.8 * len(moved) > 0  # nothing reads the text's queries in SD3's last block
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    final = [max(r.folder.glob("cycle-*-final")) for r in (shared, untied)]
    students = [load_student(shared, found.family, folder) for folder in final]
    for expert, denoiser in students[1].items():
        for key, value in denoiser.network.state_dict().items():
            assert torch.equal(students[0][expert].network.state_dict()[key], value), f"{expert}.{key}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_parameter_is_stored_once_and_the_teacher_is_the_teacher(tmp_path, precision):
    kind = "wan22"
    write(kind, tmp_path / kind, WORDS)
    r = recipe("run", kind, tmp_path, RUNS["two experts, a phase each"][1], {"precision": precision})
    family = load_family(r.model)
    alone = load_teacher(family, precision, device=torch.device("cpu"))
    shared = Tied(r, family, torch.device("cpu"))
    roles: list[Any] = [*shared.teacher().modules.values()]
    roles += [shared.expert(role, e) for role in ("student", "fake") for e in family.routing().experts]
    stored = {p.data_ptr(): p for role in roles for p in role.network.parameters()}
    adapters = sum(p.numel() for role in roles for n, p in role.network.named_parameters() if "lora_" in n)
    adapters //= 3  # each network was looked at through its three roles
    whole = sum(p.numel() for module in alone.modules.values() for p in module.parameters())
    assert sum(p.numel() for p in stored.values()) == whole + adapters
    assert sum(p.numel() for p in stored.values() if "float32" in str(p.dtype)) >= adapters
    table = Conditions.read(family.encode(PROMPTS, tmp_path / "conditions"))
    for role in roles:  # a fresh adapter changes nothing
        for name, p in role.network.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    x, cond, uncond = torch.randn(2, *family.shape().latent), table.rows([1, 2]), table.rows([0, 0])
    for t in (0.95, 0.4):
        for role in roles:  # whoever ran last, the teacher is the teacher
            with torch.no_grad():
                found = role(x, torch.full((2,), t), cond)
                ours = shared.teacher().guided_x0(x, torch.full((2,), t), cond, uncond, Guidance(3.0))
                theirs = alone.guided_x0(x, torch.full((2,), t), cond, uncond, Guidance(3.0))
            assert torch.equal(ours, theirs)
            if role.adapter is not None:
                own = shared.teacher().modules[role.adapter.partition("_")[2]]
                with torch.no_grad():
                    assert (found - own(x, torch.full((2,), t), cond)).abs().max() > 1e-3, "its adapter is off"


def two_ranks(rank: int, where: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=rank, world_size=2)
    for sharding in ("ddp", "fsdp"):
        r = ranked(folder, sharding)
        r.folder.mkdir(parents=True, exist_ok=True)
        state = train(r, OneOfSome(r.folder, rank), tied=True).state()
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
        torch.save({k: v.clone() for k, v in whole.items()}, folder / f"{sharding}-{rank}.pt")
        dist.barrier()
    half = derive(ranked(folder, "fsdp"), {"name": "half", "training.precision": "bf16"})
    half.folder.mkdir(parents=True, exist_ok=True)
    train(half, OneOfSome(half.folder, rank), tied=True)  # bf16 networks and fp32 adapters in one group of FSDP's
    dist.destroy_process_group()


def ranked(folder: Path, sharding: str) -> Recipe:
    method = RUNS["two phases on one network"][1]
    return recipe(sharding, "wan21", folder, method, {"sharding": sharding, "gradient_checkpointing": True})


def test_two_tied_ranks_train_what_one_untied_does(tmp_path):
    torch.set_num_threads(1)
    write("wan21", tmp_path / "wan21", WORDS)
    alone = derive(ranked(tmp_path, "ddp"), {"name": "alone"})
    expected = train(alone, FolderSession(alone.folder), tied=False).state()
    multiprocessing.spawn(two_ranks, (port(), tmp_path), nprocs=2)
    for sharding in ("ddp", "fsdp"):
        ranks = [torch.load(tmp_path / f"{sharding}-{rank}.pt") for rank in (0, 1)]
        for key, value in expected.items():
            assert torch.equal(ranks[0][key], ranks[1][key]), f"{sharding}: {key}"
            if ".optimizer." not in key:
                assert (ranks[0][key] - value).abs().max() < 1e-5, f"{sharding}: {key}"
            elif key.endswith(".exp_avg"):
                assert (ranks[0][key] - value).norm() <= 0.01 * value.norm() + 1e-9, f"{sharding}: {key}"


def test_roles_without_adapters_cannot_be_tied():
    with pytest.raises(ValidationError, match=r"set training\.fake\.lora=\{\}"):
        Recipe(placement=Placement(teacher="tied"))
    with pytest.raises(ValidationError, match=r"set training\.student\.lora=\{\} and training\.fake\.lora=\{\}"):
        Recipe(placement=Placement(teacher="tied"), training=Training(student=Role(rate=1e-5)))
    with pytest.raises(ValidationError, match="teachers=2 does nothing with teacher=tied"):
        Placement(teacher="tied", teachers=2)
