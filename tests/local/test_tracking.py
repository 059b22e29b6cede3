"""What MLflow holds after resumes and rollbacks, in an embedded database."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from mlflow import MlflowClient

from raydmd.recipe import Recipe
from raydmd.tracking.tracker import Tracker
from raydmd.training.folder import trained

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local


def rows(*cycles: int, attempt: int, loss: float) -> list[dict[str, float]]:
    return [{"cycle": c, "monitor/attempt": attempt, "fake/loss": loss} for c in cycles]


def test_rows_are_written_once_and_those_of_a_later_attempt_again(tmp_path: Path) -> None:
    recipe = Recipe(name="tracked", output=tmp_path)
    recipe.folder.mkdir(parents=True)
    first = rows(10, 20, 30, attempt=0, loss=1.0)
    Tracker.open(recipe, {}).log(first)
    tracker = Tracker.open(recipe, {})  # as after a restart, which reads the file from its start
    again = rows(20, 30, 40, attempt=1, loss=2.0)
    tracker.log([*first, *again])
    Tracker.open(recipe, {}).log([*first, *again])
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    seen = sorted((m.step, m.value) for m in client.get_metric_history(tracker.run_id, "fake/loss"))
    assert seen == [(10, 1.0), (20, 1.0), (20, 2.0), (30, 1.0), (30, 2.0), (40, 2.0)]


def test_a_final_checkpoint_counts_once_the_worker_says_it_has_arrived(tmp_path: Path) -> None:
    final = tmp_path / "train" / "cycle-00000010-final"
    final.mkdir(parents=True)
    (final / "progress.json").write_text("{}")
    assert trained(tmp_path) is None
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "finished", "cycle": 10}\n')
    assert trained(tmp_path) == final
