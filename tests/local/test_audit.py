"""`.ci/audit`, with services that answer as we tell them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.local
AUDIT = Path(__file__).parents[2] / ".ci" / "audit"
FAKE = """
import json, os, sys
argv = dict(zip(sys.argv[1:], sys.argv[2:]))
with open(os.environ["ASKED"], "a") as log:
    log.write(argv["--vulnerability-service"] + " ")
if argv["--vulnerability-service"] not in os.environ["ANSWERS"].split():
    sys.exit("no network")
bad = os.environ["BAD"].split()
found = []
for line in open(argv["--requirement"]):
    name, version = line.strip().split("==")
    if name == "unknown":
        found.append({"name": name, "skip_reason": "not found"})
    else:
        vulns = [{"id": "CVE-1", "fix_versions": ["9.9"], "aliases": []}] if line.strip() in bad else []
        found.append({"name": name, "version": version, "vulns": vulns})
print(json.dumps({"dependencies": found, "fixes": []}))
"""
KNOWN = "requests==2.19.0"


def audited(folder: Path, *, answers: str, bad: str = KNOWN, **env: str) -> tuple[int, str]:
    (folder / ".ci").mkdir(exist_ok=True)
    (folder / ".venv").mkdir(exist_ok=True)
    shutil.copy(AUDIT, folder / ".ci" / "audit")
    (folder / "constraints.txt").write_text("# pins\na==1.0\nb==2.0\nunknown==3.0\n")
    (folder / "pip_audit.py").write_text(FAKE)
    done = subprocess.run(
        [sys.executable, str(folder / ".ci" / "audit")],
        env=os.environ
        | {"PYTHONPATH": str(folder), "ANSWERS": answers, "BAD": bad, "ASKED": str(folder / "asked")}
        | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


def test_a_known_vulnerability_fails(tmp_path: Path) -> None:
    code, said = audited(tmp_path, answers="pypi osv", bad=f"{KNOWN} b==2.0")
    assert code == 1
    assert "b 2.0: CVE-1, fixed in 9.9" in said
    assert "1 known of 2 tested versions (pypi)" in said


def test_none_passes_names_what_was_not_looked_at_and_is_not_asked_again_today(tmp_path: Path) -> None:
    code, said = audited(tmp_path, answers="osv")
    assert (code, "0 known of 2 tested versions (osv)" in said, "unknown to osv: unknown" in said) == (0, True, True)
    asked = (tmp_path / "asked").read_text()
    assert audited(tmp_path, answers="")[0] == 0
    assert (tmp_path / "asked").read_text() == asked


@pytest.mark.parametrize(("answers", "bad"), [("", KNOWN), ("pypi osv", "")], ids=["no network", "knows nothing"])
def test_who_does_not_answer_has_not_said_that_all_is_well(tmp_path: Path, answers: str, bad: str) -> None:
    code, said = audited(tmp_path, answers=answers, bad=bad)
    assert code == 0
    assert "NOT CHECKED" in said
    assert "none known" not in said
    assert "0 known" not in said
    assert audited(tmp_path, answers=answers, bad=bad, RAYDMD_AUDIT="required")[0] == 1
