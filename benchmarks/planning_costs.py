"""What passes of the well-known pipelines cost, for plans that need not find it anew: raydmd/planning/data/costs.json.

    python benchmarks/planning_costs.py      ten minutes; after a change of the tracer, of the table or of diffusers

Plans the papers' recipes of experiments/ with their own roles, and with all roles in full and with adapters.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from raydmd.errors import InputError
from raydmd.planning import network
from raydmd.planning.hardware import read_hardware
from raydmd.planning.known import known
from raydmd.planning.network import SHIPPED
from raydmd.planning.planner import Planner
from raydmd.recipe import Recipe, derive

ROOT = Path(__file__).parents[1]
ROLES: dict[str, Any] = {
    "full": {"training.student.lora": None, "training.fake.lora": None},
    "adapters": {"training.student.lora": {"rank": 64}, "training.fake.lora": {"rank": 64}},
}
OTHERS = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {"frames": 81, "height": 480, "width": 832},
    "Qwen/Qwen-Image": {"height": 1024, "width": 1024},
    "stabilityai/stable-diffusion-3.5-large": {"height": 1024, "width": 1024},
}
"""Models and sizes that no script has as it is."""


def main() -> None:
    network.shipped = dict  # type: ignore[assignment]  # none of what was found before
    found: dict[str, Any] = {}
    for recipe in recipes():
        for roles in ({}, *ROLES.values()):
            planner = Planner(derive(recipe, {"training.gradient_checkpointing": True, **roles}), read_hardware("h100"))
            for gpus in (8, planner.own.gpus):
                planner.best(gpus)
            found |= planner.networks.asked
            print(f"{recipe.name}: {len(found)} answers", flush=True)
    keep(found)


def recipes() -> list[Recipe]:
    """Those of scripts whose models the table has, and the others."""
    sys.path.insert(0, str(ROOT / "experiments"))
    found = []
    for path, size in OTHERS.items():
        method = {"name": "phased"} if "Wan" in path else {"name": "dmd2", "shift": 3.0}
        found.append(derive(Recipe(name=path.rpartition("/")[2]), {"model": {"path": path, **size}, "method": method}))
    for script in sorted((ROOT / "experiments").glob("*.py")):
        if script.name.startswith("sweep_"):
            continue
        try:
            recipe = runpy.run_path(str(script))["PAPER"]
            if recipe.model.path in known():
                found.append(recipe)
        except InputError as error:
            print(f"{script.name}: {error}")
    return found


def keep(found: dict[str, Any]) -> None:
    """Write them, one a line, numbers without digits that mean nothing."""
    rows = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(found.items())]
    SHIPPED.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
