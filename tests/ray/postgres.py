"""A real PostgreSQL server for tests: installed if it can be, started for the test, ended with it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@contextmanager
def server() -> Iterator[str]:
    """A server with an empty database; yields its address."""
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
        call(str(bin_folder / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(data / "log"), "-w", "start")
        try:
            yield f"postgresql://raydmd@127.0.0.1:{port}/postgres"
        finally:
            call(str(bin_folder / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
