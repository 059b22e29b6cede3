"""What makes a pipeline's parts the same as others: digests of their files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.recipe import Model

WHOLE = 64 << 20
"""Files up to so many bytes are read whole."""
BLOCK, BLOCKS = 1 << 16, 512
SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")


def fingerprint(settings: Model, parts: Sequence[str]) -> dict[str, str]:
    """Digests of the files of a pipeline's parts.

    A large file is known by its size and by blocks from its start to its end, evenly spaced: training moves all of
    a weight file, and reading tens of gigabytes would hold up every start. A ``config.json`` is known by its
    settings, without what diffusers notes there about itself.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        parts: folders of the pipeline, e.g. ``transformer``.

    Returns:
        File, relative to the pipeline, to digest.

    Raises:
        InputError: if a part has no files, or one cannot be read.
    """
    root = Path(settings.path)
    if not root.is_dir():
        root = _snapshot(settings, parts)
    found: dict[str, str] = {}
    for part in parts:
        files = sorted(f for f in (root / part).rglob("*") if f.is_file() and f.suffix in SUFFIXES)
        if not files:
            raise InputError(f"model {settings.path!r} has no files in {part}")
        try:
            found |= {f.relative_to(root).as_posix(): digest(f) for f in files}
            if part in settings.lora:
                found[f"{part}, LoRA"] = digest(Path(settings.lora[part]))
        except (OSError, ValueError) as error:
            raise InputError(f"model {settings.path!r}, part {part}: {error}") from None
    return found


def changes_of(settings: Model, parts: Sequence[str]) -> dict[str, int]:
    """When the weight files of a pipeline's parts were last written, in nanoseconds, by file."""
    root = Path(settings.path)
    if not root.is_dir():
        root = _snapshot(settings, parts)
    files = (f for part in parts for f in (root / part).rglob("*") if f.is_file() and f.suffix in SUFFIXES)
    return {f.relative_to(root).as_posix(): f.stat().st_mtime_ns for f in sorted(files)}


def digest(file: Path) -> str:
    """What a file is known by; see :func:`fingerprint`.

    Raises:
        OSError: if it cannot be read.
    """
    if file.name == "config.json":
        kept = {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if not k.startswith("_")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            for k in range(BLOCKS):
                stream.seek(k * (size - BLOCK) // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:32]


def _snapshot(settings: Model, parts: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            settings.path, revision=settings.revision, allow_patterns=[f"{part}/*" for part in parts]
        )
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean the same here
        raise InputError(
            f"model {settings.path!r} is no folder, and the hub does not give it: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    return Path(folder)
