"""Students that are measured while they train: what the worker leaves, what is made of it, who is told."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ray.exceptions import RayError
from safetensors.torch import load_file

from raydmd.models import load_family
from raydmd.recipe import derive
from raydmd.training import interim as interims
from raydmd.training.export import load_student
from raydmd.training.finish import interim_figures
from raydmd.training.follow import Follower
from raydmd.training.interim import Interim
from raydmd.training.students import EVALUATIONS, STUDENTS
from tests.local.test_worker import PROMPTS, recipe, work
from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_pipeline(tmp_path_factory.mktemp("two"))


def test_students_are_left_as_their_average_and_those_to_come_are_the_teachers(pipeline: Path, tmp_path: Path) -> None:
    r = derive(recipe(pipeline, tmp_path), {"evaluation.every": 2, "evaluation.samples": 4})
    r = derive(r, {"evaluation": {"teacher_steps": 2, "batch": 4}, "training.ema": 0.5})
    worker, end = work(r)
    assert end == "finished"
    left = sorted((r.folder / STUDENTS).iterdir())
    cycles = [int(f.name.removeprefix("cycle-")) for f in left]
    assert cycles == list(range(2, worker.plan.cycles, 2))
    family = load_family(r.model)
    first = left[0]
    [expert] = [f.stem for f in (first / "student").iterdir()]  # the first phase's
    assert set(load_student(r, family, first)) == {expert}
    whole = load_student(r, family, first, unfinished=True)
    assert len(whole) == 2
    other = next(e for e in family.routing().experts if e != expert)
    before = dict(family.denoiser(other, dtype=torch.float32).named_parameters())
    later = next(denoiser for name, denoiser in whole.items() if name != expert)
    assert all(torch.equal(p, before[n]) for n, p in later.named_parameters())
    figures = interim_figures(r, str(first), PROMPTS, None)
    assert {"evaluation/seconds", "evaluation/brightness", "evaluation/flow"} <= set(figures)


def test_it_is_the_average_that_is_left(pipeline: Path, tmp_path: Path) -> None:
    r = derive(recipe(pipeline, tmp_path), {"evaluation.every": 2})
    worker, end = work(r, stop_at=2)
    assert end == "stopped"
    [folder] = (r.folder / STUDENTS).iterdir()
    [file] = (folder / "student").iterdir()
    saved, role = load_file(file), worker.student
    assert all(torch.equal(v, role.average[f"{file.stem}.{n}"]) for n, v in saved.items())
    assert not all(torch.equal(v, role.parameters[f"{file.stem}.{n}"]) for n, v in saved.items())


class Immediate:
    """Stands for a Ray task; its references are what it returns."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def remote(self, _: Any, folder: str, *__: Any) -> Any:
        return self._found[folder.rsplit("/", 1)[-1]]


def test_each_student_is_measured_once_and_a_restart_tells_again(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = derive(recipe(pipeline, tmp_path), {"evaluation.every": 2})
    for name in ("cycle-00000002", "cycle-00000004", "cycle-00000006.partial"):
        (r.folder / STUDENTS / name).mkdir(parents=True)
    found = {"cycle-00000002": {"evaluation/flow": 1.0}, "cycle-00000004": {"evaluation/flow": 2.0}}
    monkeypatch.setattr(interims.ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(interims.ray, "get", lambda ref: ref)
    monkeypatch.setattr(Interim, "_task", lambda _: Immediate(found))
    told: list[dict[str, float]] = []
    Interim(r, PROMPTS, None, told.append).finish()
    expected = [{"cycle": 2.0, "evaluation/flow": 1.0}, {"cycle": 4.0, "evaluation/flow": 2.0}]
    assert told == expected
    assert [f.name for f in (r.folder / STUDENTS).iterdir()] == ["cycle-00000006.partial"]

    (r.folder / STUDENTS / "cycle-00000004").mkdir()  # a resumed worker comes past it again
    again: list[dict[str, float]] = []
    Interim(r, PROMPTS, None, again.append).finish()
    assert again == expected
    assert not (r.folder / STUDENTS / "cycle-00000004").exists()
    lines = (r.folder / EVALUATIONS).read_text().splitlines()
    assert [json.loads(line)["cycle"] for line in lines] == [2.0, 4.0]


def test_one_that_fails_stays_for_the_next_attempt(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    r = derive(recipe(pipeline, tmp_path), {"evaluation.every": 2})
    folder = r.folder / STUDENTS / "cycle-00000002"
    folder.mkdir(parents=True)

    def fail(_: Any) -> None:
        raise RayError("out of memory")

    monkeypatch.setattr(interims.ray, "wait", lambda refs, **_: (refs, []))
    monkeypatch.setattr(interims.ray, "get", fail)
    monkeypatch.setattr(Interim, "_task", lambda _: Immediate({folder.name: {}}))
    told: list[dict[str, float]] = []
    Interim(r, PROMPTS, None, told.append).finish()
    assert told == []
    assert folder.exists()
    assert "cycle 2 failed: out of memory" in capsys.readouterr().out


class Flaky:
    """A tracker whose server is away at first."""

    def __init__(self) -> None:
        self.away = True
        self.given: list[tuple[int, float, dict[str, float]]] = []

    def log(self, rows: list[dict[str, float]]) -> None:
        pass

    def figures(self, figures: dict[str, float], *, step: int, when: float) -> None:
        if self.away:
            raise ConnectionError("nobody there")
        self.given.append((step, when, figures))


def test_a_tracking_server_that_is_away_costs_no_evaluation(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = recipe(pipeline, tmp_path)
    r.folder.mkdir(parents=True)
    row = {"student": "cycle-00000002", "time": 5.0, "cycle": 2.0, "evaluation/flow": 1.0}
    (r.folder / EVALUATIONS).write_text(json.dumps(row) + "\n", encoding="utf-8")
    tracker = Flaky()
    follower = Follower(r.folder, r, tracker)  # type: ignore[arg-type]
    monkeypatch.setattr(follower._done, "wait", lambda _: None)
    follower._read(None)
    assert tracker.given == []
    tracker.away = False
    follower._read(None)
    follower._read(None)
    assert tracker.given == [(2, 5.0, {"evaluation/flow": 1.0})]
