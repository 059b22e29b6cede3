"""Workers that die, and whether the run starts them again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import helpers
import pytest
import ray
import ray.util
import unlucky

from raydmd.errors import RunFailed, RunStopped
from raydmd.recipe import Recipe, derive
from raydmd.training import attempts, run
from raydmd.training.events import read_lines
from raydmd.training.folder import finished
from raydmd.training.prepare import prepare
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray that ends nobody for want of memory: what ends workers here is planned."""
    home = tmp_path_factory.mktemp("unlucky")
    wan_pipeline(home / "model", experts=1)
    (home / "prompts.txt").write_text("a cat runs\na dog jumps\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        with helpers.own_cluster():
            yield home


@pytest.fixture(autouse=True)
def _unlucky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "train_loop", unlucky.unlucky_loop)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def recipe(home: Path, name: str, **training: object) -> Recipe:
    size = {"frames": 1, "height": 32, "width": 32}
    return derive(
        Recipe(name=name, output=home / "runs"),
        {
            "model": {"path": str(home / "model"), **size},
            "data.prompts": str(home / "prompts.txt"),
            "checkpoints.every": 2,
            "training": {
                **{"cycles": 8, "batch": 2, "fake_updates": 1, "precision": "fp32", "report_every": 1},
                **{"student": {"lora": None}, "step_timeout": 60.0},
                **training,
            },
            "placement": {"workers": 2, "teacher": "local", "worker_cpus": 0.5},
            "evaluation": {"samples": 2, "grid": 2, "teacher_steps": 2},
        },
    )


def go(r: Recipe) -> None:
    """As ``raydmd.training.run.run`` does, on the Ray that is there."""
    stop = r.folder / "STOP"
    stop.unlink(missing_ok=True)
    run.conduct(prepare(r), stop)


def events(r: Recipe, kind: str) -> list[dict]:
    return [e for e in read_lines(r.folder / "events.jsonl") if e["event"] == kind]


def test_more_deaths_than_the_budget_do_not_end_a_run_that_gets_on(home: Path, capsys) -> None:
    r = derive(
        recipe(home, "deaths", max_failures=1), {"checkpoints.background": False}
    )  # killed as soon as it is there
    unlucky.plan(r.folder, (1, 3, "killed", 1), (0, 5, "killed", 1), (1, 7, "killed", 1))
    go(r)
    assert finished(r.folder)
    restarts = events(r, "restart")
    assert [e["rank"] for e in restarts] == [1, 0, 1]
    assert [e["count"] for e in restarts] == [1, 1, 1]
    assert [e["cycle"] for e in events(r, "resume")][-2:] == [4, 6]
    for e in restarts:
        assert "its process is gone" in e["message"]
        assert "MB at most" in e["message"]
        assert e["node"]
    said = capsys.readouterr().out
    assert "cycle 8: its process is gone" in said
    assert "restarting from cycle 6 (1 of at most 1 without a new checkpoint)" in said
    assert not list((r.folder / "stacks").iterdir())


def test_one_that_always_fails_ends_soon_with_its_cause_and_can_be_resumed(home: Path) -> None:
    r = recipe(home, "always", max_failures=1)
    unlucky.plan(r.folder, (1, 3, "error", unlucky.ALWAYS))
    with pytest.raises(RunFailed, match=r"(?s)rank 1 of 2 on .*cycle 4: ImportError: no module named nowhere\n.*=1"):
        go(r)
    # The checkpoint under way is finished before the error ends the workers; with it a new row of failures begins.
    assert [e["count"] for e in events(r, "restart")] == [1]
    unlucky.plan(r.folder)
    go(r)
    assert finished(r.folder)
    assert events(r, "resume")[-1]["cycle"] == 2


def test_too_little_memory_twice_in_one_cycle_is_final(home: Path) -> None:
    """However many restarts there may be; and the first time it is tried again."""
    r = recipe(home, "memory", max_failures=9)
    unlucky.plan(r.folder, (1, 1, "memory", 1), (1, 3, "memory", unlucky.ALWAYS))
    with pytest.raises(RunFailed, match="too little memory") as caught:
        go(r)
    text = str(caught.value)
    for part in ("rank 1 of 2 on ", "cycle 4", "Tried to allocate 3.00 GiB", "MB at most", "twice in a row"):
        assert part in text
    for part in ("training.batch", "training.gradient_checkpointing", "sharding=fsdp", "lora", "placement.workers"):
        assert part in text
    assert [e["failure"] for e in events(r, "restart")] == ["memory", "memory"]
    assert [e["rank"] for e in events(r, "out_of_memory")] == [1, 1, 1]


def test_a_worker_alone_that_is_stopped_is_ended_and_what_follows_is_a_setting(home: Path, monkeypatch) -> None:
    monkeypatch.setattr(attempts, "LATE", 5.0)
    r = derive(recipe(home, "stopped", step_timeout=39.0, stall_timeout=40.0), {"placement.workers": 1})
    unlucky.plan(r.folder, (0, 3, "stopped", 1), (0, 5, "stopped", 1))
    with pytest.raises(RunStopped, match=r"(?s)training.on_stall=stop.*cycle 4 \(the process was stopped\)"):
        go(derive(r, {"training.on_stall": "stop"}))
    go(r)
    assert finished(r.folder)
    assert [e["failure"] for e in events(r, "restart")] == ["stall"]
    assert ["the process was stopped" in e["doing"] for e in events(r, "stalled")] == [True, True]


def test_workers_whose_controller_dies_leave_no_places_taken(home: Path) -> None:
    """Ray's own cleaner needs the dashboard, which a Ray of our own does not have."""
    r = recipe(home, "controller", max_failures=1)
    unlucky.plan(r.folder, (0, 2, "controller", 1))
    go(r)
    assert [e["failure"] for e in events(r, "restart")] == ["death"]
    assert len({e["pid"] for e in (*events(r, "start"), *events(r, "resume"))}) == 2
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}


def test_workers_that_collapse_roll_back_together(home: Path) -> None:
    """All to one checkpoint, which Ray Train's list names."""
    quick = {"settle": 3, "window": 2, "patience": 2, "every": 1, "action": "rollback", "cut": 1e-4, "ratio": 1.5}
    r = recipe(home, "collapse", cycles=15, decay=0.0, student={"rate": 0.3, "lora": None})
    r = derive(r, {"method": {"name": "dmd2", "steps": 2}, "monitor": quick, "checkpoints.every": 3})
    unlucky.plan(r.folder)
    go(r)
    assert finished(r.folder)
    (back,), (alarm,) = events(r, "rollback"), events(r, "alarm")
    assert back["since"] == alarm["cycle"]
    assert back["cycle"] <= max(alarm["cycle"] - r.monitor.lookback, 0)
    assert not events(r, "restart")
