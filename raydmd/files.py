"""Files that are whole or not there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def replace(file: Path, text: str) -> None:
    """Write a file anew: under its name there is the old one or the new one, and links to the old one keep it.

    Args:
        file: to write, in UTF-8.
        text: all of it.

    Raises:
        OSError: if it can't be written; then the old one is still there.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
