"""Noise-image pairs through a real pool: the bytes that a teacher in this process gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from raydmd.errors import DONE, InputError
from raydmd.recipe import Recipe, derive
from raydmd.training.make_pairs import make

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ray
PROMPTS = ["a red bag moving left fast", "something moving up", "something"]


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file() and f.name != "lock"}


def test_a_pool_makes_the_bytes_of_a_teacher_in_this_process(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = derive(
        Recipe(output=tmp_path, deterministic=True),
        {
            "data.prompts": str(tmp_path / "prompts.txt"),
            "method": {"name": "dmd", "regression": {"loss": "l2", "steps": 3}},
            "training.precision": "fp32",
            "placement": {"teachers": 2, "batch_items": 2},
        },
    )
    assert make(recipe, 10, shard=4) == DONE
    assert "shard 3 of 3   10 of 10 pairs" in capsys.readouterr().out
    local = derive(recipe, {"placement": {"teacher": "local", "teachers": 1}})
    try:
        assert make(local, 10, tmp_path / "local", shard=4) == DONE
    finally:
        torch.use_deterministic_algorithms(False)
    assert contents(tmp_path / f"pairs-{recipe.model.path}") == contents(tmp_path / "local")
    with pytest.raises(InputError, match="the cluster has too little CPU"):
        make(derive(recipe, {"placement.teachers": 1000}), 12, tmp_path / "more", shard=4)
