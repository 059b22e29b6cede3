"""Metrics, motion and the judge against closed forms and clips of known content."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raydmd.errors import InputError, NonFiniteError
from raydmd.evaluation.metrics import (
    accuracy_by_stated,
    attribute_accuracy,
    brightness,
    coverage,
    saturation,
)
from raydmd.evaluation.motion import dynamic_degree, optical_flow
from raydmd.evaluation.samples import Samples, evaluation_prompts
from raydmd.zoo.judge import AttributeJudge, Body, train_judge
from raydmd.zoo.world import ATTRIBUTES, FRAMES, PIXELS_PER_FRAME, SIZE, MovingCaption, World

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit


def predictions(*captions: MovingCaption) -> dict[str, Tensor]:
    """What a perfect judge says of clips that show exactly these captions."""
    return {
        name: torch.tensor([values.index(getattr(c, name)) for c in captions]) for name, values in ATTRIBUTES.items()
    }


def shown(**changes: str) -> MovingCaption:
    full = {"item": "bag", "colour": "red", "direction": "left", "speed": "fast"}
    return MovingCaption(**(full | changes))


def test_accuracy_counts_only_what_is_stated() -> None:
    prompts = ["a red thing", "a red bag", "something", "a big dog, running"]
    seen = predictions(shown(item="coat"), shown(item="coat"), shown(), shown(colour="blue"))
    accuracy = attribute_accuracy(prompts, seen)
    assert accuracy == {
        "item": 0.0,
        "colour": 1.0,
        "direction": None,
        "speed": None,
        "joint": 0.5,
    }


def test_accuracy_by_stated_grows_harder_with_every_attribute() -> None:
    prompts = ["a red thing", "a blue thing", "a red bag", "a red bag moving left fast", "something", "no caption"]
    seen = predictions(*[shown(direction="right")] * 6)
    found = accuracy_by_stated(prompts, seen)
    assert set(found) == {1, 2, 4}
    assert found[1] == {"item": None, "colour": 0.5, "direction": None, "speed": None, "joint": 0.5}
    assert found[2]["joint"] == 1.0
    assert found[4] == {"item": 1.0, "colour": 1.0, "direction": 0.0, "speed": 1.0, "joint": 0.0}


def test_uniform_predictions_cover_everything() -> None:
    prompts = ["something moving left fast"] * 32
    every = itertools.product(ATTRIBUTES["item"], ATTRIBUTES["colour"])
    found = coverage(prompts, predictions(*[shown(item=i, colour=c) for i, c in every]))
    for table in found.values():
        assert set(table) == {"item", "colour", "mean"}
        assert table["mean"]["entropy"] == pytest.approx(1.0)
        assert table["mean"]["distance"] == pytest.approx(0.0)
        assert table["mean"]["missing"] == 0.0
    assert found["grouped"]["item"]["missing_by_chance"] == pytest.approx((7 / 8) ** 32)


def test_collapsed_predictions_miss_modes() -> None:
    found = coverage(["a bag moving left fast"] * 8, predictions(*[shown()] * 8))
    assert set(found["grouped"]) == {"colour", "mean"}
    colour = found["grouped"]["colour"]
    assert colour["entropy"] == 0.0
    assert colour["missing"] == 0.75
    assert colour["distance"] == pytest.approx(0.75)


def test_collapse_within_prompts_shows_in_groups_and_not_in_the_pool() -> None:
    pairs = list(zip(("bag", "coat", "dress", "boot"), ATTRIBUTES["colour"], strict=True))
    prompts = [f"a {item} moving left fast" for item, _ in pairs for _ in range(4)]
    seen = predictions(*[shown(item=i, colour=c) for i, c in pairs for _ in range(4)])
    found = coverage(prompts, seen)
    assert found["grouped"]["colour"]["entropy"] == 0.0
    assert found["pooled"]["colour"]["entropy"] == pytest.approx(1.0)
    few = coverage(prompts[:3], {name: v[:3] for name, v in seen.items()})
    assert few["grouped"] == {}
    assert few["pooled"]["colour"]["missing"] == 0.75


def test_brightness_and_saturation_of_flat_colours() -> None:
    clips = torch.zeros(1, 2, 3, 4, 4)
    clips[:, :, 0] = 0.9
    clips[:, :, 1] = 0.3
    assert brightness(clips) == pytest.approx(0.4)
    assert saturation(clips) == pytest.approx(0.9)
    assert saturation(torch.full_like(clips, 0.5)) == 0.0


def moving(speed: str, count: int = 6) -> Tensor:
    """Clips ``(N, F, 3, H, W)`` of known speed: the world's, or squares without its data."""
    generator = torch.Generator().manual_seed(0)
    try:
        world = World(split="t10k")
    except FileNotFoundError:
        return torch.stack([square(PIXELS_PER_FRAME[speed], generator) for _ in range(count)])
    clips, _ = world.clips([MovingCaption(speed=speed)] * count, generator=generator)
    return clips.transpose(1, 2) / 2 + 0.5


def square(speed: float, generator: torch.Generator) -> Tensor:
    texture = F.interpolate(0.4 + 0.6 * torch.rand(1, 3, 6, 6, generator=generator), size=16, mode="bilinear")
    canvas = F.pad(texture, (8, 8, 8, 8)).expand(FRAMES, -1, -1, -1)
    theta = torch.eye(2, 3).repeat(FRAMES, 1, 1)
    theta[:, 0, 2] = (torch.arange(FRAMES) - (FRAMES - 1) / 2) * speed * 2 / SIZE
    grid = F.affine_grid(theta, [FRAMES, 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(canvas, grid, align_corners=False).clamp(0, 1)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_flow_tells_slow_from_fast_and_both_in_pixels(noise: float) -> None:
    generator = torch.Generator().manual_seed(2)
    flows = {}
    for speed in PIXELS_PER_FRAME:
        clips = moving(speed)
        clips = clips + noise * torch.randn(clips.shape, generator=generator)
        flows[speed] = optical_flow(clips.clamp(0, 1))
    # The world adds up to 0.5 pixels of sway across the path and 10% either way along it.
    assert flows["slowly"].mean() == pytest.approx(0.75, abs=0.15)
    assert flows["fast"].mean() == pytest.approx(1.8, abs=0.2)
    assert flows["slowly"].max() < flows["fast"].min()
    assert dynamic_degree(torch.cat(list(flows.values())), 1.3) == 0.5


@pytest.mark.parametrize("speed", [0.7, 1.8])
def test_flow_of_squares_needs_no_data(speed: float) -> None:
    clip = square(speed, torch.Generator().manual_seed(0))[None]
    assert float(optical_flow(clip)) == pytest.approx(speed, rel=0.15)


def test_flow_of_nothing_is_zero_and_of_images_an_error() -> None:
    assert optical_flow(torch.zeros(2, 3, 3, SIZE, SIZE)).tolist() == [0.0, 0.0]
    # The middle frame: Farneback's flow is not exact at the picture's edge, where the first ones show a part of theirs.
    middle = FRAMES // 2
    still = moving("fast", count=1)[:, middle : middle + 1].expand(-1, 4, -1, -1, -1)
    assert float(optical_flow(still)) == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(InputError, match="F >= 2"):
        optical_flow(torch.zeros(2, 1, 3, SIZE, SIZE))


def render(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flat colours for labels, the rest of the attributes constant."""
    colour = torch.randint(3, (batch,), generator=generator)
    clips = torch.zeros(batch, FRAMES, 3, SIZE, SIZE)
    clips[torch.arange(batch), :, colour] = 0.8
    labels = torch.zeros(batch, 4, dtype=torch.long)
    labels[:, 1] = colour
    return clips, labels


@pytest.mark.parametrize("body", ["conv", "attention"])
def test_a_judge_learns_and_survives_its_file(body: Body, tmp_path: Path) -> None:
    ticks = itertools.count()
    judge = train_judge(render, minutes=0.25, seed=0, body=body, clock=lambda: float(next(ticks)))
    assert next(ticks) == 16  # one look before and one after each of 15 steps
    clips, labels = render(12, torch.Generator().manual_seed(9))
    assert torch.equal(judge.predict(clips)["colour"], labels[:, 1])
    judge.save(tmp_path / "deep" / "judge.safetensors")
    again = AttributeJudge.load(tmp_path / "deep" / "judge.safetensors")
    assert torch.equal(judge.features(clips), again.features(clips))
    assert judge.features(clips).shape == (12, 64)


def test_a_judge_says_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        AttributeJudge.load(tmp_path / "nowhere.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        AttributeJudge.load(broken)
    with pytest.raises(InputError, match="shape"):
        AttributeJudge().features(torch.zeros(1, 5, 3, SIZE, SIZE))
    with pytest.raises(InputError, match="minutes"):
        train_judge(render, minutes=0.0, seed=0)


def test_prompts_are_singles_and_open_groups() -> None:
    prompts = evaluation_prompts(64, seed=5)
    assert prompts == evaluation_prompts(64, seed=5)
    assert prompts != evaluation_prompts(64, seed=6)
    assert len(prompts) == 64
    repeated = [prompts[i : i + 8] for i in range(32, 64, 8)]
    assert all(len(set(group)) == 1 and MovingCaption.parse(group[0]).open for group in repeated)
    assert len({group[0] for group in repeated}) == 4
    assert len(evaluation_prompts(7, seed=5)) == 7
    assert evaluation_prompts(0, seed=5) == []
    many = evaluation_prompts(4000, seed=5, group=2)
    assert len(many) == 4000
    with pytest.raises(InputError):
        evaluation_prompts(8, seed=0, group=1)


@pytest.mark.parametrize(
    ("clips", "error", "word"),
    [
        (torch.zeros(2, 3, 4, 4), InputError, "shape"),
        (torch.zeros(2, 2, 3, 4, 4, dtype=torch.uint8), InputError, "float"),
        (torch.zeros(3, 2, 3, 4, 4), InputError, "2 prompts"),
        (torch.zeros(0, 2, 3, 4, 4), InputError, "no clips"),
        (torch.full((2, 2, 3, 4, 4), -1.0), InputError, r"\[0, 1\]"),
        (torch.full((2, 2, 3, 4, 4), math.nan), NonFiniteError, "clip 0"),
    ],
)
def test_samples_refuse_what_no_metric_reads(clips: Tensor, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        Samples(name="s", title="S", clips=clips, prompts=["a", "b"], evaluations=1, seconds=0.1)
