"""Early stopping against the whole grid: how near its best, for how many of its updates.

    python benchmarks/halving.py                              half an hour on two cores
    python benchmarks/halving.py --space fine --every 10      the same around the optimum

Nine points of DMD2 on ``sd35-tiny`` (guidance by student rate), each trained to its end, and the same nine with
asynchronous halving. Both sweeps share one teacher; a point's run is the same in both, up to where it is stopped.
Halving must come within 2% of the grid's best Fréchet distance for at most 40% of its trial-steps. The coarse space is
what one begins with: decades of the rate, and a factor of three in guidance. In the fine one all points end near each
other, and their order after an eighth of the training says little.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydmd.recipe import Recipe, derive
from raydmd.recipe_evaluation import Evaluation
from raydmd.training.events import read_lines
from raydmd.training.prepare import quiet
from raydmd.tuning.checks import pinned
from raydmd.tuning.spec import read_sweep
from raydmd.tuning.storage import storage_url
from raydmd.tuning.study import rows_of
from raydmd.tuning.sweep import sweep
from raydmd.zoo.settings import SWEPT, on_zoo

if TYPE_CHECKING:
    from raydmd.tuning.rows import Row

WITHIN, SHARE = 0.02, 0.4
EIGHTH = 8
"""The first judgement comes after one of so many parts of the training."""
RESULTS = Path(__file__).parent / "results" / "halving.json"
SPACES = {
    "coarse": {"method.guidance": [1.0, 3.5, 12.0], "training.student.rate": [4e-6, 4e-5, 4e-4]},
    "fine": {"method.guidance": [2.0, 3.5, 6.0], "training.student.rate": [5e-5, 2e-4, 8e-4]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=SPACES, default="coarse")
    parser.add_argument("--output", type=Path, default=Path("runs/halving"))
    parser.add_argument("--cycles", type=int, default=160)
    parser.add_argument("--every", type=int, default=20, help="cycles between evaluations")
    given = parser.parse_args()
    quiet()
    paper = derive(Recipe(), {"name": "dmd2", "method": {"name": "dmd2", "steps": 4, "shift": 3.0, "guidance": 3.5}})
    evaluation = Evaluation(every=given.every, samples=128, teacher_steps=30).model_dump()
    swept = {**SWEPT, "evaluation": evaluation}
    base = on_zoo(paper, "sd35-tiny", cycles=given.cycles, output=given.output, **swept)
    base = derive(base, {"data.cache": (given.output / "conditions").absolute(), "deterministic": True})
    found: dict[str, list[Row]] = {}
    grace = max(1, given.cycles // EIGHTH // given.every)  # evaluations before the first judgement
    for name, stopping in (("grid", None), ("halving", {"reduction": 3.0, "grace": grace})):
        plain: dict[str, Any] = {
            "name": f"{name}-{given.space}",
            "space": SPACES[given.space],
            "search": {"kind": "grid"},
            "stopping": stopping,
        }
        spec = read_sweep(plain)
        sweep(spec, base, cluster="here")
        place = pinned(spec, base)
        found[name] = [r for r in rows_of(spec, storage_url(spec, place.output.parent)) if r.state != "lost"]
    rows = []
    for name, trials in found.items():
        best = min((t for t in trials if t.values), key=lambda t: t.values["frechet"])
        steps = sum(trained(given.output / f"{name}-{given.space}" / "trials" / f"{t.root:04d}") for t in trials)
        rows.append({"sweep": name, "best": best.values["frechet"], "changes": best.changes, "steps": steps})
    whole, halved = rows
    off, share = halved["best"] / whole["best"] - 1, halved["steps"] / whole["steps"]
    print("| sweep | best Fréchet | of | trial-steps |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['sweep']} | {row['best']:.2f} | {row['changes']} | {row['steps']} |")
    met = off <= WITHIN and share <= SHARE
    print(
        f"{'met' if met else 'NOT MET'}: {off:+.1%} of the grid's best (at most {WITHIN:.0%}), {share:.0%} of its steps"
    )
    settings = {"cycles": given.cycles, "every": given.every, "within": WITHIN, "share": SHARE}
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    known["command"] = "python benchmarks/halving.py --space SPACE"
    known[given.space] = {"space": SPACES[given.space], "settings": settings, "rows": rows, "off": off, "share": share}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if met else 1)


def trained(folder: Path) -> int:
    """Cycles that a run has trained, those after the word to stop among them."""
    return max((int(row["cycle"]) for row in read_lines(folder / "metrics.jsonl")), default=0)


if __name__ == "__main__":
    main()
