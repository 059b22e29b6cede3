"""What is written and deleted stays in its folder, whatever names are given and wherever links point."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from pyarrow import fs

from raydmd.cli import main
from raydmd.errors import BAD_INPUT, InputError
from raydmd.models.places import locate
from raydmd.pairs.manifest import MANIFEST, Manifest, Origin, PairsError
from raydmd.recipe import Model, Recipe, derive
from raydmd.training.takeover import TAKEN, release
from raydmd.tuning.spec import cluster_folder, read_sweep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.local

OUTSIDE = ["../a", "..", ".", "a/b", "/tmp/a", "", ".hidden", "a\nb", "a\x00b", "~", "-rf", "a" * 200]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_of_runs_sweeps_and_clusters_are_names_of_folders(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        derive(Recipe(), {"name": name})
    with pytest.raises(InputError):
        read_sweep({"name": name, "space": {"seed": [0, 1]}})
    with pytest.raises(InputError, match="--cluster"):
        cluster_folder(tmp_path, name)
    assert cluster_folder(tmp_path, "node-1.example_2") == tmp_path / "clusters" / "node-1.example_2"


def test_a_clusters_name_on_the_command_line_stops_nothing_outside(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    (sweep / "clusters").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit) as end:
        main(["sweep", "stop", str(sweep), "--cluster", "../../run"])
    assert end.value.code == BAD_INPUT
    assert not (tmp_path / "run" / "STOP").exists()


@pytest.mark.parametrize("key", ["prompts", "judge", "reward"])
@pytest.mark.parametrize("name", ["../secret.txt", "/etc/passwd", "a/../../secret.txt"])
def test_a_strangers_pipeline_names_no_files_outside_of_its_folder(key: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "raydmd.json").write_text(json.dumps({key: name}))
    with pytest.raises(InputError, match="not in its folder"):
        locate(Model(path=str(folder)))


def test_a_strangers_pairs_name_no_files_outside_of_their_folder(tmp_path: Path) -> None:
    names = {f: [] if f in ("latent", "boundaries") else 1 for f in Origin.__dataclass_fields__}
    tree = {"format": 0, "origin": names, "shards": [{"file": "../a", "pairs": 1, "size": 1, "sha256": ""}]}
    from raydmd.pairs import manifest

    (tmp_path / MANIFEST).write_text(json.dumps({**tree, "format": manifest.FORMAT}))
    with pytest.raises(PairsError, match="not in its folder"):
        Manifest.read(tmp_path)


def through_arrow(folder: Path) -> None:
    """As Ray Train deletes checkpoints that are no longer kept."""
    fs.LocalFileSystem().delete_dir(str(folder / TAKEN))


@pytest.mark.parametrize("delete", [release, through_arrow], ids=["ours", "Ray Train's"])
def test_what_links_point_to_outlives_the_folder_that_they_are_in(
    delete: Callable[[Path], None], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "a.txt").write_text("mine")
    folder = tmp_path / "run"
    (folder / TAKEN / "cycle-00000001").mkdir(parents=True)
    (folder / TAKEN / "cycle-00000001" / "link").symlink_to(outside)
    (folder / TAKEN / "cycle-00000001" / "file").symlink_to(outside / "deep" / "a.txt")
    delete(folder)
    assert not (folder / TAKEN).exists()
    assert (outside / "deep" / "a.txt").read_text() == "mine"


def test_a_folder_that_is_itself_a_link_is_not_emptied(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / TAKEN).symlink_to(outside)
    release(tmp_path / "run")
    assert (outside / "a.txt").read_text() == "mine"
