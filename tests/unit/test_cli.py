"""The command line, as a process sees it: output, messages, exit codes."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import TYPE_CHECKING

import pytest
import yaml

import raydmd
from raydmd.cli import experiment, main, read_overrides
from raydmd.errors import InputError, PoolError, RunStopped
from raydmd.recipe import Recipe, derive, known_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

pytestmark = pytest.mark.unit

ZOO = derive(Recipe(), {"name": "tiny", "training.cycles": 10})
PAPER = derive(Recipe(), {"name": "paper", "model.path": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"})


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(front: Callable[[Sequence[str]], None], *argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as info:
            front(argv)
        out, err = capfd.readouterr()
        return int(info.value.code or 0), out, err

    return call


def script(argv: Sequence[str]) -> None:
    experiment(zoo=ZOO, paper=PAPER, doc="A paper's result.", argv=argv)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, int | None]]:
    """Stands in for the training room and records what it was given."""
    seen: list[tuple[Recipe, int | None]] = []
    _training(monkeypatch, lambda recipe, max_cycles: seen.append((recipe, max_cycles)))
    return seen


def test_pairs_takes_a_recipe_and_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    seen: list[tuple[object, ...]] = []
    module = types.ModuleType("raydmd.training.make_pairs")
    module.__dict__["make"] = lambda recipe, count, folder, *, shard: seen.append((recipe, count, folder, shard)) or 0
    monkeypatch.setitem(sys.modules, "raydmd.training.make_pairs", module)
    file = tmp_path / "mine.yaml"
    file.write_text("method: {name: dmd}\n")
    words = ["--count", "10", "--output", "p", "--shard", "2", "method.regression.steps=7", "--seed", "4"]
    code, _, err = call(main, "pairs", str(file), *words)
    assert (code, err) == (0, "")
    ((recipe, count, folder, shard),) = seen
    assert isinstance(recipe, Recipe)
    assert recipe.method.regression is not None
    assert (recipe.method.regression.steps, recipe.seed, count, str(folder), shard) == (7, 4, 10, "p", 2)
    for words, says in (
        ([str(file)], "how many pairs"),
        (["--count", "3"], "which recipe"),
        ([str(file), "--count", "3", "--shart", "2"], "unknown flag '--shart'"),
        ([str(tmp_path / "no.yaml"), "--count", "3"], "no.yaml"),
    ):
        code, _, err = call(main, "pairs", *words)
        assert code == 2
        assert says in err


def _training(monkeypatch: pytest.MonkeyPatch, act: Callable[[Recipe, int | None], int | None]) -> None:
    module = types.ModuleType("raydmd.training.run")
    module.__dict__["run"] = lambda recipe, *, max_cycles=None: act(recipe, max_cycles)
    monkeypatch.setitem(sys.modules, "raydmd.training.run", module)


def test_a_process_prints_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "raydmd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"raydmd {raydmd.__version__}\n"
    assert done.stderr == ""


def test_recipe_prints_what_it_resolves(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call(main, "recipe", "method.name=dmd2", "--training.cycles", "3")
    tree = yaml.safe_load(out)
    assert code == 0
    assert (tree["method"]["solver"], tree["training"]["cycles"]) == ("renoise", 3)


def test_recipe_names_the_keys_of_sections_that_are_off(call: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = call(main, "recipe", "method.name=dmd2")
    off = dict(line.removeprefix("# ").split(": ", 1) for line in out.splitlines() if line.startswith("# method."))
    assert off["method.gan.data"] == "(must be given)"
    assert off["method.anchor.steps"] == "5"
    assert set(off) <= set(known_keys())
    assert not any(key.startswith("method.decouple") for key in _off(call, "method.name=decoupled"))
    derived = derive(Recipe(), {"method.name": "dmd2", "method.anchor.steps": 4})
    assert derived.method.anchor is not None
    assert derived.method.anchor.steps == 4


def _off(call: Callable[..., tuple[int, str, str]], *words: str) -> list[str]:
    _, out, _ = call(main, "recipe", *words)
    return [line.removeprefix("# ").split(":")[0] for line in out.splitlines() if line.startswith("# ")]


@pytest.mark.parametrize(
    "words",
    [
        ["--training.student.rate=1e-5"],
        ["--training.student.rate", "1e-5"],
        ["training.student.rate=1e-5"],
    ],
)
def test_three_ways_to_give_a_key(words: list[str], call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = call(script, "--dry-run", *words, "--seed", "3")
    assert (code, err) == (0, "")
    tree = yaml.safe_load(out)
    assert (tree["name"], tree["seed"], tree["training"]["student"]["rate"]) == ("tiny", 3, 1e-5)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "tiny"),
        (["--model", "wan22-tiny"], "tiny"),
        (["--model", "./wan22-tiny"], "paper"),
        (["--model", "org/model"], "paper"),
        (["model.path=org/model"], "paper"),
        (["--model.path", "org/model"], "paper"),
        (["--model", "org/model", "--name", "mine"], "mine"),
    ],
)
def test_the_model_picks_the_parent(words: list[str], name: str, call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call(script, "--dry-run", *words)
    assert (code, yaml.safe_load(out)["name"]) == (0, name)


def test_a_recipe_file_picks_the_parent_too(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {path: org/model}\nseed: 9\n")
    _, out, _ = call(script, "--dry-run", "--recipe", str(file), "--seed", "8")
    tree = yaml.safe_load(out)
    assert (tree["name"], tree["model"]["path"], tree["seed"]) == ("paper", "org/model", 8)


def test_flags_reach_the_run(runs: list[tuple[Recipe, int | None]], call: Callable[..., tuple[int, str, str]]) -> None:
    flags = "--prompts p.txt --name n --output o --workers 2 --teachers 3 --seed 4 --deterministic"
    code, out, err = call(script, *flags.split(), "--max-cycles", "5")
    assert (code, out, err) == (0, "", "")
    (recipe, max_cycles), *more = runs
    assert (max_cycles, more) == (5, [])
    assert (str(recipe.data.prompts), recipe.name, str(recipe.output)) == ("p.txt", "n", "o")
    assert (recipe.placement.workers, recipe.placement.teachers) == (2, 3)
    assert (recipe.seed, recipe.deterministic) == (4, True)


def test_run_takes_a_file_before_or_after_flags(
    tmp_path: Path,
    runs: list[tuple[Recipe, int | None]],
    call: Callable[..., tuple[int, str, str]],
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: from-file\n")
    assert call(main, "run", str(file), "--training.cycles", "5")[0] == 0
    assert call(main, "run", "--training.cycles", "5", str(file))[0] == 0
    assert runs[0] == runs[1]
    assert runs[0][0].name == "from-file"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wrokers", "2"], "unknown flag '--wrokers'; did you mean '--workers'?"),
        (["--num-workers=2"], "unknown flag '--num-workers'; did you mean '--workers'?"),
        (["--dryrun"], "unknown flag '--dryrun'; did you mean '--dry-run'?"),
        (["--lr", "1"], "unknown flag '--lr'; did you mean '--training.student.rate'?"),
        (["--cycles", "1"], "unknown flag '--cycles'; did you mean '--training.cycles'?"),
        (["--zzzz"], "unknown flag '--zzzz'; --help lists flags, 'raydmd recipe' all keys"),
        (["-x"], "unknown flag '-x'"),
        (["lr=1"], "unknown recipe key 'lr'; did you mean 'training.student.rate'?"),
        (["--training.cycles"], "--training.cycles needs a value"),
        (["--training.cycles="], "override 'training.cycles=' has no value"),
        (["--model", ""], "override 'model.path=' has no value"),
        (["stray"], "can't read 'stray'; a recipe key is set by KEY=VALUE"),
        (["--seed", "1", "seed=2"], "recipe key 'seed' is given twice"),
        (["--workers", "0"], "placement.workers: "),
        (["--recipe", "/none.yaml"], "recipe file /none.yaml does not exist"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str],
    message: str,
    runs: list[tuple[Recipe, int | None]],
    call: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = call(script, *words)
    assert (code, out, runs) == (2, "", [])
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["--workers", "two"], ["--workers"], ["--max-cycles", "0"]])
def test_a_flag_of_the_wrong_kind(words: list[str], call: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = call(script, *words)
    assert code == 2
    assert words[0] in err


def test_run_without_a_file(call: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = call(main, "run")
    assert (code, err.startswith("error: which recipe?")) == (2, True)


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (InputError("no room"), 2, "error: no room\n"),
        (PoolError("pool a, replica 1, request 7"), 1, "error: pool a, replica 1, request 7\n"),
        (RunStopped("at cycle 5"), 3, "stopped: at cycle 5\n"),
        (KeyboardInterrupt(), 3, "stopped: interrupted; "),
        (PoolError("ray::x\n  File\nPoolError: lost"), 1, "error: PoolError: lost\n"),
    ],
)
def test_faults_become_exit_codes(
    fault: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., tuple[int, str, str]],
) -> None:
    def fail(recipe: Recipe, max_cycles: int | None) -> int | None:
        raise fault

    _training(monkeypatch, fail)
    seen, _, err = call(script)
    assert seen == code
    assert err.startswith(message)
    assert "Traceback" not in err


def test_the_runs_own_exit_code(monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]) -> None:
    _training(monkeypatch, lambda recipe, max_cycles: 3)
    assert call(script)[0] == 3


def test_an_unforeseen_fault_is_one_line_and_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    def fail(recipe: Recipe, max_cycles: int | None) -> int | None:
        raise ZeroDivisionError("by zero\nmore")

    _training(monkeypatch, fail)
    code, _, err = call(script, "--output", str(tmp_path))
    log = tmp_path / "tiny" / "error.log"
    assert (code, err) == (1, f"error: ZeroDivisionError: by zero (traceback in {log})\n")
    assert "Traceback (most recent call last)" in log.read_text()
    monkeypatch.setenv("RAYDMD_DEBUG", "1")
    assert "Traceback (most recent call last)" in call(script, "--output", str(tmp_path))[2]


def test_help_names_flags_keys_and_exit_codes(
    call: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = call(script, "--help")
    assert code == 0
    for word in ("A paper's result.", "--max-cycles", "KEY=VALUE", "3  stopped; the same command"):
        assert word in out


def test_words_after_a_key_are_its_value() -> None:
    words = ["--seed", "-1", "--name=a=b", "x.yaml", "training.cycles=3"]
    assert read_overrides(words, files=1) == (
        ["seed=-1", "name=a=b", "training.cycles=3"],
        ["x.yaml"],
    )
