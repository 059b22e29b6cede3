"""Pictures are prepared as transformers' image processors do it; frames are taken evenly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from raydmd.errors import InputError
from raydmd.rewards.pictures import Preprocess, pick_frames

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

SIZES = [(48, 77), (20, 33), (100, 64), (32, 32), (16, 17)]


def levels_apart(ours: Preprocess, processor: Any, picture: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    wanted = processor(picture, return_tensors="pt").pixel_values
    found = ours(pixels)
    assert found.shape == wanted.shape
    return (found - wanted).abs() * torch.tensor(ours.std).view(3, 1, 1) * 255


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_are_prepared_as_transformers_does(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    apart = levels_apart(Preprocess(size=32, crop=(32, 32)), processor, noise)
    # PIL filters in fixed point: a value near a half may round the other way.
    assert apart.max() < 1.01
    assert (apart > 0.01).float().mean() < 0.002


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_that_lose_their_aspect_ratio_are_prepared_as_transformers_does(size: tuple[int, int]) -> None:
    coarse = np.random.default_rng(0).integers(60, 196, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)).copy()
    processor = BlipImageProcessorPil(size={"height": 24, "width": 40})
    apart = levels_apart(Preprocess(size=(24, 40)), processor, smooth)
    assert apart.max() < 1.01
    assert apart.mean() < 0.2


def test_picture_settings_are_read_or_refused(tmp_path: Path) -> None:
    def settings(**changes: Any) -> str:
        old = {"size": 30, "crop_size": 28, "do_center_crop": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(old | changes))
        return str(tmp_path)

    old_format = Preprocess(size=30, crop=(28, 28), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert Preprocess.read(settings()) == old_format
    assert Preprocess.read(settings(do_center_crop=False)).crop is None
    assert Preprocess.read(settings(size={"height": 40, "width": 50})).size == (40, 50)
    assert Preprocess.read(settings(resample=2)).filter == "bilinear"
    for wrong in ({"resample": 1}, {"do_normalize": False}, {"size": {"longest_edge": 30}}, {"crop_size": 31}):
        with pytest.raises(InputError):
            Preprocess.read(settings(**wrong))
    with pytest.raises(InputError, match="image processor"):
        Preprocess.read(str(tmp_path / "none"))


def test_frames_are_the_middles_of_equal_parts() -> None:
    pixels = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(2, 9, 3, 4, 4)
    for count, wanted in {1: [4], 3: [1, 4, 7], 9: list(range(9)), 20: list(range(9))}.items():
        assert pick_frames(pixels, count)[1, :, 0, 0, 0].tolist() == wanted
