"""Taking over another run's training state: what is the donor's, what is new, what is left when it is interrupted."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from raydmd.errors import RunFailed
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.process import step_grid
from raydmd.recipe import Recipe, derive, load
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training import takeover
from raydmd.training.checkpoint import PROGRESS, read_progress
from raydmd.training.events import EventLog, read_lines
from raydmd.training.folder import same_run
from raydmd.training.manifest import NAME, damage
from raydmd.training.session import FolderSession
from raydmd.training.store import TRAIN, Store
from raydmd.training.takeover import TAKEN, checkpoint_at, end_leg, take_over, taken
from raydmd.training.worker import Job, Worker
from tests.local.test_worker import PROMPTS, recipe
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.local


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_pipeline(tmp_path_factory.mktemp("one"), experts=1)


def worker_of(r: Recipe, stop_at: int | None = None) -> Worker:
    torch.set_num_threads(1)
    r.folder.mkdir(parents=True, exist_ok=True)
    (r.folder / "recipe.yaml").write_text(r.to_yaml(), encoding="utf-8")
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
    job = Job(recipe=r, family=family, conditions=table, stop_at=stop_at, taken=taken(r.folder))
    return Worker(job, teacher, FolderSession(r.folder / TRAIN), EventLog(r.folder / "events.jsonl"))


def leg(r: Recipe, stop_at: int) -> dict[str, Tensor]:
    """Run to a cycle; returns the state there."""
    worker = worker_of(r, stop_at)
    assert worker.run() == "stopped"
    assert worker.cycle == stop_at
    return copied(worker)


def step_of(r: Recipe) -> float:
    """Where its first phase ends."""
    return worker_of(r).method.phases[0].floor


def copied(worker: Worker) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in worker.state().items()}


@pytest.fixture
def two(pipeline: Path, tmp_path: Path) -> tuple[Recipe, Recipe]:
    """Two runs of a population, the first one's state better; both stand at cycle 2."""
    training = {"decay": 0.0, "cycles": 12}
    donor = recipe(pipeline, tmp_path, name="donor", training=training, method={"boundaries": [0.9]})
    other = derive(donor, {"name": "other", "training.student.rate": 3e-3, "method.guidance": 2.0})
    leg(other, 2)
    return donor, other


def test_the_state_is_the_donors_and_the_settings_are_the_new_ones(two: tuple[Recipe, Recipe]) -> None:
    donor, other = two
    there = leg(donor, 2)
    changes = {
        "training.student.rate": 1e-2,
        "training.fake.weight_decay": 0.1,
        "training.ema": 0.1,
        "training.fake_updates": 3,
        "method.boundaries": [0.7],
        "method.guidance": 3.0,
    }
    now = derive(other, changes)
    assert take_over(now, donor.folder, cycle=2, changes=changes)
    assert load(other.folder / "recipe.yaml", Recipe()) == now
    same_run(now, now.folder)
    [event] = [e for e in read_lines(other.folder / "events.jsonl") if e["event"] == "exploit"]
    assert (event["cycle"], event["donor"], event["changes"]) == (2, "donor", changes)

    worker = worker_of(now)
    actors = worker.begin()
    here = copied(worker)
    assert worker.cycle == 2
    kinds = {".".join(k.split(".")[:2]) for k in there}
    assert {"student.optimizer", "student.average", "fake.optimizer", "student.updates", "fake.updates"} <= kinds
    assert here.keys() == there.keys()
    assert all(torch.equal(here[k], v) for k, v in there.items())
    assert actors.fake_updates == 3
    grid = step_grid(4, 5.0)
    assert actors.phase.floor == grid[3] != step_of(donor)  # three steps instead of two

    done = worker_of(now, 3)
    assert done.run() == "stopped"
    [rates] = [{group["lr"] for group in done.student.optimizer.param_groups}]
    assert rates == {1e-2}
    assert {group["weight_decay"] for group in done.fake.optimizer.param_groups} == {0.1}
    p, average = done.student.parameters, done.student.average
    for name, value in average.items():
        before = there[f"student.average.{name}"]
        assert torch.allclose(value, before + 0.9 * (p[name] - before), atol=1e-7), name


def test_the_next_step_is_the_donors_own_but_for_the_new_rate(two: tuple[Recipe, Recipe]) -> None:
    donor, other = two
    there = leg(donor, 2)
    settings = donor.model_dump(exclude={"name"})
    alike, faster = (Recipe.model_validate({**settings, "name": n}) for n in ("other", "faster"))
    assert alike.folder == other.folder
    faster = derive(faster, {"training.student.rate": 10 * donor.training.student.rate})
    for r in (alike, faster):
        assert take_over(r, donor.folder, cycle=2, changes={})
    own, same, tenfold = leg(donor, 3), leg(alike, 3), leg(faster, 3)
    assert own.keys() == same.keys()
    assert all(torch.equal(same[k], v) for k, v in own.items())
    moved = [k for k in own if k.startswith("student.transformer") and not torch.equal(own[k], there[k])]
    assert moved
    for key in moved:  # Adam's step is the rate times a function of gradients, which are those of the same state
        assert torch.allclose(tenfold[key] - there[key], 10 * (own[key] - there[key]), atol=2e-6), key
    assert all(torch.equal(tenfold[k], own[k]) for k in own if k.startswith("fake."))


def test_a_copy_is_linked_and_outlives_the_donor(two: tuple[Recipe, Recipe]) -> None:
    donor, other = two
    there = leg(donor, 2)
    source = donor.folder / TRAIN / checkpoint_at(Store.of(donor.folder, None), 2)
    before = (source / PROGRESS).read_text(encoding="utf-8")
    now = derive(other, {"training.fake_updates": 5})
    take_over(now, donor.folder, cycle=2, changes={})
    copy = taken(other.folder)
    assert copy is not None
    files = [f for f in source.iterdir() if f.name not in (PROGRESS, NAME.format(0))]
    assert damage(copy) == damage(source) == ""
    assert files
    assert all(f.stat().st_ino == (copy / f.name).stat().st_ino for f in files)
    assert (source / PROGRESS).read_text(encoding="utf-8") == before
    assert read_progress(copy).monitor["measures"]["fake_updates"] == 5
    shutil.rmtree(donor.folder)
    worker = worker_of(now)
    worker.begin()
    assert all(torch.equal(v, there[k]) for k, v in worker.state().items())


def test_without_links_it_is_copied(two: tuple[Recipe, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError("no links here")

    donor, other = two
    leg(donor, 2)
    monkeypatch.setattr(os, "link", none)
    take_over(other, donor.folder, cycle=2, changes={})
    copy = taken(other.folder)
    assert copy is not None
    source = donor.folder / TRAIN / checkpoint_at(Store.of(donor.folder, None), 2)
    names = {f.name for f in source.iterdir()}
    assert names == {f.name for f in copy.iterdir()}
    assert all((copy / n).read_bytes() == (source / n).read_bytes() for n in names - {PROGRESS})


class Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


@pytest.mark.parametrize("where", ["link_tree", "_adopt", "replace", "EventLog"])
def test_one_that_was_interrupted_is_done_again(
    two: tuple[Recipe, Recipe], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor, other = two
    there = leg(donor, 2)
    now = derive(other, {"training.student.rate": 7e-3})
    whole = getattr(takeover, where)

    def die(*given: Any) -> None:
        if where == "link_tree":  # half of the files are there
            source, target = given
            target.mkdir(parents=True)
            (target / PROGRESS).write_bytes((source / PROGRESS).read_bytes())
        if where != "replace" or given[0].name == "recipe.yaml":
            raise Killed
        whole(*given)

    monkeypatch.setattr(takeover, where, die)
    with pytest.raises(Killed):
        take_over(now, donor.folder, cycle=2, changes={})
    assert (taken(other.folder) is None) == (where in ("link_tree", "_adopt"))
    monkeypatch.setattr(takeover, where, whole)
    assert take_over(now, donor.folder, cycle=2, changes={})
    assert not take_over(now, donor.folder, cycle=2, changes={})
    assert [f.name for f in (other.folder / TAKEN).iterdir()] == ["cycle-00000002"]
    assert load(other.folder / "recipe.yaml", Recipe()) == now
    worker = worker_of(now)
    worker.begin()
    assert all(torch.equal(v, there[k]) for k, v in worker.state().items())
    events = [e["event"] for e in read_lines(other.folder / "events.jsonl")]
    assert events.count("exploit") == 1


def test_a_full_disk_is_said_and_leaves_the_run_as_it_was(
    two: tuple[Recipe, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    donor, other = two
    leg(donor, 2)
    monkeypatch.setattr(takeover, "link_tree", full)
    with pytest.raises(RunFailed, match=r"can't take over .*No space left"):
        take_over(derive(other, {"training.student.rate": 1e-5}), donor.folder, cycle=2, changes={})
    assert load(other.folder / "recipe.yaml", Recipe()) == other
    with pytest.raises(RunFailed, match="there is no checkpoint of cycle 9"):
        take_over(other, donor.folder, cycle=9, changes={})


def test_a_run_that_never_wrote_a_checkpoint_takes_over_too(two: tuple[Recipe, Recipe]) -> None:
    donor, _ = two
    there = leg(donor, 2)
    new = derive(donor, {"name": "new"})
    take_over(new, donor.folder, cycle=2, changes={})
    worker = worker_of(new)
    worker.begin()
    assert all(torch.equal(v, there[k]) for k, v in worker.state().items())


def test_a_leg_ends_where_it_should_and_is_not_overrun(two: tuple[Recipe, Recipe]) -> None:
    donor, other = two
    leg(donor, 2)
    take_over(other, donor.folder, cycle=2, changes={})
    assert not end_leg(other.folder, 4)
    assert taken(other.folder)
    after = leg(other, 4)
    # A checkpoint of its own is newer now; asked to come to where it is, it stays.
    assert all(torch.equal(v, after[k]) for k, v in leg(other, 4).items())
    assert end_leg(other.folder, 4)
    assert taken(other.folder) is None
    assert end_leg(other.folder, 4)
    events = [e for e in read_lines(other.folder / "events.jsonl") if e["event"] == "leg"]
    assert [e["cycle"] for e in events] == [4]
    onward = leg(other, 5)
    assert any(not torch.equal(v, after[k]) for k, v in onward.items())


def test_an_average_that_is_kept_by_one_alone_can_not_be_taken_over(two: tuple[Recipe, Recipe]) -> None:
    """What the check of a population's space is for."""
    donor, other = two
    leg(derive(donor, {"training.ema": 0.0}), 2)
    take_over(other, donor.folder, cycle=2, changes={})
    with pytest.raises(OSError, match=r"Missing key in checkpoint state_dict: student.average"):
        worker_of(other).begin()
