"""Prompts encoded by processes of a cluster: spread, stopped, resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import ray
import torch

from raydmd.errors import RunFailed, RunStopped
from raydmd.models import load_family
from raydmd.models.base import Conditions
from raydmd.models.family import Family
from raydmd.recipe import Recipe, derive
from raydmd.training.cluster import connect
from raydmd.training.encoding import encode
from tests.pipelines import sd3_pipeline

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ray
PROMPTS = ["a cat", "a dog runs", "a", "a cat jumps"]


def test_prompts_are_encoded_by_processes_of_the_cluster(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(Family, "part", 2)
    model = sd3_pipeline(tmp_path / "sd3")
    recipe = derive(Recipe(output=tmp_path), {"model.path": str(model), "training.step_timeout": 120})
    family = load_family(recipe.model)
    connect()
    try:
        stop = tmp_path / "STOP"
        stop.touch()
        with pytest.raises(RunStopped, match="parts of prompts it encoded are kept"):
            encode(recipe, family, PROMPTS, tmp_path / "cache", stop)
        stop.unlink()
        found = Conditions.read(encode(recipe, family, PROMPTS, tmp_path / "cache", stop))
        assert "of 2" in capsys.readouterr().out
        lost = derive(recipe, {"model.path": str(tmp_path / "sd3"), "model.text_length": 5})
        other = load_family(lost.model)
        (model / "text_encoder" / "config.json").unlink()
        with pytest.raises(RunFailed, match="encoding prompts: "):
            encode(lost, other, PROMPTS, tmp_path / "broken", stop)
    finally:
        ray.shutdown()
    sd3_pipeline(tmp_path / "again")
    again = load_family(recipe.model.model_copy(update={"path": str(tmp_path / "again")}))
    alone = Conditions.read(again.encode(PROMPTS, tmp_path / "alone"))
    torch.testing.assert_close(found.embeds, alone.embeds, rtol=0, atol=1e-6)
