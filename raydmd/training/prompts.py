"""Reading prompt files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def read_prompts(path: Path | None) -> list[str]:
    """One prompt a line; blank lines are left out.

    Raises:
        InputError: if the file is missing, empty, or has lines that are no UTF-8 text (they are named).
    """
    if path is None:
        raise InputError("no prompts: give a text file with --prompts, one prompt a line")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"prompt file {path}: {error.strerror}") from None
    prompts, bad = [], []
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip("\r")
        except UnicodeDecodeError as error:
            bad.append(f"line {number} (byte {error.start + 1}: {line[error.start]:#04x})")
            continue
        if any(ord(c) < 32 and c != "\t" for c in text):
            bad.append(f"line {number} (control character)")
        elif text.strip():
            prompts.append(text.strip())
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InputError(f"prompt file {path} is not UTF-8 text in {', '.join(bad[:5])}{more}")
    if not prompts:
        raise InputError(f"prompt file {path} holds no prompts")
    return prompts
