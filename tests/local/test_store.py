"""Checkpoints on a disk or in object storage: what stays of them, and what happens where there is no room for one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from raydmd.errors import DamagedCheckpoint, InputError, RunFailed, RunStopped
from raydmd.recipe import Recipe, derive
from raydmd.training import checkpoint, mending, store
from raydmd.training.events import METRICS, EventLog, read_lines
from raydmd.training.folder import same_run
from raydmd.training.manifest import damage, seal
from raydmd.training.mending import catch_up, check_books, fall_back
from raydmd.training.ranks import Ranks
from raydmd.training.ray_worker import RaySession
from raydmd.training.retention import check_best, retain, to_keep
from raydmd.training.store import BOOKS, KEPT, MARK, TRAIN, Store, check_storage
from raydmd.training.students import EVALUATIONS
from raydmd.training.takeover import TAKEN, taken
from tests.local.test_damage import checkpoints, worker_of
from tests.local.test_two_ranks import port
from tests.local.test_worker import recipe
from tests.pipelines import wan_pipeline
from tests.ranks import OneOfSome
from tests.s3 import BUCKET, environment, object_storage

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.local


@pytest.fixture(scope="module", params=[None, f"{BUCKET}/runs"], ids=["disk", "s3"])
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param is None:
        yield None
        return
    with object_storage() as values, environment(values):
        yield request.param


def run_of(output: Path, storage: str | None, **changes: object) -> Recipe:
    return derive(
        Recipe(name="run", output=output), {"checkpoints.storage": storage, "checkpoints.every": 2, **changes}
    )


def commit(r: Recipe, scratch: Path, *cycles: int, keep: int = 9) -> Store:
    """Write checkpoints and Ray Train's list of the last ones, as far as it is read."""
    own = Store.of(r.folder, r.checkpoints.storage)
    for cycle in cycles:
        folder = scratch / checkpoint.name_of(cycle)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tensors = {"weight": torch.full((2000,), float(cycle))}
        checkpoint.save(folder, tensors, checkpoint.Progress(cycle=cycle, phase=0, monitor={}, recipe=""))
        seal(folder)
        own.files.create_dir(own.path(folder.name), recursive=True)
        own.send(folder, folder.name)
    names = own.names()[-keep:]
    for name in own.names()[:-keep]:
        own.files.delete_dir(own.path(name))
    with own.files.open_output_stream(own.path(BOOKS)) as stream:
        entries = ", ".join(f'{{"checkpoint_dir_name": "{n}"}}' for n in names)
        stream.write(f'{{"checkpoint_results": [{entries}]}}'.encode())
    return own


def test_what_is_sent_is_there_and_comes_back_whole(tmp_path: Path, storage: str | None) -> None:
    own = commit(run_of(tmp_path, storage), tmp_path / "scratch", 2, 4)
    assert own.local == (storage is None)
    assert own.names() == ["cycle-00000002", "cycle-00000004"]
    with own.at("cycle-00000004") as folder:
        assert damage(folder) == ""
        weight = torch.zeros(2000)
        checkpoint.load(folder, {"weight": weight})
        assert torch.equal(weight, torch.full((2000,), 4.0))
    assert folder.exists() == own.local, "a copy goes again"
    (tmp_path / "part" / "student").mkdir(parents=True)
    (tmp_path / "part" / "student" / "expert.safetensors").write_bytes(b"weights")
    own.send(tmp_path / "part", "cycle-00000004")
    with own.at("cycle-00000004", only="student") as folder:
        assert (folder / "student" / "expert.safetensors").read_bytes() == b"weights"
        assert own.local or [f.name for f in folder.iterdir()] == ["student"]
    with pytest.raises(OSError), own.at("cycle-00000006") as folder:  # noqa: PT011  # each file system has its own words
        assert next(folder.iterdir())


def test_storage_that_is_busy_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, told, copy = commit(run_of(tmp_path, None), tmp_path / "scratch", 2), list[str](), store.arrow.copy_files
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "file").write_text("here")

    def busy(*given: object, **how: object) -> None:
        told.append("asked")
        if len(told) < 3:
            raise OSError("AWS Error SLOW_DOWN")
        copy(*given, **how)

    monkeypatch.setattr(store, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(store.arrow, "copy_files", busy)
    own.send(tmp_path / "part", "cycle-00000002")
    assert own.read("cycle-00000002", "file") == b"here"
    told.clear()
    monkeypatch.setattr(store, "PAUSES", (0.0,))
    with pytest.raises(OSError, match="SLOW_DOWN"):
        own.send(tmp_path / "part", "cycle-00000002")
    assert len(told) == 2


def test_storage_that_is_away_is_waited_for_unless_that_is_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    r = run_of(tmp_path, "s3://bucket/runs", **{"placement.room_timeout": 60})
    r.folder.mkdir(parents=True)
    monkeypatch.setattr(mending, "PAUSE", 0.0)
    answers: list[Exception | str] = [OSError("no route"), OSError("no route"), "here"]

    def ask() -> str:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    assert mending.patiently(ask, r) == "here"
    assert capsys.readouterr().out.count("s3://bucket/runs does not answer: no route; asked again for up to 60 s") == 1
    assert [e["event"] for e in read_lines(r.folder / "events.jsonl")] == ["waiting"]
    answers = [FileNotFoundError(2, "gone")]
    with pytest.raises(FileNotFoundError):
        mending.patiently(ask, r)
    (r.folder / "STOP").touch()
    answers = [OSError("no route")]
    with pytest.raises(RunStopped, match="no route; the same command"):
        mending.patiently(ask, r)
    (r.folder / "STOP").unlink()
    answers = [OSError("no route")] * 1000
    with pytest.raises(RunFailed, match=r"placement\.room_timeout=0\.001 s"):
        mending.patiently(ask, derive(r, {"placement.room_timeout": 0.001}))
    answers = [OSError("a disk's")]
    with pytest.raises(OSError, match="a disk's"):
        mending.patiently(ask, derive(r, {"checkpoints.storage": None}))


def test_two_runs_of_a_name_do_not_meet(tmp_path: Path, storage: str | None) -> None:
    one, other = (run_of(tmp_path / place, storage) for place in "ab")
    own = commit(one, tmp_path / "scratch", 2)
    assert Store.of(other.folder, storage).names() == []
    assert own.root == Store.of(one.folder, storage).root
    if storage is not None:
        shutil.move(one.folder, tmp_path / "elsewhere")  # whoever moves the folder keeps the checkpoints
        assert Store.of(tmp_path / "elsewhere", storage).names() == own.names()
        assert (tmp_path / "elsewhere" / MARK).is_file()


def test_a_damaged_one_is_gone_back_behind_and_stays(tmp_path: Path, storage: str | None) -> None:
    r = run_of(tmp_path, storage)
    own = commit(r, tmp_path / "scratch", 2, 4, 6)
    check_books(r)
    with own.files.open_output_stream(own.path("cycle-00000006/__0_0.distcp")) as stream:
        stream.write(b"torn")
    assert fall_back(r, "it is torn") == "cycle-00000004"
    copy = taken(r.folder)
    assert copy is not None
    assert damage(copy) == ""
    after = Store.of(r.folder, storage)
    assert (own.experiment, after.experiment) == (TRAIN, "train-2")
    assert after.names() == []
    assert own.names() == [checkpoint.name_of(c) for c in (2, 4, 6)], "nothing is deleted"
    check_books(r)
    commit(r, tmp_path / "scratch", 6)
    own.files.delete_dir(after.path("cycle-00000006"))
    with pytest.raises(DamagedCheckpoint, match="cycle-00000006 is gone"):
        check_books(r)
    assert fall_back(r, "it is gone") == "cycle-00000004"


def test_every_so_many_and_the_best_one_stay(tmp_path: Path, storage: str | None) -> None:
    r = run_of(tmp_path, storage, **{"checkpoints.keep_every": 6, "checkpoints.best": "frechet", "evaluation.every": 4})
    own = commit(r, tmp_path / "scratch", 2, 4, 6)
    retain(r, own)
    assert own.names(KEPT) == ["cycle-00000004", "cycle-00000006"], "what waits for its evaluation stays"
    evaluations = EventLog(r.folder / EVALUATIONS)
    for cycle, value in ((4, 9.0), (8, 7.0)):
        evaluations.write("", cycle=cycle, student=checkpoint.name_of(cycle), **{"evaluation/frechet": value})
    commit(r, tmp_path / "scratch", 8, 10, keep=2)
    retain(r, own)
    assert own.names() == ["cycle-00000008", "cycle-00000010"]
    assert own.names(KEPT) == ["cycle-00000006", "cycle-00000008"], "4 is best no more"
    evaluations.write("", cycle=12, student=checkpoint.name_of(12), **{"evaluation/frechet": 8.0})
    commit(r, tmp_path / "scratch", 12, 14, keep=2)
    retain(r, own)
    assert own.names(KEPT) == ["cycle-00000006", "cycle-00000008", "cycle-00000012"]
    with own.at("cycle-00000008", KEPT) as folder:
        assert damage(folder) == ""
    events = [(e["event"], e["checkpoint"][-2:]) for e in read_lines(r.folder / "events.jsonl")]
    assert events == [("kept", "04"), ("kept", "06"), ("kept", "08"), ("dropped", "04"), ("kept", "12")]
    assert fall_back(r, "all of the last are damaged") == "cycle-00000014"


def test_one_that_was_kept_by_half_or_is_written_anew_is_kept_again(tmp_path: Path, storage: str | None) -> None:
    r = run_of(tmp_path, storage, **{"checkpoints.keep_every": 4})
    store = commit(r, tmp_path / "scratch", 4)
    retain(r, store)
    store.files.delete_file(store.path("cycle-00000004/manifest-00000.json", KEPT))
    retain(r, store)
    with store.at("cycle-00000004", KEPT) as folder:
        assert damage(folder) == ""
    for place in (None, KEPT):  # on a disk they are one file
        with store.files.open_output_stream(store.path("cycle-00000004/__0_0.distcp", place)) as stream:
            stream.write(b"torn")
    EventLog(r.folder / "events.jsonl").write("fallback", checkpoint="", message="torn")
    after = commit(r, tmp_path / "scratch", 4)
    anew = after.path("cycle-00000004/manifest-00000.json")
    listed = after.first_list("cycle-00000004")
    with after.files.open_output_stream(anew) as stream:
        stream.write(listed.replace(b'"stamp": ""', b'"stamp": "later"'))
    retain(r, after)
    assert b"later" in after.first_list("cycle-00000004", KEPT)
    with after.at("cycle-00000004", KEPT) as folder:
        assert damage(folder) == ""


def test_a_run_that_took_over_another_ones_state_goes_back_to_that_and_not_behind(tmp_path: Path) -> None:
    r = run_of(tmp_path, None)
    store = commit(r, tmp_path / "scratch", 2, 4)
    (r.folder / TAKEN).mkdir()
    shutil.copytree(store.path("cycle-00000004"), r.folder / TAKEN / "cycle-00000004")
    EventLog(r.folder / "events.jsonl").write("exploit", cycle=4, donor="other", changes={})
    commit(r, tmp_path / "scratch", 6)
    Path(store.path("cycle-00000006/__0_0.distcp")).write_bytes(b"torn")
    assert fall_back(r, "it is torn") == "cycle-00000004"
    assert taken(r.folder) == r.folder / TAKEN / "cycle-00000004"
    session = object.__new__(RaySession)  # without a cluster: what it finds where Ray Train knows of none
    session._folder, session._store = r.folder, Store.of(r.folder, None)
    assert session._older(lambda c: c <= 5).path == str(r.folder / TAKEN / "cycle-00000004")
    shutil.rmtree(r.folder / TAKEN)
    assert session._older(lambda c: c <= 5) is None, "its own before are another past"
    with pytest.raises(RunFailed, match="none of its 1 checkpoints is whole"):
        fall_back(r, "it is torn")


def test_a_rollback_finds_what_was_there_before_a_fall_back(tmp_path: Path, storage: str | None) -> None:
    r = run_of(tmp_path, storage)
    store = commit(r, tmp_path / "scratch", 2, 4, 6, 8)
    for torn in (4, 8):
        with store.files.open_output_stream(store.path(f"cycle-0000000{torn}/__0_0.distcp")) as stream:
            stream.write(b"torn")
    assert fall_back(r, "it is torn") == "cycle-00000006"
    session = object.__new__(RaySession)
    session._folder, session._store = r.folder, Store.of(r.folder, storage)
    assert session._older(lambda c: c <= 5).path == store.path("cycle-00000002")
    assert session._older(lambda c: c <= 7).path == str(r.folder / TAKEN / "cycle-00000006")
    assert session._older(lambda c: c <= 1) is None


def test_the_row_of_a_checkpoint_whose_controller_died_over_it_is_written(tmp_path: Path, storage: str | None) -> None:
    r = run_of(tmp_path, storage)
    store = commit(r, tmp_path / "scratch", 2)
    row = {"cycle": 2.0, "fake/loss": 0.1 + 0.2, "odd": None}
    newest = {"checkpoint_dir_name": "cycle-00000002", "metrics": row}
    with store.files.open_output_stream(store.path(BOOKS)) as stream:
        stream.write(json.dumps({"checkpoint_results": [newest], "latest_checkpoint_result": newest}).encode())
    (r.folder / METRICS).write_text('{"cycle": 1.0}\n{"torn')
    for _ in range(2):
        catch_up(r)
        rows = list(read_lines(r.folder / METRICS))
        assert [x["cycle"] for x in rows] == [1.0, 2.0]
        assert rows[-1]["fake/loss"] == 0.1 + 0.2
        assert [e["checkpoint"] for e in read_lines(r.folder / "events.jsonl")] == ["cycle-00000002"]
    fall_back(r, "damaged")
    catch_up(r)  # other books, which know of nothing yet
    assert len(list(read_lines(r.folder / METRICS))) == 2


def test_a_name_in_object_storage_that_was_lost_is_told(tmp_path: Path, storage: str | None) -> None:
    if storage is not None:
        r = run_of(tmp_path, storage)
        commit(r, tmp_path / "scratch", 2)
        (r.folder / MARK).write_text("")
        with pytest.raises(InputError, match="is empty: write into it"):
            Store.of(r.folder, storage)


def test_a_figure_that_nobody_measures_is_told(tmp_path: Path) -> None:
    r = run_of(tmp_path, None, **{"checkpoints.best": "frechet", "evaluation.every": 4})
    own = commit(r, tmp_path / "scratch", 4)
    EventLog(r.folder / EVALUATIONS).write("", cycle=4, student=FOUR, **{"evaluation/flow": 1.0})
    retain(r, own)
    [event] = read_lines(r.folder / "events.jsonl")
    assert (event["event"], "no figure frechet" in event["message"]) == ("retention", True)


FOUR, EIGHT = checkpoint.name_of(4), checkpoint.name_of(8)


class Case(NamedTuple):
    measured: dict[str, float]
    every: int | None
    evaluated: int | None
    stay: list[int]


@pytest.mark.parametrize(
    "case",
    [
        Case({}, None, None, []),
        Case({}, 4, None, [4, 8]),
        Case({}, None, 4, [4, 8]),
        Case({FOUR: 1.0}, None, 4, [4, 8]),
        Case({FOUR: 1.0, EIGHT: 2.0}, None, 4, [4]),
        Case({FOUR: 1.0, EIGHT: 2.0}, 8, 4, [4, 8]),
        Case({FOUR: float("nan"), EIGHT: 2.0}, None, 4, [8]),
        Case({FOUR: 2.0, EIGHT: 2.0}, None, 4, [4, 8]),
        # Another attempt's student of the same cycle was worse.
        Case({FOUR: 1.0, checkpoint.name_of(4, 1): 9.0, EIGHT: 2.0}, None, 4, [4]),
    ],
)
def test_which_ones_stay(case: Case) -> None:
    names = [checkpoint.name_of(c) for c in (2, 6, 8)] + [FOUR + "-phase", EIGHT + "-final"]
    found = to_keep(names, case.measured, every=case.every, evaluated=case.evaluated)
    assert sorted(found) == [{4: FOUR + "-phase"}.get(c, checkpoint.name_of(c)) for c in case.stay]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoints.keep": 1}, "checkpoints.keep"),
        ({"checkpoints.keep_every": 3}, "keep_every=3 is no multiple of every=2"),
        ({"checkpoints.best": "frechet"}, "checkpoints.best=frechet needs evaluations"),
        ({"checkpoints.best": "frechet", "evaluation.every": 3}, "multiple of checkpoints.every=2"),
        ({"checkpoints.storage": "/mnt/disk"}, "no address of object storage"),
        ({"checkpoints.storage": "file:///mnt/disk"}, "no address of object storage"),
        ({"checkpoints.storage": "s3://me:secret@bucket/runs"}, "holds credentials"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        run_of(tmp_path, None, **changes)
    assert "secret" not in str(refused.value)


def test_best_must_be_a_figure_with_a_best(tmp_path: Path) -> None:
    check_best(run_of(tmp_path, None, **{"checkpoints.best": "joint", "evaluation.every": 2}))
    for wrong, hint in (("frechett", "did you mean 'frechet'"), ("brightness", "is no figure")):
        with pytest.raises(InputError, match=hint):
            check_best(run_of(tmp_path, None, **{"checkpoints.best": wrong, "evaluation.every": 2}))


def test_storage_is_asked_before_anything_starts(storage: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check_storage(storage)
    with pytest.raises(InputError, match=r"nope://bucket"):
        check_storage("nope://bucket")
    if storage is not None:
        with pytest.raises(InputError, match=r"s3://missing/runs can't be written to.*environment"):
            check_storage("s3://missing/runs")
        monkeypatch.setattr(store, "PATIENCE", 0.0)
        with pytest.raises(InputError, match="did not answer within 0 s"):
            check_storage(storage)


def test_a_run_does_not_change_its_storage(tmp_path: Path) -> None:
    r = run_of(tmp_path, None)
    r.folder.mkdir(parents=True)
    (r.folder / "recipe.yaml").write_text(r.to_yaml())
    same_run(derive(r, {"checkpoints.every": 4, "checkpoints.keep": 7, "checkpoints.background": False}), r.folder)
    with pytest.raises(InputError, match=r"checkpoints\.storage"):
        same_run(derive(r, {"checkpoints.storage": "s3://bucket/runs"}), r.folder)


def test_what_is_written_in_the_background_is_what_there_was(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(100_000.0), "b": torch.zeros(7, dtype=torch.bfloat16)[2:]}
    kept = {k: v.clone() for k, v in tensors.items()}
    progress = checkpoint.Progress(cycle=1, phase=0, monitor={}, recipe="")
    written = checkpoint.save(tmp_path, tensors, progress, background=True)
    for value in tensors.values():
        value.fill_(-1)  # training goes on
    written()
    checkpoint.load(tmp_path, tensors)
    assert all(value.equal(kept[name]) for name, value in tensors.items())
    assert checkpoint.size(tensors) == 400_010


def test_a_disk_that_is_full_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = recipe(wan_pipeline(tmp_path / "model", experts=1), tmp_path)
    assert worker_of(r, 2).run() == "stopped"
    [before] = checkpoints(r)

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: Usage(1000))
    with pytest.raises(
        RunFailed, match=r"checkpoint cycle-00000003-phase needs .* GiB and .* has 0.00 GiB free: make room"
    ):
        worker_of(r).run()
    assert checkpoints(r) == [before]
    assert damage(before) == ""
    assert {f.name for f in before.parent.iterdir()} == {before.name}
    monkeypatch.undo()
    assert worker_of(r).run() == "finished"


def one_of_two(rank: int, where: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{where}", rank=rank, world_size=2)
    ranks = Ranks(OneOfSome(Path(), rank))
    ranks.agree(None)
    with pytest.raises(RunFailed, match="rank 1: RunFailed: no room"):
        ranks.agree(RunFailed("no room") if rank == 1 else None)
    with pytest.raises(RuntimeError, match="rank 0: OSError: gone; rank 1: RunFailed: no room"):
        ranks.agree(RunFailed("no room") if rank == 1 else OSError("gone"))  # what may pass is tried again
    dist.destroy_process_group()


def test_what_no_restart_cures_on_one_rank_ends_the_run_on_all() -> None:
    multiprocessing.spawn(one_of_two, (port(),), nprocs=2)
