"""Diversity, pretrained features and CLIP score: closed forms, and tiny random models against transformers."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from raydmd.errors import InputError
from raydmd.evaluation.diversity import cosine_by_prompt, distance_diversity, pairwise_cosine, pairwise_diversity
from raydmd.evaluation.features import Pooling, load_features
from raydmd.rewards.pictures import Preprocess

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def clips(count: int = 3, frames: int = 1, height: int = 40, width: int = 52, seed: int = 0) -> Tensor:
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def write_processor(folder: Path, **changes: object) -> None:
    config = {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    tokenizer.save_pretrained(folder)
    text = CLIPTextConfig(
        **SMALL, vocab_size=len(words), max_position_embeddings=12, bos_token_id=52, eos_token_id=53, pad_token_id=53
    )
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
        for parameter in model.parameters():  # as made, random CLIPs give nearly the same for all pictures
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    write_processor(folder)
    return folder


def test_diversity_is_zero_for_identical_and_one_for_orthogonal_features() -> None:
    prompts = ["a"] * 3 + ["b"] * 3 + ["c"]
    same = torch.ones(7, 3)
    apart = torch.cat([torch.eye(3), torch.eye(3), torch.ones(1, 3)])
    assert pairwise_diversity(same, prompts) == pytest.approx(0.0, abs=1e-7)
    assert pairwise_diversity(apart, prompts) == pytest.approx(1.0)
    assert pairwise_diversity(same[:2], ["a", "b"]) is None
    assert pairwise_cosine(apart, prompts) == pytest.approx(0.0, abs=1e-7)
    assert pairwise_cosine(same, prompts) == pytest.approx(1.0)
    assert pairwise_cosine(same[:2], ["a", "b"]) is None


def test_cosines_are_averaged_within_prompts_and_then_over_them() -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = ["a", "b", "a", "b", "b", "b", "c"]
    features = torch.randn(7, 5, generator=generator)
    expected = {}
    for prompt in ("a", "b"):
        rows = [i for i, p in enumerate(prompts) if p == prompt]
        pairs = [
            float(torch.cosine_similarity(features[i], features[j], dim=0)) for i, j in itertools.combinations(rows, 2)
        ]
        expected[prompt] = sum(pairs) / len(pairs)
    assert cosine_by_prompt(features, prompts) == pytest.approx(expected, rel=1e-5)
    mean = sum(expected.values()) / 2
    assert pairwise_cosine(100 * features, prompts) == pytest.approx(mean, rel=1e-5)
    assert pairwise_diversity(features, prompts) == pytest.approx(1 - mean, rel=1e-5)
    with pytest.raises(InputError, match="7"):
        pairwise_cosine(features, prompts[:6])


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_distance_diversity_is_the_mean_over_pairs_and_frames(at_once: int) -> None:
    prompts = ["a", "b", "a", "a", "b"]
    given = clips(5, frames=2, height=4, width=4)

    def distance(first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().mean((1, 2, 3))

    def mean(rows: list[int]) -> float:
        pairs = [float((given[i] - given[j]).abs().mean()) for i, j in itertools.combinations(rows, 2)]
        return sum(pairs) / len(pairs)

    found = distance_diversity(given, prompts, distance, pairs_at_once=at_once)
    assert found == pytest.approx((mean([0, 2, 3]) + mean([1, 4])) / 2, rel=1e-5)
    assert distance_diversity(given[:2], ["a", "b"], distance) is None
    with pytest.raises(InputError, match="clips"):
        distance_diversity(given, prompts[:4], distance)


def test_clip_features_are_those_of_the_model(clip_folder: Path) -> None:
    given = clips(3, frames=2, seed=1)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    prepared = Preprocess.read(str(clip_folder))(given.flatten(0, 1))
    with torch.no_grad():
        output = model.vision_model(pixel_values=prepared)
        embeds = model.visual_projection(output.pooler_output)
    hidden = output.last_hidden_state
    expected: dict[Pooling, Tensor] = {
        "cls": hidden[:, 0],
        "tokens": hidden.mean(1),
        "pooled": output.pooler_output,
        "projection": embeds,
    }
    for pooling, frames in expected.items():
        network = load_features(clip_folder, pooling)
        torch.testing.assert_close(network(given), frames.view(3, 2, -1).mean(1))
        assert not any(p.requires_grad for p in network.parameters())
    with pytest.raises(InputError, match="clips must be"):
        load_features(clip_folder, "cls")(given[0])


def test_dino_features_are_pooled(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="image processor's settings"):
        load_features(tmp_path, "pooled")
    write_processor(tmp_path, crop_size={"height": 28, "width": 28})
    network = load_features(tmp_path, "pooled")
    given = clips(2)
    with torch.no_grad():
        expected = model(pixel_values=network.preparation(given[:, 0])).pooler_output
    torch.testing.assert_close(network(given), expected)
    assert pairwise_diversity(network(given), ["a", "a"]) == pytest.approx(
        1 - float(torch.cosine_similarity(expected[0], expected[1], dim=0)), abs=1e-6
    )


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    config = ViTConfig(**SMALL, image_size=32, patch_size=16)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    write_processor(tmp_path)
    with pytest.raises(InputError, match=r"pooler\.dense"):
        load_features(tmp_path, "pooled")
    assert load_features(tmp_path, "tokens")(clips(2)).shape == (2, 16)
    with pytest.raises(InputError, match="nowhere"):
        load_features(tmp_path / "nowhere", "cls")
