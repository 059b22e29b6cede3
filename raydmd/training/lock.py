"""Holding a run's folder, so that the same name never runs twice at once on it: here, or on another machine.

A file lock tells processes of one machine at once, and is let go by the kernel when its holder dies. On many shared
file systems it does not reach other machines; for those there is a lease beside it, see :mod:`raydmd.training.lease`.

A holder that was away for longer than its lease, suspended or cut off, may find that somebody else has taken the folder
over. It then ends without another word in it; its workers look for themselves, before each cycle and each checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from raydmd.errors import FAILED, InputError, RunFailed
from raydmd.training.lease import RENEWALS, SECONDS, Lease, Reading, Verdict, judge, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOCK, LEASE = "lock", "lease.json"
PATIENCE = 60.0
"""Seconds that processes of a command that was killed may live on."""
POLL, SETTLE = 0.5, 1.0
"""Seconds between two looks at another's lease, and before a second look at one's own that replaced another machine's:
two of them may have found it over at once."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems without file locks answer."""


class Held(InputError):
    """Another process has the folder."""


class LeaseLost(RunFailed):
    """Another process has taken the folder over."""


class Hold:
    """A folder that this process holds, and keeps renewing its lease of until it is closed.

    Args:
        folder: that is held.
        lease: this process's.
        file: the lease's, open: one that replaced it is never written to.
        lost: is called in a thread of its own, once, if somebody else has taken over.

    Attributes:
        before: who held it and went without letting go; empty if nobody did.
    """

    def __init__(self, folder: Path, lease: Lease, file: int, before: str, lost: Callable[[str], None]) -> None:
        self.before, self.token = before, lease.token
        self._folder, self._lease, self._file, self._lost = folder, lease, file, lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="raydmd-lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._over.wait(self._lease.seconds / RENEWALS):
            try:
                check_held(self._folder, self._lease.token)
                if not (self._folder / LEASE).exists():  # somebody has tidied up
                    self._anew()
                self._lease = replace(self._lease, beat=self._lease.beat + 1)
                os.pwrite(self._file, self._lease.text().encode(), 0)
                os.fsync(self._file)
            except LeaseLost as error:
                self._lost(str(error))
                return
            except (OSError, InputError):  # a file server that is away: it is as far away for others, and asked again
                continue

    def _anew(self) -> None:
        if (made := _claim(self._folder, self._lease, Verdict.FREE)) is not None:
            os.close(self._file)
            self._file = made

    def close(self) -> None:
        """Let go of the folder."""
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError, LeaseLost):
            check_held(self._folder, self._lease.token)
            (self._folder / LEASE).unlink(missing_ok=True)
        os.close(self._file)


def leave(message: str) -> None:
    """End this process at once: whatever it wrote from now on, it would write into somebody else's run."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(FAILED)


@contextlib.contextmanager
def locked(
    folder: Path,
    *,
    patience: float = 0.0,
    lost: Callable[[str], None] = leave,
    seconds: float = SECONDS,
) -> Iterator[Hold]:
    """Hold the run's folder, so that the same name never runs twice at once on it.

    Args:
        folder: of the run; made if it is not there.
        patience: seconds to wait for another process that holds it.
        lost: is told why if another process has taken the folder over meanwhile; by default this one ends.
        seconds: that the lease runs for without being renewed.

    Raises:
        Held: if another process holds it.
        InputError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise InputError(f"cannot write to output folder {folder}: {error}") from None
    with file:
        hold = _take(folder, file, patience, lost, seconds)
        try:
            yield hold
        finally:
            hold.close()


def read_lease(folder: Path) -> Lease | None:
    """Who says that it holds a folder; ``None`` if nobody does."""
    try:
        return parse((folder / LEASE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def held(folder: Path) -> bool:
    """Whether somebody seems to hold a folder, at one look: good enough to show, and no more."""
    try:
        with (folder / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            reach = _reach(file)
    except BlockingIOError:
        return True
    except OSError:
        return False
    lease = read_lease(folder)
    with contextlib.suppress(OSError):
        age = time.time() - (folder / LEASE).stat().st_mtime
        return lease is not None and lease.lock != reach and age < lease.seconds
    return False


def check_held(folder: Path, token: str) -> None:
    """See that nobody else has taken a folder over.

    Args:
        folder: that is held.
        token: of the holder's lease; empty if there is none to look for.

    Raises:
        LeaseLost: if somebody has.
    """
    now = read_lease(folder)
    if token and now is not None and now.token != token:
        raise LeaseLost(
            f"run '{folder.name}' was taken over by {_who(now)}: this process had been suspended, or cut off from "
            f"{folder}, for so long that its lease was over. It ends here, and the run goes on there"
        )


def _take(folder: Path, file: IO[str], patience: float, lost: Callable[[str], None], seconds: float) -> Hold:
    begun = since = time.monotonic()
    first: Reading | None = None
    looked, told = False, False
    while True:
        alone = _flock(file)
        now = _read(folder, file)
        lease = now.lease if now else None
        reach, processes = _reach(file), _processes()
        if alone is False:
            verdict = Verdict.HELD
        else:
            verdict = judge(
                first if looked else now,
                now,
                watched=time.monotonic() - since,
                lock=reach if alone else None,
                processes=processes,
                alive=lease is not None and _started(lease.pid) == lease.begun,
            )
        if verdict is Verdict.HELD:
            if time.monotonic() - begun >= patience:
                raise Held(_refusal(folder, lease, elsewhere=alone is not False))
            looked = False
        elif verdict is Verdict.WAIT:
            if not told:
                told = True
                limit = lease.seconds if lease else SECONDS
                print(f"run '{folder.name}' was held by {_who(lease)}: is it still? (up to {limit:g} s)", flush=True)
        else:
            own = _own(reach, processes, seconds)
            if (descriptor := _claim(folder, own, verdict)) is not None:
                before = "" if verdict is Verdict.FREE else _who(lease)
                if verdict is Verdict.STALE:
                    print(f"run '{folder.name}' is taken over from {before}, whose lease is over", flush=True)
                return Hold(folder, own, descriptor, before, lost)
            looked = False
        if not looked:
            first, looked, since = now, True, time.monotonic()
        time.sleep(POLL)


def _claim(folder: Path, own: Lease, verdict: Verdict) -> int | None:
    """Put a lease in its place; ``None`` if somebody was faster."""
    path, partial = folder / LEASE, folder / f".{LEASE}-{own.token}"
    descriptor = -1
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.pwrite(descriptor, own.text().encode(), 0)
        os.fsync(descriptor)
        if verdict is Verdict.FREE:
            with contextlib.suppress(OSError):  # there is one now, or the file system has no links
                os.link(partial, path)
        if verdict is not Verdict.FREE or not path.exists():
            partial.replace(path)
        if verdict is Verdict.STALE:
            time.sleep(SETTLE)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        raise InputError(f"cannot write to output folder {folder}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    now = read_lease(folder)
    if now is not None and now.token == own.token:
        return descriptor
    os.close(descriptor)
    return None


def _read(folder: Path, file: IO[str]) -> Reading | None:
    """The lease, and its age against a file that was touched just now."""
    try:
        with (folder / LEASE).open(encoding="utf-8", errors="replace") as found:
            text, written = found.read(), os.fstat(found.fileno()).st_mtime
        os.utime(file.fileno())
        return Reading(text, os.fstat(file.fileno()).st_mtime - written)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {folder / LEASE}: {error}") from None


def _flock(file: IO[str]) -> bool | None:
    """Whether the file could be locked; ``None`` if its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise InputError(f"cannot lock {file.name}: {error}") from None
    return True


def _refusal(folder: Path, lease: Lease | None, *, elsewhere: bool) -> str:
    said = f"run '{folder.name}' is in progress in another process"
    if lease is None:
        return f"{said} ({folder})"
    then = time.strftime("%H:%M:%S", time.localtime(time.time() + lease.seconds))
    hint = f"; if that one is gone, its lease runs out by {then}, and the same command takes over" if elsewhere else ""
    return f"{said}: {_who(lease)} ({folder}){hint}"


def _who(lease: Lease | None) -> str:
    if lease is None:
        return "somebody whose lease can't be read"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lease.since))
    return f"pid {lease.pid} on host {lease.host}, since {since}"


def _own(reach: str, processes: str, seconds: float) -> Lease:
    """This process's lease."""
    return Lease(
        host=socket.gethostname(),
        lock=reach,
        processes=processes,
        pid=os.getpid(),
        begun=_started(os.getpid()),
        token=secrets.token_hex(16),
        since=time.time(),
        seconds=seconds,
    )


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _reach(file: IO[str]) -> str:
    """How far file locks reach for certain: to whoever sees the same file system through the same kernel."""
    return f"{_boot()} {os.fstat(file.fileno()).st_dev}"


def _processes() -> str:
    try:
        return f"{_boot()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{_boot()} {os.getpid()}"  # nobody else's


def _started(pid: int) -> int:
    """When a process began, in ticks since the machine did; 0 if there is none, or a dead one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    state, *fields = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(fields[18])
