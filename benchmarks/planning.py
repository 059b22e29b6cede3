"""The plan against reality: seconds and memory of a cycle of five zoo recipes, after the timing of ``--measure``.

    python benchmarks/planning.py      four minutes on an idle machine

Each recipe is one worker with its teacher beside it, one thread. First its parts are timed, as --measure does; then
the plan puts a cycle together from them; then real cycles run, exit steps and noise levels as they are drawn.
Seconds are those of this process on its core (``time.process_time``), so that others on the machine are not
counted: the wall clock of the same cycles stands beside. Memory is bytes of tensors: parameters, optimizer states,
averages and the teacher, and the peak of what is live beside them in a cycle, counted operation by operation; not
the process's resident size, of which libraries are most at these sizes. Both must be within 15%.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from bench import code, keep

import raydmd.training.cycle
from raydmd.planning.answer import Option
from raydmd.planning.measure import Bench, calibration_of, held
from raydmd.planning.planner import Planner
from raydmd.planning.show import table
from raydmd.recipe import derive
from raydmd.recipe_placement import Placement
from raydmd.training.prepare import quiet

if TYPE_CHECKING:
    from raydmd.recipe import Recipe

HERE = Path(__file__).parent
BOUND = 0.15
BATCH = 16
CYCLES = 12
TIED = {
    "training.student.lora": {"rank": 8},
    "training.fake.lora": {"rank": 8},
    "training.gradient_checkpointing": True,
    "placement": Placement(workers=1, teacher="tied").model_dump(),
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "phased, wan22-tiny": ("phased_wan22", {}),
    "DP-DMD, sd35-tiny": ("dp_dmd_sd35", {}),
    "DMD2, sdxl-tiny": ("dmd2_sdxl", {}),
    "decoupled, lumina2-tiny": ("decoupled_lumina2", {}),
    "phased, tied, computed again, wan22-tiny": ("phased_wan22", TIED),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=CYCLES)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "planning.json")
    args = parser.parse_args()
    quiet()
    sys.path.insert(0, str(HERE.parent / "experiments"))
    # Stages of a cycle are timed on the same clock as everything else here.
    cycle: Any = raydmd.training.cycle
    stopwatch, cycle.time = cycle.Stopwatch, SimpleNamespace(perf_counter=time.process_time)
    cycle.Stopwatch = lambda: stopwatch(_since=time.process_time())
    rows = []
    for name, (script, changes) in RECIPES.items():
        recipe = runpy.run_path(str(HERE.parent / "experiments" / f"{script}.py"))["ZOO"]
        placement = Placement(workers=1, teacher="local").model_dump()
        recipe = derive(recipe, {"placement": placement, "training.batch": BATCH, **changes})
        rows.append({"recipe": name, **compare(recipe, args.cycles)})
        print(shown(rows[-1:]), flush=True)
    met = all(abs(row["off"]) <= BOUND and abs(row["memory_off"]) <= BOUND for row in rows)
    said = (
        shown(rows)
        + f"\n\n{'met' if met else 'NOT MET'}: seconds of the process and bytes of tensors within {BOUND:.0%}"
    )
    keep(args.output, {"settings": {"batch": BATCH, "cycles": args.cycles, "code": code()}, "met": met, "rows": rows})
    lead = (__doc__ or "").strip().replace("    python benchmarks/planning.py ", "`python benchmarks/planning.py`,")
    args.output.with_suffix(".md").write_text(f"{lead}\n\n{said}\n", encoding="utf-8")
    print(f"\n{said}\n{args.output}")
    raise SystemExit(not met)


def compare(recipe: Recipe, cycles: int) -> dict[str, Any]:
    """Plan a recipe's cycle and run some."""
    with tempfile.TemporaryDirectory(prefix="planning-") as folder:
        found = calibration_of(recipe, clock=time.process_time)
        planner = Planner(recipe, found.hardware, found.of(recipe))
        option = Option(placement=recipe.placement.teacher, sharding="single", workers=1)
        phase = planner.answer(option).phases[0]
        bench = Bench.of(recipe, Path(folder))
        bench.cycle(0)
        seen = []
        for number in range(1, cycles + 1):
            wall, own = time.perf_counter(), time.process_time()
            parts = {k: v for k, v in bench.cycle(number).items() if k.startswith("time/")}
            seen.append({"wall": time.perf_counter() - wall, "own": time.process_time() - own, **parts})
        measured = fmean(row["own"] for row in seen)
        memory = held(bench.tensors()) + max(bench.peak(cycles + k) for k in range(3))
    planned_parts = {
        "rollout": phase.step.rollout,
        "fake": sum(phase.step.fake_updates),
        "generator": phase.step.generator,
    }
    return {
        "planned": phase.seconds,
        "measured": measured,
        "off": phase.seconds / measured - 1,
        "wall": fmean(row["wall"] for row in seen),
        "planned_parts": planned_parts,
        "measured_parts": {k: fmean(row[f"time/{k}"] for row in seen) for k in planned_parts},
        "memory_planned": phase.budget.peak,
        "memory_measured": memory,
        "memory_off": phase.budget.peak / memory - 1,
        "held": phase.budget.held,
        "cycles": seen,
    }


def shown(rows: list[dict[str, Any]]) -> str:
    """A table of them."""
    head = ["recipe", "planned, s", "measured, s", "off by", "wall clock, s", "planned, MB", "measured, MB", "off by"]
    return table(
        head,
        [
            [
                row["recipe"],
                f"{row['planned']:.3f}",
                f"{row['measured']:.3f}",
                f"{row['off']:+.1%}",
                f"{row['wall']:.3f}",
                f"{row['memory_planned'] / 1e6:.1f}",
                f"{row['memory_measured'] / 1e6:.1f}",
                f"{row['memory_off']:+.1%}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
