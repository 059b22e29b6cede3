"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import yaml

from raydmd.errors import InputError
from raydmd.recipe import Recipe, combine, derive, known_keys, load, parse_override
from raydmd.recipe_io import ALIASES, nearest
from raydmd.recipe_monitor import SIGNALS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit


def refused(*overrides: str) -> str:
    with pytest.raises(InputError) as info:
        combine(Recipe(), overrides=overrides)
    return str(info.value)


def test_defaults_are_the_papers() -> None:
    recipe = Recipe()
    assert recipe.method.name == "phased"
    assert recipe.method.boundaries == (0.875,)
    assert (recipe.method.steps, recipe.method.shift) == (4, 5.0)
    assert (recipe.training.student.rate, recipe.training.fake.rate) == (5e-5, 4e-7)
    assert recipe.training.student.lora is not None
    assert (recipe.training.student.lora.rank, recipe.training.student.lora.alpha) == (64, 8.0)


def test_yaml_round_trip(tmp_path: Path) -> None:
    changes = {
        "method.name": "dmd2",
        "training": {"fake": {"lora": {"rank": 8}}, "phase_split": [1.0]},
        "placement.worker_resources": {"trainer": 1},
        "data.prompts": "prompts.txt",
    }
    recipe = derive(Recipe(), changes)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load(file, Recipe()) == recipe


def test_later_changes_win_and_the_parent_stays(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("training: {cycles: 7, batch: 32}\nseed: 3\n")
    parent = derive(Recipe(), {"name": "parent", "seed": 1})
    recipe = combine(parent, file=file, overrides=["seed=5"])
    assert (recipe.name, recipe.seed) == ("parent", 5)
    assert (recipe.training.cycles, recipe.training.batch) == (7, 32)
    assert parent.seed == 1


def test_values_are_read_by_what_the_setting_holds() -> None:
    recipe = combine(
        Recipe(),
        overrides=[
            "training.student.rate=1e-5",
            "method.boundaries=[0.9, 0.7]",
            "name=2024-01-01",
            "model.revision=0123",
            "model.negative_prompt=blurry: bad, [ugly] #1",
            "placement.worker_resources={trainer: 1}",
            "training.fake.lora={}",
            "training.student.lora=null",
            "deterministic=true",
        ],
    )
    assert recipe.training.student.rate == 1e-5
    assert recipe.method.name == "phased"
    assert recipe.method.boundaries == (0.9, 0.7)
    assert (recipe.name, recipe.model.revision) == ("2024-01-01", "0123")
    assert recipe.model.negative_prompt == "blurry: bad, [ugly] #1"
    assert recipe.placement.worker_resources == {"trainer": 1.0}
    assert recipe.training.fake.lora is not None
    assert recipe.training.student.lora is None
    assert recipe.deterministic
    assert parse_override("model.negative_prompt=''") == ("model.negative_prompt", "")


def test_a_section_on_the_way_is_switched_on() -> None:
    recipe = derive(Recipe(), {"training.fake.lora.rank": 8})
    assert recipe.training.fake.lora is not None
    assert recipe.training.fake.lora.rank == 8


def test_another_method_starts_from_its_own_defaults() -> None:
    recipe = derive(derive(Recipe(), {"method.guidance": 7.0}), {"method": {"name": "dmd2"}})
    assert (recipe.method.name, recipe.method.guidance) == ("dmd2", 4.0)
    recipe = derive(Recipe(), {"method": {"solver": "euler", "name": "dmd2"}})
    assert recipe.method.model_dump()["solver"] == "euler"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "training.student.rate"),
        ("training.fake.lr", "training.fake.rate"),
        ("learning-rate", "training.student.rate"),
        ("batch_size", "training.batch"),
        ("num_steps", "method.steps"),
        ("cfg", "method.guidance"),
        ("guidance_scale", "method.guidance"),
        ("ema_decay", "training.ema"),
        ("lora_rank", "training.student.lora.rank"),
        ("model.seed", "seed"),
        ("training.cycels", "training.cycles"),
        ("trianing.fake.rate", "training.fake.rate"),
        ("boundaries", "method.boundaries"),
        ("training.workers", "placement.workers"),
        ("rate", "training.student.rate"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(given: str, meant: str) -> None:
    assert refused(f"{given}=1") == f"unknown recipe key '{given}'; did you mean '{meant}'?"


def test_a_key_like_no_other_gets_no_guess() -> None:
    assert refused("zzzz=1") == "unknown recipe key 'zzzz'; 'raydmd recipe' lists all keys"


def test_aliases_lead_to_keys() -> None:
    assert set(ALIASES.values()) <= set(known_keys())
    assert all(nearest(word, known_keys()) for word in ALIASES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.solver=renoise"], "no place in a phase that ends at a noise level"),
        (["method.name=dmd2", "method.fake_weight_cap=3"], "does nothing without boundaries"),
        (["method.anchor={}", "method.boundaries=[0.95]"], "phase 1 has a single one"),
        (["method.adapt={}"], "give decouple too"),
        (["method.decouple={}", "method.guidance=1"], "does nothing at guidance=1"),
        (["method.decouple.schedule=coupled", "method.decouple.augment_times=[0.1, 0.5]"], "do nothing with schedule"),
        (["method.decouple.match=0", "method.decouple.augment=0"], "no score to follow"),
        (
            ["method.name=decoupled", "method.decouple.match=0"],
            "never asks the fake score; set training.fake_updates=0",
        ),
        (["method.decouple.augment={start: 1, stop: 0}"], "method.decouple.augment"),
        (["method.name=amd", "training.batch=6"], "method.adapt.group=4 does not divide"),
        (["method.moments={}"], "clean samples"),
        (["method.name=dmd3"], "'dmd2', 'phased'"),
        (["method.boundaries=[1.5]"], "strictly between 0 and 1"),
        (["method.boundaries=[0.5, 0.875]"], "must fall"),
        (["method.steps=1"], "gives no step to phase 2 of 2"),
        (["method.times=[0.9, 0.1]"], "times must rise"),
        (["training.cycles=many"], "training.cycles: .*given 'many'"),
        (["training.cycles=0"], "greater than or equal to 1, given 0"),
        (["training.student.rate=.nan"], "training.student.rate"),
        (["training.student.betas=[0, 1]"], "less than 1"),
        (["training.ema=1"], "less than 1"),
        (["training=5", "training.cycles=3"], "'training' is set to 5"),
        (["training=5"], "training: "),
        (["training="], "has no value"),
        (["=5"], "not of the form"),
        (["seed"], "not of the form"),
        (["training.cycles=[1"], "no YAML"),
        (["seed=1", "seed=2"], "'seed' is given twice"),
        (["training.batch=10", "placement.workers=3"], "does not divide"),
        (["placement.workers_least=1"], "is no less than workers=1"),
        (["placement.resize_every=5"], "does nothing with a fixed number of workers"),
        (["placement.workers=2", "placement.workers_least=1"], "counts what nodes have, not what is free on them"),
        (
            [
                *("placement.workers=2", "placement.workers_least=1"),
                *("placement.worker_resources={gpu: 1}", "placement.teacher_resources={gpu: 1}"),
            ],
            "gpu is of teacher_resources too",
        ),
        (
            [
                "training.batch=16",
                "placement.workers=4",
                "placement.workers_least=2",
                "placement.worker_resources={t: 1}",
            ],
            "training.batch=16 does not divide over 3 workers, which placement.workers_least=2 allows",
        ),
        (["placement.samplers=1", "training.sample_log=true"], "does not see what placement.samplers draw"),
        (["training.phase_split=[1]"], "1 entries for 2 phase"),
        (["training.cycles=1"], "leaves some of 2 phases none"),
        (["name=a/b"], "name: "),
        (["placement.teacher=local", "placement.teachers=2"], "teachers=2 does nothing with"),
        (["placement.teacher=local", "placement.teacher_gpus=1"], "teacher_gpus=1.0 does nothing"),
        (["placement.reward_resources={GPU: 1}"], "reward_resources are custom resources; GPU has keys of its own"),
        (["placement.teacher_gpus=1.5"], "teacher_gpus=1.5: Ray gives parts of one GPU, or whole ones"),
        (["method.normaliser=none", "method.normaliser_floor=0.1"], "does nothing with"),
        (["training.student.lora.targets=[]"], "at least 1"),
        (["monitor.action=restart"], "'warn', 'stop', 'rollback', 'raise_ratio' or 'cut_rate'"),
        (["monitor.spread=1"], "monitor.spread: .*greater than 1"),
        (["monitor.cut=0.1"], "cut=0.1 does nothing with action=warn"),
        (["monitor.action=stop", "monitor.limit=3"], "limit=3 does nothing with action=stop"),
        (["monitor.action=cut_rate", "monitor.ratio=2"], "ratio=2.0 does nothing with action=cut_rate"),
        (["monitor.action=raise_ratio", "monitor.cut=0.1"], "cut=0.1 does nothing with action=raise_ratio"),
        (["monitor.action=cut_rate", "monitor.cut=1"], "factor of 1 changes nothing"),
        (["monitor.action=raise_ratio", "monitor.ratio=1"], "factor of 1 changes nothing"),
        (["monitor.diversity=null", "monitor.every=5"], "every=5 does nothing with diversity=null"),
        (["monitor.action=stop", *(f"monitor.{k}=null" for k in SIGNALS)], "every limit is null"),
        (["monitor.action=stop", "training.cycles=59"], "no alarm comes before 60 cycles"),
        (["monitor.action=raise_ratio", "training.fake_updates=0"], "does nothing with training.fake_updates=0"),
        (["placement.rewards=2"], "does nothing without method.adapt"),
        (["method.anchor.weight=0"], "leave anchor out"),
        (["method.times=[0, 0.9]"], "times must start at"),
        (["training.stall_timeout=60", "training.step_timeout=60"], "must be more than training.step_timeout"),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    text = refused(*overrides)
    assert re.search(message, text) or message in text
    assert "\n" not in text


def test_passwords_have_no_place_in_a_recipe() -> None:
    for uri in ("postgresql://me:hunter2@db/mlflow", "https://me:hunter2@host:5000", "https://:hunter2@host"):
        text = refused(f"tracking.uri={uri}")
        assert "tracking.uri holds a password" in text
        assert "hunter2" not in text
    for uri in ("postgresql://me@db/mlflow", "https://host:5000/a@b:c", "sqlite:////a:b@c.db", "http://localhost:5000"):
        assert combine(Recipe(), overrides=[f"tracking.uri={uri}"]).tracking.uri == uri


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nseed: 2\n", "key 'seed' stands twice, in lines 1 and 2"),
        (b"training: {cycles: 1}\ntraining.cycles: 2\n", "'training.cycles' is given twice"),
        (b"seed: \xff\n", "is not UTF-8 text (byte 0xff at offset 6)"),
        (b"", "holds nothing, not a mapping"),
        (b"- 1\n", "holds a list, not a mapping"),
        (b"seed: [1\n", "is no YAML"),
        (b"? [1, 2]\n: 3\n", "a key must be a word"),
        (b"lr: 1\n", "did you mean 'training.student.rate'?"),
        (b"training:\n", "training: "),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as info:
        load(file, Recipe())
    assert str(info.value).startswith(f"recipe file {file}")
    assert "\n" not in str(info.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "none.yaml", Recipe())
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path, Recipe())


def test_a_byte_order_mark_is_no_key(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbfseed: 4\n")
    assert load(file, Recipe()).seed == 4


def test_a_rollback_s_checkpoints_are_kept() -> None:
    assert Recipe().checkpoints_kept == 3
    r = combine(Recipe(), overrides=["monitor.action=rollback", "checkpoints.every=20"])
    assert r.checkpoints_kept > r.monitor.lookback / 20 + 1


WIDE = "{height: 16, width: 32, weight: 2}"


def test_sizes_are_read_with_their_weights() -> None:
    recipe = combine(Recipe(), overrides=[f"data.sizes=[{WIDE}, {{height: 32, width: 16, frames: 5}}]"])
    assert [(s.height, s.width, s.frames, s.weight) for s in recipe.data.sizes] == [(16, 32, None, 2), (32, 16, 5, 1)]
    assert yaml.safe_load(recipe.to_yaml())["data"]["sizes"][0] == {
        "height": 16,
        "width": 32,
        "frames": None,
        "weight": 2.0,
    }
    assert derive(recipe, {"data.sizes": ()}) == Recipe()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.sizes=[{height: 16, width: 32, weight: 0}]"], "data.sizes.0.weight: Input should be greater than 0"),
        (["data.sizes=[{height: 16, width: 32, weight: -1}]"], "data.sizes.0.weight: Input should be greater than 0"),
        (["data.sizes=[{height: 16, width: 32, share: 1}]"], "data.sizes.0.share: Extra inputs are not permitted"),
        (["data.sizes=[{height: 16}]"], "data.sizes.0.width: Field required"),
        (["data.size=[]"], "did you mean 'data.sizes'"),
        (
            ["method.name=dmd2", "method.gan={data: real}", f"data.sizes=[{WIDE}]"],
            "data.sizes does not fit method.gan, whose real samples are of the model's one size",
        ),
        (["method.name=dmd", f"data.sizes=[{WIDE}]"], "data.sizes does not fit method.regression, whose noise-image"),
        (["method.name=amd", f"data.sizes=[{WIDE}]"], "data.sizes does not fit method.adapt.rewards of kind zoo"),
    ],
)
def test_sizes_that_cannot_be_are_refused(overrides: list[str], says: str) -> None:
    assert says in refused(*overrides)
