"""Every command of the pages is one that works: looked at here, or run for real by a test that is named.

A block of `bash` that needs more than this machine says so in its first line: ``# needs a cluster``.
"""

from __future__ import annotations

import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml
from typer.core import TyperCommand

from raydmd.cli import main
from raydmd.cli_sweep import read
from raydmd.recipe import Recipe, derive
from raydmd.tuning.checks import check, pinned
from raydmd.tuning.spec import read_sweep
from tests.pages import ROOT, Block, blocks, reference, spans

pytestmark = pytest.mark.local

NEEDS = ("# needs a GPU", "# needs a cluster", "# takes the ")
"""First words of blocks whose commands can't be run here: they need more, or take what the reader is making. What of
raydmd is in the former must be right all the same."""
RUN_BY = {
    "raydmd compare": ("tests/local/test_compare.py", 'main(["compare"'),
    "raydmd pairs": ("tests/unit/test_cli.py", 'call(main, "pairs"'),
    "raydmd plan": ("tests/unit/test_plan.py", 'main(["plan"'),
    "raydmd sample": ("tests/local/test_show.py", 'main(["sample"'),
    "raydmd track": ("tests/local/test_tracking.py", "send("),
    "raydmd sweep run": ("tests/chaos/test_two_clusters.py", '"run", "s.yaml", "--cluster"'),
    "raydmd sweep stop": ("tests/local/test_paths.py", 'main(["sweep", "stop"'),
    "raydmd sweep status": ("tests/ray/test_sweep.py", '"status"'),
    "raydmd top": ("tests/ray/test_access.py", '"top", "--once"'),
    "ray start": ("tests/sites.py", '"start"'),
    "ray job": ("tests/chaos/test_job.py", '"job", "submit"'),
    "ray get-auth-token": ("tests/chaos/test_job.py", '"get-auth-token", "--generate"'),
    "ray up": ("tests/local/test_manifests.py", "def test_rays_launcher_takes_it"),
    "ray down": ("tests/local/test_manifests.py", "def test_rays_launcher_takes_it"),
    "ray dashboard": ("tests/local/test_manifests.py", "def test_rays_launcher_takes_it"),
    "raydmd doctor": ("tests/chaos/test_services.py", '"doctor"'),
    "kubectl": ("tests/local/test_manifests.py", "kubernetes_validate"),
    "docker build": ("tests/local/test_manifests.py", "hadolint"),
    "docker compose": ("tests/chaos/test_services.py", "compose.yaml"),
    "sbatch": ("tests/local/test_manifests.py", "slurm/raydmd.sbatch"),
    "mlflow ui": ("tests/tracking_server.py", '"mlflow", "server"'),  # the same command's longer name
    "pytest": (".ci/run", "make test"),
    "python docs/gallery/": ("docs/make_screenshots.py", "GALLERY"),
}
"""What runs the commands that are not started here: a file, and words in it."""
COMMANDS = reference()[ROOT / "docs" / "reference" / "commands.md"]
SHELL = ("source", "export", "cd", "cp")


def commands(block: Block) -> list[list[str]]:
    """A block's commands as words, several of a line apart; without comments, variables and where output goes."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if set(word) <= set("&;|"):
                words = words[: words.index(">")] if ">" in words else words
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


def marked(block: Block) -> bool:
    """Whether it says that it needs more than this machine."""
    return block.text.startswith(NEEDS)


def said(words: list[str]) -> str:
    """What ``raydmd WORDS`` prints; it must end well."""
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code, (words, out.getvalue())
    return out.getvalue()


def dry(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at a script's command."""
    script = ROOT / words[0]
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:], *(["--dry-run"] if "--dry-run" not in words else [])])
    monkeypatch.syspath_prepend(str(script.parent))
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code, (words, out.getvalue())
    assert "training" in yaml.safe_load(out.getvalue().split("\nok:")[0])


def parsed(words: list[str]) -> None:
    """See that a command would take these words, without running it."""
    reached: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TyperCommand, "invoke", lambda self, _: reached.append(self.name))
        with pytest.raises(SystemExit) as end:
            main(words)
    assert not end.value.code, words
    assert len(reached) == 1, f"nothing was reached by {words}"


def look(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """See that a command is one that works."""
    match words:
        case ["ray", "job", "submit", *rest]:
            named("ray job")
            look(rest[rest.index("--") + 1 :], monkeypatch)
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            assert set(t for t in targets if "=" not in t) <= set(known), words
        case ["raydmd", "recipe", *rest]:
            assert yaml.safe_load(said(["recipe", *rest]))
        case ["raydmd", "run", *rest]:
            assert yaml.safe_load(said(["run", *rest, *(["--dry-run"] if "--dry-run" not in rest else [])]))
        case ["raydmd", *rest]:
            named(" ".join(words[: 3 if words[1] == "sweep" else 2]))
            parsed(rest)
        case ["python", script, *rest] if script.startswith("experiments/"):
            dry([script, *rest], monkeypatch)
        case ["python", "-m", module, *_]:
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or (ROOT / module.replace(".", "/")).is_dir()
        case ["python", script, *_]:
            assert (ROOT / script).is_file(), words
            if script.startswith("docs/gallery/"):
                named("python docs/gallery/")
                assert Path(script).name in (ROOT / "docs" / "make_screenshots.py").read_text(encoding="utf-8")
        case [shell, *_] if shell in SHELL:
            pass
        case _:
            named(next(k for k in (" ".join(words[:2]), words[0]) if k in RUN_BY))


def named(command: str) -> None:
    """The file that runs a command must be there, and have these words."""
    file, words = RUN_BY[command]
    assert words in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not run {command}"


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("block", blocks("bash", "sh", "shell"), ids=str)
def test_every_command_of_the_pages_works(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(block)
    assert found
    for words in found:
        ours = words[0] in ("raydmd", "python", "make", "ray") and not block.text.startswith("# takes")
        if ours or not marked(block):
            look(words, monkeypatch)


def test_commands_within_text_are_there_too() -> None:
    """Not their arguments, which stand for others, but scripts, modules, targets and commands."""
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wrong = []
    for file, text in spans():
        words = text.split()
        if text.startswith("make ") and len(words) > 1 and words[1] not in known:
            wrong.append((file, text))
        if re.match(r"raydmd [a-z]", text):
            if words[1] == "sweep" and len(words) > 2:
                ok = all(f"## raydmd sweep {w}\n" in COMMANDS for w in re.split(r"\\?\|", words[2]))
            else:
                ok = f"## raydmd {words[1]}\n" in COMMANDS
            if not ok:
                wrong.append((file, text))
        if (script := re.match(r"(?:python )?((?:experiments|benchmarks|docs)/[\w/]+\.(?:py|yaml))\b", text)) and not (
            ROOT / script[1]
        ).is_file():
            wrong.append((file, text))
    assert wrong == []


def test_its_own_eyes_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong in a page is seen."""
    for wrong in (
        ["raydmd", "recipe", "training.studnet.rate=1e-4"],
        ["raydmd", "run", "experiments/mixture_wan22.yaml", "--wrokers", "2"],
        ["raydmd", "compare", "runs/a", "--buy", "frechet"],
        ["raydmd", "sweep", "status", "runs/a", "--jsno"],
        ["python", "experiments/phased_wan22.py", "--training.studnet.rate=1"],
        ["python", "benchmarks/nothing.py"],
        ["make", "nonsense"],
        ["ray", "job", "submit", "--", "python", "experiments/phased_wan22.py", "--wrokers", "2"],
    ):
        with pytest.raises((AssertionError, KeyError)):
            look(wrong, monkeypatch)
    with pytest.raises(StopIteration):
        look(["helm", "install"], monkeypatch)


def test_the_sweep_of_the_pages_is_accepted(tmp_path: Path) -> None:
    [text] = [block.text for block in blocks("yaml") if "\nspace:" in block.text]
    file = tmp_path / "ca-dm.yaml"
    file.write_text(text, encoding="utf-8")
    given, base = read(file)
    given["budget"].pop("gpu_hours", None)
    spec = read_sweep(given)
    check(spec, pinned(spec, derive(base, {"output": tmp_path})))


def test_parts_of_recipes_on_the_pages_are_accepted() -> None:
    parts = [yaml.safe_load(block.text) for block in blocks("yaml") if "\nspace:" not in block.text]
    recipes = [part for part in parts if isinstance(part, dict) and set(part) <= set(Recipe.model_fields)]
    assert recipes
    for part in recipes:
        derive(Recipe(), part)
