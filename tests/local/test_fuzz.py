"""A thousand bad inputs: each is accepted, or refused soon with a typed message, and nothing that was given changes.

``RAYDMD_FUZZ=1000 pytest tests/local/test_fuzz.py`` takes more of each kind, ``RAYDMD_FUZZ_SEED`` others.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import string
import time
import traceback
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from raydmd.data.prompts import read_prompts
from raydmd.errors import InputError, NonFiniteError
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.recipe import Model, Recipe, combine, known_keys
from raydmd.serving.client import ReplicaFailed
from raydmd.serving.engine import TeacherEngine, answer_each
from raydmd.serving.messages import RewardRequest, ScoreRequest, WalkRequest
from raydmd.training.prepare import check_method, prepare
from tests.local.test_worker import recipe as recipe_of_tests
from tests.local.test_worker import work
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from raydmd.models.family import Family

pytestmark = [pytest.mark.local, pytest.mark.timeout(900)]

COUNT = int(os.environ.get("RAYDMD_FUZZ", "250"))
SEED = int(os.environ.get("RAYDMD_FUZZ_SEED", "0"))
SOON = 1.0
"""Seconds of this process for a refusal, after the file was read; others may be busy meanwhile."""
FAULTS: list[str] = []
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 10**30, -(10**18), 0.5, 1e-30, 1e300, math.inf, -math.inf, math.nan,
    "", " ", "x", "null", "1e-4", "0x10", "../..", "/", "/etc/passwd", "~", "a b", "\x00", "\u202e", "é" * 300,
    "${HOME}", "{{x}}", "auto", "none", [], [1], [1, 2, 3], [0.9, 0.5], [0.5, 0.5], [[]], ["a", None], {}, {"a": 1},
    {1: 2}, {"low": 1, "high": 0}, "2026-11-22", b"\xff",
]  # fmt: skip


@contextlib.contextmanager
def refused_or_not(what: Any, tally: dict[str, int], *others: type[Exception]) -> Iterator[None]:
    """Whatever is in here ends soon, and by itself or in a typed error that says something."""
    begun = time.process_time()
    try:
        yield
        tally["accepted"] += 1
    except (InputError, *others) as error:
        tally["refused"] += 1
        said = str(error)
        assert 10 < len(said) < 4000, (what, said)
        assert "Traceback" not in said, (what, said)
        assert time.process_time() - begun < SOON, what
    except Exception as error:  # all of them are told at the end
        where = traceback.extract_tb(error.__traceback__)[-1]
        FAULTS.append(f"{what!r}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")


def tallied(tally: dict[str, int]) -> None:
    print(tally)
    faults, FAULTS[:] = list(FAULTS), []
    assert not faults, f"{len(faults)} of {COUNT}:\n" + "\n".join(fault[-500:] for fault in faults[:12])
    assert tally["refused"] > COUNT // 10, tally
    assert tally["accepted"] + tally["refused"] >= COUNT


def odd_text(draw: random.Random) -> str:
    return "".join(draw.choice(string.printable + "é\u202e\x00\ud7ff") for _ in range(draw.randrange(60)))


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        inner = tree.get(part)
        if not isinstance(inner, dict):
            inner = tree[part] = {}
        tree = inner
    tree[last] = value


def misspelt(draw: random.Random, key: str) -> str:
    i = draw.randrange(len(key))
    return draw.choice([key[:i] + key[i + 1 :], key[:i] + draw.choice("xyz._") + key[i:], key.upper(), key + "s"])


def recipe_text(draw: random.Random, keys: list[str]) -> str:
    tree: dict[str, Any] = {"model": {"path": draw.choice(["wan22-tiny", "sd35-tiny", "sit-tiny", "nowhere"])}}
    for _ in range(draw.randrange(1, 5)):
        key = draw.choice(keys)
        put(tree, misspelt(draw, key) if draw.random() < 0.15 else key, draw.choice(ODD))
    text = yaml.safe_dump(tree, allow_unicode=True)
    kind = draw.random()
    if kind < 0.1:
        place = draw.randrange(len(text))
        return text[:place] + draw.choice("{}[]:&*!|>'\"%@\t\n-") + text[place:]
    if kind < 0.15:
        return odd_text(draw)
    return text + text if kind < 0.2 else text


def test_recipes(tmp_path: Path) -> None:
    draw, keys, tally = random.Random(SEED), known_keys(), {"accepted": 0, "refused": 0}
    start = Recipe(output=tmp_path / "runs")
    for k in range(COUNT):
        file = tmp_path / f"{k}.yaml"
        text = recipe_text(draw, keys)
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        before = file.read_bytes()
        words = []
        if draw.random() < 0.3:
            words = [f"{draw.choice(keys)}={draw.choice(ODD)}"]
        found: Recipe | None = None
        with refused_or_not((text, words), tally):
            found = combine(start, file=file, overrides=words)
        if found is not None and k % 4 == 0:  # looks at the model's files as well
            with refused_or_not((text, words), tally):
                prepare(found)
        assert file.read_bytes() == before
    tallied(tally)
    assert not list(tmp_path.glob("runs/*")), "a recipe that was only looked at has left something"


SMALL: list[Any] = [None, True, False, 0, 1, 2, 3, 7, 0.1, 0.5, 0.9, 1e-30, [], [0.5], [0.9, 0.5], {}, "auto"]
"""What a key may be that makes nothing too large for a test."""


def test_recipes_that_are_accepted_train(tmp_path: Path) -> None:
    draw, trained = random.Random(SEED + 4), 0
    start = recipe_of_tests(wan_pipeline(tmp_path / "model", experts=1, layers=1), tmp_path / "runs")
    family = load_family(start.model)
    keys = [k for k in known_keys() if k.split(".")[0] in ("method", "training", "monitor")]
    while trained < COUNT // 25:
        words = [f"{key}={json.dumps(draw.choice(SMALL))}" for key in draw.sample(keys, 3)]
        try:
            found = combine(start, overrides=words)
            check_method(found, family)
        except InputError:
            continue
        if found == start or found.method.adapt or found.method.regression or found.method.gan:
            continue  # these need more than a pipeline
        trained += 1
        with contextlib.suppress(NonFiniteError):  # an answer, too
            assert work(found.model_copy(update={"name": f"run{trained}"}), stop_at=1)[1] in ("stopped", "finished")


PROMPTS: dict[str, Callable[[random.Random], bytes]] = {
    ".txt": lambda draw: "\n".join(odd_text(draw) for _ in range(draw.randrange(5))).encode("utf-8", "replace"),
    ".jsonl": lambda draw: "\n".join(
        json.dumps(draw.choice([{"prompt": "a"}, {"caption": 1}, {"prompt": None}, [], "x", 3, {"text": "b" * 9}]))
        for _ in range(draw.randrange(5))
    ).encode(),
    ".csv": lambda draw: "\n".join(
        draw.choice(["prompt,x", "a,b", '"a', "a,b,c,d", "", ",,,", "prompt", "é,\u202e"]) for _ in range(5)
    ).encode(),
    ".tsv": lambda draw: b"prompt\tx\n" + draw.randbytes(draw.randrange(50)),
    ".parquet": lambda draw: b"PAR1" + draw.randbytes(draw.randrange(200)) + b"PAR1",
    ".png": lambda draw: draw.randbytes(30),
    "": lambda draw: draw.randbytes(30),
}


def test_prompt_files(tmp_path: Path) -> None:
    draw, tally = random.Random(SEED + 1), {"accepted": 0, "refused": 0}
    for k in range(COUNT):
        ending = draw.choice(list(PROMPTS))
        made = PROMPTS[ending](draw)
        if draw.random() < 0.3 and made:
            place = draw.randrange(len(made))
            made = made[:place] + draw.randbytes(draw.randrange(4)) + made[place + draw.randrange(4) :]
        file = tmp_path / f"prompts{k}{ending}"
        file.write_bytes(made)
        column = draw.choice([None, None, None, "prompt", "", "\x00"])
        with refused_or_not((ending, made, column), tally):
            prompts = read_prompts(file, column=column, pictures=draw.random() < 0.1)
            assert prompts
            assert all(isinstance(p, str) and p.strip() for p in prompts)
        assert file.read_bytes() == made
    tallied(tally)


def broken(draw: random.Random, folder: Path) -> str:
    """Break one thing of a pipeline's folder."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    file = draw.choice(files)
    name = str(file.relative_to(folder))
    how = draw.choice(["cut", "empty", "gone", "noise", "folder", "value", "class"])
    if how == "cut":
        os.truncate(file, draw.randrange(file.stat().st_size + 1))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "gone":
        file.unlink()
    elif how == "noise":
        file.write_bytes(draw.randbytes(200))
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif file.suffix == ".json":
        with contextlib.suppress(ValueError):
            tree = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(tree, dict) and tree:
                key = draw.choice(sorted(tree))
                odd = [v for v in ODD if not isinstance(v, bytes)]
                tree[key] = ["diffusers", "NoSuchClass"] if how == "class" else draw.choice(odd)
                file.write_text(json.dumps(tree), encoding="utf-8")
                name += f" {key}={tree[key]!r}"
    return f"{how} {name}"


def used(family: Family, folder: Path) -> None:
    family.encode(["a cat runs"], folder / "conditions")
    load_teacher(family, "fp32", device=torch.device("cpu"))
    shutil.rmtree(folder / "conditions", ignore_errors=True)


def test_folders_of_pipelines(tmp_path: Path) -> None:
    draw, tally = random.Random(SEED + 2), {"accepted": 0, "refused": 0}
    whole = wan_pipeline(tmp_path / "whole")
    torch.set_num_threads(1)
    used(load_family(Model(path=str(whole), frames=5, height=32, width=32)), tmp_path)  # imports what reads it
    for k in range(COUNT):
        folder = tmp_path / "broken"
        shutil.copytree(whole, folder)
        what = f"{k}: " + "; ".join(
            broken(draw, folder) for _ in range(draw.choice([1, 1, 1, 2])) if any(folder.iterdir())
        )
        settings = Model(path=str(folder), frames=5, height=32, width=32)
        with refused_or_not(what, tally):
            family = load_family(settings)
            if k % 5 == 0:  # its weights, too
                used(family, tmp_path)
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "conditions", ignore_errors=True)
    tallied(tally)


def test_requests_to_a_pool(tmp_path: Path) -> None:
    draw, tally = random.Random(SEED + 3), {"accepted": 0, "refused": 0}
    family = load_family(Model(path=str(wan_pipeline(tmp_path / "model")), frames=5, height=32, width=32))
    table = Conditions.read(family.encode(["a cat runs", "a dog jumps"], tmp_path / "conditions"))
    experts = load_teacher(family, "fp32", device=torch.device("cpu"))
    latent = family.shape().latent
    engine = TeacherEngine(experts, table, sample_shape=latent)
    good = ScoreRequest(
        x_t=torch.zeros(1, *latent), t=torch.tensor([0.95]), conditions=(1,), guidance=Guidance(2.0),
        expert=experts.routing.experts[0], name="good",
    )  # fmt: skip
    [expected] = engine.answer([good])

    def request() -> Any:
        shape = draw.choice([latent, latent, latent, latent[1:], (*latent, 1), (1, *latent[1:]), ()])
        size = draw.choice([0, 1, 1, 1, 2])
        x_t = torch.full((size, *shape), draw.choice([0.0, 0.0, 1.0, math.nan, math.inf, 1e38]))
        x_t = x_t.to(draw.choice([torch.float32, torch.float32, torch.float64, torch.int64, torch.bfloat16]))
        conditions = tuple(draw.choice([0, 1, 2, 3, -1, 10**9]) for _ in range(draw.choice([size, size, size + 1])))
        guidance = Guidance(draw.choice([1.0, 2.0, 0.0, 1e30, math.nan]))
        name = odd_text(draw)
        kind = draw.randrange(10)
        if kind < 6:
            t = torch.tensor(
                [draw.choice([0.0, 0.5, 0.95, 1.0, -1.0, 2.0, math.nan])] * draw.choice([size, size, 1, 3])
            )
            expert = draw.choice([*experts.routing.experts, "nobody", ""])
            split = draw.random() < 0.3
            return ScoreRequest(
                x_t=x_t, t=t, conditions=conditions, guidance=guidance, expert=expert, split=split, name=name
            )
        if kind < 9:
            grid = draw.choice([(1.0, 0.5, 0.0), (0.0, 1.0), (1.0,), (), (1.0, math.nan, 0.0), (2.0, 0.0)])
            return WalkRequest(x_t=x_t, grid=grid, conditions=conditions, guidance=guidance, name=name)
        return RewardRequest(x_t=x_t, conditions=conditions, name=name)

    for _ in range(COUNT):
        asked = request()
        with refused_or_not(asked, tally, NonFiniteError):
            engine.key(asked)
            [answer] = answer_each(engine, [asked], who="replica")
            assert not isinstance(answer, ReplicaFailed), answer
            if isinstance(answer, Exception):
                raise answer
            assert torch.isfinite(answer.value).all()
    [again] = engine.answer([good])
    assert again.value.equal(expected.value)
    tallied(tally)
