"""One MLflow run per raydmd run: keyed by cycle, idempotent over restarts, written by the driver alone.

The rows come from the run's ``metrics.jsonl``, which is complete; a tracking server that is away for a
while therefore costs nothing but time.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from raydmd.errors import InputError
from raydmd.tracking import RUN_ID
from raydmd.tracking.reader import patience

if TYPE_CHECKING:
    from raydmd.recipe import Recipe

WRITING = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
"""Runs try again by themselves: a server that is away is known to be within half a minute, not after four."""
STEP, TIME, ATTEMPT = "cycle", "time", "monitor/attempt"
KEY = "raydmd.key"
"""Tag by which a run's folder knows its MLflow run."""
TAGS = "mlflow_tags.json"
"""File of a run with that tag's value, and the other tags."""


class Tracker:
    """A run in MLflow: the one that this raydmd run had before, or a new one.

    Nothing is asked of the server before the first writing, or :meth:`connect`. Every writing may be done again: what
    is there already stays as it is, also after an answer that was lost.

    Args:
        recipe: the run.
        tags: of this attempt.
    """

    def __init__(self, recipe: Recipe, tags: Mapping[str, str]) -> None:
        self._recipe, self._tags = recipe, dict(tags)
        self.uri = recipe.tracking.uri or f"sqlite:///{recipe.output.expanduser().absolute() / 'mlflow.db'}"
        self._open: tuple[MlflowClient, str] | None = None
        self._opening = threading.Lock()
        self._logged: set[tuple[int, int]] = set()

    def connect(self) -> None:
        """See that the tracking server is there.

        Raises:
            InputError: if it can't be used.
        """
        try:
            with self._asked():
                pass
        except (MlflowException, OSError) as error:
            raise InputError(f"tracking.uri {self.uri}: {error}") from error

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of metrics, each with its ``cycle`` and ``time``; those already written are left out."""
        with self._asked() as (client, run_id):
            for row in rows:
                step = int(row[STEP])
                place = (int(row.get(ATTEMPT, 0)), step)
                if place not in self._logged:
                    client.log_batch(run_id, metrics=_metrics(row, step, row[TIME]))
                    self._logged.add(place)

    def figures(self, figures: Mapping[str, float], *, step: int, when: float) -> None:
        """Write the figures of an evaluation after so many cycles, made at a time, unless they are there."""
        self._measured(figures, step, when, lambda m: (m.step, m.timestamp) == (step, int(when * 1000)))

    def _measured(self, figures: Mapping[str, float], step: int, when: float, same: Callable[[Metric], bool]) -> None:
        first = next(iter(figures))
        with self._asked() as (client, run_id):
            if not any(same(m) for m in client.get_metric_history(run_id, _key(first))):
                client.log_batch(run_id, metrics=_metrics(figures, step, when))

    def results(self, figures: Mapping[str, float], artifacts: Sequence[Path], *, step: int, when: float) -> None:
        """Write the last evaluation's figures and the files that belong to the run."""
        self._measured(figures, step, when, lambda m: m.step == step)
        with self._asked() as (client, run_id):
            for path in artifacts:
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), path.name)
                elif path.exists():
                    client.log_artifact(run_id, str(path))

    def end(self, status: str) -> None:
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with self._asked() as (client, run_id):
            client.set_terminated(run_id, status=status)

    @contextlib.contextmanager
    def _asked(self) -> Iterator[tuple[MlflowClient, str]]:
        with patience(WRITING):
            with self._opening:  # the follower's thread, and at the end of a run the driver's
                if self._open is None:
                    self._open = self._opened()
            yield self._open

    def _opened(self) -> tuple[MlflowClient, str]:
        client = MlflowClient(tracking_uri=self.uri)
        run = self._found(client)
        run_id: str = run.info.run_id
        recipe = self._recipe.model_dump(mode="json", exclude={"tracking"})
        missing = [Param(k, v[:6000]) for k, v in flatten(recipe) if k not in run.data.params]
        if missing:  # before the parameters, so that a run that has them has it
            client.log_dict(run_id, recipe, "recipe.yaml")
        for i in range(0, len(missing), 100):
            client.log_batch(run_id, params=missing[i : i + 100])
        client.set_terminated(run_id, status="RUNNING")
        # Of this attempt: its versions, and what a population has made of its settings.
        client.log_batch(run_id, tags=[RunTag(k, v) for k, v in self._tags.items()])
        # After a rollback the same cycles come again, as another attempt.
        # After a death as well, and a stop may then leave a row between two that are there.
        attempts = {(int(m.value), m.step) for m in client.get_metric_history(run_id, ATTEMPT)}
        steps = {step for _, step in attempts}
        cycles = {(0, m.step) for m in client.get_metric_history(run_id, STEP) if m.step not in steps}
        self._logged = attempts | cycles
        return client, run_id

    def _found(self, client: MlflowClient) -> Run:
        """The run of this folder. It is known by a key of its own, in case that the server's answer was lost."""
        file = self._recipe.folder / RUN_ID
        if file.is_file():
            return client.get_run(file.read_text(encoding="utf-8").strip())
        # The tags are kept as well: somebody else may have to send the run.
        made = json.dumps({"key": uuid.uuid4().hex, "tags": self._tags})
        kept = json.loads(_kept(self._recipe.folder / TAGS, made))
        key, tags = kept["key"], {**kept["tags"], KEY: kept["key"]}
        experiment = experiment_of(client, self._recipe)

        def known() -> list[Run]:
            return list(client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", order_by=["attributes.start_time"]))

        if not known():
            client.create_run(experiment, run_name=self._recipe.name, tags=tags)
        first, *others = known()
        for other in others:  # MLflow's client asks again by itself if an answer is lost
            client.delete_run(other.info.run_id)
        _kept(file, first.info.run_id)
        return first


def experiment_of(client: MlflowClient, recipe: Recipe) -> str:
    """The id of a recipe's experiment, made if it is not there."""
    name, uri = recipe.tracking.experiment, recipe.tracking.uri
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    # An embedded database has no server to take files: they lie beside it.
    beside = None if uri and not uri.startswith("sqlite:") else recipe.output.expanduser().absolute()
    if beside and uri:
        beside = Path(uri.removeprefix("sqlite:///")).parent.absolute()
    try:
        made = client.create_experiment(name, artifact_location=(beside / "mlartifacts").as_uri() if beside else None)
    except MlflowException:  # another run has just made it
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)
    return str(made)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted keys with text values."""
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += flatten(value, f"{prefix}{key}.")
        else:
            found.append(
                (
                    f"{prefix}{key}",
                    yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip(),
                )
            )
    return found


def _key(name: str) -> str:
    """MLflow allows letters, digits and ``_-. /`` in a metric's name."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)


def _metrics(figures: Mapping[str, Any], step: int, when: float) -> list[Metric]:
    # Their own time, not that of writing: MLflow keeps equal ones once.
    now = int(when * 1000)
    return [
        Metric(_key(k), float(v), now, step) for k, v in figures.items() if isinstance(v, int | float) and k != TIME
    ]


def _kept(file: Path, text: str) -> str:
    """What a file holds; ``text``, if it is not there yet."""
    if not file.is_file():
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    return file.read_text(encoding="utf-8").strip()
