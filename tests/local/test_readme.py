"""What the README shows is what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raydmd.cli_sweep import read
from raydmd.recipe import derive
from raydmd.tuning.checks import check, pinned
from raydmd.tuning.spec import read_sweep

pytestmark = pytest.mark.local

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_its_sweep_is_accepted(tmp_path: Path) -> None:
    [text] = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.S) if "\nspace:" in block]
    file = tmp_path / "ca-dm.yaml"
    file.write_text(text, encoding="utf-8")
    given, base = read(file)
    given["budget"].pop("gpu_hours", None)
    spec = read_sweep(given)
    check(spec, pinned(spec, derive(base, {"output": tmp_path})))
