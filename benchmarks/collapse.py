"""Does the collapse monitor fire before the pictures are ruined, and does its rollback save the run?

    python benchmarks/collapse.py

CFG augmentation alone, at a rate that rises far too high, on a zoo model: once unwatched to the end, once stopped where
the monitor fires, once rolled back; beside it healthy runs, in which the monitor must be silent. The rate rises over
half the run, so that checkpoints are there from before the trouble. All of the monitor's settings but its action, and
how often it may roll back, are the recipe's defaults. Training is in this process, without Ray. The table goes to the
terminal, the figures to ``--output`` after every run; the same command goes on after the last one of the same code.
Ends with 1 if the monitor was silent or late, saved nothing, or cried wolf.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import BOUNDARIES, HERE, MODELS, Bench, code, keep

from raydmd.recipe import Recipe, derive
from raydmd.training.checkpoint import cycle_of
from raydmd.training.events import read_lines
from raydmd.zoo.settings import TRAINING

FORCED: dict[str, Any] = {"name": "decoupled", "decouple": {"match": 0.0}}
"""CFG augmentation alone, which asks no fake score."""
HEALTHY: dict[str, dict[str, Any]] = {
    "decoupled": {"name": "decoupled"},
    "phased": {"name": "phased"},
    "dmd2, not normalised": {"name": "dmd2", "normaliser": "none"},
}
"""Methods that are well at the models' guidance; ``dmd2`` with its own normaliser is not (docs/log.md)."""
RUINED, WELL = 0.8, 0.95
"""Shares of the teacher's joint accuracy below which pictures count as ruined, and above which a run is well."""
COLUMNS = ("frechet", "joint", "flow", "brightness", "saturation", "diversity")


def main() -> None:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan22-tiny", choices=list(MODELS))
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=4e-4, help="the forced collapse's; the zoo's is 2e-4")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "collapse.json")
    args = parser.parse_args()
    fast = {"student": {"rate": args.rate}, "fake_updates": 0, "fake_warmup": 0, "warmup": args.cycles // 2}
    runs: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "forced, unwatched": (FORCED, fast, {"action": "warn"}),
        "forced, stopped at the alarm": (FORCED, fast, {"action": "stop"}),
        # Augmentation alone collapses at any rate in the end; three halvings last for this run.
        "forced, rolled back": (FORCED, fast, {"action": "rollback", "limit": 3}),
        **{f"healthy, {name}": (method, {}, {"action": "warn"}) for name, method in HEALTHY.items()},
    }
    runs["healthy, phased"][0]["boundaries"] = BOUNDARIES[args.model]
    with tempfile.TemporaryDirectory(prefix="raydmd-collapse-") as scratch:
        base = derive(
            Recipe(name="run", output=Path(scratch)),
            {
                "model.path": args.model,
                "training": TRAINING | {"batch": args.batch, "cycles": args.cycles},
                "checkpoints.every": 10,
                "method": {"name": "dmd2"} | MODELS[args.model],
                "evaluation": {"samples": args.samples},
            },
        )
        settings = {k: v for k, v in vars(args).items() if k != "output"} | {"code": code()}
        kept = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
        done = kept["rows"] if kept.get("settings") == settings else []
        bench = Bench(base, Path(scratch) / "conditions", torch.device(args.device))
        reference, floor, *undistilled = bench.teacher_samples()
        shown = bench.rows(reference, floor, undistilled)
        for name, (method, training, monitor) in runs.items():
            if found := [row for row in done if row["title"] == name and row["monitor"] == monitor]:
                shown += found
                continue
            changes = {"name": name.replace(", ", "-").replace(" ", "-"), "method": MODELS[args.model] | method}
            recipe = derive(base, changes | {"training": training, "monitor": monitor})
            end, checkpoint = bench.train(recipe)
            row = bench.rows(reference, floor, [bench.student_samples(recipe, checkpoint)])[-1]
            alarms = [
                {k: e[k] for k in ("cycle", "signal", "message", "action")}
                for e in read_lines(recipe.folder / "events.jsonl")
                if e["event"] == "alarm"
            ]
            back = [e["cycle"] for e in read_lines(recipe.folder / "events.jsonl") if e["event"] == "rollback"]
            found = {"end": end, "cycle": cycle_of(checkpoint.name), "alarms": alarms, "back_to": back}
            shown.append(row | found | {"title": name, "monitor": monitor})
            print(line(shown[-1]), flush=True)
            keep(args.output, {"settings": settings, "rows": shown})
    print("\n| | updates | " + " | ".join(COLUMNS) + " | alarms |\n|---|---|" + "---|" * (len(COLUMNS) + 1))
    for row in shown:
        print(line(row))
    by_title = {row["title"]: row for row in shown}
    teacher, healthy = by_title["teacher"]["joint"], [row for row in shown if row["title"].startswith("healthy")]
    ruined, stopped, saved = (
        by_title[f"forced, {how}"] for how in ("unwatched", "stopped at the alarm", "rolled back")
    )
    checks = {
        "the unwatched run is ruined": ruined["joint"] < RUINED * teacher,
        "the monitor fires": bool(stopped["alarms"]),
        "before the pictures are ruined": stopped["joint"] >= RUINED * teacher,
        "the rolled back run goes back to a checkpoint of its own": bool(saved["back_to"]) and saved["back_to"][0] > 0,
        "it trains to its end": saved["end"] == "finished",
        "and is not ruined": saved["joint"] >= RUINED * teacher,
        "healthy runs are well": all(row["joint"] >= WELL * teacher for row in healthy),
        "and silent": not any(row["alarms"] for row in healthy),
    }
    print("\n" + "\n".join(f"{'yes' if held else 'NO '}  {what}" for what, held in checks.items()))
    raise SystemExit(0 if all(checks.values()) else 1)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = ["" if row.get(key) is None else f"{row[key]:.3g}" for key in COLUMNS]
    alarms = "; ".join(f"{a['cycle']}: {a['signal']}" for a in row.get("alarms", []))
    return f"| {row['title']} | {row.get('cycle', '')} | " + " | ".join(cells) + f" | {alarms} |"


if __name__ == "__main__":
    main()
