"""What real samples are called: sidecars, or one file for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from raydmd.data.media import Kind


def read_captions(
    kind: Kind, files: Sequence[Path], counts: Sequence[int], root: Path, listed: Path | None
) -> list[str]:
    """A caption per sample, in the order of files; empty where there is none.

    Args:
        kind: of the files.
        files: of the data.
        counts: samples in each.
        root: folder (or file) that names in a list are relative to.
        listed: a file of lines ``name, tab, caption``; ``None`` reads the ``.txt`` beside each file.

    Raises:
        InputError: naming lines that can't be read or name no file, or sidecars of another length than their latents.
    """
    if listed is not None:
        if kind == "latents":
            raise InputError("method.gan.captions names images or videos; latents take a .txt beside each file")
        return _listed(listed, files, root if root.is_dir() else root.parent)
    found = []
    for file, count in zip(files, counts, strict=True):
        sidecar = file.with_suffix(".txt")
        if not sidecar.is_file():
            found += [""] * count
        elif kind == "latents":
            lines = _text(sidecar).splitlines()
            if len(lines) != count:
                raise InputError(f"method.gan.data: {sidecar} has {len(lines)} lines for {count} samples")
            found += [line.strip() for line in lines]
        else:
            found.append(" ".join(_text(sidecar).split()))
    return found


def _listed(listed: Path, files: Sequence[Path], folder: Path) -> list[str]:
    names = {file.relative_to(folder).as_posix(): i for i, file in enumerate(files)}
    found, bad = [""] * len(files), []
    for number, line in enumerate(_text(listed).splitlines(), start=1):
        name, tab, caption = line.partition("\t")
        if not line.strip():
            continue
        if not tab:
            bad.append(f"line {number} (no tab)")
        elif name.strip() not in names:
            bad.append(f"line {number} (no file {name.strip()!r})")
        else:
            found[names[name.strip()]] = caption.strip()
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InputError(f"method.gan.captions: {listed}: {', '.join(bad[:5])}{more}")
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"caption file {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"caption file {file} is not UTF-8 text: byte {error.start + 1}") from None
