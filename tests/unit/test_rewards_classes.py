"""The reward of class-conditional models, against transformers' own image classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from raydmd.errors import InputError
from raydmd.recipe_method import Reward as RewardSpec
from raydmd.rewards.build import build

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit
PROMPTS = ["4", "0", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = ConvNextV2Config(
        num_channels=3, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=32, num_labels=5
    )
    model = ConvNextV2ForImageClassification(config)
    with torch.no_grad():
        for weight in model.parameters():  # transformers' own start is so small that all classes are alike
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_it_is_the_classifiers_log_probability_of_the_prompts_class(folder: Path) -> None:
    pixels = torch.randint(256, (3, 2, 3, 32, 32), generator=torch.Generator().manual_seed(1)) / 255  # of 8 bits
    model = ConvNextV2ForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logs = model(pixel_values=pixels.flatten(0, 1) * 2 - 1).logits.log_softmax(1).view(3, 2, 5)
    wanted = torch.stack([logs[i, :, int(text)].mean() for i, text in enumerate(PROMPTS)])
    reward = build([RewardSpec(kind="class", path=str(folder), frames=2)])
    values = reward.score(pixels, PROMPTS, range(3))
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-4)
    assert logs.std() > 0.1, "a classifier that knows no classes would show nothing"
    assert values.max() < 0
    assert not values.requires_grad


@pytest.mark.parametrize("prompt", ["5", "-1", "a cat", ""])
def test_a_prompt_that_is_no_class_is_refused(folder: Path, prompt: str) -> None:
    reward = build([RewardSpec(kind="class", path=str(folder))])
    with pytest.raises(InputError, match=r"reads numbers of classes, 0 to 4, given"):
        reward(torch.rand(1, 1, 3, 32, 32), [prompt])


def test_a_missing_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs an image classifier"):
        build([RewardSpec(kind="class")])
    with pytest.raises(InputError, match="no AutoModelForImageClassification can be read"):
        build([RewardSpec(kind="class", path=str(tmp_path))])
