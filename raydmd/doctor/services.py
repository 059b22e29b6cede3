"""What answers over HTTP beside a cluster: Ray's dashboard, Prometheus, Grafana, the tracking server."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from raydmd.doctor.facts import Service
from raydmd.redact import hidden

if TYPE_CHECKING:
    from collections.abc import Callable

NAMED = {"Prometheus": ("RAY_PROMETHEUS_HOST", "/-/healthy"), "Grafana": ("RAY_GRAFANA_HOST", "/api/health")}
"""Variables by which Ray's dashboard knows them, and where they say that they are well."""
HASTE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def ask_dashboard(on_head: Callable[..., Any]) -> Service:
    """Ray's dashboard, without which there are no submitted jobs.

    Args:
        on_head: calls a method of the head's probe.
    """
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray._private.worker import get_dashboard_url

    address = get_dashboard_url() or ""  # type: ignore[no-untyped-call]
    if not address:
        return Service("dashboard", "", "it does not run")
    _, error = on_head("fetch", f"http://{address}/api/version", dict(get_auth_headers_if_auth_enabled({})))
    return Service("dashboard", address, error)


def ask_named(on_head: Callable[..., Any]) -> list[Service]:
    """Prometheus and Grafana, where the head's environment names them.

    Args:
        on_head: calls a method of the head's probe.
    """
    known = on_head("environment", *(variable for variable, _ in NAMED.values()))
    found = []
    for name, (variable, path) in NAMED.items():
        if url := known.get(variable):
            _, error = on_head("fetch", url.rstrip("/") + path, {})
            found.append(Service(name, hidden(url), error))
    return found


def ask_tracking(uri: str | None, deadline: float) -> Service:
    """A tracking server, asked as a run asks it, from here.

    Args:
        uri: of it; ``None`` for the default, a file beside the runs.
        deadline: seconds for its answer.
    """
    if uri is None:
        return Service("MLflow", "")
    failed: list[str] = []

    def ask() -> None:
        try:
            from mlflow.tracking import MlflowClient

            from raydmd.tracking.reader import patience

            with patience(HASTE):
                MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        except Exception as error:  # raised in the thread that waits
            failed.append(hidden(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"))

    # A server that takes the connection and says nothing would hold this up for longer than anybody waits.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline)
    if thread.is_alive():
        failed.append(f"no answer within {deadline:g} s")
    return Service("MLflow", hidden(uri), failed[0] if failed else "")
