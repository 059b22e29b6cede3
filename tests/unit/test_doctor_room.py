"""``raydmd doctor``'s figure of how large checkpoints get, against what training would write."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from raydmd.doctor.room import largest, need_of
from raydmd.methods.presets import build_method, student_routing
from raydmd.models import load_family
from raydmd.recipe import Recipe, derive
from raydmd.training import checkpoint
from raydmd.training.adversary import make_heads
from raydmd.training.build import Building

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit
LORA = {"rank": 4, "alpha": 4.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "dmd2"}, "training.ema": 0.0},
        {"method": {"name": "phased"}, "training.ema": 0.99},
        {"method": {"name": "phased"}, "training.student.lora": LORA},
        {
            "method": {"name": "dmd2", "gan": {"data": "clips", "depths": (0.5, 1.0)}},
            "training.student.lora": LORA,
            "training.fake.lora": LORA,
        },
    ],
    ids=lambda changes: " ".join(map(str, changes)),
)
def test_the_largest_checkpoint_is_what_training_writes(changes: dict[str, Any]) -> None:
    """As :mod:`raydmd.training.worker` makes the roles of each phase, and exports the student after the last."""
    recipe = derive(Recipe(), {"model.path": "wan22-tiny", "training.sharding": "ddp", **changes})
    family, session = load_family(recipe.model), SimpleNamespace(rank=0, device=torch.device("cpu"), tokens=None)
    method = build_method(recipe.method, family.routing(), family.process, family.prediction)
    building, t = Building(recipe, family, session, None), recipe.training  # type: ignore[arg-type]
    sizes, finished = [], tuple[str, ...]()
    for phase in method.phases:
        needed = tuple(dict.fromkeys((*finished, *phase.student)))
        student = {e: building.expert("student", e) for e in needed}
        routing = student_routing(recipe.method, family.routing())
        trained = building.role("student", student, phase.student, finished, t.student, routing)
        fake = {e: building.expert("fake", e) for e in phase.fake_experts}
        heads = make_heads(recipe.method.gan, fake, seed=0, device=session.device)
        critic = building.role("fake", fake, phase.fake_experts, (), t.fake, family.routing(), heads)
        sizes.append(checkpoint.size({**trained.tensors(), **critic.tensors()}))
        finished = needed
    sizes[-1] += trained.written()
    assert largest(recipe) == pytest.approx(max(sizes), rel=0.01)  # beside it counters of steps, a few bytes each


def test_room_that_a_run_needs(tmp_path: Path) -> None:
    recipe = derive(Recipe(), {"output": tmp_path, "name": "wan", "checkpoints.keep": 3})
    need = need_of(recipe)
    assert need
    assert (need.path, need.count) == (str(tmp_path), 4), "one is written before the oldest goes"
    assert need.each == largest(recipe) / 2**30
    wan = {"model.path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "method.name": "phased"}
    two_full = need_of(derive(recipe, {**wan, "training.student.lora": LORA, "training.fake.lora": None}))
    assert two_full
    assert two_full.each * 2**30 == pytest.approx(2 * 3 * 4 * 14.29e9, rel=0.01), "both experts of the fake score"
    for known in ("cycle-00000200", "cycle-00000400"):
        (tmp_path / "wan" / "train" / known).mkdir(parents=True)
    again = need_of(recipe)
    assert again
    assert again.count == 2, "a run that is resumed has some of them"
    assert need_of(derive(recipe, {"checkpoints.storage": "s3://bucket/runs"})) is None
    assert need_of(derive(recipe, {"model.path": str(tmp_path / "nothing")})) is None
