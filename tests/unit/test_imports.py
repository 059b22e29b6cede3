"""The house rules of DESIGN sections 3 and 8 that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import raydmd

pytestmark = pytest.mark.unit

HOUSE = Path(raydmd.__file__).parent
TESTS = Path(__file__).parents[1]

ORDER = [
    "errors",
    "files",
    "redact",
    "process",
    "guidance",
    "draws",
    "objectives",
    "recipe_io",
    "recipe_types",
    "recipe_gan",
    "recipe_regression",
    "recipe_method",
    "recipe_evaluation",
    "recipe_monitor",
    "recipe_checkpoints",
    "recipe_data",
    "recipe_placement",
    "recipe_training",
    "recipe_fits",
    "recipe",
    "models",
    "data",
    "sampling",
    "methods",
    "serving",
    "pairs",
    "zoo",
    "rewards",
    "tracking",
    "evaluation",
    "training",
    "planning",
    "comparing",
    "tuning",
    "doctor",
    "cli_faults",
    "cli_words",
    "cli_sweep",
    "cli_compare",
    "cli_doctor",
    "cli_plan",
    "cli",
    "__main__",
]
"""From the ground up: a room imports itself and what is below it."""

GROUND = {"process", "guidance", "objectives"}
HEAVY = ["ray", "diffusers", "transformers", "mlflow", "peft", "accelerate"]
NEVER = {
    "process": HEAVY,
    "guidance": HEAVY,
    "objectives": HEAVY,
    "draws": HEAVY,
    "redact": HEAVY,
    "recipe_io": HEAVY,
    "recipe_types": HEAVY,
    "recipe_gan": HEAVY,
    "recipe_evaluation": HEAVY,
    "recipe_regression": HEAVY,
    "recipe_method": HEAVY,
    "recipe_monitor": HEAVY,
    "recipe_data": HEAVY,
    "recipe_placement": HEAVY,
    "recipe_training": HEAVY,
    "recipe_fits": HEAVY,
    "recipe_checkpoints": HEAVY,
    "recipe": HEAVY,
    "methods": HEAVY,
    "models": ["ray", "mlflow"],
    "data": ["ray", "mlflow"],
    "sampling": ["ray", "mlflow"],
    "pairs": HEAVY,
    "zoo": ["ray", "mlflow"],
    "rewards": ["ray", "mlflow"],
    "tracking": ["ray"],
    "comparing": ["ray"],
}


def room(file: Path) -> str:
    return file.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Absolute names of all modules a file imports anywhere, lazily or for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {p[1] for p in parts if p[0] == "raydmd" and len(p) > 1 and p[1] != "__version__"}


FILES = [f for f in sorted(HOUSE.rglob("*.py")) if f.parent != HOUSE or f.name != "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(HOUSE)))
def test_nothing_imports_upward(file: Path) -> None:
    here, used = room(file), imports(file)
    assert here in ORDER, f"put the new room {here!r} into ORDER"
    above = set(ORDER[ORDER.index(here) + 1 :])
    assert not rooms_of(used) & above
    if here in GROUND:
        assert rooms_of(used) <= GROUND
    assert not {name.split(".")[0] for name in used} & set(NEVER.get(here, ()))


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "low.py"
    file.write_text("def f():\n    from raydmd import recipe\n    import raydmd.cli\n    import ray.data\n")
    assert rooms_of(imports(file)) == {"recipe", "cli"}
    assert "ray.data" in imports(file)


def test_light_modules_bring_in_nothing_heavy() -> None:
    files = [f for f in FILES if room(f) in {*GROUND, "draws", "recipe_io", "recipe", "cli"}]
    names = [".".join(("raydmd", *f.relative_to(HOUSE).with_suffix("").parts)) for f in files]
    names = [name.removesuffix(".__init__") for name in names]
    assert {"raydmd.process", "raydmd.recipe", "raydmd.cli"} <= set(names)
    code = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


def test_every_test_has_a_room_and_its_marker() -> None:
    for file in TESTS.rglob("test_*.py"):
        home = file.relative_to(TESTS).parts[0]
        assert home in {"unit", "local", "ray", "chaos"}, file
        assert f"pytest.mark.{home}" in file.read_text(encoding="utf-8"), file
