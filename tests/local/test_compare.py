"""``raydmd compare`` of folders: what the command prints, writes and refuses."""

from __future__ import annotations

import fcntl
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from raydmd.cli import main
from raydmd.cli_sweep import described
from raydmd.recipe import Recipe, derive
from raydmd.tuning.compare import compare_page
from raydmd.tuning.spec import read_sweep
from raydmd.tuning.study import Study, rows_of
from tests.runs import CYCLES, make_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.local

Call = "Callable[..., tuple[int, str, str]]"


@pytest.fixture
def call(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as info:
            main(["compare", *map(str, argv)])
        out, err = capfd.readouterr()
        return int(info.value.code or 0), out, err

    return call


def rows_in(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in out.splitlines() if row.startswith("|")]


def make_sweep(output: Path, name: str = "ca-dm", *, trials: int = 3) -> Path:
    """A sweep's folder with its study: trials finished, and the last one stopped early."""
    folder = output / name
    spec = read_sweep(
        {
            "name": name,
            "objectives": {"frechet": "min", "coverage_entropy": "max"},
            "space": {"method.guidance": {"low": 2.0, "high": 6.0}, "training.fake_updates": [3, 5]},
            "search": {"kind": "random"},
            "budget": {"trials": trials},
        }
    )
    base = derive(Recipe(), {"output": folder / "trials", "training.cycles": CYCLES})
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(described(spec, base), encoding="utf-8")
    study = Study(spec, base, f"sqlite:///{folder / 'study.db'}", "here")
    for k in range(trials):
        claim = study.claim()
        assert claim is not None
        last = k == trials - 1
        make_run(folder / "trials", f"{k:04d}", claim.changes, 50.0 - 10 * k, cycles=20 if last else CYCLES)
        study.note(claim.number, 20, {"frechet": 50.0, "coverage_entropy": 0.5})
        if last:
            study.stopped_early(claim.number)
        else:
            study.finished(claim.number, {"frechet": 50.0 - 10 * k, "coverage_entropy": (50.0 - 10 * k) / 100})
    return folder


def test_runs_are_sorted_and_only_their_differences_are_shown(tmp_path: Path, call: Any) -> None:
    make_run(tmp_path / "runs", "worse", {"method.guidance": 2.0}, 60.0)
    make_run(tmp_path / "runs", "better", {"method.guidance": 4.0}, 30.0)
    make_run(tmp_path / "runs", "broken", {"method.guidance": 9.0}, 30.0, cycles=10, error="the teacher has gone")
    code, out, _ = call("runs/worse", "runs/better", "runs/broken")
    assert code == 0
    head, *rows = rows_in(out)
    assert head == ["run", "state", "cycles", "frechet ↓", "coverage_entropy ↑", "guidance"]
    assert [r[0] for r in rows] == ["better", "worse", "broken", "teacher", "undistilled"]
    assert rows[0][1:] == ["finished *", "40", "30", "0.3", "4"]
    assert rows[2][1] == "failed"
    assert "broken: the teacher has gone" in out
    assert "all the same: " in out
    told = json.loads((tmp_path / "compare.json").read_text())
    assert [r["name"] for r in told["runs"]] == ["better", "worse", "broken"]
    assert told["same"]["training.cycles"] == CYCLES
    curve = told["curves"]["metrics"]["evaluation/frechet"]["runs"]["0"]
    assert curve[0] == [10, 20, 30, 40]
    assert curve[1][-1] == 30.0
    html = (tmp_path / "compare.html").read_text()
    assert html.startswith("<!doctype html>")
    assert "runs/better/report.html" in html


def test_samples_are_shown_where_prompts_and_seeds_are_the_same(tmp_path: Path, call: Any) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_run(tmp_path / "runs", name, {"evaluation.seed": seed}, 30.0, frames=3)
    code, _, _ = call("runs/a", "runs/b", "runs/c")
    assert code == 0
    told = json.loads((tmp_path / "compare.json").read_text())
    assert [(g["seed"], len(g["runs"])) for g in told["samples"]] == [(1, 2), (2, 1)]
    html = (tmp_path / "compare.html").read_text()
    assert "data:image/webp;base64," in html


def test_a_sweep_is_told_by_its_study_and_its_trials_folders(tmp_path: Path, call: Any) -> None:
    folder = make_sweep(tmp_path / "runs")
    code, out, err = call(folder, "--no-html")
    assert code == 0, err
    head, *rows = rows_in(out)
    assert head[:7] == ["run", "state", "cycles", "frechet ↓", "coverage_entropy ↑", "guidance", "fake_updates"]
    assert [r[:4] for r in rows] == [
        ["0001", "finished *", "40", "40"],
        ["0000", "finished *", "40", "50"],
        ["0002", "stopped early", "20", rows[2][3]],
        ["teacher", "", "", "1"],
        ["undistilled", "", "", "90"],
    ]
    assert not (tmp_path / "compare.html").exists()
    code, out, _ = call(folder, "--by", "coverage_entropy", "--json", "--html", tmp_path / "x" / "page.html")
    told = json.loads(out)
    assert [r["name"] for r in told["runs"]] == ["0000", "0001", "0002"]
    assert (tmp_path / "x" / "page.json").is_file()


def test_a_trial_of_another_cluster_is_told_by_the_study_alone(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path)
    spec = read_sweep({k: v for k, v in yaml.safe_load((folder / "sweep.yaml").read_text()).items() if k != "recipe"})
    base = derive(Recipe(), {"output": folder / "trials", "training.cycles": CYCLES})
    rows = rows_of(spec, f"sqlite:///{folder / 'study.db'}")
    os.rename(folder / "trials" / "0000", tmp_path / "elsewhere")
    page, data = compare_page(spec, base, rows, folder)
    assert page == folder / "compare.html"
    told = json.loads(data.read_text())
    row = next(r for r in told["runs"] if r["name"] == "0000")
    assert (row["state"], row["figures"]["frechet"], row["link"]) == ("finished", 50.0, "")
    assert row["changes"]["method.guidance"] == rows[0].changes["method.guidance"]


def test_a_page_that_cannot_be_written_undoes_no_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_sweep(tmp_path)
    spec = read_sweep({k: v for k, v in yaml.safe_load((folder / "sweep.yaml").read_text()).items() if k != "recipe"})
    rows = rows_of(spec, f"sqlite:///{folder / 'study.db'}")
    (folder / "compare.html").mkdir()
    assert compare_page(spec, Recipe(), rows, folder) == []
    assert "compare.html was not written" in capsys.readouterr().out


def test_a_run_that_goes_on_is_running_and_one_that_died_is_not(tmp_path: Path, call: Any) -> None:
    folder = make_run(tmp_path / "runs", "a", {}, 30.0, cycles=20)
    make_run(tmp_path / "runs", "b", {}, 30.0, cycles=10)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, out, _ = call("runs/a", "runs/b", "--no-html")
    assert [r[1] for r in rows_in(out)[1:]] == ["running", "stopped"]


def test_runs_of_other_models_without_evaluations_are_compared_all_the_same(tmp_path: Path, call: Any) -> None:
    for name, model in (("a", "sd35-tiny"), ("b", "wan22-tiny")):
        folder = make_run(tmp_path / "runs", name, {"model.path": model}, 30.0, cycles=10)
        (folder / "evaluations.jsonl").unlink()
    code, out, _ = call("runs/a", "runs/b")
    head, *rows = rows_in(out)
    assert code == 0
    assert head == ["run", "state", "cycles", "path"]
    assert {r[3] for r in rows} == {"sd35-tiny", "wan22-tiny"}
    (tmp_path / "runs" / "b" / "metrics.jsonl").unlink()
    assert call("runs/a", "runs/b", "--by", "fake/loss", "--goal", "min")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/bettr"], "did you mean runs/better?"),
        (["runs"], "below it are 1: runs/better"),
        (["nothing-like-it"], "--tracking URI"),
        ([], "which runs?"),
        (["runs/better", "--by", "frechett"], "did you mean 'frechet'"),
        (["runs/better", "--by", "fake/loss"], "--goal min or --goal max"),
        (["runs/better", "--goal", "low"], "min, max or teacher"),
        (["runs/better", "--html", "page.txt"], ".html"),
        (["x", "--tracking", "sqlite:////nowhere/mlflow.db"], "there is no such database"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, call: Any, words: list[str], said: str) -> None:
    make_run(tmp_path / "runs", "better", {}, 30.0)
    code, _, err = call(*words)
    assert code == 2
    assert said in err
    assert not (tmp_path / "compare.html").exists()


def test_a_sweep_without_trials_says_so(tmp_path: Path, call: Any) -> None:
    folder = make_sweep(tmp_path, "full")
    spec = yaml.safe_load((folder / "sweep.yaml").read_text())
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "sweep.yaml").write_text(yaml.safe_dump({**spec, "name": "empty"}))
    code, _, err = call("empty")
    assert code == 2
    assert "was it begun?" in err
    own = read_sweep({k: v for k, v in spec.items() if k != "recipe"} | {"name": "empty"})
    Study(own, Recipe(), f"sqlite:///{empty / 'study.db'}", "here")
    code, _, err = call("empty")
    assert code == 2
    assert "has no trials yet" in err
