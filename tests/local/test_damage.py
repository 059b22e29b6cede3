"""Checkpoints that are not what was written: never loaded as good, and the one before is gone on from."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from raydmd.errors import DamagedCheckpoint, RunFailed
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.recipe import Recipe, derive
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training import checkpoint
from raydmd.training.events import EventLog, read_lines
from raydmd.training.manifest import NAME, damage, reseal, seal
from raydmd.training.mending import MOST, check_books, clear, fall_back
from raydmd.training.session import FolderSession
from raydmd.training.store import BOOKS, TRAIN, Store, experiment, link_tree
from raydmd.training.takeover import TAKEN, pending, taken
from raydmd.training.worker import Job, Worker
from tests.local.test_worker import PROMPTS, recipe
from tests.pipelines import wan_pipeline

pytestmark = pytest.mark.local

BLOCK = 4096


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_pipeline(tmp_path_factory.mktemp("damage"), experts=1)


@pytest.fixture
def stopped(pipeline: Path, tmp_path: Path) -> Recipe:
    """A run that was stopped after 4 of 6 cycles, with checkpoints after 2, 3 (where its first phase ends) and 4."""
    r = recipe(pipeline, tmp_path, method={"boundaries": [0.9]})
    worker = worker_of(r, 4)
    assert worker.run() == "stopped"
    return r


def worker_of(r: Recipe, stop_at: int | None = None) -> Worker:
    torch.set_num_threads(1)
    place = r.folder / experiment(r.folder)
    place.mkdir(parents=True, exist_ok=True)
    family = load_family(r.model)
    table = Conditions.read(family.encode(PROMPTS, r.folder / "conditions"))
    teacher = LocalClient(TeacherEngine(load_teacher(family, "fp32", device=torch.device("cpu")), table))
    job = Job(recipe=r, family=family, conditions=table, stop_at=stop_at, taken=taken(r.folder))
    return Worker(job, teacher, FolderSession(place), EventLog(r.folder / "events.jsonl"))


def checkpoints(r: Recipe) -> list[Path]:
    return sorted((r.folder / experiment(r.folder)).glob("cycle-*"))


def books(r: Recipe) -> Path:
    """Ray Train's list, as far as it is read."""
    file = r.folder / experiment(r.folder) / BOOKS
    entries = [{"version": 0, "checkpoint_dir_name": c.name} for c in checkpoints(r)]
    file.write_text(json.dumps({"checkpoint_results": entries, "latest_checkpoint_result": entries[-1]}))
    return file


def test_whatever_is_cut_off_is_found(stopped: Recipe) -> None:
    whole = checkpoints(stopped)[-1]
    assert damage(whole) == ""
    files = sorted(f for f in whole.rglob("*") if f.is_file())
    assert {".metadata", "progress.json", NAME.format(0)} <= {f.name for f in files}
    cuts = 0
    for file in files:
        kept = file.read_bytes()
        for size in range(0, len(kept), BLOCK):
            os.truncate(file, size)
            assert file.name in damage(whole), (file, size)
            cuts += 1
        os.truncate(file, len(kept) - 1)
        assert file.name in damage(whole)
        file.write_bytes(kept)
    assert damage(whole) == ""
    assert cuts > 100


def write(folder: Path) -> None:
    """A small checkpoint of one rank, without its list."""
    folder.mkdir()
    checkpoint.save(
        folder, {"weight": torch.ones(9)}, checkpoint.Progress(cycle=1, phase=0, monitor={}, recipe="before")
    )


def test_a_file_that_no_list_names_is_missed(tmp_path: Path) -> None:
    write(tmp_path / "one")
    kept = (tmp_path / "one" / "__0_0.distcp").read_bytes()
    (tmp_path / "one" / "__0_0.distcp").unlink()
    seal(tmp_path / "one")
    (tmp_path / "one" / "__0_0.distcp").write_bytes(kept)
    assert damage(tmp_path / "one") == "__0_0.distcp is in no list"


def test_a_disk_that_fails_is_an_error_that_threads_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(OSError, match=r"rank 0: OSError: .*No space left"):
        write(tmp_path / "one")


def test_what_was_not_written_to_its_end_goes_and_nothing_else(pipeline: Path, stopped: Recipe) -> None:
    r = derive(stopped, {"output": stopped.folder.parent / "cleared"})
    shutil.copytree(stopped.folder, r.folder)
    there = Store.of(r.folder, None)
    begun = "cycle-00000001"
    shutil.copytree(there.path(there.names()[-1]), there.path(begun))
    (Path(there.path(begun)) / NAME.format(0)).unlink()
    before = there.names()
    clear(r)
    assert there.names() == [name for name in before if name != begun]
    [event] = [e for e in read_lines(r.folder / "events.jsonl") if e["event"] == "cleared"]
    assert event["checkpoint"] == begun


def test_what_is_changed_missing_or_of_another_writing_is_found(tmp_path: Path) -> None:
    for rank in range(2):
        own = tmp_path / f"of{rank}"
        write(own) if rank == 0 else own.mkdir()
        (own / f"__{rank}_0.distcp").write_bytes(bytes([rank]) * 9000)
        seal(own, rank=rank, world=2, stamp="a")
        shutil.copytree(own, tmp_path / "whole", dirs_exist_ok=True)
    whole = tmp_path / "whole"
    assert damage(whole) == ""
    file = whole / "__1_0.distcp"
    kept = file.read_bytes()
    file.write_bytes(kept[:5000] + b"\0" + kept[5001:])
    assert damage(whole) == "__1_0.distcp is not what was written"
    assert damage(whole, part=0, parts=2) == ""  # another process's share
    assert damage(whole, part=1, parts=2) == "__1_0.distcp is not what was written"
    file.unlink()
    assert damage(whole) == "__1_0.distcp is missing"
    file.write_bytes(kept)
    (tmp_path / "empty").mkdir()
    seal(tmp_path / "empty", stamp="a")
    shutil.copytree(whole, tmp_path / "gutted")
    (tmp_path / "gutted" / "manifest-00000.json").write_bytes((tmp_path / "empty" / NAME.format(0)).read_bytes())
    assert damage(tmp_path / "gutted") == ".metadata is in no list"
    seal(tmp_path / "of1", rank=1, world=2, stamp="b")
    shutil.copy2(tmp_path / "of1" / NAME.format(1), whole)
    assert damage(whole) == "manifest-00001.json is of another writing than manifest-00000.json"
    (whole / NAME.format(1)).unlink()
    assert damage(whole) == "manifest-00001.json is missing"
    (whole / NAME.format(0)).write_text("[]")
    assert damage(whole) == "manifest-00000.json can't be read"


def test_a_file_that_was_changed_on_purpose_is_listed_anew_and_links_are_left_alone(tmp_path: Path) -> None:
    one, copy = tmp_path / "one", tmp_path / "copy"
    write(one)
    seal(one)
    link_tree(one, copy)
    (copy / "progress.json").unlink()
    (copy / "progress.json").write_text("after")
    assert damage(copy)
    reseal(copy, "progress.json")
    assert damage(copy) == damage(one) == ""


def test_what_was_taken_over_counts_until_a_checkpoint_after_it(stopped: Recipe) -> None:
    log = EventLog(stopped.folder / "events.jsonl")
    assert pending(stopped.folder) is None
    name = fall_back(stopped, "a test")
    copy = pending(stopped.folder)
    assert copy == stopped.folder / TAKEN / name
    log.write("committed", checkpoint="cycle-r01-00000002")  # of a rollback to before it
    assert pending(stopped.folder) is None
    assert taken(stopped.folder) == copy, "which a further rollback may go back to"


def test_a_run_that_falls_back_to_the_same_checkpoint_again_and_again_ends(stopped: Recipe) -> None:
    names = {fall_back(stopped, "rank 5 reads rubbish") for _ in range(MOST)}
    assert len(names) == 1
    with pytest.raises(RunFailed, match=f"rank 5 reads rubbish.*{MOST} times"):
        fall_back(stopped, "rank 5 reads rubbish")
    EventLog(stopped.folder / "events.jsonl").write("committed", checkpoint="cycle-00000005")
    assert fall_back(stopped, "much later") in names


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_the_same(pipeline: Path, stopped: Recipe) -> None:
    other = stopped.folder.parent / "other"
    undisturbed = worker_of(recipe(pipeline, other, method={"boundaries": [0.9]}))
    assert undisturbed.run() == "finished"
    *_, before, fourth = checkpoints(stopped)
    assert (before.name, fourth.name) == ("cycle-00000003-phase", "cycle-00000004")
    file = max(fourth.glob("*.distcp"))
    os.truncate(file, BLOCK)
    with pytest.raises(DamagedCheckpoint, match=rf"{fourth.name} is damaged: {file.name} has 4096 bytes of"):
        worker_of(stopped).run()
    assert fall_back(stopped, "it is cut off") == before.name
    assert (stopped.folder / TRAIN / fourth.name).is_dir()  # nothing is deleted
    again = worker_of(stopped)
    assert again.run() == "finished"
    events = list(read_lines(stopped.folder / "events.jsonl"))
    assert [e["checkpoint"] for e in events if e["event"] == "fallback"] == [before.name]
    assert [e["cycle"] for e in events if e["event"] == "resume"] == [3]
    state = again.state()
    assert all(value.equal(state[name]) for name, value in undisturbed.state().items())
    # From here on its own checkpoints are newer than the one that it was given.
    final = checkpoints(stopped)[-1]
    assert final.name.endswith("-final")
    check_books(stopped)
    os.truncate(max((final / "student").iterdir()), 100)
    with pytest.raises(DamagedCheckpoint, match="final is damaged: student/"):
        check_books(stopped)
    assert fall_back(stopped, "it is cut off") == "cycle-00000004"
    assert [f.name for f in (stopped.folder / TAKEN).iterdir()] == ["cycle-00000004"]


def test_where_all_are_damaged_nothing_is_begun_anew_and_nothing_is_lost(stopped: Recipe) -> None:
    for folder in checkpoints(stopped):
        (folder / "progress.json").write_text("{")
    count = len(checkpoints(stopped))
    with pytest.raises(DamagedCheckpoint, match="progress"):
        worker_of(stopped).run()
    with pytest.raises(RunFailed, match=f"none of its {count} checkpoints is whole.*another --name"):
        fall_back(stopped, "it is damaged")
    assert len(checkpoints(stopped)) == count


def test_books_that_cannot_be_gone_by_are_found_before_the_start(stopped: Recipe) -> None:
    check_books(stopped)  # none yet: Ray Train begins some
    file = books(stopped)
    check_books(stopped)
    kept = file.read_text()
    file.write_text(kept[:-1])
    with pytest.raises(DamagedCheckpoint, match="Ray Train's list of checkpoints can't be read"):
        check_books(stopped)
    file.write_text(kept)
    shutil.rmtree(checkpoints(stopped)[-1])
    with pytest.raises(DamagedCheckpoint, match="is gone"):
        check_books(stopped)
    assert fall_back(stopped, "it is gone").startswith("cycle-")


def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    r = Recipe(name="run", output=tmp_path)
    (r.folder / TRAIN).mkdir(parents=True)
    (r.folder / TRAIN / BOOKS).write_text("")
    with pytest.raises(DamagedCheckpoint):
        check_books(r)
    assert fall_back(r, "it is empty") == ""
    assert experiment(r.folder) == "train-2"
    check_books(r)
