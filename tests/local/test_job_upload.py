"""What `ray job submit --working-dir .` would send, as Ray itself packs it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package

pytestmark = pytest.mark.local
ROOT = Path(__file__).parents[2]
SECRET = b"c4n4ry0000"
PLANTED = [
    *(
        ".env",
        "prod.env",
        ".env.local",
        "deploy/.env",
        ".netrc",
        ".pgpass",
        ".git/config",
        ".git-credentials",
        ".envrc",
    ),
    *(
        "id_rsa",
        "keys/id_ed25519",
        "keys/server.pem",
        "keys/server.key",
        "auth_token",
        ".aws/credentials",
        "kubeconfig",
    ),
    *(
        "credentials.json",
        "gcp-credentials-1.json",
        "service-account-7.json",
        "secrets.yaml",
        "my_secret.txt",
        ".ray/x",
    ),
    *(
        "passwords.txt",
        "hf_token.txt",
        ".huggingface/token",
        ".ssh/config",
        ".venv/pyvenv.cfg",
        "mlflow.db",
        "study.db",
    ),
    *(
        "runs/a/recipe.yaml",
        "runs/a/train/cycle-00000004/__0_0.distcp",
        "mlruns/0/meta.yaml",
        "out.log",
        "mlflow.db-wal",
    ),
]
LARGE = ["model.safetensors", "deep/down/weights.bin", "a.pt", "b.ckpt", "data.tar.gz", "clip.mp4", "x.npz"]
SENT = [
    "raydmd/cli.py",
    "experiments/mine.py",
    "prompts.txt",
    "prompts.parquet",
    "recipes/a.yaml",
    "raydmd/models/tokens.py",
]
ZOO = "raydmd/zoo/data/tiny/transformer/diffusion_pytorch_model.safetensors"


def packed(folder: Path, target: Path) -> ZipFile:
    create_package(str(folder), target, include_gitignore=True)
    return ZipFile(target)


def test_secrets_and_large_files_stay_here(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    for name in [*PLANTED, *LARGE, *SENT, ZOO]:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(SECRET if name in PLANTED else b"\0" * (1 << 20) if name in LARGE else b"text")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    with packed(folder, tmp_path / "package.zip") as package:
        names = {n for n in package.namelist() if not n.endswith("/")}
        assert names == {*SENT, ZOO, ".gitignore", ".rayignore"}
        assert not [n for n in names if SECRET in package.read(n)]


def test_this_checkout_is_sent_whole_and_small(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    with packed(ROOT, tmp_path / "package.zip") as package:
        names = {n for n in package.namelist() if not n.endswith("/")}
    needed = {n for n in tracked if n.startswith(("raydmd/", "experiments/", "cluster/")) and (ROOT / n).is_file()}
    assert needed
    assert needed <= names
    assert not [n for n in names if n.startswith((".git/", ".venv/", "runs/"))]
    assert (tmp_path / "package.zip").stat().st_size < 100 << 20
