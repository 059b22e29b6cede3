"""Runs as a tracking server has them: found by name, read in few requests, given up on soon where none answers."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from raydmd.errors import InputError
from raydmd.recipe_io import nearest_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from mlflow.entities import Run as MlflowRun

SWEEP = "raydmd.sweep"
OBJECTIVES = "raydmd.objectives"
"""Tags of a sweep's run: its name, and its objectives as JSON."""
RUN, OF_SWEEP, EXPERIMENT = "run", "sweep", "experiment"
AT_ONCE = 16
"""Requests under way."""
BULK = 100
"""Runs of one request for histories, the most that a server takes."""
FIRST_ANSWER = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "7"}
LATER = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
"""Patience with a server before it has answered once, and then; MLflow's own is minutes."""
HISTORY = "/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"
"""Of many runs at once: what MLflow's own pages ask for."""
CAUSE = re.compile(r"\[Errno [^\]]*\] [\w ,-]+|[Rr]ead timed out|[Cc]onnect(?:ion)? ?(?:to \S+ )?timed out")
ID = re.compile(r"[0-9a-f]{32}")
_GATE = threading.Lock()
_HELD: dict[str, list[str]] = {}
"""Limits that are in the environment for now."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a name stands for.

    Attributes:
        kind: ``run``, ``sweep`` or ``experiment``.
        name: as the server has it.
        id: of the run or experiment.
        run: unless it is an experiment.
    """

    kind: str
    name: str
    id: str
    run: MlflowRun | None = None

    def said(self) -> str:
        """For a message."""
        return f"{self.kind} {self.id} ({self.name})"


@dataclass(frozen=True)
class Histories:
    """Metrics of several runs.

    Attributes:
        points: by run and metric: time written, cycle and value.
        requests: that it took.
    """

    points: dict[str, dict[str, list[tuple[int, int, float]]]] = field(default_factory=dict)
    requests: int = 0


class Reader:
    """A tracking server, or an embedded database.

    Args:
        uri: of it.

    Raises:
        InputError: if it does not answer.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            raise InputError(f"tracking {uri}: there is no such database")  # MLflow would make it
        try:
            with patience(FIRST_ANSWER):
                self._client = MlflowClient(tracking_uri=uri)
                self._experiments = {e.experiment_id: e for e in _pages(self._client.search_experiments)}
        except Exception as error:  # whatever the client, or its database, raises
            raise InputError(f"tracking {uri} does not answer: {_reason(error)}") from None

    @property
    def served(self) -> bool:
        """Whether it is a server, and not a database."""
        return self.uri.startswith(("http://", "https://"))

    def find(self, text: str) -> list[Found]:
        """All that a name or id may stand for; ``run:``, ``sweep:`` or ``experiment:`` before it says which.

        Args:
            text: as it was given.
        """
        kind, colon, name = text.partition(":")
        if not colon or kind not in (RUN, OF_SWEEP, EXPERIMENT):
            kind, name = "", text
        found: list[Found] = []
        with patience(LATER):
            if kind != EXPERIMENT:
                if ID.fullmatch(name):
                    with contextlib.suppress(MlflowException):
                        found.append(_found(self._client.get_run(name)))
                found += [_found(run) for run in self._search(f"attributes.run_name = {_quoted(name)}")]
            if kind in ("", EXPERIMENT):
                found += [
                    Found(kind=EXPERIMENT, name=name, id=e.experiment_id)
                    for e in self._experiments.values()
                    if e.name == name
                ]
        return [f for f in found if not kind or f.kind == kind]

    def near(self, text: str) -> str | None:
        """The name on the server that was most likely meant."""
        name = text.partition(":")[2] or text
        with patience(LATER):
            runs = {str(run.info.run_name) for run in self._search("", most=1000)}
        return nearest_name(name, {*runs, *(e.name for e in self._experiments.values())})

    def runs_of(self, found: Found) -> list[MlflowRun]:
        """A run by itself, a sweep's trials, or all of an experiment's runs but those of sweeps, the oldest first."""
        if found.kind == RUN:
            assert found.run is not None
            return [found.run]
        with patience(LATER):
            if found.kind == OF_SWEEP:
                runs = self._search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{found.id}'")
            else:
                runs = [run for run in self._search("", experiments=[found.id]) if not is_sweep(run)]
        return sorted(runs, key=lambda run: (run.info.start_time or 0, str(run.info.run_name)))

    def histories(self, runs: Sequence[MlflowRun], skip: Collection[str], *, most: int) -> Histories:
        """The metrics of all runs, asked for side by side.

        Args:
            runs: whose they are.
            skip: metrics that are not wanted, or beginnings of their names that end with ``/``.
            most: points of a run's metric that a server need give.
        """
        beginnings = tuple(name for name in skip if name.endswith("/"))
        wanted: dict[str, list[str]] = {}
        for run in runs:
            for key in run.data.metrics:
                if key not in skip and not key.startswith(beginnings):
                    wanted.setdefault(key, []).append(run.info.run_id)
        parts = [(key, ids[i : i + BULK]) for key, ids in wanted.items() for i in range(0, len(ids), BULK)]
        points: dict[str, dict[str, list[tuple[int, int, float]]]] = {run.info.run_id: {} for run in runs}
        with patience(LATER), ThreadPoolExecutor(AT_ONCE if self.served else 1) as pool:
            found = pool.map(lambda part: self._history(part[0], part[1], most), parts)
            for (key, _), rows in zip(parts, found, strict=True):
                for run_id, at, step, value in rows:
                    points[run_id].setdefault(key, []).append((at, step, value))
        for metrics in points.values():
            for rows_of_metric in metrics.values():
                rows_of_metric.sort(key=lambda row: row[:2])
        return Histories(points, len(parts))

    def text(self, run_id: str, path: str) -> str | None:
        """A text among a run's artifacts; ``None`` if it is not there or can't be had."""
        with tempfile.TemporaryDirectory(prefix="raydmd-") as folder, patience(LATER):
            try:
                if all(found.path != path for found in self._client.list_artifacts(run_id)):
                    return None  # asking for it would be tried again and again
                file = self._client.download_artifacts(run_id, path, folder)
                return Path(file).read_text(encoding="utf-8")
            except Exception:  # a page of figures does not fail for a picture
                return None

    def page_of(self, run: MlflowRun) -> str:
        """Where MLflow's own page of a run is; empty for a database."""
        if not self.served:
            return ""
        scheme, slashes, rest = self.uri.rstrip("/").partition("://")
        host, slash, path = rest.partition("/")
        public = f"{scheme}{slashes}{host.rpartition('@')[2]}{slash}{path}"  # pages are passed on, passwords are not
        return f"{public}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"

    def _search(self, query: str, *, experiments: Sequence[str] = (), most: int | None = None) -> list[MlflowRun]:
        ids = list(experiments) or list(self._experiments)
        found: list[MlflowRun] = []
        token: str | None = None
        while ids:
            page = self._client.search_runs(ids, query, max_results=1000, page_token=token)
            found += list(page)
            token = page.token
            if not token or (most and len(found) >= most):
                break
        return found

    def _history(self, key: str, ids: Sequence[str], most: int) -> list[tuple[str, int, int, float]]:
        if self.served:
            try:
                return self._bulk(key, ids, most)
            except (MlflowException, OSError, KeyError, ValueError):
                pass  # an older server, or one that hides its pages' requests: run by run
        return [
            (run_id, m.timestamp, m.step, m.value)
            for run_id in ids
            for m in self._client.get_metric_history(run_id, key)
        ]

    def _bulk(self, key: str, ids: Sequence[str], most: int) -> list[tuple[str, int, int, float]]:
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        asked = {"run_ids": list(ids), "metric_key": key, "max_results": most}
        host = get_default_host_creds(self.uri)  # type: ignore[no-untyped-call]
        answer = http_request(host, HISTORY, "GET", params=asked)  # type: ignore[no-untyped-call]
        if answer.status_code != 200:
            raise OSError(f"{HISTORY}: {answer.status_code}")
        rows: list[dict[str, Any]] = answer.json().get("metrics", [])
        return [(r["run_id"], int(r["timestamp"]), int(r.get("step", 0)), float(r["value"])) for r in rows]


def is_sweep(run: MlflowRun) -> bool:
    """Whether a run is the one above a sweep's trials."""
    return SWEEP in run.data.tags and MLFLOW_PARENT_RUN_ID not in run.data.tags


@contextlib.contextmanager
def patience(limits: dict[str, str]) -> Iterator[None]:
    """MLflow's patience with a server, as far as the environment does not set it; threads may be inside together."""
    with _GATE:
        for key in [k for k in limits if k in _HELD or k not in os.environ]:
            _HELD.setdefault(key, []).append(limits[key])
            os.environ[key] = limits[key]
    try:
        yield
    finally:
        with _GATE:
            for key in [k for k in limits if k in _HELD]:
                _HELD[key].remove(limits[key])
                if _HELD[key]:
                    os.environ[key] = _HELD[key][-1]
                else:
                    del _HELD[key]
                    os.environ.pop(key, None)


def _found(run: MlflowRun) -> Found:
    return Found(kind=OF_SWEEP if is_sweep(run) else RUN, name=str(run.info.run_name), id=str(run.info.run_id), run=run)


def _pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _quoted(name: str) -> str:
    mark = '"' if "'" in name else "'"
    return f"{mark}{name}{mark}"


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    # Of a request that went nowhere the cause says it all; it stands last, in three pairs of brackets.
    if cause := CAUSE.search(said):
        return cause.group().strip()
    return said if len(said) <= 300 else f"{said[:297]}..."
