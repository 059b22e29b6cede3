"""Measuring a machine, planning with it, and comparing a run with its plan."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from raydmd.cli import main
from raydmd.cli_plan import told_after
from raydmd.errors import InputError
from raydmd.planning import network
from raydmd.planning.after import after
from raydmd.planning.answer import Option
from raydmd.planning.calibration import Calibration, Entry, Measured, default_file, key, line, model_key, read, write
from raydmd.planning.calls import count
from raydmd.planning.hardware import read_hardware
from raydmd.planning.known import family_of
from raydmd.planning.measure import Bench, calibrate, held
from raydmd.planning.planner import Planner
from raydmd.planning.trace import passes
from raydmd.recipe import Recipe, derive

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local

CHANGES: dict[str, Any] = {
    "model.path": "sd35-tiny",
    "method": {"name": "dmd2", "steps": 2, "shift": 3.0},
    "training": {
        "batch": 4,
        "cycles": 10,
        "fake_updates": 2,
        "precision": "fp32",
        "ema": 0.9,
        "student": {"rate": 1e-4, "lora": None},
    },
    "placement.teacher": "local",
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("RAYDMD_CACHE", str(tmp_path / "cache"))
    return derive(Recipe(name="run", output=tmp_path), CHANGES)


def test_memory_is_what_tensors_take(recipe: Recipe, tmp_path: Path) -> None:
    planner = Planner(recipe, read_hardware("h100"))
    budget = planner.answer(Option(placement="local", sharding="single", workers=1)).phases[0].budget
    bench = Bench.of(recipe, tmp_path / "bench")
    assert budget.held == pytest.approx(held(bench.tensors()), rel=0.02)
    assert budget.peak == pytest.approx(held(bench.tensors()) + max(bench.peak(k) for k in range(3)), rel=0.15)
    # without memory and with it, an operation is an operation
    denoiser = bench.actors.fake.denoisers["transformer"]
    real = passes(denoiser, None, bench.conditions.rows([1, 2]), bench.actors.latent, train=True)
    told = planner.networks.cost(
        rows=2, latent=bench.actors.latent, bits=32, autocast=32, lora=None, again=False, train=True
    )
    assert (told.forward, told.backward) == (real.forward, real.backward)
    assert told.kept == pytest.approx(real.kept, rel=0.01)


def test_measured_planned_and_compared(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    found = calibrate(recipe, default_file(), rounds=1)
    assert read(default_file()) == found
    assert found.hardware.cores
    wanted = {f"{c.role} {c.kind}" for phase in count(recipe, family_of(recipe.model)[0]) for c in phase.calls}
    assert found.entries[key(recipe)].passes.keys() == wanted
    planner = Planner(recipe, found.hardware, found.of(recipe))
    step = planner.answer(planner.own).phases[0]
    assert 0 < step.seconds < 60

    recipe.folder.mkdir()
    (recipe.folder / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(InputError, match="no cycles yet"):
        after(recipe.folder, found.hardware, found)
    times = {"rollout": step.step.rollout, "fake": 2 * sum(step.step.fake_updates), "generator": step.step.generator}
    row = {"cycle": 1, "phase": 0, "time/teacher_wait": 0.0} | {f"time/{k}": v for k, v in times.items()}
    (recipe.folder / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    by = {o.what: o.by for o in after(recipe.folder, found.hardware, found)}
    assert by["fake, s"] == pytest.approx(-0.5, abs=0.05)
    assert by["rollout, s"] == pytest.approx(0.0, abs=0.01)
    assert "planned" in str(told_after(recipe.folder))
    with pytest.raises(SystemExit) as done:
        main(["plan", "--cluster", "here", "--after", str(recipe.folder)])
    assert done.value.code == 0
    assert "beside the run" in capsys.readouterr().out


def test_no_line_about_a_plan_where_nothing_was_measured(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert told_after(recipe.folder) is None
    with pytest.raises(SystemExit) as done:
        main(["plan", "--cluster", "here", "--after", str(recipe.folder)])
    assert done.value.code == 2
    assert "nothing was measured yet" in capsys.readouterr().err


def test_rows_between_those_measured_are_on_a_line() -> None:
    assert line([(2.0, 1.0), (4.0, 2.0)], 3) == 1.5
    assert line([(2.0, 1.0), (4.0, 2.0)], 8) == 4.0
    assert line([(2.0, 1.0), (4.0, 2.0), (8.0, 10.0)], 6) == 6.0
    assert line([(2.0, 1.0)], 6) == 3.0
    entry = Entry(
        what="", model="", passes={"fake forward": [(2.0, 1.0)]}, updates={}, beside={}, rates={}, held=0, peak=0
    )
    seconds = Measured("here", entry).seconds(lambda role, kind, rows: -1.0, 4)
    assert seconds("fake", "forward", 2.0) == 4.0
    assert seconds("student", "forward", 1.0) == -1.0


def test_rates_are_of_their_model_and_precision_alone(recipe: Recipe) -> None:
    paper = read_hardware("h100")
    slow = {"forward": 2e12, "train": 1e12}
    entry = Entry(
        what="run: a tiny one", model=model_key(recipe), passes={}, updates={}, beside={}, rates=slow, held=0, peak=0
    )
    known = Calibration(machine="this", hardware=paper, entries={key(recipe): entry})
    assert known.at(recipe).rate("fp32", train=True) == pytest.approx(1e12)
    assert known.at(recipe).rate("fp32", train=False) == pytest.approx(2e12)
    assert known.source(recipe) == "times measured on this"
    other = derive(recipe, {"method.steps": 3})
    assert known.of(other) is None
    assert known.at(other) == known.at(recipe)
    assert "at the rates of run: a tiny one" in known.source(other)
    for changes in ({"training.precision": "bf16"}, {"model.path": "wan21-untrained"}):
        large = derive(recipe, changes)
        assert known.at(large) == paper
        assert "nothing was measured here" in known.source(large)
    sizes = derive(recipe, {"data.sizes": [{"height": 64, "width": 64}, {"height": 32, "width": 64}]})
    assert known.of(sizes) is None
    assert known.at(sizes) == known.at(recipe)
    assert "data.sizes has several" in known.source(sizes)


def test_what_does_not_fit_one_device_says_what_else_to_do(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def of(*_: Any) -> None:
            raise error

        monkeypatch.setattr(Bench, "of", of)

    fail(torch.OutOfMemoryError("tried to allocate 50 GiB"))
    with pytest.raises(InputError, match=r"sd35-tiny does not fit.*placement.teacher=tied.*without --measure"):
        calibrate(recipe, default_file(), rounds=1)
    assert not default_file().exists()
    fail(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        calibrate(recipe, default_file(), rounds=1)


def test_a_calibration_is_whole_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    assert read(file) is None
    write(file, Calibration(machine="x", hardware=read_hardware("h100")))
    assert read(file) is not None
    file.write_text("{}")
    with pytest.raises(InputError, match="--measure"):
        read(file)


def test_what_blocks_cost_is_told_from_few(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks and one more, against all of them."""
    changes = {"model.path": "wan21-untrained", "method": {"name": "dmd2", "steps": 2, "shift": 3.0}}
    planner = Planner(derive(recipe, changes), read_hardware("h100"))
    own, config = planner.networks, planner.family._config(planner.family._kind(), "transformer")
    monkeypatch.setattr(planner.family, "_config", lambda *_: config | {"num_layers": 7})
    settings = {"rows": 1, "latent": (16, 3, 4, 4), "bits": 32, "autocast": 32, "lora": None, "train": True}
    for again in (False, True):
        told = own.cost(again=again, **settings)  # type: ignore[arg-type]
        monkeypatch.setattr(network, "KEPT", 100)
        own.asked.clear()
        monkeypatch.setenv("RAYDMD_CACHE", str(recipe.output / f"all-{again}"))
        whole = own.cost(again=again, **settings)  # type: ignore[arg-type]
        monkeypatch.setattr(network, "KEPT", 2)
        own.asked.clear()
        assert told.forward == pytest.approx(whole.forward, rel=1e-9)
        assert told.backward == pytest.approx(whole.backward, rel=1e-9)
        for name in ("kept", "recording", "peak"):
            assert getattr(told, name) == pytest.approx(getattr(whole, name), rel=0.02), name
    assert torch.is_grad_enabled()
