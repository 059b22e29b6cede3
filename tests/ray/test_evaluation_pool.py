"""The evaluation's clips of the teacher: walked by its pool, equal to a teacher's in this process, kept for others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import helpers
import pytest
import torch

from raydmd.models import load_family
from raydmd.recipe import Recipe, derive
from raydmd.training.clips import ask, at_pool, teacher_samples
from raydmd.training.encoding import training_prompts
from raydmd.training.pools import teacher_pool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

TEXTS = ["a red disc moves right", "a blue square moves up", "a red disc moves right"]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with helpers.own_cluster(deterministic=True):
        yield


def recipe(output: Path) -> Recipe:
    changes = {
        "model.path": "wan22-tiny",
        "training.precision": "fp32",
        "evaluation.teacher_steps": 6,
        "evaluation.samples": len(TEXTS),
        "evaluation.batch": 2,
        "placement.teacher_cpus": 0.1,
    }
    return derive(Recipe(output=output, deterministic=True), changes)


def test_a_pool_makes_the_clips_that_a_teacher_here_makes_and_they_are_kept(tmp_path: Path) -> None:
    one, other = recipe(tmp_path / "one"), recipe(tmp_path / "other")
    family, cpu = load_family(one.model), torch.device("cpu")
    assert at_pool(one, family)
    here = list(teacher_samples(ask(one, family, TEXTS, cpu), None))
    table = family.encode(training_prompts(one, family)[:4], tmp_path)
    with teacher_pool(other, family, table, family.shape().latent) as pool:
        asked = ask(other, family, TEXTS, cpu)
        there = list(teacher_samples(asked, pool.client_spec()))
    assert [s.name for s in there] == ["teacher", "reference", "undistilled", "undistilled_guided"]
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.clips, b.clips)
        assert b.seconds > 0
    assert not torch.equal(there[0].clips, there[1].clips)  # other noise

    # The pool is gone: what follows comes from the files, and the damaged one is of no use.
    again = list(teacher_samples(asked, pool.client_spec()))
    assert all(torch.equal(a.clips, b.clips) for a, b in zip(again, there, strict=True))
    files = sorted(asked.file.parent.glob("clips-*.safetensors"))
    assert len(files) == 4
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    anew = list(teacher_samples(asked, None))
    assert all(torch.equal(a.clips, b.clips) for a, b in zip(anew, there, strict=True))


@pytest.mark.parametrize(
    ("changes", "pooled"),
    [
        ({}, True),
        ({"teacher": "local"}, False),
        ({"teacher_quantize": "int8"}, False),
        ({"teacher_gpus": 2.0}, False),
        ({"teacher_experts": 1}, False),  # one replica cannot hold both at once
        ({"teacher_experts": 1, "teachers": 2}, True),
    ],
)
def test_who_walks(tmp_path: Path, changes: dict[str, object], pooled: bool) -> None:
    plain = recipe(tmp_path)
    made = plain.model_copy(update={"placement": plain.placement.model_copy(update=changes)})
    assert at_pool(made, load_family(made.model)) is pooled
