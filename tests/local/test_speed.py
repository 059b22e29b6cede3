"""A frozen teacher made faster gives the same answers, or near ones."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest
import torch

from raydmd.errors import InputError
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.recipe import Model
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Model:
    folder = wan_pipeline(tmp_path_factory.mktemp("wan"), layers=2)
    return Model(path=str(folder), frames=5, height=32, width=32)


def answers(settings: Model, cache: Path, **how) -> torch.Tensor:
    family = load_family(settings)
    table = Conditions.read(family.encode(["a cat runs"], cache))
    teacher = load_teacher(family, "fp32", device=torch.device("cpu"), experts=(family.routing().experts[0],), **how)
    assert list(teacher.modules) == [family.routing().experts[0]]
    x_t = torch.randn(2, *family.shape().latent, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return teacher.x0(x_t, torch.tensor([0.95, 0.99]), table.rows([1, 1]))


def test_a_compiled_teacher_answers_as_a_plain_one(settings, tmp_path):
    plain = answers(settings, tmp_path)
    torch.testing.assert_close(answers(settings, tmp_path, compile_mode="default"), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_quantised_teacher_answers_nearly_so(settings, tmp_path):
    plain = answers(settings, tmp_path)
    near = answers(settings, tmp_path, quantize="int8")
    assert not torch.equal(near, plain)
    assert (near - plain).norm() < 0.02 * plain.norm()


def test_quantising_without_torchao_says_what_to_install(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install torchao"):
        answers(settings, tmp_path, quantize="int8")
