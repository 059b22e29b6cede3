"""What an evaluation measures with beside a judge: networks, held-out rewards, and where they appear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from raydmd.errors import InputError
from raydmd.evaluation.check import check_instruments
from raydmd.evaluation.distances import embed, frechet, precision_recall, vendi
from raydmd.evaluation.diversity import pairwise_diversity
from raydmd.evaluation.evaluate import evaluate
from raydmd.evaluation.features import load_features
from raydmd.evaluation.instruments import load_instruments
from raydmd.evaluation.samples import Samples
from raydmd.recipe import Recipe, derive
from raydmd.recipe_method import Reward
from raydmd.rewards.build import load
from tests.unit.test_diversity import clip_folder, write_processor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit
__all__ = ["clip_folder"]
PROMPTS = ["a cat", "a cat", "a dog", "a dog", "a bird", "a bird"]


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(
            Dinov2Config(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
            )
        ).save_pretrained(folder)
    write_processor(folder)
    return folder


def samples(name: str, seed: int) -> Samples:
    clips = torch.rand(len(PROMPTS), 2, 3, 40, 40, generator=torch.Generator().manual_seed(seed))
    return Samples(name=name, title=name, clips=clips, prompts=PROMPTS, evaluations=4, seconds=0.1)


def test_networks_and_rewards_have_columns_with_their_figures(dino, clip_folder):
    settings = derive(
        Recipe(),
        {
            "evaluation.networks": [{"name": "dino", "path": str(dino)}, {"name": "clip", "path": str(clip_folder)}],
            "evaluation.rewards": [{"kind": "clip", "path": str(clip_folder)}],
        },
    ).evaluation
    check_instruments(settings)
    tools = load_instruments(settings, judge=None, device=torch.device("cpu"))
    teacher, other, student = samples("reference", 0), samples("teacher", 1), samples("student", 2)
    found = evaluate(teacher, other, [samples("undistilled", 3), student], None, tools)
    network = load_features(str(dino), "pooled")
    theirs, ours = embed(network, teacher.clips), embed(network, student.clips)
    row = found.row("student")
    assert row["frechet_dino"] == pytest.approx(frechet(theirs, ours))
    assert row["diversity_dino"] == pytest.approx(pairwise_diversity(ours, PROMPTS))
    assert row["vendi_dino"] == pytest.approx(vendi(ours))
    assert row["recall_dino"] == precision_recall(theirs, ours).recall
    reward = load(Reward(kind="clip", path=str(clip_folder)))
    assert row["reward_clip"] == pytest.approx(float(reward(student.clips, PROMPTS).mean()), rel=1e-5)
    assert found.row("reference")["frechet_dino"] == pytest.approx(0.0, abs=1e-4)
    shown = {c.key for c in found.shown()}
    assert {"frechet_dino", "diversity_clip", "precision_dino", "reward_clip"} <= shown
    assert "Fréchet dino" in found.text()
    assert "frechet_dino" in found.to_json()["rows"][0]


def test_folders_that_are_not_there_are_refused_before_the_start():
    wrong = derive(Recipe(), {"evaluation.networks": [{"name": "dino", "path": "./none"}]})
    with pytest.raises(InputError, match=r"evaluation\.networks\.dino\.path: there is no './none'"):
        check_instruments(wrong.evaluation)
    check_instruments(
        derive(Recipe(), {"evaluation.networks": [{"name": "dino", "path": "facebook/dinov2-base"}]}).evaluation
    )
    with pytest.raises(InputError, match="must differ in name"):
        derive(Recipe(), {"evaluation.networks": [{"name": "a", "path": "x/y"}, {"name": "a", "path": "x/z"}]})
