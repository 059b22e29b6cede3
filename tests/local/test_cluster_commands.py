"""Every command that cluster/ names is one that runs."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from raydmd.recipe import Recipe, combine

pytestmark = pytest.mark.local

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"


def dry_run(words: list[str]) -> str:
    """What a command that is written down says, started as ``--dry-run``; the doctor, which has none, as ``--help``."""
    words = [w.replace("/etc/raydmd/recipe.yaml", "cluster/recipe.yaml").replace("/opt/raydmd/", "") for w in words]
    if "--" in words:  # what is behind 'ray job submit'
        words = words[words.index("--") + 1 :]
    if ">" in words:
        words = words[: words.index(">")]
    return started(tuple(word for word in words if word != "--dry-run"))


@functools.cache
def started(words: tuple[str, ...]) -> str:
    """Many of them are the same command."""
    doctor = words[:2] == ("raydmd", "doctor")
    assert doctor or words[0] == "python"
    start = ["-m", "raydmd"] if doctor else []
    done = subprocess.run(
        [sys.executable, *start, *words[1:], "--help" if doctor else "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if doctor:  # its keys are those of a recipe
        keys = [w for w in words if "=" in w and not w.startswith("-")]
        combine(Recipe(), overrides=keys)
        assert set(words[2:]) - set(keys) <= {"amd-sdxl.yaml", "--address", "HEAD:6379"}, (
            "the file that the command before it writes"
        )
    return done.stdout


def commands() -> dict[str, list[str]]:
    """Every command of raydmd that is written down in cluster/, by where."""
    found: dict[str, list[str]] = {}
    for file in sorted(f for f in CLUSTER.rglob("*") if f.is_file() and f.suffix != ".json"):
        text = file.read_text(encoding="utf-8")
        for line in re.findall(r"^# *(?:runs|Its figures): (.+)$", text, re.M):
            found[f"{file.relative_to(CLUSTER)}: {line}"] = shlex.split(line)
        for line in re.findall(r"^ *entrypoint: (.+)$", text, re.M):
            found[f"{file.relative_to(CLUSTER)}: {line}"] = shlex.split(line)
        if file.suffix == ".md":
            for block in re.findall(r"```bash\n(.*?)```", text, re.S):
                for line in block.replace("\\\n", " ").splitlines():
                    command = line.partition(" #")[0].strip()
                    if re.search(r"(^|-- )(raydmd|python experiments)", command):
                        found[f"{file.relative_to(CLUSTER)}: {command}"] = shlex.split(command)
    return found


def test_every_manifest_names_what_it_runs() -> None:
    named = {where.partition(":")[0] for where in commands()}
    runs = {"kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "launcher/aws.yaml", "launcher/gcp.yaml"}
    assert named >= {*runs, "slurm/raydmd.sbatch", "services/compose.yaml", "README.md"}


@pytest.mark.parametrize("where", commands())
def test_commands_that_are_written_down_run(where: str) -> None:
    dry_run(commands()[where])
