"""What a checkpoint's files must be, written down by who wrote them, so that a damaged one is never loaded as good.

Each rank lists its own files with their sizes and SHA-256 sums once they are complete. A checkpoint is whole if the
list of every rank that wrote it is there, and every file is what its list says.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from raydmd.errors import DamagedCheckpoint
from raydmd.training.metadata import FILE as METADATA
from raydmd.training.metadata import read_metadata

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = "manifest-{:05d}.json"
FIRST = NAME.format(0)


def seal(folder: Path, *, rank: int = 0, world: int = 1, stamp: str = "") -> None:
    """List the files that this rank has put into a checkpoint's folder; the last thing it writes.

    Args:
        folder: of this rank's files, or of all ranks'.
        rank: of this process.
        world: how many ranks write.
        stamp: of those who write together, and of nobody else: others who died over it may have left files.
    """
    own = (f for f in folder.rglob("*") if f.is_file() and not _is_list(f) and _writer(f) == rank)
    names = sorted(f.relative_to(folder).as_posix() for f in own)
    files = {name: _facts(folder / name) for name in names}
    # Without a line's end: whatever is cut off, it no longer is JSON.
    (folder / NAME.format(rank)).write_text(
        json.dumps({"world": world, "stamp": stamp, "files": files}), encoding="utf-8"
    )


def reseal(folder: Path, name: str) -> None:
    """Put a file that was changed on purpose, in a copy of a checkpoint, into its list anew."""
    for path in folder.glob(NAME.replace("{:05d}", "*")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if name in found["files"]:
            found["files"][name] = _facts(folder / name)
            path.unlink()  # it may be a hard link to the original's
            path.write_text(json.dumps(found), encoding="utf-8")


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint; empty if it is whole.

    Args:
        folder: of all ranks' files.
        part: which share of the files to read, where several processes look at one checkpoint.
        parts: how many shares there are.
    """
    first = _listed(folder, 0)
    if isinstance(first, str):
        return first
    listed = set[str]()
    for rank in range(first["world"]):
        found = first if rank == 0 else _listed(folder, rank)
        if isinstance(found, str):
            return found
        if found["stamp"] != first["stamp"]:
            return f"{NAME.format(rank)} is of another writing than {NAME.format(0)}"
        listed.update(found["files"])
        if rank % parts != part:
            continue
        for name, expected in found["files"].items():
            if wrong := _wrong(folder / name, expected):
                return f"{name} {wrong}"
    if METADATA not in listed:
        return f"{METADATA} is in no list"
    try:  # what it names must be in a list: a rank's may be of an emptied folder
        missing = sorted({place.relative_path for place in read_metadata(folder).storage_data.values()} - listed)
    except DamagedCheckpoint as error:
        return str(error)
    except OSError as error:
        return f"{METADATA} can't be read: {error}"
    return f"{missing[0]} is in no list" if missing else ""


def unfinished(folder_has: Callable[[str], bytes]) -> bool:
    """Whether a checkpoint's writing has not come to its end: some rank's list is not there.

    Args:
        folder_has: the bytes of a file of it, empty if it is not there.
    """
    try:
        world = int(json.loads(folder_has(FIRST))["world"])
    except (ValueError, KeyError, TypeError):
        return True
    return not all(folder_has(NAME.format(rank)) for rank in range(1, world))


def _listed(folder: Path, rank: int) -> dict[str, Any] | str:
    path = folder / NAME.format(rank)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if (
            isinstance(found["stamp"], str)
            and int(found["world"]) > rank
            and all({"bytes", "sha256"} <= f.keys() for f in found["files"].values())
        ):
            return dict(found)
    except OSError:
        return f"{path.name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return f"{path.name} can't be read"


def _wrong(path: Path, expected: dict[str, Any]) -> str:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size} bytes of {expected['bytes']}"
        return "" if _sum(path) == expected["sha256"] else "is not what was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read: {error}"


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sum(path)}


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _writer(path: Path) -> int:
    """The rank that writes a file of this name: of tensors each rank its own, everything else the first."""
    found = re.fullmatch(r"__(\d+)_\d+\.distcp", path.name)
    return int(found[1]) if found else 0


def _is_list(path: Path) -> bool:
    return path.match(NAME.replace("{:05d}", "*"))
