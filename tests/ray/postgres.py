"""A real PostgreSQL server for tests: installed if it can be, started for the test, ended with it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USER = "postgres"


def binaries() -> Path:
    """Where ``initdb`` and ``pg_ctl`` are; skips the test where they can't be had."""
    found = _find()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "install", "-y", "-q", "postgresql"], capture_output=True, timeout=600, check=False)
        found = _find()
    if found is None:
        pytest.skip("no PostgreSQL here, and it could not be installed: apt-get install postgresql")
    return found


def _find() -> Path | None:
    places = [
        *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),
        Path("/usr/local/bin"),
        Path("/usr/bin"),
    ]
    return next((p for p in places if (p / "initdb").exists() and (p / "pg_ctl").exists()), None)


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        address: of its database.
        stop: end it at once, as a crash does.
        start: it again, with what it has kept.
    """

    address: str
    stop: Callable[[], None]
    start: Callable[[], None]


@contextmanager
def server() -> Iterator[Server]:
    """A server with an empty database."""
    bin_folder = binaries()
    # It does not run as root: where tests do, its own user has to own its files.
    who = {"user": USER, "group": USER} if os.geteuid() == 0 else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="raydmd-pg-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        root.chmod(0o755)
        data = root / "data"
        data.mkdir()
        if who:
            shutil.chown(data, USER, USER)

        def call(*words: str) -> None:
            subprocess.run(words, cwd="/", check=True, capture_output=True, timeout=120, **who)  # type: ignore[call-overload]

        call(str(bin_folder / "initdb"), "-D", str(data), "-U", "raydmd", "--auth=trust", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data} -c fsync=off"
        control = (str(bin_folder / "pg_ctl"), "-D", str(data), "-w")

        def start() -> None:
            call(*control, "-o", options, "-l", str(data / "log"), "start")

        def stop() -> None:
            call(*control, "-m", "immediate", "stop")

        start()
        try:
            yield Server(f"postgresql://raydmd@127.0.0.1:{port}/postgres", stop, start)
        finally:
            stop()
