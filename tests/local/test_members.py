"""A population's turns in a real study and real folders, with legs that only pretend to train; killed everywhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from raydmd.errors import InputError
from raydmd.recipe import Recipe, derive, load
from raydmd.training import takeover
from raydmd.training.checkpoint import PROGRESS, Progress, name_of
from raydmd.training.events import EventLog, read_lines
from raydmd.training.takeover import EXPLOIT, LEG, TAKEN, end_leg
from raydmd.tuning import members as populations
from raydmd.tuning.members import Members, only_here
from raydmd.tuning.show import as_json, best_of
from raydmd.tuning.spec import Sweep, read_sweep
from raydmd.tuning.study import Study
from raydmd.tuning.trial import Common

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local

CYCLES = 60


def spec(**other: Any) -> Sweep:
    given = {
        "name": "s",
        "objectives": {"frechet": "min"},
        "space": {
            "training.student.rate": {"low": 1e-6, "high": 1e-1, "log": True},
            "method.guidance": {"low": 2.0, "high": 6.0},
        },
        "population": {},
        "budget": {"trials": 4},
    }
    return read_sweep(given | other)


class Cluster:
    """One command of a sweep: what Tune and the trials do, in one process and without training."""

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.spec, self.folder = sweep, folder
        changes = {"output": folder / "trials", "training.cycles": CYCLES, "evaluation.every": 20}
        self.base = derive(Recipe(), changes)
        self.study = Study(sweep, self.base, f"sqlite:///{folder / 'study.db'}", "here")
        self.study.give_back()
        self.legs = 0
        self.fails: set[tuple[int, int]] = set()
        self.blind: set[tuple[int, int]] = set()
        self.ran: list[tuple[int, int]] = []

    def members(self) -> Members:
        common = Common(self.base, {"tag": "t"})
        return Members(self.spec, self.study, common, lambda _: None, self.folder / "STOP")

    def run(self, legs: int = 99, width: int = 2) -> Members:
        """So many legs, so many at a time."""
        members, busy = self.members(), dict[str, dict[str, Any]]()
        while True:
            while len(busy) < width and self.legs < legs:
                name = f"t{self.legs}"
                config = members.suggest(name)
                if not isinstance(config, dict):
                    break
                busy[name] = config
                self.legs += 1
            if not busy:
                return members
            name = next(iter(busy))
            self.leg(members, name, busy.pop(name))

    def leg(self, members: Members, name: str, config: dict[str, Any]) -> None:
        recipe = derive(self.base, {**config["changes"], "name": f"{config['root']:04d}"})
        folder, until = recipe.folder, config["until"] or CYCLES
        assert not (folder / "recipe.yaml").exists() or load(folder / "recipe.yaml", Recipe()) == recipe
        self.ran.append((config["root"], until))
        (folder / "train" / name_of(until)).mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        if (config["root"], until) in self.fails:
            members.on_trial_complete(name, {"error": "out of memory", "cycle": 0, "gpu_seconds": 1.0})
            return
        monitor = {"measures": {"fake_updates": recipe.training.fake_updates}}
        progress = Progress(cycle=until, phase=0, monitor=monitor, recipe=recipe.to_yaml())
        place = folder / "train" / name_of(until)
        (place / PROGRESS).write_text(json.dumps(progress.__dict__))
        (place / "weights").write_text(f"{config['root']} at {until}")
        # Good settings and a good state make a good figure.
        taken = takeover.taken(folder)
        state = (taken / "weights").read_text() if taken else ""
        figure = recipe.training.student.rate * 10 + len(state) / 1e6 + 1 / until
        told = {"cycle": float(until), "frechet": figure, "gpu_seconds": 10.0}
        if (config["root"], until) not in self.blind:
            members.on_trial_result(name, told)
        if config["until"] is None:
            members.on_trial_complete(name, {**told, "finished": True})
            return
        EventLog(folder / "events.jsonl").write("stopped", cycle=until, alarm=None)
        assert end_leg(folder, until)
        members.on_trial_complete(name, {"cycle": until, LEG: True, "gpu_seconds": 12.0})


def exploits(folder: Path) -> dict[str, list[tuple[int, str]]]:
    return {
        f.name: [(e["cycle"], e["donor"]) for e in read_lines(f / "events.jsonl") if e["event"] == EXPLOIT]
        for f in sorted((folder / "trials").iterdir())
    }


def told(cluster: Cluster) -> list[tuple[Any, ...]]:
    rows = [row for row in cluster.study.rows() if row.state != "lost"]
    return [(row.root, row.state, row.changes, row.at, row.lineage) for row in sorted(rows, key=lambda r: r.root)]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_all_go_in_step_and_the_worst_takes_over(tmp_path: Path, width: int) -> None:
    cluster = Cluster(tmp_path, spec())
    cluster.run(width=width)
    assert cluster.study.over()
    assert sorted(cluster.ran) == sorted((root, until) for until in (20, 40, 60) for root in range(4))
    assert [until for _, until in cluster.ran] == [20] * 4 + [40] * 4 + [60] * 4
    found = exploits(tmp_path)
    assert sum(map(len, found.values())) == 2
    for name, events in found.items():
        row = next(r for r in cluster.study.rows() if f"{r.root:04d}" == name)
        entries = [(e.cycle, f"{e.donor:04d}") for e in row.lineage if e.donor is not None]
        assert entries == events
        assert row.changes == row.lineage[-1].changes
        assert load(tmp_path / "trials" / name / "recipe.yaml", Recipe()).training.student.rate == pytest.approx(
            row.changes["training.student.rate"]
        )
        for entry in row.lineage[1:]:
            donor = next(r for r in cluster.study.rows() if r.root == entry.donor)
            then = [e for e in donor.lineage if e.cycle < entry.cycle][-1].changes
            assert entry.changes.keys() == then.keys()
            assert entry.changes != then
    rates = {r.root: r.lineage[0].changes["training.student.rate"] for r in cluster.study.rows()}
    [worst] = [name for name, events in found.items() if events and events[0][0] == 20]
    assert int(worst) == max(rates, key=rates.__getitem__)
    best = best_of(cluster.study.rows(), cluster.spec)
    assert best
    assert "schedule" in as_json(cluster.study.rows(), cluster.spec, only=[best])["trials"][0]
    assert cluster.study.gpu_hours() * 3600 == pytest.approx(4 * (12 + 12 + 10))
    # Nothing is kept twice once a run has a checkpoint of its own.
    assert not [f for f in tmp_path.glob(f"trials/*/{TAKEN}/*.partial")]


@pytest.mark.parametrize("legs", range(1, 12))
def test_a_sweep_that_is_stopped_after_any_leg_ends_as_one_that_was_not(tmp_path: Path, legs: int) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, first = (Cluster(tmp_path / name, spec()) for name in ("whole", "parts"))
    whole.run()
    first.run(legs=legs)
    first.study.give_back()
    again = Cluster(tmp_path / "parts", spec())
    again.run()
    assert told(again) == told(whole)
    assert exploits(tmp_path / "parts") == exploits(tmp_path / "whole")
    assert sorted([*first.ran, *again.ran]) == sorted(whole.ran), "a leg was run again, or left out"


class Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


def die(*_: Any, **__: Any) -> None:
    raise Killed


class Wordless(EventLog):
    """Dies before it says that a takeover is done."""

    def write(self, kind: str, **facts: Any) -> None:
        if kind == EXPLOIT:
            raise Killed
        super().write(kind, **facts)


def before_recipe(file: Path, text: str) -> None:
    """Dies when the copy is in its place, before the recipe is."""
    if file.name == "recipe.yaml":
        raise Killed
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


def after(*given: Any, **facts: Any) -> None:
    """Dies when all is done, before the next member's turn."""
    takeover.take_over(*given, **facts)
    raise Killed


PLACES: dict[str, tuple[Any, str, Any]] = {
    "decided, not begun": (populations, "take_over", die),
    "before a file is copied": (takeover, "link_tree", die),
    "copied, not adopted": (takeover, "_adopt", die),
    "in its place, with the old recipe": (takeover, "replace", before_recipe),
    "done, not said": (takeover, "EventLog", Wordless),
    "said": (populations, "take_over", after),
}


@pytest.mark.parametrize("where", PLACES)
def test_killed_in_the_middle_of_a_takeover(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, first = (Cluster(tmp_path / name, spec()) for name in ("whole", "parts"))
    whole.run()
    with monkeypatch.context() as m:
        m.setattr(*PLACES[where])
        with pytest.raises(Killed):
            first.run()
    assert len(first.ran) == 4
    again = Cluster(tmp_path / "parts", spec())
    again.run()
    assert told(again) == told(whole)
    assert exploits(tmp_path / "parts") == exploits(tmp_path / "whole")
    assert sorted([*first.ran, *again.ran]) == sorted(whole.ran)


def test_one_whose_run_fails_takes_over_and_goes_on(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, spec())
    cluster.fails = {(1, 20), (2, 60)}
    cluster.run()
    states = {row.root: row.state for row in cluster.study.rows()}
    assert states == {0: "finished", 1: "finished", 2: "failed", 3: "finished"}  # on the last leg nobody follows
    assert exploits(tmp_path)["0001"][0][0] == 20
    assert cluster.study.over()


def test_if_all_fail_the_sweep_ends(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, spec())
    cluster.fails = {(k, 40) for k in range(4)}
    cluster.run()
    assert {row.state for row in cluster.study.rows()} == {"failed"}
    assert {row.error for row in cluster.study.rows()} == {"out of memory"}
    assert cluster.study.over()


def test_one_without_a_figure_is_the_worst(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, spec())
    cluster.blind = {(0, 20)}
    cluster.run()
    assert [name for name, events in exploits(tmp_path).items() if (events or [(0, "")])[0][0] == 20] == ["0000"]


def test_a_stopped_sweep_starts_no_leg(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, spec())
    members = cluster.members()
    (tmp_path / "STOP").touch()
    assert members.suggest("t") == Members.FINISHED


def test_a_leg_that_was_stopped_is_not_over(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, spec())
    members = cluster.members()
    config = members.suggest("t")
    members.on_trial_complete("t", None)
    assert members.suggest("u") == config


def test_a_second_cluster_is_refused(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, spec())
    only_here(cluster.study, cluster.spec, "here")
    only_here(cluster.study, cluster.spec, "here")
    with pytest.raises(InputError, match=r"its population belongs to cluster 'here', .* give --cluster here"):
        only_here(cluster.study, cluster.spec, "there")
