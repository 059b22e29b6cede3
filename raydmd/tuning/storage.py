"""Optuna's storage of a study: how it is opened by several clusters at once, and lived with while it is away."""

from __future__ import annotations

import contextlib
import functools
import random
import time
import warnings
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError

from raydmd.errors import InputError, RunFailed
from raydmd.redact import hidden

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from raydmd.tuning.spec import Sweep

BEAT = 10
"""Seconds between signs of life of a running trial."""
GRACE = 60
"""Seconds of silence after which a trial is taken for lost."""
RETRIES = 5
"""Times that a trial's process may die."""
OPENINGS = 20
"""Tries to open a storage whose tables others are making."""
AWAY = 600.0
"""Seconds that a storage may be away in the middle of a sweep: a database is restarted, a network mended."""
HURRY = 10.0
"""The same, once the sweep was told to stop."""


def storage_of(url: str) -> RDBStorage:
    """Optuna's storage, with signs of life.

    Raises:
        InputError: if it can't be reached.
    """
    for left in reversed(range(OPENINGS)):
        try:
            with quiet():
                return RDBStorage(
                    url,
                    heartbeat_interval=BEAT,
                    grace_period=GRACE,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(None),
                    engine_kwargs={"pool_pre_ping": True, "connect_args": deadlines(url)},
                )
        except (SQLAlchemyError, ImportError, ValueError, RuntimeError) as error:
            # Clusters that start together make the tables together: the database lets one of them, and refuses the
            # others until it has done.
            if left == 0 or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                raise InputError(f"the study's storage {hidden(url)} can't be used: {first_line(error)}") from None
        time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


def deadlines(url: str) -> dict[str, Any]:
    """How long a database may be silent before it is taken for away: one that is frozen closes no connection."""
    if not url.startswith("postgresql"):
        return {}
    kept_alive = {"keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
    return {"connect_timeout": 10, "tcp_user_timeout": 30_000, **kept_alive}


def storage_url(spec: Sweep, folder: Path) -> str:
    """Of the study of a sweep that is kept in a folder."""
    given = spec.storage or f"sqlite:///{folder / 'study.db'}"
    # The driver that `raydmd[postgres]` brings; SQLAlchemy would look for an older one.
    return given.replace("postgresql://", "postgresql+psycopg://", 1)


class Patience:
    """Tries again what a storage that is away for a while refuses.

    Args:
        url: of the storage.

    Attributes:
        stop: a file; once it is there, the sweep was told to stop.
        since: monotonic time from which the storage was there whenever it was asked.
    """

    def __init__(self, url: str) -> None:
        self._url, self._away = url, False
        self.stop: Path | None = None
        self.since = time.monotonic()

    def keep(self, ask: Callable[[], Any]) -> Any:
        """Ask until there is an answer; ``ask`` may be done again.

        Raises:
            RunFailed: if the storage stays away.
        """
        begun, pause = time.monotonic(), 0.5
        while True:
            try:
                answer = ask()
            except (SQLAlchemyError, StorageInternalError) as error:
                if not is_outage(error):
                    raise
                self.missed(error)
                waited = time.monotonic() - begun
                if waited > AWAY or (waited > HURRY and self.stop and self.stop.exists()):
                    raise RunFailed(
                        f"the study's storage {hidden(self._url)} was away for {waited:.0f} s: {_cause(error)}. "
                        "The same command goes on"
                    ) from None
            else:
                self.met()
                return answer
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def missed(self, error: Exception) -> None:
        """The storage did not answer."""
        self.since = time.monotonic()
        if not self._away:
            self._away = True
            print(f"the study's storage {hidden(self._url)} is away ({_cause(error)}); trying again", flush=True)

    def met(self) -> None:
        """It did."""
        if self._away:
            self._away = False
            print("the study's storage is back", flush=True)


class Patient(Protocol):
    """Has a patience."""

    patience: Patience


_Owner = TypeVar("_Owner", bound=Patient)
_Args = ParamSpec("_Args")
_Answer = TypeVar("_Answer")


def patiently(method: Callable[Concatenate[_Owner, _Args], _Answer]) -> Callable[Concatenate[_Owner, _Args], _Answer]:
    """A method that outlasts an outage; it is called anew after one, so it must bear being done twice."""

    @functools.wraps(method)
    def outlasting(self: _Owner, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Answer:
        answer: _Answer = self.patience.keep(lambda: method(self, *args, **kwargs))
        return answer

    return outlasting


def is_outage(error: BaseException) -> bool:
    """Whether a database did not answer, rather than refuse what it was asked."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    return isinstance(cause, OperationalError | InterfaceError)


@contextlib.contextmanager
def quiet() -> Any:
    """Optuna's log is not a run's; what is experimental in it is tested here."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # Signs of life are given by the study.
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        yield


def first_line(error: BaseException) -> str:
    """Of what an error says."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _cause(error: Exception) -> str:
    return first_line(error.__cause__ or error)
