"""A sweep's study in a real database, without Ray: claims, deaths, restarts, other sweeps."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from raydmd.errors import InputError, RunFailed
from raydmd.recipe import Recipe, derive
from raydmd.tuning import storage as storages
from raydmd.tuning import study as studies
from raydmd.tuning.halving import Halving
from raydmd.tuning.repeats import merged
from raydmd.tuning.search import StudySearch
from raydmd.tuning.show import as_json, best_of, front, progress, table
from raydmd.tuning.spec import read_sweep
from raydmd.tuning.study import Study, rows_of, tell_to_stop
from raydmd.tuning.sweep import known_here
from raydmd.tuning.trial import Common

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "ray"))
import postgres  # noqa: E402

pytestmark = pytest.mark.local


def spec(**other: Any) -> Any:
    given = {
        "name": "s",
        "objectives": {"frechet": "min", "joint": "max"},
        "space": {"method.guidance": {"low": 2.0, "high": 6.0}, "method.steps": [2, 4]},
        "search": {"kind": "random"},
        "budget": {"trials": 4},
    }
    return read_sweep(given | other)


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def figures(value: float) -> dict[str, float]:
    return {"frechet": value, "joint": value / 10, "seconds": 1.0}


def test_trials_are_claimed_once_and_the_budget_holds(tmp_path: Path) -> None:
    clusters = [Study(spec(), Recipe(), url(tmp_path), f"c{k}") for k in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = [claim for claims in pool.map(lambda s: [s.claim() for _ in range(4)], clusters) for claim in claims]
    claimed = [claim for claim in found if claim]
    assert len({claim.number for claim in claimed}) == len(claimed) == 4
    assert all(2 <= claim.changes["method.guidance"] <= 6 for claim in claimed)
    assert not clusters[0].over()
    for cluster in clusters:
        for row in cluster.rows():
            if row.state == "running" and row.cluster == cluster._cluster:
                cluster.note(row.number, 10, figures(row.number))
                cluster.finished(row.number, figures(row.number))
    assert clusters[1].over()
    assert clusters[2].claim() is None
    assert sum(row.state == "finished" for row in clusters[0].rows()) == 4


def test_two_clusters_of_one_name_in_two_folders_do_not_take_each_others_trials(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "clusters" / "node001").mkdir(parents=True)
    one, other = (Study(spec(), Recipe(), url(tmp_path), "node001") for _ in range(2))
    known_here(one, spec(), "node001", tmp_path / "a")
    known_here(one, spec(), "node001", tmp_path / "a")  # as the command after it
    with pytest.raises(InputError, match="--cluster NAME"):
        known_here(other, spec(), "node001", tmp_path / "b")
    (tmp_path / "b" / "clusters" / "node002").mkdir()
    known_here(other, spec(), "node002", tmp_path / "b")


def test_what_is_drawn_depends_on_the_trial_alone(tmp_path: Path) -> None:
    one = Study(spec(), Recipe(), url(tmp_path / "a"), "c") if (tmp_path / "a").mkdir() is None else None
    (tmp_path / "b").mkdir()
    assert one is not None
    first = [one.claim() for _ in range(3)]
    drawn = [claim.changes for claim in first if claim]
    other = Study(spec(), Recipe(), url(tmp_path / "b"), "c")
    again = [other.claim() for _ in range(2)]
    restarted = Study(spec(), Recipe(), url(tmp_path / "b"), "d")
    again.append(restarted.claim())
    assert [claim.changes for claim in again if claim] == drawn
    assert len({str(c) for c in drawn}) == 3


def test_a_restart_goes_on_with_its_own(tmp_path: Path) -> None:
    first = Study(spec(), Recipe(), url(tmp_path), "here")
    claim = first.claim()
    assert claim
    first.note(claim.number, 20, figures(3.0))
    del first
    again = Study(spec(), Recipe(), url(tmp_path), "here")
    assert again.give_back() == 1
    taken = again.claim()
    assert taken
    assert (taken.root, taken.changes) == (claim.root, claim.changes)
    assert taken.number != claim.number
    assert again.taken() == 1
    [row] = [row for row in again.rows() if row.state == "running"]
    assert row.at == {20: {"frechet": 3.0, "joint": 0.3}}
    assert [row.state for row in again.rows()] == ["lost", "running"]


DIES = """
import os, sys
from raydmd.recipe import Recipe
from raydmd.tuning import study as studies
from test_study import spec
claim = studies.Study(spec(), Recipe(), sys.argv[1], "dies").claim()
print(claim.number, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_dead_clusters_trial_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "PATH": "/usr/bin:/bin"}
    dead = subprocess.run(
        [sys.executable, "-c", DIES, url(tmp_path)], capture_output=True, text=True, timeout=60, env=env, check=False
    )
    assert dead.stdout.strip() == "0", dead.stderr
    monkeypatch.setattr(studies, "GRACE", 3)
    monkeypatch.setattr(storages, "GRACE", 3)
    monkeypatch.setattr(storages, "BEAT", 1)
    survivor = Study(spec(budget={"trials": 1}), Recipe(), url(tmp_path), "lives")
    assert survivor.claim() is None  # it may yet live
    assert not survivor.over()
    time.sleep(4)
    claim = survivor.claim()
    assert claim
    assert claim.root == 0
    survivor.finished(claim.number, figures(1.0))
    assert survivor.over()


def test_a_late_teller_does_not_count_twice(tmp_path: Path) -> None:
    slow = Study(spec(budget={"trials": 1}), Recipe(), url(tmp_path), "slow")
    claim = slow.claim()
    assert claim
    other = Study(spec(budget={"trials": 1}), Recipe(), url(tmp_path), "slow")
    other.give_back()
    taken = other.claim()
    assert taken
    assert not slow.note(claim.number, 10, figures(9.0))  # its trial was given away meanwhile
    assert other.note(taken.number, 10, figures(1.0))
    slow.finished(claim.number, figures(9.0))
    other.finished(taken.number, figures(1.0))
    assert [row.values.get("frechet") for row in other.rows() if row.values] == [1.0]


def test_a_trial_without_a_figure_has_failed_and_the_sweep_goes_on(tmp_path: Path) -> None:
    study = Study(spec(), Recipe(), url(tmp_path), "c")
    claim = study.claim()
    assert claim
    study.finished(claim.number, {"frechet": 1.0})
    [row] = study.rows()
    assert (row.state, row.error) == ("failed", "its evaluation has no joint")
    assert study.claim()


def test_another_sweep_under_the_same_name_is_refused(tmp_path: Path) -> None:
    Study(spec(), Recipe(), url(tmp_path), "c")
    Study(spec(budget={"trials": 99}), derive(Recipe(), {"placement.teachers": 3}), url(tmp_path), "c")  # may differ
    with pytest.raises(InputError, match=r"of another sweep: recipe.method.shift differ"):
        Study(spec(), derive(Recipe(), {"method.shift": 3.0}), url(tmp_path), "c")
    with pytest.raises(InputError, match=r"of another sweep: space.method.guidance"):
        Study(spec(space={"method.guidance": [1, 2]}), Recipe(), url(tmp_path), "c")
    with pytest.raises(InputError, match="has no study 'other'"):
        rows_of(spec(name="other"), url(tmp_path))


def test_a_storage_that_is_not_there_is_said_without_its_password() -> None:
    with pytest.raises(InputError, match="can't be used") as caught:
        Study(spec(), Recipe(), "postgresql://me:secret@127.0.0.1:1/db", "c")
    assert "secret" not in str(caught.value)


def test_a_grid_is_run_once(tmp_path: Path) -> None:
    grid = spec(space={"method.steps": [1, 2, 4]}, search={"kind": "grid"}, budget={"trials": 99})
    study = Study(grid, Recipe(), url(tmp_path), "c")
    joined = Study(grid, Recipe(), url(tmp_path), "d")
    found = [study.claim(), joined.claim(), study.claim(), joined.claim()]
    assert [claim.changes["method.steps"] for claim in found if claim] == [1, 2, 4]
    assert found[3] is None


def test_tables_best_and_front(tmp_path: Path) -> None:
    study = Study(spec(), Recipe(), url(tmp_path), "c")
    claims = [study.claim() for _ in range(4)]
    values = [(5.0, 0.5), (3.0, 0.2), (6.0, 0.4)]
    for claim, (frechet, joint) in zip(claims, values, strict=False):
        assert claim
        study.note(claim.number, 30, {"frechet": frechet, "joint": joint})
        study.finished(claim.number, {"frechet": frechet, "joint": joint})
    assert claims[3]
    study.failed(claims[3].number, "out of memory")
    rows = study.rows()
    best = best_of(rows, study.spec)
    assert best
    assert best.root == 1
    assert [row.root for row in front(rows, study.spec.objectives)] == [1, 0]
    text = table(rows, study.spec)
    assert text.index("0001") < text.index("0000") < text.index("0002")
    assert "trial 0003: out of memory" in text
    assert "best frechet 3" in progress(rows, study.spec)
    assert [t["front"] for t in as_json(rows, study.spec)["trials"]] == [True, True, False, False]


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_repeats_are_run_with_seeds_of_their_own_and_count_by_their_mean(tmp_path: Path, kind: str) -> None:
    space = {"method.steps": [2, 4]} if kind == "grid" else {"method.guidance": {"low": 2.0, "high": 6.0}}
    repeated = spec(space=space, search={"kind": kind}, budget={"trials": 2}, repeats=3)
    studies_of = [Study(repeated, Recipe(), url(tmp_path), name) for name in ("c", "d")]
    seen: list[tuple[str, int]] = []
    # The second setting's mean is better, though its worst run is worse than any of the first's.
    values = iter([5.0, 5.0, 5.0, 1.0, 6.0, 2.0])
    for k in range(6):
        study = studies_of[k % 2]
        claim = study.claim()
        assert claim
        seen.append((str({k: v for k, v in claim.changes.items() if k != "seed"}), claim.changes["seed"]))
        assert best_of(study.rows(), repeated) is None or k >= 3
        value = next(values)
        study.finished(claim.number, {"frechet": value, "joint": value / 10})
    assert all(study.claim() is None and study.over() for study in studies_of)
    assert [seed for _, seed in seen] == [0, 1, 2] * 2
    assert [setting for setting, _ in seen[:3]] == [seen[0][0]] * 3
    assert [setting for setting, _ in seen[3:]] == [seen[3][0]] * 3
    assert seen[0][0] != seen[3][0]
    rows = studies_of[0].rows()
    best = best_of(rows, repeated)
    assert best
    assert (best.root, best.values["frechet"], best.runs) == (3, 3.0, (3, 4, 5))
    text = table(rows, repeated)
    assert "finished (3 runs)" in text
    assert "3 ± 2.6" in text
    assert progress(rows, repeated).startswith("of 2: 2 finished")
    assert [row["runs"] for row in as_json(merged(rows, 3), repeated)["trials"]] == [[0, 1, 2], [3, 4, 5]]


def test_a_setting_whose_cluster_dies_is_repeated_as_often(tmp_path: Path) -> None:
    repeated = spec(budget={"trials": 1}, repeats=3)
    dies = Study(repeated, Recipe(), url(tmp_path), "c")
    assert dies.claim()
    lives = Study(repeated, Recipe(), url(tmp_path), "c")
    assert lives.give_back() == 1
    claims = []
    while claim := lives.claim():
        claims.append(claim)
        lives.finished(claim.number, figures(1.0))
    assert sorted(claim.changes["seed"] for claim in claims) == [0, 1, 2]
    assert len({claim.changes["method.guidance"] for claim in claims}) == 1
    assert lives.over()


def test_a_word_to_stop_reaches_clusters_elsewhere_once(tmp_path: Path) -> None:
    a, b = (Study(spec(), Recipe(), url(tmp_path), name) for name in ("a", "b"))
    assert a.claim()
    assert not a.told_to_stop()
    with pytest.raises(InputError, match="has no cluster 'aa'; it has a"):
        tell_to_stop(spec(), url(tmp_path), "aa")
    tell_to_stop(spec(), url(tmp_path), "a")
    assert (a.told_to_stop(), b.told_to_stop()) == (True, False)
    tell_to_stop(spec(), url(tmp_path), None)
    assert b.told_to_stop()
    again = Study(spec(), Recipe(), url(tmp_path), "a")  # the same command goes on
    assert not again.told_to_stop()


def test_an_outage_in_the_middle_of_a_claim_leaves_no_trial_behind(tmp_path: Path) -> None:
    study = Study(spec(budget={"trials": 2}), Recipe(), url(tmp_path), "c")
    real, left = study._storage.set_trial_user_attr, [3]

    def fails(trial_id: int, key: str, value: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OperationalError("no answer", None, Exception("no answer"))
        real(trial_id, key, value)

    study._storage.set_trial_user_attr = fails  # type: ignore[method-assign]
    claims = [study.claim(), study.claim()]
    assert left[0] < 0
    assert [claim.number for claim in claims if claim] == [0, 1]
    assert study.claim() is None
    for number in (0, 1):
        study.finished(number, figures(1.0))
    assert study.over()


def test_a_trial_whose_process_dies_goes_on_until_it_always_does(tmp_path: Path) -> None:
    study = Study(spec(budget={"trials": 1}), Recipe(), url(tmp_path), "c")
    seen = []
    while claim := study.claim():
        seen.append(claim.root)
        study.note(claim.number, 10, figures(1.0))
        study.died(claim.number, "killed")
    assert seen == [0] * (storages.RETRIES + 1)
    last = study.rows()[-1]
    assert (last.state, last.error) == ("failed", "killed; 6 times")
    assert study.over()


def test_any_number_of_stops_loses_no_trial(tmp_path: Path) -> None:
    grid = spec(space={"method.steps": [4]}, search={"kind": "grid"})
    for _ in range(8):
        study = Study(grid, Recipe(), url(tmp_path), "c")
        assert study.claim()
        assert study.give_back() == 1
    claim = Study(grid, Recipe(), url(tmp_path), "c").claim()
    assert claim
    assert claim.root == 0


def test_a_lost_trial_that_nobody_put_back_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(spec(budget={"trials": 1}), Recipe(), url(tmp_path), "c")
    claim = study.claim()
    assert claim
    study._storage.set_trial_state_values(study._mine[claim.number], state=TrialState.FAIL)  # and then it died
    for module in (studies, storages):
        monkeypatch.setattr(module, "GRACE", 1)
    time.sleep(1.5)
    again = Study(spec(budget={"trials": 1}), Recipe(), url(tmp_path), "d")
    time.sleep(1.5)
    taken = again.claim()
    assert taken
    assert taken.root == 0
    again.finished(taken.number, figures(1.0))
    assert again.claim() is None
    assert again.over()


def test_what_all_share_is_made_once(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> str:
        time.sleep(1)
        made.append(name)
        return name

    both = [Study(spec(), Recipe(), url(tmp_path), name) for name in ("a", "b")]
    with ThreadPoolExecutor(2) as at_once:
        found = list(at_once.map(lambda s: s.attribute("run", lambda: make(s._cluster)), both))
    assert len(made) == 1
    assert found == made * 2


def halving(study: Study) -> tuple[StudySearch, Halving]:
    search = StudySearch(study, Common(Recipe(), {}))
    found = Halving(study, search, time_attr="cycle", metric="frechet", mode="min", max_t=100, grace_period=5)
    return search, found


def test_halving_counts_others_by_their_cycles_and_judges_nobody_twice(tmp_path: Path) -> None:
    alone = spec(objectives={"frechet": "min"}, budget={"trials": 9})
    others = Study(alone, Recipe(), url(tmp_path), "others")
    for value in (50.0, 60.0, 70.0):  # at cycle 5; much better by cycle 10, which comes before it as text
        claim = others.claim()
        assert claim
        others.note(claim.number, 5, {"frechet": value})
        others.note(claim.number, 10, {"frechet": value - 45})
    study = Study(alone, Recipe(), url(tmp_path), "c")
    search, scheduler = halving(study)
    config = search.suggest("mine")
    trial = SimpleNamespace(trial_id="mine")
    scheduler.on_trial_add(None, trial)
    result = {"cycle": 5, "frechet": 40.0, "gpu_seconds": 0.0}
    assert scheduler.on_trial_result(None, trial, result) == scheduler.CONTINUE  # the best of all at that cycle
    search.on_trial_result("mine", result)
    for value in (1.0, 2.0, 3.0):
        claim = others.claim()
        assert claim
        others.note(claim.number, 5, {"frechet": value})
    study.let_go(config["number"])
    search, scheduler = halving(study)  # the next command goes on with it, and hears of its evaluation again
    assert search.suggest("again")["root"] == config["root"]
    trial = SimpleNamespace(trial_id="again")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, result) == scheduler.CONTINUE
    fresh = SimpleNamespace(trial_id="fresh")
    search.suggest("fresh")
    scheduler.on_trial_add(None, fresh)
    assert scheduler.on_trial_result(None, fresh, result) == scheduler.STOP  # a new one of those figures is stopped


WORKS = """
import sys
from raydmd.recipe import Recipe
from raydmd.tuning.study import Study
from test_study import figures, spec
study = Study(spec(budget={"trials": 30}), Recipe(), sys.argv[1], sys.argv[2])
while claim := study.claim():
    study.note(claim.number, 10, figures(claim.number))
    study.finished(claim.number, figures(claim.number))
    print(claim.number, flush=True)
"""


def test_processes_share_a_study_in_postgresql_and_no_trial_is_run_twice() -> None:
    with postgres.server() as database:
        driver = database.address.replace("postgresql://", "postgresql+psycopg://")
        env = {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}:{HERE.parent / 'ray'}", "PATH": "/usr/bin:/bin"}
        running = [
            subprocess.Popen(
                [sys.executable, "-c", WORKS, driver, f"c{k}"],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for k in range(4)
        ]
        ended = [process.communicate(timeout=200) for process in running]
        assert all(process.returncode == 0 for process in running), [err for _, err in ended]
        numbers = [int(line) for out, _ in ended for line in out.split()]
        assert len(numbers) == len(set(numbers)) == 30
        rows = rows_of(spec(budget={"trials": 30}), driver)
        assert sum(row.state == "finished" for row in rows) == 30
        assert len({row.cluster for row in rows if row.values}) > 1


def test_clusters_that_start_together_make_the_storage_once() -> None:
    with postgres.server() as database, ThreadPoolExecutor(8) as at_once:
        driver = database.address.replace("postgresql://", "postgresql+psycopg://")
        studies_made = list(at_once.map(lambda k: Study(spec(), Recipe(), driver, f"c{k}"), range(8)))
        claim = studies_made[0].claim()
        assert claim
        assert [len(study.rows()) for study in studies_made] == [1] * 8


def test_a_database_that_is_restarted_costs_a_sweep_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with postgres.server() as database:
        study = Study(spec(), Recipe(), database.address.replace("postgresql://", "postgresql+psycopg://"), "c")
        claim = study.claim()
        assert claim
        study.note(claim.number, 10, figures(3.0))
        database.stop()
        study.beat()  # does not wait
        with ThreadPoolExecutor(1) as meanwhile:
            noted = meanwhile.submit(study.note, claim.number, 20, figures(2.0))
            time.sleep(2)
            assert not noted.done()
            database.start()
            noted.result(timeout=30)
        study.finished(claim.number, figures(1.0))
        [row] = study.rows()
        assert row.at == {10: {"frechet": 3.0, "joint": 0.3}, 20: {"frechet": 2.0, "joint": 0.2}}
        assert row.state == "finished"
        said = capsys.readouterr().out
        assert said.count("is away") == said.count("is back") == 1


def test_after_an_outage_others_have_time_for_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (studies, storages):
        monkeypatch.setattr(module, "GRACE", 4)
    monkeypatch.setattr(storages, "BEAT", 1)
    with postgres.server() as database:
        driver = database.address.replace("postgresql://", "postgresql+psycopg://")
        both = [Study(spec(budget={"trials": 2}), Recipe(), driver, name) for name in ("a", "b")]
        assert all(study.claim() for study in both)
        time.sleep(5)
        database.stop()
        both[1].beat()
        database.start()
        both[1].beat()
        assert both[1].claim() is None  # silent for more than the grace, as everybody was
        time.sleep(5)
        both[1].beat()
        taken = both[1].claim()
        assert taken
        assert taken.root == 0


def test_a_database_that_stays_away_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres.server() as database:
        study = Study(spec(), Recipe(), database.address.replace("postgresql://", "postgresql+psycopg://"), "c")
        database.stop()
        try:
            monkeypatch.setattr(storages, "AWAY", 1.0)
            with pytest.raises(RunFailed, match=r"was away for .* The same command goes on"):
                study.claim()
            monkeypatch.setattr(storages, "AWAY", 600.0)
            monkeypatch.setattr(storages, "HURRY", 0.0)
            study.patience.stop = tmp_path  # a signal has come
            with pytest.raises(RunFailed, match="was away for"):
                study.rows()
        finally:
            database.start()
