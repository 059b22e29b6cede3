"""What runs that are killed have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.pipelines import wan_pipeline

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline and two prompts."""
    home = tmp_path_factory.mktemp("chaos")
    wan_pipeline(home / "model")
    (home / "prompts.txt").write_text("a cat runs\na dog jumps\n")
    return home
