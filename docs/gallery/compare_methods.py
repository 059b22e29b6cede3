"""Train several methods on the same model for as many updates, and compare them.

    python docs/gallery/compare_methods.py

Four presets on the zoo's sd35-tiny, one run after the other; teacher, prompts and seeds of the evaluation are the same,
so that the second run finds the teacher's pictures there. Writes the page that ``raydmd compare`` writes, and a picture
of quality on the way. The times are those of a demonstration: `make methods` is the measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from raydmd.comparing.document import compared
from raydmd.comparing.folders import read_run
from raydmd.comparing.write import write
from raydmd.recipe import Recipe, derive
from raydmd.training.run import run
from raydmd.zoo.settings import TRAINING

if TYPE_CHECKING:
    from collections.abc import Sequence

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {"name": "dmd2"},
    "phased": {"name": "phased", "boundaries": [0.8]},
    "decoupled": {"name": "decoupled", "decouple": {"schedule": "constrained"}},
    "dp-dmd": {"name": "dp_dmd"},
}
TITLES = {"frechet": "Fréchet distance", "coverage_entropy": "coverage"}
SHARED = {"steps": 4, "shift": 3.0, "guidance": 3.5}


def recipes(cycles: int, output: Path) -> list[Recipe]:
    """One recipe for each method; they differ in ``method`` and in nothing else."""
    zoo = {
        "output": output,
        "model.path": "sd35-tiny",
        "training": {**TRAINING, "batch": 48, "cycles": cycles, "report_every": 2},
        "placement": {"workers": 1, "teachers": 1},
        "evaluation": {"samples": 128, "every": cycles // 4, "grid": 8},
        "data.cache": output / "conditions",
    }
    return [derive(Recipe(), {**zoo, "name": f"gallery-{k}", "method": {**SHARED, **m}}) for k, m in METHODS.items()]


def main() -> None:
    """Train what is not trained yet, and write page and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=80, help="student updates of each run; a multiple of 4")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="the runs go here")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent, help="the picture goes here")
    args = parser.parse_args()
    asked = recipes(args.cycles, args.output.absolute())
    for recipe in asked:
        run(recipe)
    found = compared([read_run(recipe.folder) for recipe in asked], title="four methods, sd35-tiny", by="frechet")
    page, figures = write(found, args.output / "gallery-compare.html")
    print(f"page      {page}\nfigures   {figures}")
    args.pictures.mkdir(parents=True, exist_ok=True)
    curves(asked, args.pictures / "compare_methods.png")


def curves(asked: Sequence[Recipe], file: Path) -> None:
    """Fréchet distance and coverage of each student while it trained, at its end, and of the teacher."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for place, (key, title) in zip(axes, TITLES.items(), strict=True):
        for recipe, name in zip(asked, METHODS, strict=True):
            lines = (recipe.folder / "evaluations.jsonl").read_text("utf-8").splitlines()
            points = [(row["cycle"], row[f"evaluation/{key}"]) for row in map(json.loads, lines)]
            points.append((recipe.training.cycles, measured(recipe)["student"][key]))
            place.plot(*zip(*points, strict=True), marker="o", ms=3, label=name)
        place.axhline(measured(asked[0])["teacher"][key], color="black", lw=1, ls=":", label="teacher")
        place.set_title(title, fontsize=10)
        place.set_xlabel("cycle", fontsize=9)
        place.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def measured(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """A run's figures, by what was measured."""
    rows = json.loads((recipe.folder / "result.json").read_text("utf-8"))["rows"]
    return {row["name"]: row for row in rows}


if __name__ == "__main__":
    main()
