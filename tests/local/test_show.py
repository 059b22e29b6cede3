"""``raydmd sample``: what it refuses. What it shows is held against stock pipelines in test_families.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from raydmd.cli import main
from raydmd.errors import BAD_INPUT, InputError
from raydmd.recipe import Recipe
from raydmd.training.show import show

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.local


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r"is no run: it has no recipe.yaml"):
        show(tmp_path, [], count=1, seeds=[0], output=None)
    with pytest.raises(SystemExit) as exit_:
        main(["sample", str(tmp_path / "absent")])
    assert exit_.value.code == BAD_INPUT
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("named", ["", "pipeline"])
def test_a_run_that_is_not_trained_is_refused(tmp_path: Path, named: str):
    (tmp_path / "recipe.yaml").write_text(Recipe().to_yaml())
    (tmp_path / "pipeline").mkdir()
    with pytest.raises(InputError, match="is not trained to its end; its own command resumes it"):
        show(tmp_path / named, [], count=1, seeds=[0], output=None)
