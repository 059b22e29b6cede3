"""The zoo's two worlds: their captions, and pictures of known content from a data set made here."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from raydmd.errors import InputError
from raydmd.evaluation.metrics import attribute_accuracy, coverage
from raydmd.evaluation.samples import evaluation_prompts
from raydmd.rewards.classifier import ClassifierReward
from raydmd.zoo.judge import LANGUAGES, AttributeJudge, Body
from raydmd.zoo.make_experts import TEXT_LENGTH, build_tokenizer
from raydmd.zoo.make_vae import build_deeper_vae, build_image_vae
from raydmd.zoo.still import PLACES, SIZES, StillCaption, StillWorld
from raydmd.zoo.world import COLOURS, ITEMS, LEVEL, Caption, MovingCaption, World

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Fashion-MNIST's files with two white squares per class."""
    files = {"images-idx3": np.full((20, 28, 28), 255, np.uint8), "labels-idx1": np.arange(20, dtype=np.uint8) % 10}
    for kind, array in files.items():
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        with gzip.open(tmp_path / f"train-{kind}-ubyte.gz", "wb") as file:
            file.write(head + array.tobytes())
    return tmp_path


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_caption_is_read_back_and_none_has_another_ones_text(language: type[Caption]) -> None:
    every = list(language.every())
    assert len({c.text for c in every}) == len(every) == 9 * 5 * 5 * 3
    assert all(language.parse(c.text) == c for c in every)
    assert all(set(c.stated) | set(c.open) == set(language.attributes) for c in every)
    assert not language.knows("a dog top left")
    with pytest.raises(ValueError, match="not a caption"):
        language.parse("a dog top left")


def test_the_worlds_differ_in_what_they_can_say() -> None:
    caption = StillCaption(item="sneaker", colour="red", place="top left", size="small")
    assert caption.text == "a red sneaker top left small"
    assert StillCaption(size="large").text == "something large"
    assert MovingCaption(item="sneaker", direction="left").text == "a sneaker moving left"
    assert not MovingCaption.knows(caption.text)
    assert StillCaption.parse("a red bag").open == ("place", "size")
    assert MovingCaption.parse("a red bag").open == ("direction", "speed")


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_are_drawn_as_asked(language: type[Caption]) -> None:
    assert language.draw(20, seed=3) == language.draw(20, seed=3)
    assert all(not c.open for c in language.draw(50, seed=1, keep=1.0))
    assert all(not c.stated for c in language.draw(50, seed=1, keep=0.0))
    share = np.mean([len(c.stated) / 4 for c in language.draw(500, seed=1)])
    assert share == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize("preface", ["", "Be an assistant, please. <Start>"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_prompt_fits_its_tokens(language: type[Caption], preface: str) -> None:
    tokenizer = build_tokenizer(language, preface=preface)
    texts = [f"{preface} {c.text}".strip() for c in language.every()]
    ids = tokenizer(texts, padding="longest", return_tensors="pt").input_ids
    assert ids.shape[1] <= TEXT_LENGTH
    assert (ids != tokenizer.unk_token_id).all()
    assert ((ids == tokenizer.eos_token_id).sum(1) == 1).all()


def test_a_deeper_autoencoder_begins_with_the_outer_levels_of_its_model() -> None:
    shallow = build_image_vae()
    deep = build_deeper_vae(shallow)
    assert deep.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode().shape == (1, 16, 4, 4)
    for own, taken in (
        (deep.encoder.down_blocks[:2], shallow.encoder.down_blocks[:2]),
        (deep.decoder.up_blocks[1:], shallow.decoder.up_blocks),
    ):
        assert all(torch.equal(weight, taken.state_dict()[name]) for name, weight in own.state_dict().items())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("place", PLACES)
def test_a_picture_shows_its_caption(data: Path, place: str, size: str) -> None:
    generator = torch.Generator().manual_seed(0)
    captions = [StillCaption(colour=colour, place=place, size=size) for colour in COLOURS for _ in range(4)]
    pictures, labels = StillWorld(data).clips(captions, generator=generator)
    assert pictures.shape == (16, 3, 32, 32)
    assert labels[:, 1:].tolist() == [
        [COLOURS.index(c.colour), PLACES.index(place), SIZES.index(size)] for c in captions
    ]
    assert pictures.amin() == -LEVEL
    assert pictures.amax() <= LEVEL
    shown = (pictures.amax(1) > 0).float()
    rows, columns = (shown.sum(axis) > 0 for axis in (2, 1))
    side = rows.sum(1).float()
    assert side.mean() == pytest.approx({"small": 12.4, "large": 19.2}[size], abs=1.2)
    down, across = ((lines * torch.arange(32)).sum(1) / lines.sum(1) - 15.5 for lines in (rows, columns))
    for found, low in ((down, "top" in place), (across, "left" in place)):
        assert ((found < -3) if low else (found > 3)).all()


def test_what_a_caption_leaves_open_is_uniform(data: Path) -> None:
    _, labels = StillWorld(data).clips([StillCaption()] * 1600, generator=torch.Generator().manual_seed(0))
    for column, values in enumerate((ITEMS, COLOURS, PLACES, SIZES)):
        counts = torch.bincount(labels[:, column], minlength=len(values)) / 1600
        assert (counts - 1 / len(values)).abs().max() < 0.04


def test_clips_still_have_their_frames(data: Path) -> None:
    clips, labels = World(data).clips([MovingCaption()] * 2, generator=torch.Generator().manual_seed(0))
    assert (clips.shape, labels.shape) == ((2, 3, 9, 32, 32), (2, 4))


@pytest.mark.parametrize("body", ["conv", "attention"])
def test_a_judge_of_pictures_survives_its_file_and_reads_no_clips(body: Body, tmp_path: Path) -> None:
    judge = AttributeJudge(StillCaption, body).eval()
    judge.save(tmp_path / "judge.safetensors")
    again = AttributeJudge.load(tmp_path / "judge.safetensors")
    assert again.language is StillCaption
    pictures = torch.rand(3, 1, 3, 32, 32)
    assert torch.equal(judge.features(pictures), again.features(pictures))
    assert {k: v.shape for k, v in again.predict(pictures).items()} == dict.fromkeys(StillCaption.attributes, (3,))
    with pytest.raises(InputError, match=r"\(N, 1, 3, 32, 32\)"):
        again.predict(torch.rand(3, 9, 3, 32, 32))
    reward = ClassifierReward(again)
    assert reward(pictures, ["a bag top left", "something", "something large"]).shape == (3,)
    with pytest.raises(InputError, match="zoo's captions"):
        reward(pictures, ["a bag moving left", "something", "something"])


def test_metrics_follow_the_judges_language() -> None:
    seen = {"item": torch.tensor([6, 6]), "colour": torch.tensor([0, 1])}
    seen |= {"place": torch.tensor([0, 3]), "size": torch.tensor([1, 1])}
    prompts = ["a red bag top left", "a red bag top left"]
    accuracy = attribute_accuracy(prompts, seen, StillCaption)
    assert accuracy == {"item": 1.0, "colour": 0.5, "place": 0.5, "size": None, "joint": 0.5}
    assert set(coverage(prompts, seen, StillCaption)["pooled"]) == {"size", "mean"}
    asked = evaluation_prompts(64, seed=5, language=StillCaption)
    assert all(StillCaption.knows(p) for p in asked)
    assert any("left" in p for p in asked)
