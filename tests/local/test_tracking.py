"""What MLflow holds after resumes and rollbacks, in an embedded database."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from raydmd.errors import InputError, RunFailed
from raydmd.recipe import Recipe
from raydmd.tracking import tracker as trackers
from raydmd.tracking.tracker import Tracker
from raydmd.training.events import METRICS, EventLog
from raydmd.training.folder import UNSENT, trained
from raydmd.training.lock import locked
from raydmd.training.students import EVALUATIONS
from raydmd.training.tracked import hand_over, send

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local


def rows(*cycles: int, attempt: int, loss: float) -> list[dict[str, float]]:
    return [{"cycle": c, "monitor/attempt": attempt, "fake/loss": loss, "time": 100.0 * attempt + c} for c in cycles]


def test_rows_are_written_once_and_those_of_a_later_attempt_again(tmp_path: Path) -> None:
    recipe = Recipe(name="tracked", output=tmp_path)
    recipe.folder.mkdir(parents=True)
    first = rows(10, 20, 30, attempt=0, loss=1.0)
    Tracker(recipe, {}).log(first)
    tracker = Tracker(recipe, {})  # as after a restart, which reads the file from its start
    again = rows(20, 30, 40, attempt=1, loss=2.0)
    tracker.log([*first, *again])
    Tracker(recipe, {}).log([*first, *again])
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = (recipe.folder / trackers.RUN_ID).read_text()
    seen = sorted((m.step, m.value) for m in client.get_metric_history(run_id, "fake/loss"))
    assert seen == [(10, 1.0), (20, 1.0), (20, 2.0), (30, 1.0), (30, 2.0), (40, 2.0)]


def test_a_row_between_two_that_are_there_is_written(tmp_path: Path) -> None:
    """A death goes back to cycle 32, behind what was logged, and a stop then leaves a row at 33."""
    recipe = Recipe(name="tracked", output=tmp_path)
    recipe.folder.mkdir(parents=True)
    Tracker(recipe, {}).log(rows(30, 32, 35, attempt=0, loss=1.0))
    Tracker(recipe, {}).log(rows(30, 32, 33, 35, 40, attempt=0, loss=2.0))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = (recipe.folder / trackers.RUN_ID).read_text()
    seen = sorted((m.step, m.value) for m in client.get_metric_history(run_id, "fake/loss"))
    assert seen == [(30, 1.0), (32, 1.0), (33, 2.0), (35, 1.0), (40, 2.0)]


class Losing:
    """A client whose server does what it is asked, and whose every first answer of a kind is lost."""

    def __init__(self, client: MlflowClient) -> None:
        self._client, self._lost = client, set[str]()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = real(*args, **kwargs)
            if name not in self._lost:
                self._lost.add(name)
                raise ConnectionError("the answer was lost")
            return answer

        return call


def test_answers_that_are_lost_cost_nothing_and_double_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(name="tracked", output=tmp_path)
    recipe.folder.mkdir(parents=True)
    plain = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    losing = Losing(plain)
    monkeypatch.setattr(trackers, "MlflowClient", lambda tracking_uri: losing)
    tracker = Tracker(recipe, {"raydmd.cluster": "c"})
    given = rows(10, 20, attempt=0, loss=1.0)
    (recipe.folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    (recipe.folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    evaluated = {"student": "cycle-00000010", "time": 11.0, "cycle": 10.0, "evaluation/flow": 1.5}
    (recipe.folder / EVALUATIONS).write_text(json.dumps(evaluated) + "\n", encoding="utf-8")
    report = recipe.folder / "report.html"
    report.write_text("<html>", encoding="utf-8")
    hand_over(recipe, tracker, "FINISHED", {"evaluation/flow": 2.0}, [report])
    assert (recipe.folder / UNSENT).is_file()
    tries = 0
    while (recipe.folder / UNSENT).is_file():
        tries += 1
        assert tries < 20
        with contextlib.suppress(RunFailed):  # an answer was lost
            send(recipe.folder)
    assert tries > 3
    assert not send(recipe.folder)
    [experiment] = [e for e in plain.search_experiments() if e.name == "raydmd"]
    [run] = plain.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["raydmd.cluster"] == "c"
    assert run.data.params["method.name"] == "phased"
    last = recipe.training.cycles
    for key, expected in {"fake/loss": [(10, 1.0), (20, 1.0)], "evaluation/flow": [(10, 1.5), (last, 2.0)]}.items():
        seen = sorted((m.step, m.value) for m in plain.get_metric_history(run.info.run_id, key))
        assert seen == expected, key
    assert {f.path for f in plain.list_artifacts(run.info.run_id)} >= {"report.html", "recipe.yaml"}


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run's folder"):
        send(tmp_path)


def test_a_final_checkpoint_counts_once_the_worker_says_it_has_arrived(tmp_path: Path) -> None:
    assert trained(tmp_path) is None
    events = EventLog(tmp_path / "events.jsonl")
    events.write("checkpoint", name="cycle-00000010-final")
    assert trained(tmp_path) is None
    events.write("finished", cycle=10, checkpoint="cycle-00000010-final")
    assert trained(tmp_path) == "cycle-00000010-final"
    events.write("fallback", checkpoint="cycle-00000008", message="it was damaged")
    assert trained(tmp_path) is None


def test_a_folder_whose_process_is_about_to_go_is_waited_for(tmp_path: Path) -> None:
    let_go = threading.Event()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            let_go.wait(30)

    held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(10)
    with pytest.raises(InputError, match="in progress in another process"), locked(tmp_path):
        pass
    threading.Timer(1.0, let_go.set).start()
    with locked(tmp_path, patience=20):
        assert let_go.is_set()
    holder.join()
