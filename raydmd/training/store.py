"""Where a run's checkpoints are: in its folder, or in object storage that all nodes reach.

Ray Train keeps the last ones under a name of its own in the store's root (:func:`experiment`), those that are to stay
longer lie beside it under :data:`KEPT`. On disks they are written where they stay, otherwise in a temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import shutil
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
from pyarrow import fs as arrow

from raydmd.errors import InputError, RunFailed
from raydmd.files import replace
from raydmd.training.events import read_lines
from raydmd.training.manifest import FIRST
from raydmd.training.restarts import FALLBACK

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAIN, KEPT = "train", "kept"
PARTIAL = ".partial"
BOOKS = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that it keeps."""
MARK = "storage.id"
"""File of a run's folder with the name of its own in object storage, where other runs may be called like it."""
CHUNK = 64 * 1024 * 1024
SPARE = 16 * 1024 * 1024
PAUSES = (1.0, 4.0, 15.0)
"""Seconds after which object storage that has refused files is given them again."""
SEEN_WITHIN = 90
"""Seconds within which all nodes must see what one has put into the run's folder; NFS may take 60."""
PATIENCE = 60.0
"""Seconds within which object storage must answer a first question."""


@dataclass(frozen=True)
class Store:
    """A run's checkpoints.

    Attributes:
        files: the file system.
        root: path in it.
        experiment: what Ray Train calls what it keeps now.
    """

    files: arrow.FileSystem
    root: str
    experiment: str = TRAIN

    @classmethod
    def of(cls, folder: Path, storage: str | None) -> Store:
        """The store of the run in ``folder``, whose recipe's ``checkpoints.storage`` is this.

        Raises:
            InputError: if there is no such kind of storage, or the run's name in it is lost.
        """
        if storage is None:
            return cls(arrow.LocalFileSystem(), str(folder), experiment(folder))
        files, base = resolve(storage)
        mark = folder / MARK
        if not mark.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            replace(mark, f"{folder.name}-{uuid.uuid4().hex[:12]}")
        own = mark.read_text(encoding="utf-8").strip()
        if not own:
            raise InputError(f"{mark} is empty: write into it what this run's folder in {storage} is called")
        return cls(files, f"{base}/{own}", experiment(folder))

    @property
    def local(self) -> bool:
        """Whether it is a disk, of this machine or of a file server."""
        return isinstance(self.files, arrow.LocalFileSystem)

    def path(self, name: str, place: str | None = None) -> str:
        """Where a checkpoint is in the file system, in Ray Train's place unless another is given."""
        return posixpath.join(self.root, place or self.experiment, name)

    def names(self, place: str | None = None) -> list[str]:
        """Checkpoints that are there, whole or not, in the order of writing."""
        found = self.files.get_file_info(arrow.FileSelector(self.path("", place), allow_not_found=True))
        names = (f.base_name for f in found if f.type == arrow.FileType.Directory)
        return sorted(n for n in names if n.startswith("cycle-") and not n.endswith(PARTIAL))

    def places(self) -> list[str]:
        """All that hold checkpoints of this run, whatever happened to it."""
        found = self.files.get_file_info(arrow.FileSelector(self.root, allow_not_found=True))
        folders = (f.base_name for f in found if f.type == arrow.FileType.Directory)
        return sorted(n for n in folders if n in (KEPT, TRAIN) or n.startswith(f"{TRAIN}-"))

    def books(self) -> dict[str, Any]:
        """Ray Train's list of what it keeps; empty before the first.

        Raises:
            OSError: or ValueError, if it can't be read.
        """
        path = self.path(BOOKS)
        if self.files.get_file_info(path).type == arrow.FileType.NotFound:
            return {}
        with self.files.open_input_stream(path) as stream:
            return dict(json.loads(stream.read()))

    @contextlib.contextmanager
    def at(self, name: str, place: str | None = None, *, only: str = "") -> Iterator[Path]:
        """A checkpoint as a folder of this machine; a copy that goes again where it is not on a disk.

        Args:
            name: of the checkpoint.
            place: where it is, if not in Ray Train's.
            only: the one folder in it that is needed.

        Yields:
            The checkpoint's folder.

        Raises:
            OSError: if it can't be fetched.
        """
        path = self.path(name, place)
        if self.local:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="raydmd-") as copy:
            target = Path(copy) / only
            target.mkdir(exist_ok=True)
            arrow.copy_files(posixpath.join(path, only), str(target), source_filesystem=self.files, chunk_size=CHUNK)
            yield Path(copy)

    def send(self, folder: Path, name: str) -> None:
        """Put a folder's files into a checkpoint of object storage; what is busy is asked again.

        Raises:
            OSError: if that fails.
        """
        # By one thread: https://github.com/apache/arrow/issues/32372
        to = {"destination_filesystem": self.files, "chunk_size": CHUNK, "use_threads": False}
        for pause in (*PAUSES, None):
            try:
                arrow.copy_files(str(folder), self.path(name), **to)
                return
            except OSError:
                if pause is None:
                    raise
                time.sleep(pause)

    def keep(self, name: str) -> None:
        """Let a checkpoint stay when Ray Train deletes its own: by hard links or the storage's own copies.

        It takes the place of another writing of the same one.

        Raises:
            OSError: if that fails.
        """
        target, partial = self.path(name, KEPT), self.path(name + PARTIAL, KEPT)
        with contextlib.suppress(FileNotFoundError):
            self.files.delete_dir(partial)
        if self.local:
            link_tree(Path(self.path(name)), Path(partial))
            self.drop(name)
            Path(partial).rename(target)
            return
        self.drop(name)
        base = self.path(name)
        found = self.files.get_file_info(arrow.FileSelector(base, recursive=True))
        # A checkpoint without its first list counts for nothing, so that comes last.
        for info in sorted((f for f in found if f.is_file), key=lambda f: f.base_name == FIRST):
            copy = posixpath.join(target, posixpath.relpath(info.path, base))
            try:
                self.files.copy_file(info.path, copy)
            except OSError:  # S3 itself copies up to 5 GiB
                both = {"source_filesystem": self.files, "destination_filesystem": self.files}
                arrow.copy_files(info.path, copy, **both, chunk_size=CHUNK, use_threads=False)

    def first_list(self, name: str, place: str | None = None) -> bytes:
        """What tells one writing of a checkpoint from another; empty if it is not there, or only begun.

        Raises:
            OSError: if that can't be told.
        """
        return self.read(name, FIRST, place)

    def read(self, name: str, file: str, place: str | None = None) -> bytes:
        """A file of a checkpoint; empty if it is not there.

        Raises:
            OSError: if that can't be told.
        """
        path = posixpath.join(self.path(name, place), file)
        if self.files.get_file_info(path).type == arrow.FileType.NotFound:
            return b""
        with self.files.open_input_stream(path) as stream:
            return bytes(stream.read())

    def drop(self, name: str, place: str = KEPT) -> None:
        """Delete a checkpoint; of those that are kept, unless another place is given."""
        with contextlib.suppress(FileNotFoundError):
            self.files.delete_dir(self.path(name, place))


def experiment(folder: Path) -> str:
    """Ray Train's name of what it keeps of the run in ``folder``: another one after each fall back.

    It takes the newest checkpoint that its books name, and none else; so what has a damaged one is left as it is.
    """
    falls = sum(e["event"] == FALLBACK for e in read_lines(folder / "events.jsonl"))
    return f"{TRAIN}-{falls + 1}" if falls else TRAIN


def resolve(storage: str) -> tuple[arrow.FileSystem, str]:
    """A file system and a path in it, of an address such as ``s3://bucket/folder``.

    Raises:
        InputError: for one that nothing here understands.
    """
    try:
        try:
            files, base = arrow.FileSystem.from_uri(storage)
        except pyarrow.ArrowInvalid:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            found, base = url_to_fs(storage)
            files = arrow.PyFileSystem(arrow.FSSpecHandler(found))
    except Exception as error:
        raise InputError(f"checkpoints.storage={storage}: {error}") from None
    return files, base.rstrip("/")


def check_storage(storage: str | None) -> None:
    """See that object storage can be written to and read from here.

    Raises:
        InputError: if it can't, or does not answer.
    """
    if storage is None:
        return
    files, base = resolve(storage)
    probe = f"{base}/.raydmd-{uuid.uuid4().hex}"

    def ask() -> None:
        with files.open_output_stream(probe) as stream:
            stream.write(b"raydmd")
        with files.open_input_stream(probe) as stream:
            assert stream.read() == b"raydmd"
        files.delete_file(probe)

    pool = ThreadPoolExecutor(1, thread_name_prefix="raydmd-storage")
    try:
        pool.submit(ask).result(PATIENCE)
    except Late:
        raise InputError(f"checkpoints.storage={storage} did not answer within {PATIENCE:g} s") from None
    except Exception as error:
        raise InputError(
            f"checkpoints.storage={storage} can't be written to: {str(error).partition(' (Req')[0]}. Credentials "
            "and endpoint (AWS_ENDPOINT_URL) are those of the environment, on every node"
        ) from None
    finally:
        pool.shutdown(wait=False)


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder's files, by hard links where the file system has them: checkpoints are never written to again.

    Raises:
        OSError: if a file can't be copied.
    """
    target.mkdir(parents=True)
    for file in sorted(source.rglob("*")):
        copy = target / file.relative_to(source)
        if file.is_dir():
            copy.mkdir(exist_ok=True)
            continue
        try:
            os.link(file, copy)
        except OSError:  # another file system, or one without links; a full disk is met again here
            shutil.copy2(file, copy)


def check_space(name: str, size: int, folder: Path) -> None:
    """See that a checkpoint fits on a disk, with some to spare for what is beside its tensors.

    Args:
        name: of the checkpoint.
        size: its bytes.
        folder: on the disk; it need not be there yet.

    Raises:
        RunFailed: before anything is written.
    """
    while not folder.exists():
        folder = folder.parent
    free, asked = shutil.disk_usage(folder).free, size + size // 20 + SPARE
    if free < asked:
        raise RunFailed(
            f"checkpoint {name} needs {asked / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free: make room, "
            "or let fewer stay (checkpoints.keep, checkpoints.keep_every). The one before is whole"
        )
