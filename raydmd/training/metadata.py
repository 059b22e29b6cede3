"""Reading a checkpoint's ``.metadata`` so that nothing in it is run: PyTorch writes it as a pickle, and reads it so.

A pickle may call anything. This one may name the few classes that a table of tensors is made of, and no other; entries
that PyTorch would go on to unpickle without a limit, which it has for what is no tensor, are refused as well.
"""

from __future__ import annotations

import pickle
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader

from raydmd.errors import DamagedCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

FILE = ".metadata"
TABLE = (
    "Metadata",
    "MetadataIndex",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
)
"""Of PyTorch's module of that name."""
PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path", "PurePath")


class Reader(FileSystemReader):
    """Reads checkpoints whose metadata may be anybody's."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """See :class:`torch.distributed.checkpoint.StorageReader`."""
        del args, kwargs  # the rank, where each has metadata of its own
        found = read_metadata(cast("Path", self.path))
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def read_metadata(folder: Path) -> metadata.Metadata:
    """A checkpoint's table of tensors.

    Args:
        folder: of the checkpoint.

    Raises:
        DamagedCheckpoint: if it is no such table, or names what none of ours does.
        OSError: if it can't be read now, which is the disk's fault and not the checkpoint's.
    """
    try:
        with (folder / FILE).open("rb") as file:
            found = _Limited(file).load()
    except OSError:
        raise
    except Exception as error:  # whatever a pickle's reading raises
        raise DamagedCheckpoint(f"checkpoint {folder.name} is damaged: its {FILE} can't be read: {error}") from None
    if wrong := _wrong(found):
        raise DamagedCheckpoint(f"checkpoint {folder.name} is damaged: its {FILE} {wrong}")
    return cast("metadata.Metadata", found)


class _Limited(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == metadata.__name__ and name in TABLE:
            return getattr(metadata, name)
        if (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11 writes an enumeration's members
            return _member
        if module in ("pathlib", "pathlib._local") and name in PATHS:
            return _path  # not the class: a pickle may set what it was given
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of tensors does")


def _path(*parts: str) -> PurePath:
    return PurePath(*parts)


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"it holds tensors of layout {name!r}")
    return torch.strided


def _member(kind: object, name: str) -> Any:
    if kind is not metadata._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("it looks for parts of what is no table of tensors")
    return metadata._MEM_FORMAT_ENCODING[name]


def _wrong(found: Any) -> str:
    if not isinstance(found, metadata.Metadata):
        return "holds no table of tensors"
    entries = found.state_dict_metadata
    if not isinstance(entries, dict) or not all(
        isinstance(v, metadata.TensorStorageMetadata) for v in entries.values()
    ):
        return "holds more than tensors"
    places = found.storage_data
    if not isinstance(places, dict) or not all(isinstance(v, filesystem._StorageInfo) for v in places.values()):
        return "does not say where its tensors are"
    names = {v.relative_path for v in places.values()}
    if odd := sorted(str(n) for n in names if not isinstance(n, str) or n in ("", ".", "..") or "/" in n or "\\" in n):
        return f"names files that are not in its folder, e.g. {odd[0]!r}"
    return ""
