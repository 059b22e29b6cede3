"""Prompt files of every kind, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import pickle
import re
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet
import pytest

from raydmd.data.prompts import READERS, read_prompts
from raydmd.errors import InputError
from raydmd.models.pictured import Pictured

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.unit
PROMPTS = ["a cat", "ein Hund über", 'said "so, so"']


def test_text(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("a cat\r\n\n  ein Hund über\n".encode())
    assert read_prompts(file) == ["a cat", "ein Hund über"]
    for content, message in (
        (b"", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
        (b"fine\nbad \xff\xfe\n", r"line 2 \(byte 5: 0xff\)"),
        (b"nul\x00here\n", "line 1"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_prompts(file)
    for asked in ({"column": "a"}, {"pictures": True}):
        with pytest.raises(InputError, match=r"has no columns, but .* is asked for; give a table"):
            read_prompts(file, **asked)


@pytest.mark.parametrize("column", [None, "caption", "prompt"])
@pytest.mark.parametrize("ending", READERS)
def test_tables(tmp_path, ending, column):
    """A column by its usual name, the first of them, or by the name that is asked for."""
    write(tmp_path / f"p{ending}", {"id": ["1", "2", "3"], "caption": PROMPTS, "prompt": PROMPTS[::-1]})
    expected = PROMPTS if column == "caption" else PROMPTS[::-1]
    assert read_prompts(str(tmp_path / f"p{ending}"), column=column) == expected
    with pytest.raises(InputError, match=r"no column 'words'; it has id, caption, prompt. Name one with data.column"):
        read_prompts(tmp_path / f"p{ending}", column="words")


def write(file: Path, table: dict[str, list[str]]) -> None:
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(table), file)
    else:
        mark = "\t" if file.suffix == ".tsv" else ","
        lines = [list(table), *(list(row.values()) for row in rows)]
        quoted = [mark.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines]
        file.write_text("\n".join(quoted) + "\n", encoding="utf-8")


def test_odd_line_ends_and_categories_are_no_new_rows(tmp_path):
    odd = ["a cat\u2028sits", "a dog\x0bruns"]
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(odd) + "\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.csv") == odd
    values = pyarrow.array(PROMPTS).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": values}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == PROMPTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"no JSON in line 2 \(Expecting value\)"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', "a mapping is expected in line 2"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', r"bad line 2 \(no text in 'prompt'\)"),
        ("p.jsonl", b"", "holds no prompts"),
        ("p.csv", b"id,name\n1,a\n", "no column prompt, caption or text; it has id, name"),
        ("p.csv", b"prompt\n\xff\n", "not UTF-8 text: byte 8"),
        ("p.parquet", b"not a table", "p.parquet"),
        ("p.yaml", b"- a", r"no reader for '.yaml'; there are readers for .txt, .jsonl, .csv, .tsv, .parquet"),
        ("p", b"a", "no reader for a file without an ending"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("ending", READERS)
def test_prompts_with_pictures(tmp_path, ending):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    file = tmp_path / f"p{ending}"
    write(file, {"prompt": ["a cat", "a cat"], "image": ["a.png", "b.png"]})
    first, second = read_prompts(file, pictures=True)
    assert (first, second) == (Pictured("a cat", tmp_path / "a.png"), Pictured("a cat", tmp_path / "b.png"))
    assert first != second
    assert len({first, second, "a cat"}) == 3
    assert pickle.loads(pickle.dumps(second)) == second
    assert f"{second}" == "a cat"
    assert read_prompts(file) == ["a cat", "a cat"]
    write(file, {"prompt": ["a cat", "a cat"], "image": ["a.png", "c.png"]})
    with pytest.raises(InputError, match=rf"bad (line|row) \d \(no file {re.escape(str(tmp_path / 'c.png'))}\)"):
        read_prompts(file, pictures=True)
    write(file, {"prompt": ["a cat"], "picture": ["a.png"]})
    with pytest.raises(InputError, match="no column 'image' of pictures' files; it has prompt, picture"):
        read_prompts(file, pictures=True)


def test_nothing_and_nowhere(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="--prompts"):
        read_prompts(None)


def test_a_dataset_by_folder_or_id(tmp_path, monkeypatch):
    """The library's own part is one call; it is an extra, so that here it is a stand-in."""
    asked = []

    class Table(list):
        column_names = ("text", "picture")

        def select_columns(self, names: list[str]) -> list[dict[str, str]]:
            assert names == ["text"], "a picture is decoded for its caption"
            return [{name: row[name] for name in names} for row in self]

    def load_dataset(source: str, *, split: str) -> Table:
        asked.append((source, split))
        if split != "train":
            raise ValueError(f"Unknown split {split}")
        return Table({"text": text, "picture": "large"} for text in PROMPTS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("some/prompts") == PROMPTS
    assert read_prompts(tmp_path) == PROMPTS
    assert asked == [("some/prompts", "train"), (str(tmp_path), "train")]
    with pytest.raises(InputError, match="neither a file nor a dataset with split 'eval': ValueError: Unknown split"):
        read_prompts("some/prompts", split="eval")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install datasets"):
        read_prompts("some/prompts")
