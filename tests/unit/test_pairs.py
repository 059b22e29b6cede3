"""Noise-image pairs without a model: what is written, resumed, refused and streamed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from raydmd.errors import InputError, PoolError
from raydmd.guidance import Guidance
from raydmd.models.base import Conditions, Experts, Routing
from raydmd.models.identity import WHOLE, fingerprint
from raydmd.pairs.make import begin, make_pairs
from raydmd.pairs.manifest import Manifest, Origin, PairsError, prompts_digest, read_prompts, refuse_other
from raydmd.pairs.store import PairStore, noise_digest
from raydmd.pairs.stream import UNSEEN, PairStream, no_errors
from raydmd.process import RectifiedFlow, step_grid
from raydmd.recipe import Model
from raydmd.sampling import sample
from raydmd.serving.client import Client
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit
LATENT = (2, 3)
PROMPTS = ["a", "b", "c"]
TABLE = Conditions(embeds=torch.randn(4, 1, 2, generator=torch.Generator().manual_seed(0)))
CPU = torch.device("cpu")
ORIGIN = Origin(
    teacher={"transformer/config.json": "1", "transformer/weights.safetensors": "2"},
    boundaries=(0.875,),
    text_length=8,
    precision="fp32",
    guidance=3.0,
    steps=4,
    shift=5.0,
    solver="euler",
    seed=3,
    prompts=prompts_digest("", PROMPTS),
    latent=LATENT,
    count=11,
    shard=4,
    request=2,
    noise=noise_digest(3, LATENT),
)


class Flow(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(3, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x_t, t, cond):
        heard = self.weight[2] * cond.embeds.mean((1, 2)).view(-1, 1, 1)
        return self.weight[0] * x_t + self.weight[1] * t.view(-1, 1, 1) + heard


TEACHER = Experts({"high": Flow(0), "low": Flow(1)}, Routing(("high", "low"), (0.875,)), RectifiedFlow(), "flow")


class Recorded(Client):
    """A local teacher that remembers its requests, and dies after some."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.teacher = LocalClient(TeacherEngine(TEACHER, TABLE))
        self.requests, self.dies_after = [], dies_after

    @property
    def retries(self) -> int:
        return 0

    def submit(self, request):
        if self.dies_after is not None and len(self.requests) >= self.dies_after:
            raise PoolError("gone")
        self.requests.append(request)
        return self.teacher.submit(request)


def make(folder: Path, client: Client | None = None, *, origin: Origin = ORIGIN, ahead: int = 3) -> Manifest:
    folder.mkdir(exist_ok=True)
    manifest = begin(folder, origin, "", PROMPTS)
    return make_pairs(folder, manifest, len(PROMPTS), client or Recorded(), ahead=ahead)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_pair_s_noise_is_what_the_walk_started_from_and_its_target_where_it_came_to(tmp_path):
    client = Recorded()
    assert make(tmp_path, client).finished
    store = PairStore.open(tmp_path, verify=True)
    assert len(store) == 11
    assert [len(r.x_t) for r in client.requests] == [2, 2, 2, 2, 2, 1]
    order = [5, 0, 10, 3]
    target, rows = store.targets(order)
    started = torch.cat([r.x_t for r in client.requests])
    assert torch.equal(store.noise(order), started[order])
    assert rows == tuple([row for r in client.requests for row in r.conditions][i] for i in order)
    grid = step_grid(ORIGIN.steps, ORIGIN.shift)
    walked = sample(
        TEACHER, started[order], TABLE.rows(rows), TABLE.rows([0] * 4), grid=grid, guidance=Guidance(ORIGIN.guidance)
    )
    torch.testing.assert_close(target, walked)
    every = store.targets(range(11))[1]
    assert sorted(every[:3]) == sorted(every[3:6]) == [1, 2, 3]
    assert read_prompts(tmp_path, ORIGIN) == PROMPTS


@pytest.mark.parametrize("dies_after", [0, 1, 3, 4, 5])
def test_resumed_pairs_are_byte_identical_to_uninterrupted_ones(tmp_path, dies_after):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make(whole)
    with pytest.raises(PoolError, match="gone"):
        make(parts, Recorded(dies_after), ahead=2)
    before = contents(parts)
    (parts / "pairs-00002.partial").write_bytes(b"torn")
    client = Recorded()
    make(parts, client, ahead=1)
    shards = sum(name.endswith(".safetensors") for name in before)
    assert len(client.requests) == 6 - 2 * shards
    assert contents(parts) == contents(whole)
    again = Recorded()
    make(parts, again)
    assert again.requests == []


def test_a_shard_that_came_to_harm_is_made_again(tmp_path):
    make(tmp_path)
    good = contents(tmp_path)
    (tmp_path / "pairs-00001.safetensors").write_bytes(good["pairs-00001.safetensors"][:-1])
    make(tmp_path)
    assert contents(tmp_path) == good


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"guidance": 4.0}, r"guidance differs: they were made with 3\.0, the recipe has 4\.0"),
        ({"steps": 5}, "steps differs"),
        ({"seed": 4}, "seed differs"),
        ({"count": 12}, "count differs: they were made with 11, the recipe has 12"),
        ({"prompts": "x"}, "prompts differs"),
        ({"teacher": {**ORIGIN.teacher, "transformer/weights.safetensors": "3"}}, r"weights\.safetensors differs"),
        ({"teacher": {"transformer/config.json": "1"}}, r"another teacher: .*weights\.safetensors is not in"),
        ({"noise": "x"}, "this torch draws other numbers from seed 3"),
    ],
)
def test_pairs_of_another_origin_are_not_gone_on_with(tmp_path, change, says):
    make(tmp_path)
    with pytest.raises(PairsError, match=says) as info:
        make(tmp_path, origin=replace(ORIGIN, **change))
    assert str(tmp_path) in str(info.value)


def test_training_minds_some_fields_alone():
    other = replace(ORIGIN, count=5, seed=9)
    refuse_other(None, ORIGIN, other, ("guidance", "teacher"))
    with pytest.raises(PairsError, match="latent differs"):
        refuse_other(None, ORIGIN, replace(other, latent=(1,)), ("latent", "teacher"))


def test_missing_unfinished_short_and_corrupt_pairs_are_refused_by_name(tmp_path):
    with pytest.raises(PairsError, match=r"no noise-image pairs in .*raydmd pairs"):
        PairStore.open(tmp_path)
    with pytest.raises(PoolError):
        make(tmp_path, Recorded(5), ahead=1)
    with pytest.raises(PairsError, match="unfinished: 2 of 3 shards"):
        PairStore.open(tmp_path)
    make(tmp_path)
    file, manifest = tmp_path / "pairs-00001.safetensors", tmp_path / "manifest.json"
    good, text = file.read_bytes(), manifest.read_text()
    file.write_bytes(good[:-4])
    with pytest.raises(PairsError, match=r"pairs-00001\.safetensors has \d+ bytes, and was written with"):
        PairStore.open(tmp_path)
    file.write_bytes(good[:-4] + b"\x01\x02\x03\x04")
    PairStore.open(tmp_path)
    with pytest.raises(PairsError, match=r"pairs-00001\.safetensors is corrupt"):
        PairStore.open(tmp_path, verify=True)
    file.write_bytes(b"\xff" * len(good))
    with pytest.raises(PairsError, match=r"pairs-00001\.safetensors is not readable"):
        PairStore.open(tmp_path)
    file.unlink()
    with pytest.raises(PairsError, match=r"pairs-00001\.safetensors is missing"):
        PairStore.open(tmp_path)
    file.write_bytes(good)
    manifest.write_text(text.replace('"latent": [\n   2,', '"latent": [\n   7,'))
    with pytest.raises(PairsError, match=r"pairs-00000\.safetensors holds .*\[4, 2, 3\]"):
        PairStore.open(tmp_path)
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(PairsError, match="of format 2"):
        PairStore.open(tmp_path)
    for broken in ("{", "[]", '{"format": 1, "origin": {}, "shards": []}'):
        manifest.write_text(broken)
        with pytest.raises(PairsError, match=r"manifest\.json is not readable"):
            PairStore.open(tmp_path)
    (tmp_path / "prompts.json").write_text('{"negative": "", "prompts": ["other"]}')
    with pytest.raises(PairsError, match="does not hold the prompts"):
        read_prompts(tmp_path, ORIGIN)


@pytest.fixture
def store(tmp_path) -> PairStore:
    make(tmp_path)
    return PairStore.open(tmp_path)


def stream(store: PairStore, *, rank: int = 0, world: int = 1, errors=None, resample: float = 0.0) -> PairStream:
    errors = no_errors(len(store)) if errors is None else errors
    return PairStream(
        store, TABLE, seed=5, batch=4, rank=rank, world=world, resample=resample, errors=errors, device=CPU
    )


def test_pairs_come_in_turn_by_position_alone_for_any_world_size(store):
    one = stream(store)
    seen = [i for cycle in range(11) for i in one.batch(cycle).indices]
    assert set(Counter(seen).values()) == {4}
    assert seen[:11] != seen[11:22]
    for cycle in (7, 2):
        whole, halves = one.batch(cycle), [stream(store, rank=r, world=2).batch(cycle) for r in (0, 1)]
        assert whole.indices == halves[0].indices + halves[1].indices
        for name in ("noise", "target"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(h, name) for h in halves]))
        assert torch.equal(whole.cond.embeds, halves[0].cond.join(halves[1].cond).embeds)
        assert whole.draws.positions == halves[0].draws.positions + halves[1].draws.positions
        target, rows = store.targets(whole.indices)
        assert torch.equal(whole.target, target)
        assert torch.equal(whole.cond.embeds, TABLE.rows(rows).embeds)
        assert torch.equal(whole.noise, store.noise(whole.indices))


def test_resampled_pairs_follow_their_running_errors(store):
    errors = no_errors(len(store))
    ours = stream(store, errors=errors, resample=1.0)
    first = ours.batch(0).indices
    ours.learn(0, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = dict(zip(first, (1.0, 2.0, 3.0, 4.0), strict=True))
    if len(expected) == 4:
        assert {i: float(errors[i]) for i in expected} == expected
    assert int((errors == UNSEEN).sum()) == 11 - len(expected)
    errors[:] = 0.0
    errors[7], errors[2] = 3.0, 1.0
    counts = Counter(i for cycle in range(1, 200) for i in ours.batch(cycle).indices)
    assert set(counts) == {2, 7}
    assert counts[7] / counts[2] == pytest.approx(3.0, rel=0.25)
    halves = [stream(store, errors=errors.clone(), resample=1.0, rank=r, world=2).batch(9).indices for r in (0, 1)]
    assert halves[0] + halves[1] == ours.batch(9).indices, "all ranks must agree on who gets what"
    mixed = stream(store, errors=errors, resample=0.3)
    counts = Counter(i for cycle in range(200) for i in mixed.batch(cycle).indices)
    assert set(counts) == set(range(11))
    assert counts[7] > 2 * counts[0]
    errors[:] = 4.0
    drawn = Counter(mixed.batch(9).indices)
    mixed.learn(9, torch.full((4,), 8.0))
    assert {i: float(errors[i]) for i in drawn} == {i: 8 - 4 * 0.5**k for i, k in drawn.items()}
    stream(store, errors=errors.fill_(UNSEEN), resample=0.0).learn(0, torch.ones(4))
    assert (errors == UNSEEN).all()


def test_a_teacher_is_known_by_its_files(tmp_path):
    part = tmp_path / "transformer"
    part.mkdir()
    settings, large = Model(path=str(tmp_path)), WHOLE + 10_000_000
    (part / "config.json").write_text('{"layers": 2, "_diffusers_version": "1"}')
    with (part / "a.safetensors").open("wb") as file:
        file.truncate(large)
    (part / "notes.md").write_text("no weights")
    before = fingerprint(settings, ["transformer"])
    assert list(before) == ["transformer/a.safetensors", "transformer/config.json"]
    (part / "config.json").write_text('{"_diffusers_version": "2", "layers": 2}')
    assert fingerprint(settings, ["transformer"]) == before
    (part / "config.json").write_text('{"layers": 3}')
    assert fingerprint(settings, ["transformer"])["transformer/config.json"] != before["transformer/config.json"]
    seen = [before["transformer/a.safetensors"]]
    for place in (0, large - 1):
        with (part / "a.safetensors").open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        seen.append(fingerprint(settings, ["transformer"])["transformer/a.safetensors"])
    assert len(set(seen)) == 3
    with pytest.raises(InputError, match="no files in vae"):
        fingerprint(settings, ["vae"])
