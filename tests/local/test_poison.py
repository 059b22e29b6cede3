"""A sample that is poison: named, drawn anew within a budget, the same after a restart, and on all ranks together."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import DTensor

from raydmd.draws import Draws
from raydmd.errors import NonFiniteError
from raydmd.methods.method import Method
from raydmd.methods.terms import Answer, Matching
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.recipe import Recipe, derive
from raydmd.serving.client import Client
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient, LocalPending
from raydmd.serving.messages import Reply
from raydmd.training.events import EventLog, read_lines
from raydmd.training.quarantine import FILE
from raydmd.training.session import FolderSession
from raydmd.training.stream import Stream
from raydmd.training.worker import Job, Worker
from tests.local.test_two_ranks import port
from tests.pipelines import wan_pipeline
from tests.ranks import OneOfSome

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.serving.messages import Request

pytestmark = [pytest.mark.local, pytest.mark.timeout(900)]
PROMPTS = ["a cat runs", "a dog jumps", "a cat jumps"]
CYCLES, BATCH, SLOTS = 6, 4, 3


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return wan_pipeline(tmp_path_factory.mktemp("poison"))


def recipe(pipeline: Path, output: Path, **training: Any) -> Recipe:
    return derive(
        Recipe(name="run", output=output, deterministic=True),
        {
            "model": {"path": str(pipeline), "frames": 5, "height": 32, "width": 32},
            "method": {"name": "dmd2"},
            "checkpoints.every": 2,
            "training": {
                **{"cycles": CYCLES, "batch": BATCH, "fake_updates": 2, "fake_warmup": 1, "precision": "fp32"},
                **{"report_every": 1, "ema": 0.9, "student": {"rate": 1e-3, "lora": None}, "fake": {"rate": 1e-3}},
                **training,
            },
        },
    )


def make(r: Recipe, session: FolderSession, stop_at: int | None = None, rewards: Client | None = None) -> Worker:
    torch.set_num_threads(1)
    r.folder.mkdir(parents=True, exist_ok=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.output / f"conditions-{session.rank}"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=session.device), table))
    job = Job(recipe=r, family=family, conditions=table, stop_at=stop_at, prompts=PROMPTS)
    return Worker(job, teacher, session, EventLog(r.folder / "events.jsonl", enabled=session.rank == 0), rewards)


def work(r: Recipe, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    worker = make(r, FolderSession(r.folder), stop_at)
    worker.run()
    return {k: v.clone() for k, v in worker.state().items()}


def position(cycle: int, place: int, sample: int) -> int:
    return (cycle * SLOTS + place) * BATCH + sample


Guilty = "Callable[[torch.Tensor], list[int]]"


def by_noise(*positions: int, seed: int = 0) -> Guilty:
    """Which samples of a rollout began from the noise of these positions."""

    def guilty(noise: torch.Tensor) -> list[int]:
        found = [Draws(seed, "", (p,)).normal("noise", noise.shape[1:])[0] for p in positions]
        return [i for i, own in enumerate(noise) if any(own.equal(other) for other in found)]

    return guilty


def spoil(patch: pytest.MonkeyPatch, kind: str, guilty: Guilty) -> None:
    """Have these samples be poison: to the teacher, to the student's gradient or to the fake score's loss."""
    queries, gradient, fake_loss = Method.queries, Matching.gradient, Method.fake_loss

    def asked(self, sample, *args):
        found = queries(self, sample, *args)
        for i in guilty(sample.noise):
            found[0].x_t[i, 0] = torch.nan
        return found

    def moved(self, sample, *args):
        found = gradient(self, sample, *args)
        for i in guilty(sample.noise):
            found[i, 0] = torch.nan
        return found

    def regressed(self, fake, sample, *args):
        loss, error, t = fake_loss(self, fake, sample, *args)
        for i in guilty(sample.noise):
            loss, error[i] = loss * torch.nan, torch.nan
        return loss, error, t

    patch.setattr(*{
        "teacher": (Method, "queries", asked),
        "student": (Matching, "gradient", moved),
        "fake": (Method, "fake_loss", regressed),
    }[kind])  # fmt: skip


KINDS = {
    "teacher": (position(3, 0, 2), "student", "x_t was not finite already"),
    "student": (position(3, 0, 2), "student", "its gradient is not finite"),
    "fake": (position(3, 2, 1), "fake.1", "its error is not finite"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_named_drawn_anew_and_a_restart_draws_the_same(pipeline, tmp_path, monkeypatch, kind):
    where, slot, why = KINDS[kind]
    usual = work(recipe(pipeline, tmp_path / "usual"))
    spoil(monkeypatch, kind, by_noise(where))

    refused = recipe(pipeline, tmp_path / "refused")
    for _ in range(2):  # the same command ends at the same place, with what to do
        with pytest.raises(NonFiniteError) as caught:
            work(refused)
        text = str(caught.value)
        for part in (
            f"cycle 3, {slot}, position {where}, prompt ",
            why,
            "data.quarantine=[",
            "training.poison_budget=",
        ):
            assert part in text
        assert any(repr(prompt) in text for prompt in PROMPTS)
    assert not (refused.folder / FILE).exists()

    whole = recipe(pipeline, tmp_path / "whole", poison_budget=1)
    after = work(whole)
    [row] = read_lines(whole.folder / FILE)
    assert (row["position"], row["slot"], row["text"]) == (where, slot, PROMPTS[row["prompt"] - 1])
    [event] = [e for e in read_lines(whole.folder / "events.jsonl") if e["event"] == "quarantined"]
    assert (event["drawn_anew"], event["budget"]) == (1, 1)
    assert any(not after[k].equal(v) for k, v in usual.items())
    assert all(v.isfinite().all() for v in after.values())

    parts = recipe(pipeline, tmp_path / "parts", poison_budget=1)
    work(parts, stop_at=4)  # past it
    for newest in parts.folder.glob("cycle-*04"):
        shutil.rmtree(newest)  # as if it had died before that checkpoint
    assert all(after[k].equal(v) for k, v in work(parts).items())
    resumed = [e["cycle"] for e in read_lines(parts.folder / "events.jsonl") if e["event"] == "resume"]
    assert resumed == [2], "it did not go through that cycle twice"
    assert (parts.folder / FILE).read_text() == (whole.folder / FILE).read_text()

    going_on = derive(refused, {"training.poison_budget": 1})
    assert all(after[k].equal(v) for k, v in work(going_on).items()), "the run that had failed goes on"


def test_in_the_warm_up_too(pipeline, tmp_path, monkeypatch):
    spoil(monkeypatch, "fake", by_noise(1, seed=1))
    r = recipe(pipeline, tmp_path, poison_budget=1)
    work(r)
    [row] = read_lines(r.folder / FILE)
    assert (row["slot"], row["position"], row["seed"]) == ("warmup.0", 1, 1)


def test_one_that_stays_poison_ends_with_the_budget(pipeline, tmp_path, monkeypatch):
    """Here every sample of prompt 2 is, and no noise cures it; leaving the prompt out does."""
    r = recipe(pipeline, tmp_path, poison_budget=3)
    queries = Method.queries
    rows: list[tuple[int, ...]] = []
    make_batch = Stream.batch

    def batch(self, cycle, slot):
        found = make_batch(self, cycle, slot)
        if slot == "student":
            rows.append(found.conditions)
        return found

    def asked(self, sample, *args):
        found = queries(self, sample, *args)
        for i, row in enumerate(rows[-1]):
            if row == 2:
                found[0].x_t[i] = torch.nan
        return found

    monkeypatch.setattr(Stream, "batch", batch)
    monkeypatch.setattr(Method, "queries", asked)
    with pytest.raises(NonFiniteError, match=r"poison_budget=3 is spent.*data\.quarantine=\[2\]"):
        work(r)
    assert 0 < len(list(read_lines(r.folder / FILE))) <= 3
    before = len(rows)
    work(derive(r, {"data.quarantine": [2]}))
    assert rows[before:]
    assert not any(2 in conditions for conditions in rows[before:])


class Judge(Client):
    """Rewards that are plain numbers, but for one sample of the request whose name begins so, and then no more."""

    def __init__(self, name: str, sample: int) -> None:
        self._name, self._sample, self._met = name, sample, False

    @property
    def retries(self) -> int:
        return 0

    def submit(self, request: Request) -> LocalPending:
        if request.name.startswith(self._name) and not self._met:
            self._met = True
            return LocalPending(NonFiniteError("the reward is nan", (self._sample,)))
        value = request.x_t.flatten(1).mean(1)
        return LocalPending(Reply(answer=Answer(value=value), replica="judge", seconds=0.0, batch_items=len(value)))


REWARDS = {
    "judged-student": ("cycle 3 reward", position(3, 0, 3), "student"),
    "judged-fake": ("cycle 3 fake.1 reward", position(3, 2, 3), "fake.1"),
}


def one_of_two(rank: int, where: int, pipeline: Path, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=rank, world_size=2)
    found = {}
    for kind, (at, _, _) in KINDS.items():
        for sharding in ("ddp", "fsdp"):
            with pytest.MonkeyPatch.context() as patch:
                spoil(patch, kind, by_noise(at))
                name = f"{kind}-{sharding}"
                r = recipe(pipeline, output / name, sharding=sharding)
                worker = make(r, OneOfSome(r.folder, rank))
                try:
                    worker.run()
                except NonFiniteError as error:
                    before = [int(worker.student.updates), int(worker.fake.updates)]
                    found[name] = [str(error), before]
                dist.barrier()
                r = derive(r, {"training.poison_budget": 1, "name": "again"})
                worker = make(r, OneOfSome(r.folder, rank))
                worker.run()
                state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in worker.state().items()}
                torch.save({k: v.clone() for k, v in state.items()}, r.folder / f"rank{rank}.pt")
                dist.barrier()
    for name, (asked, _, _) in REWARDS.items():
        r = derive(recipe(pipeline, output / name), {"method": {"name": "amd", "adapt": {"group": 2}}})
        for budget in (0, 1):
            r = derive(r, {"training.poison_budget": budget, "name": f"budget{budget}"})
            judge = Judge(asked if rank == 1 else "nobody", 1)
            worker = make(r, OneOfSome(r.folder, rank), rewards=judge)
            try:
                assert worker.run() == "finished"
            except NonFiniteError as error:
                found[name] = [str(error), [int(worker.student.updates), int(worker.fake.updates)]]
            dist.barrier()
    with pytest.MonkeyPatch.context() as patch:  # a gradient that is no sample's
        update = Worker._actors

        def torn(self, phase):
            actors = update(self, phase)
            plain = actors.method.generator_loss
            if rank == 1:
                object.__setattr__(actors.method, "generator_loss", lambda *a, **k: plain(*a, **k) + torch.nan)
            return actors

        patch.setattr(Worker, "_actors", torn)
        r = recipe(pipeline, output / "torn")
        worker = make(r, OneOfSome(r.folder, rank))
        try:
            worker.run()
        except NonFiniteError as error:
            found["torn"] = [str(error), [int(worker.student.updates), int(worker.fake.updates)]]
    (output / f"found{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_stop_together_name_it_and_draw_what_one_rank_draws(pipeline, tmp_path, monkeypatch):
    alone = {}
    for kind, (at, _, _) in KINDS.items():
        with monkeypatch.context() as patch:
            spoil(patch, kind, by_noise(at))
            r = recipe(pipeline, tmp_path / kind, poison_budget=1)
            alone[kind] = work(r), (r.folder / FILE).read_text()
    multiprocessing.spawn(one_of_two, (port(), pipeline, tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "both ranks say the same, and have moved as far"
    for kind, (at, slot, why) in KINDS.items():
        for sharding in ("ddp", "fsdp"):
            text, (student, fake) = first[f"{kind}-{sharding}"]
            assert f"{slot}, position {at}, prompt" in text
            assert why in text
            assert (student, fake) == (3, 1 + 2 * 3 + {"fake": 1}.get(kind, 2)), "no optimizer moved for it"
            folder = tmp_path / f"{kind}-{sharding}" / "again"
            expected, quarantine = alone[kind]
            here = json.loads((folder / FILE).read_text())
            assert {**here, "why": ""} == {**json.loads(quarantine), "why": ""}
            ranks = [torch.load(folder / f"rank{k}.pt") for k in (0, 1)]
            for key, value in expected.items():
                assert ranks[0][key].equal(ranks[1][key]), f"{kind}: {key}"
                if key.endswith((".exp_avg", ".exp_avg_sq")):
                    apart = float((ranks[0][key] - value).norm() / (value.norm() + 1e-12))
                    assert apart < 0.05, f"{kind}-{sharding}: {key}"
    for name, (_, at, slot) in REWARDS.items():
        text, (student, fake) = first[name]
        assert f"{slot}, position {at}, prompt" in text
        assert "the reward is nan" in text
        assert (student, fake) == (3, 1 + 2 * 3 + (1 if slot == "fake.1" else 2))
        [row] = read_lines(tmp_path / name / "budget1" / FILE)
        assert (row["position"], row["slot"]) == (at, slot)
    text, (student, _) = first["torn"]
    assert student == 0
    for part in (
        "the student's loss is nan in cycle 0, student; no parameter moved",
        "No sample alone is the cause (the loss is not finite on rank 1)",
        "0 (prompt ",
        "3 (prompt ",
    ):
        assert part in text
