"""Sequence parallelism: ranks that share each sample's tokens train what one rank does, and ask once."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from raydmd.errors import InputError, NonFiniteError
from raydmd.guidance import Guidance
from raydmd.methods.terms import Answer
from raydmd.models import load_family
from raydmd.models.base import Conditions
from raydmd.models.tokens import TokenGroup
from raydmd.models.untrained import write
from raydmd.recipe import Model, Recipe, derive
from raydmd.serving.client import Client, Pending
from raydmd.serving.messages import Reply, ScoreRequest
from raydmd.training.events import EventLog
from raydmd.training.ray_worker import WorkerConfig, teacher_client
from raydmd.training.session import FolderSession, Session
from raydmd.training.shared import SharedClient
from raydmd.training.store import Store
from raydmd.training.tied import Tied
from raydmd.training.worker import Job, Worker
from tests.local.test_families import SIZES
from tests.local.test_tied import recipe
from tests.local.test_two_ranks import port
from tests.pipelines import WORDS
from tests.ranks import OneOfSome

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.serving.order import ClientSpec
    from raydmd.serving.pool_client import PoolClient

pytestmark = pytest.mark.local
FULL: dict[str, Any] = {"student": {"rate": 1e-4, "eps": 1e-5, "lora": None}, "fake": {"rate": 1e-4, "eps": 1e-5}}
PROMPTS = ["a cat runs", "a dog", "a"]
PHASED = {"name": "phased", "boundaries": [0.875], "steps": 4, "shift": 5.0}
UNROLLED = {"name": "dp_dmd", "steps": 2, "shift": 3.0, "anchor": {"steps": 2, "of": 6}}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "experts": ("wan22", PHASED, FULL | {"sharding": "fsdp", "gradient_checkpointing": True}, "local"),
    "adapters-through-two-steps": ("flux", UNROLLED, {}, "local"),
    "masked-texts-of-odd-length": ("qwen-image", {"name": "decoupled", "steps": 2, "shift": 3.0}, FULL, "local"),
    "tied": ("flux", {"name": "dmd2", "steps": 2, "shift": 3.0}, {}, "tied"),
    "tied-experts-in-bf16": ("wan22", PHASED, {"precision": "bf16", "gradient_checkpointing": True}, "tied"),
}
WORLD, GROUP = 4, 2


def recipe_of(name: str, output: Path) -> Recipe:
    kind, method, training, teacher = RUNS[name]
    r = recipe(name, kind, output, method, training | {"cycles": 2})
    placement = {"teacher": teacher, "workers": WORLD, "sequence": GROUP}
    return derive(r, {"placement": placement}) if output.name == "shared" else r


def run(name: str, session: Session, output: Path) -> dict[str, torch.Tensor]:
    r, tied = recipe_of(name, output), RUNS[name][3] == "tied"
    r.folder.mkdir(parents=True, exist_ok=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, output / f"conditions-{session.rank}"))
    size = session.tokens.size if session.tokens else 1
    job = Job(
        recipe=r,
        family=family,
        conditions=table.padded(size),
        tied=Tied(r, family, session.device, session.tokens) if tied else None,
    )

    def no_pool(spec: ClientSpec) -> PoolClient:
        raise AssertionError(f"{spec} is asked for")

    config = WorkerConfig(
        recipe=r,
        conditions="",
        pool=None,
        rewards=None,
        samplers=None,
        prompts=(),
        real=None,
        pairs=None,
        stop_at=None,
        folder=str(r.folder),
        store=Store.of(r.folder, None),
    )
    teacher = teacher_client(config, job, session, no_pool)
    worker = Worker(job, teacher, session, EventLog(r.folder / "events.jsonl"))
    assert worker.run() == "finished"
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in worker.state().items()}
    return {k: v.clone() for k, v in state.items()}


class Asked(Client):
    """A frozen model that says how often it was asked, and then fails."""

    retries = 0

    def __init__(self) -> None:
        self.times = 0

    def submit(self, request: ScoreRequest) -> Pending:
        self.times += 1
        return Said(request, self.times)


class Said(Pending):
    waited = 0.0

    def __init__(self, request: ScoreRequest, times: int) -> None:
        self._request, self._times = request, times

    def result(self) -> Reply:
        if self._times > 2:
            raise NonFiniteError(f"asked {self._times} times")
        x = self._request.x_t * self._times
        answer = Answer(value=x, uncond=-x if self._times == 2 else None)
        return Reply(answer=answer, replica="one", seconds=0.0, batch_items=len(x))


def ask_together(tokens: TokenGroup) -> list[Any]:
    """What a rank hears of three requests, the last of which fails."""
    client = SharedClient(Asked() if tokens.leads else None, tokens)
    x = torch.full((1, 2), float(tokens.leader))
    asked = [
        client.submit(ScoreRequest(x_t=x, t=torch.ones(1), conditions=(1,), guidance=Guidance(), expert="any"))
        for _ in "123"
    ]
    first, second = (p.result().answer for p in asked[:2])
    heard = [first.value.tolist(), first.uncond, second.value.tolist(), second.uncond.tolist()]
    for _ in "12":  # the same error again, without another word between ranks
        with pytest.raises(NonFiniteError, match="asked 3 times"):
            asked[2].result()
    return heard


def one_of_four(rank: int, where: int, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=rank, world_size=WORLD)
    for name in RUNS:
        session = OneOfSome(output / "sessions" / name, rank)
        session.world, session.tokens = WORLD, TokenGroup(GROUP, torch.device("cpu"), timedelta(seconds=77))
        session.folder.mkdir(parents=True, exist_ok=True)
        torch.save(run(name, session, output), output / f"{name}-{rank}.pt")
        assert session.share == (rank // GROUP, WORLD // GROUP)
    (output / f"heard-{rank}.json").write_text(json.dumps(ask_together(session.tokens)))
    group = session.tokens.group
    assert group.size() == GROUP < WORLD
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)
    dist.destroy_process_group()


def test_ranks_that_share_tokens_train_what_one_does(tmp_path):
    """Two groups of two: whole networks, adapters and tied ones, to 1e-5 of every weight."""
    torch.set_num_threads(1)
    alone = {}
    for name, (kind, *_) in RUNS.items():
        for ranks in ("one", "shared"):
            write(kind, tmp_path / ranks / kind, WORDS)
        folder = tmp_path / "sessions" / name
        folder.mkdir(parents=True)
        alone[name] = run(name, FolderSession(folder), tmp_path / "one")
    output = tmp_path / "shared"
    multiprocessing.spawn(one_of_four, (port(), output), nprocs=WORLD)
    for name, expected in alone.items():
        ranks = [torch.load(output / f"{name}-{k}.pt") for k in range(WORLD)]
        precision = recipe_of(name, output).training.precision
        for key, value in expected.items():
            where, found = f"{name}: {key}", ranks[0][key]
            assert all(torch.equal(other[key], found) for other in ranks), where
            if key.endswith(".exp_avg"):
                bar = 0.01 if precision == "fp32" else 0.05  # bf16 keeps eight bits
                assert (found - value).norm() <= bar * value.norm() + 1e-9, where
            elif ".optimizer." not in key and precision == "fp32":
                apart = float((found - value).abs().max())
                assert apart < 1e-5, where
        steps = [v.abs().max() for k, v in expected.items() if k.endswith(".exp_avg")]
        assert max(steps) > 1e-3, f"{name}: gradients too small to tell"
    for rank in range(WORLD):
        leader = float(rank - rank % GROUP)
        heard = json.loads((output / f"heard-{rank}.json").read_text())
        assert heard == [[[leader] * 2], None, [[2 * leader] * 2], [[-2 * leader] * 2]]


@pytest.mark.parametrize(
    ("kind", "size", "says"),
    [
        ("sdxl", 2, "raydmd can't split the tokens of a StableDiffusionXLPipeline"),
        ("wan21", 4, "2 attention heads do not divide by it"),
        ("wan21", 3, "2 attention heads and 8 tokens do not divide by it"),
    ],
)
def test_a_network_whose_tokens_cannot_be_shared_is_refused(tmp_path, kind, size, says):
    folder = write(kind, tmp_path, WORDS)
    family = load_family(Model(path=str(folder), **SIZES.get(kind, {})))
    family.check_sequence(1)
    with pytest.raises(InputError, match=f"placement.sequence={size} does not fit .*: {says}"):
        family.check_sequence(size)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"placement": {"workers": 3, "sequence": 2}}, "placement.workers=3 does not divide into groups"),
        ({"placement": {"workers": 4, "sequence": 2}, "training.batch": 3}, "does not divide over the 2 groups of"),
        ({"placement": {"workers": 2, "sequence": 2}, "method.gan": {"data": "x"}}, "does not go with method.gan"),
        (
            {"placement": {"workers": 2, "sequence": 2}, "training": {"precision": "bf16", "sharding": "ddp"}},
            "set training.sharding=fsdp, or training.fake.lora={}",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused(changes, says):
    sharded = derive(Recipe(), {"training.sharding": "fsdp"})
    with pytest.raises(InputError, match=re.escape(says)):
        derive(sharded, changes)
    assert derive(sharded, {"placement": {"workers": 4, "sequence": 2}, "training.batch": 2})
