"""Reading prompts: text, JSONL, CSV, TSV, Parquet, or a dataset of the ``datasets`` library."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydmd.errors import InputError
from raydmd.models.pictured import Pictured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

COLUMNS = ("prompt", "caption", "text")
"""Names that a column of prompts is known by, the first that is there."""
PICTURE = "image"
"""The name of a column of pictures' files."""
SHOWN = 5
"""How many bad lines a message names."""


@dataclass(frozen=True)
class Table:
    """What a reader found.

    Attributes:
        source: for messages.
        columns: there are.
        read: number and values of each row, by column, of given columns.
        unit: what a row is called.
        folder: that files named in it are relative to.
    """

    source: object
    columns: Sequence[str]
    read: Callable[[Sequence[str]], Iterable[tuple[int, Mapping[str, Any]]]]
    unit: str
    folder: Path


def read_prompts(
    source: str | Path | None, *, column: str | None = None, split: str = "train", pictures: bool = False
) -> list[str]:
    """Prompts in their order; empty ones are left out.

    Args:
        source: a file, by its ending: ``.txt`` (one prompt a line), ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``; a
            folder or hub id is a dataset's.
        column: which column of a table; default: the first of :data:`COLUMNS` that it has.
        split: of a dataset.
        pictures: each prompt has a picture, whose file is named in the column :data:`PICTURE`, relative to the table.

    Raises:
        InputError: if it is missing, holds no prompts, or has lines that cannot be read (they are named); if no reader
            is known for a file, or a library is missing.
    """
    if source is None:
        raise InputError("no prompts: give a file with --prompts, e.g. a text file with one prompt a line")
    path = Path(source)
    if path.is_dir() or (not path.exists() and not path.suffix and str(source).count("/") == 1):
        prompts = _chosen(_dataset(str(source), split), column, pictures)
    elif path.suffix.lower() == ".txt":
        if column is not None or pictures:
            asked = f"data.column={column!r}" if column else f"pictures, in a column {PICTURE!r}"
            raise InputError(f"prompt file {path} has no columns, but {asked} is asked for; give a table")
        prompts = _lines(path)
    else:
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            ending = repr(path.suffix) if path.suffix else "a file without an ending"
            raise InputError(
                f"prompt file {path}: no reader for {ending}; there are readers for .txt, {', '.join(READERS)}, and "
                "for datasets by folder or hub id"
            )
        try:
            prompts = _chosen(reader(path), column, pictures)
        except OSError as error:
            raise InputError(f"prompt file {path}: {error.strerror or error}") from None
    if not prompts:
        raise InputError(f"prompt file {path} holds no prompts")
    return prompts


def _lines(path: Path) -> list[str]:
    prompts, bad = [], []
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"prompt file {path}: {error.strerror}") from None
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
        raise InputError(f"prompt file {path} is not UTF-8 text in {_first(bad)}")
    return prompts


def _json_lines(path: Path) -> Table:
    rows, bad = [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                bad.append(f"line {number} ({error.msg})")
    if bad:
        raise InputError(f"prompt file {path} is no JSON in {_first(bad)}")
    if bad := [f"line {number}" for number, row in rows if not isinstance(row, dict)]:
        raise InputError(f"prompt file {path} holds no table: a mapping is expected in {_first(bad)}")
    return Table(path, list(rows[0][1]) if rows else COLUMNS, lambda _: rows, "line", path.parent)


def _csv(path: Path) -> Table:
    table = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        rows = [(table.line_num, row) for row in table]
    except csv.Error as error:
        raise InputError(f"prompt file {path}, line {table.line_num}: {error}") from None
    return Table(path, table.fieldnames or COLUMNS, lambda _: rows, "line", path.parent)


def _parquet(path: Path) -> Table:
    import pyarrow.parquet  # comes with Ray, and nothing else here needs it

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
    except pyarrow.ArrowException as error:
        raise InputError(f"prompt file {path}: {error}") from None

    def read(names: Sequence[str]) -> Iterable[tuple[int, Mapping[str, Any]]]:
        try:
            return enumerate(pyarrow.parquet.read_table(path, columns=list(names)).to_pylist(), start=1)
        except pyarrow.ArrowException as error:
            raise InputError(f"prompt file {path}: {error}") from None

    return Table(path, columns, read, "row", path.parent)


def _dataset(source: str, split: str) -> Table:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"prompts {source!r} are no file, and a dataset needs a library: pip install datasets"
        ) from None
    try:
        table = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises a dozen unrelated types; all mean the same here
        raise InputError(
            f"prompts {source!r} are neither a file nor a dataset with split {split!r}: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    # The chosen columns alone: a row of pictures would be decoded for its caption.
    return Table(
        source,
        table.column_names,
        lambda names: enumerate(table.select_columns(list(names)), start=1),
        "row",
        Path(source),
    )


READERS: dict[str, Callable[[Path], Table]] = {".jsonl": _json_lines, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
"""Of tables, by a file's ending."""


def _chosen(table: Table, column: str | None, pictures: bool) -> list[str]:
    """A table's prompts, with their pictures where they have some."""
    name = next((c for c in (COLUMNS if column is None else (column,)) if c in table.columns), None)
    asked = f"column {column!r}" if column else f"column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
    there = ", ".join(map(str, table.columns)) or "none"
    if name is None:
        raise InputError(f"prompts {table.source}: no {asked}; it has {there}. Name one with data.column")
    if pictures and PICTURE not in table.columns:
        raise InputError(f"prompts {table.source}: no column {PICTURE!r} of pictures' files; it has {there}")
    found: list[str] = []
    bad = []
    for number, row in table.read([name, PICTURE] if pictures else [name]):
        text, picture = row.get(name), row.get(PICTURE)
        where = f"{table.unit} {number}"
        if not isinstance(text, str):
            bad.append(f"{where} (no text in {name!r})")
        elif pictures and not (isinstance(picture, str) and (table.folder / picture).is_file()):
            bad.append(
                f"{where} (no file {table.folder / picture})"
                if isinstance(picture, str)
                else f"{where} (no file's name)"
            )
        elif text.strip():
            whole = " ".join(text.split("\n")).strip()
            found.append(Pictured(whole, (table.folder / str(picture)).absolute()) if pictures else whole)
    if bad:
        raise InputError(f"prompts {table.source}: bad {_first(bad)}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} is not UTF-8 text: byte {error.start + 1}") from None


def _first(bad: Sequence[str]) -> str:
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return f"{', '.join(bad[:SHOWN])}{more}"
