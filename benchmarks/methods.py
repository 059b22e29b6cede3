"""Every method beside every other, at equal compute: python benchmarks/methods.py (or: make methods).

Each variant trains in a process of its own, on one thread or on the GPU, for the same number of network
evaluations (a forward counts 1 a sample, a forward with gradient 3), with the same rates and batch.
Beside it stand what else a variant costs: its pairs' evaluations and its seconds of CPU, rewards
included. Each seed has a training seed, pairs, prompts and noise of its own, for the teacher too. Compared is with the
teacher at full steps on other noise, by a judge of other weights than the one that rewards. Finished runs are kept in
``--output/methods/`` by their settings and the state of the code, and not repeated; table and figures go to
``--output/methods.md`` and ``methods.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Self

import torch
from bench import BOUNDARIES, MODELS, Bench, code, keep
from scipy.stats import ttest_rel

from raydmd.evaluation.samples import Samples
from raydmd.recipe import Recipe, derive
from raydmd.zoo.settings import TRAINING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PAIRED = "dmd, 1 step, L2 on latents"
VARIANTS: dict[str, dict[str, Any]] = {
    PAIRED: {"name": "dmd", "regression": {"loss": "l2"}},
    "dmd without pairs, 1 step": {"name": "dmd", "regression": None},
    "dmd2 (no GAN)": {"name": "dmd2"},
    "dmd2, as phased is normalised": {"name": "dmd2", "normaliser": "none"},
    "dmd2, as dp_dmd is, half as long": {"name": "dmd2", "normaliser": "noisy_distance"},
    "phased": {"name": "phased"},
    "decoupled (hybrid)": {"name": "decoupled"},
    "decoupled, constrained": {"name": "decoupled", "decouple": {"schedule": "constrained"}},
    "decoupled, full": {"name": "decoupled", "decouple": {"schedule": "full"}},
    "decoupled, coupled": {"name": "decoupled", "decouple": {"schedule": "coupled"}},
    "decoupled (hybrid), by scores": {"name": "decoupled", "normaliser": "none"},
    "CA alone": {"name": "decoupled", "decouple": {"match": 0.0}, "training": {"fake_updates": 0, "fake_warmup": 0}},
    "DM alone": {"name": "decoupled", "decouple": {"augment": 0.0}},
    "amd": {"name": "amd", "adapt": {"epsilon": 0.1}},
    "amd of strength 0": {"name": "amd", "adapt": {"epsilon": 0.1, "strength": 0.0, "fake_strength": 0.0}},
    "dp_dmd": {"name": "dp_dmd"},
    "dp_dmd without anchor and detach": {"name": "dp_dmd", "anchor": None},
}
"""The presets with their own settings, the ablations that the papers argue with, and controls. AMD's rewards are mean
log-probabilities here: less than a tenth of a nat between samples that are right anyway should decide nothing. CA alone
asks no fake score and trains none, so that it gets three times the updates."""
CONTROLS = {
    "dmd2, as dp_dmd is, half as long": ("sd35-tiny",),
    "decoupled (hybrid), by scores": ("sd35-tiny",),
    "amd of strength 0": ("sd35-tiny",),
}
"""Models on which a control is run, where that is not all of them."""
SHARES = {"dmd2, as dp_dmd is, half as long": 0.5}
"""Of the network evaluations that a variant gets; all others get all of them."""
COLUMNS = {
    "cycles": ("updates", "{:.0f}"),
    "evaluated": ("evaluations", "{:.0f}"),
    "pairs": ("for pairs", "{:.0f}"),
    "cpu": ("CPU s", "{:.0f}"),
    "frechet": ("Fréchet", "{:.1f}"),
    "joint": ("joint", "{:.3f}"),
    "coverage_entropy": ("coverage", "{:.3f}"),
    "coverage_right": ("of right ones", "{:.3f}"),
    "missing_modes": ("missing modes", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "flow": ("flow", "{:.2f}"),
    "saturation": ("saturation", "{:.3f}"),
    "reward": ("held-out reward", "{:.2f}"),
    "low": ("low-reward share", "{:.3f}"),
}
DMD2, UNNORMALISED, TEACHER = "dmd2 (no GAN)", "dmd2, as phased is normalised", "teacher"
TRUE = "coverage_right"
DIRECTIONS = (
    ("DP-DMD is more diverse than DMD2", "dp_dmd", TRUE, "above", DMD2),
    ("also for as many updates", "dp_dmd", TRUE, "above", "dmd2, as dp_dmd is, half as long"),
    ("its anchor and detach are why", "dp_dmd", TRUE, "above", "dp_dmd without anchor and detach"),
    ("Phased DMD is more diverse than DMD2", "phased", TRUE, "above", DMD2),
    ("also where neither is normalised", "phased", TRUE, "above", UNNORMALISED),
    ("Phased DMD moves more than DMD2", "phased", "flow", "above", DMD2),
    ("also where neither is normalised", "phased", "flow", "above", UNNORMALISED),
    ("hybrid is better than constrained", "decoupled (hybrid)", "frechet", "below", "decoupled, constrained"),
    ("hybrid is better than full", "decoupled (hybrid)", "frechet", "below", "decoupled, full"),
    ("hybrid is better than coupled", "decoupled (hybrid)", "frechet", "below", "decoupled, coupled"),
    ("constrained is better than full", "decoupled, constrained", "frechet", "below", "decoupled, full"),
    ("constrained is better than coupled", "decoupled, constrained", "frechet", "below", "decoupled, coupled"),
    ("CA alone saturates", "CA alone", "saturation", "above", TEACHER),
    ("DM repairs CA", "decoupled, coupled", "frechet", "below", "CA alone"),
    ("AMD's held-out reward is above DMD2's", "amd", "reward", "above", DMD2),
    ("and above its own without weights", "amd", "reward", "above", "amd of strength 0"),
    ("AMD has fewer low-reward samples", "amd", "low", "below", DMD2),
    ("DMD's regression keeps modes", PAIRED, TRUE, "above", "dmd without pairs, 1 step"),
)
"""What the papers say, as a figure of one variant against another's, and the same against closer controls."""
SURE = 0.95
"""Of the interval of a mean difference that a direction is told by."""
TINY = 1e-9
SEEDS_APART = 100
"""A run draws from its seed and the next few."""
COSTS, COST = " costs", "cost.json"
PROBE = 12
"""Cycles over which a variant's network evaluations are counted before it trains."""


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=float, default=2000.0, help="network evaluations, times the batch")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=480)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        model, variant, seed = json.loads(args.only)
        one(args, model, variant, seed)
        return
    folder = args.output / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        run_all(args, [(m, TEACHER, seed) for m in args.models])  # students are measured against their clips
        run_all(args, [(m, v, seed) for m in args.models for v in asked(args, m)])
    write(args)


def asked(args: argparse.Namespace, model: str) -> list[str]:
    """The variants that are run on a model."""
    return [v for v in args.variants if model in CONTROLS.get(v, args.models)]


def run_all(args: argparse.Namespace, jobs: list[tuple[str, str, int]]) -> None:
    """Run jobs in processes of their own, ``args.processes`` at a time."""
    waiting, running = [j for j in jobs if not result_file(args, *j).is_file()], []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    while waiting or running:
        while waiting and len(running) < args.processes:
            job = waiting.pop(0)
            command = [sys.executable, *sys.argv, "--only", json.dumps(job)]
            print("start", *job, flush=True)
            running.append((job, subprocess.Popen(command, env=environment)))
        job, process = running.pop(0)
        try:
            status = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            running.append((job, process))
            continue
        if status:
            for _, other in running:
                other.terminate()
            raise SystemExit(f"{job} ended with {status}; what is finished is kept, the same command goes on")


def result_file(args: argparse.Namespace, model: str, variant: str, seed: int) -> Path:
    """Where the figures of a run are kept; its settings are part of the name."""
    name = "".join(c for c in variant.replace(" ", "-") if c.isalnum() or c == "-")
    trained = [VARIANTS.get(variant.removesuffix(COSTS), {}), MODELS[model], BOUNDARIES[model], TRAINING]
    given = [args.evaluations, args.batch, args.pairs, args.samples, args.device]
    return Path(args.output) / "methods" / f"{model}_{name}_{seed}_{_key(trained, given)}.json"


def _key(*what: Any) -> str:
    return hashlib.sha256(json.dumps([*what, code()]).encode()).hexdigest()[:12]


def one(args: argparse.Namespace, model: str, variant: str, seed: int) -> None:
    """Train and measure one variant, or sample the teacher and make its pairs."""
    torch.set_num_threads(1)
    out = result_file(args, model, variant, seed)
    made_for = _key(MODELS[model], args.samples, args.pairs, args.device)
    clips, pairs = out.parent / f"{model}_clips_{seed}_{made_for}.pt", out.parent / f"{model}_pairs_{seed}_{made_for}"
    with tempfile.TemporaryDirectory(prefix="raydmd-methods-") as scratch:
        recipe = recipe_of(args, model, variant, seed, Path(scratch), pairs)
        bench = Bench(recipe, Path(scratch) / "conditions", torch.device(args.device))
        if variant == TEACHER:
            made = bench.teacher_samples()
            torch.save(made[:2], clips)
            make_all(bench, recipe_of(args, model, PAIRED, seed, Path(scratch), pairs), args, pairs)
            keep(out, bench.rows(made[0], made[1], made[2:]))
            return

        seconds: dict[str, float] = {}

        def train(name: str, cycles: int, warmup: int) -> tuple[Any, float]:
            sized = derive(recipe, {"name": name, "training": {"cycles": cycles, "fake_warmup": warmup}})
            start = time.process_time()
            with Counter(bench.network, args.batch) as count:
                end, checkpoint = bench.train(sized)
            seconds[name] = time.process_time() - start
            if end != "finished":
                raise SystemExit(f"{model} {variant} {seed}: the run {end}")
            return bench.student_samples(sized, checkpoint) if name == "run" else None, count.total

        phases, warmup = 1 + len(recipe.method.boundaries), recipe.training.fake_warmup
        costs = result_file(args, model, variant + COSTS, 0)  # the same for all seeds
        if not costs.is_file():
            per_cycle = train("probe", PROBE, 0)[1] / PROBE
            warm = train("warm", phases, warmup)[1] - phases * per_cycle  # all phases' warm-up
            keep(costs, [per_cycle, warm])
        per_cycle, warm = json.loads(costs.read_text(encoding="utf-8"))
        budget = args.evaluations * SHARES.get(variant, 1.0)
        cycles = max(phases, math.floor((budget - warm) / per_cycle))
        student, total = train("run", cycles, warmup)
        with torch.serialization.safe_globals([Samples]):
            reference, floor = torch.load(clips, weights_only=True)
        row = bench.rows(reference, floor, [student])[-1]
        row |= {"cycles": cycles, "evaluated": total, "warm_up": warm, "cpu": seconds["run"]}
        if recipe.method.regression:
            row["pairs"] = json.loads((pairs / COST).read_text(encoding="utf-8"))
        keep(out, row)


def make_all(bench: Bench, recipe: Recipe, args: argparse.Namespace, folder: Path) -> None:
    """The teacher's pairs of a seed, and what they cost."""
    from raydmd.pairs.make import begin, make_pairs
    from raydmd.pairs.origin import origin_of

    if (folder / COST).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    origin = origin_of(recipe, bench.family, bench.prompts, args.pairs)
    manifest = begin(folder, origin, recipe.model.negative_prompt, bench.prompts)
    with Counter(bench.network, args.batch) as count:
        make_pairs(folder, manifest, len(bench.prompts), bench.asks, ahead=1)
    keep(folder / COST, count.total)


class Counter:
    """Counts network evaluations per sample while it is entered: a forward is 1, one with gradient 3.

    Args:
        network: class of the networks that count.
        batch: samples that make one.
    """

    def __init__(self, network: type, batch: int) -> None:
        self.network, self.batch, self.total = network, batch, 0.0

    def __enter__(self) -> Self:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(module, self.network):
                value = output[0] if isinstance(output, tuple) else output.sample
                self.total += len(value) / self.batch * (3.0 if value.requires_grad else 1.0)

        self._handle = torch.nn.modules.module.register_module_forward_hook(hook)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def recipe_of(args: argparse.Namespace, model: str, variant: str, seed: int, folder: Path, pairs: Path) -> Recipe:
    """The recipe of a variant: the zoo's settings, another method."""
    method = MODELS[model] | VARIANTS[DMD2 if variant == TEACHER else variant]
    training = TRAINING | {"batch": args.batch} | method.pop("training", {})
    if method["name"] == "phased":
        method["boundaries"] = BOUNDARIES[model]
    if method.get("regression"):
        method["regression"] = method["regression"] | {"pairs": str(pairs)}
    return derive(
        Recipe(name="run", output=folder),
        {
            "seed": SEEDS_APART * seed,
            "model.path": model,
            "training": training,
            "method": method,
            "evaluation": {"samples": args.samples, "seed": 1_000_000 + 10 * seed},
        },
    )


def directions(shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The papers' directions beside what was measured, as Markdown."""
    rows = []
    for says, one_name, key, way, other_name in DIRECTIONS:
        pairs = [  # rows of a seed, since both share its prompts, its noise and its teacher's clips
            (one, other)
            for one, other in zip(shown.get(one_name, []), shown.get(other_name, []), strict=False)
            if one.get(key) is not None and other.get(key) is not None
        ]
        if not pairs:
            continue
        found = [[float(row[key]) for row in column] for column in zip(*pairs, strict=True)]
        low, high = interval(*found)
        clear = low > 0 or high < 0
        so = (mean(found[0]) > mean(found[1])) == (way == "above")
        verdict = ("yes" if so else "the contrary") if clear else "not told apart"
        if clear and so and key == TRUE:
            # An untrained student is the most diverse of all, since it has learnt no guidance yet.
            worse = mean(float(one["frechet"]) - float(other["frechet"]) for one, other in pairs) > 0
            verdict += ", at a worse Fréchet" if worse else ""
        form = COLUMNS[key][1]
        by = f"{form.format(low)} to {form.format(high)}" if math.isfinite(low) else "unknown"
        figures = " against ".join(form.format(mean(v)) for v in found)
        rows.append((says, f"{COLUMNS[key][0]} {figures}", by, by_chance(*found), verdict))
    surely = holm([row[3] for row in rows])
    lines = ["| the papers say | measured | difference | |", "|---|---|---|---|"]
    for (says, figures, by, _, verdict), sure in zip(rows, surely, strict=True):
        lines.append(f"| {says} | {figures} | {by} | {verdict}{' *' if sure else ''} |")
    return lines


def interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Where the mean of ``a - b`` lies with a probability of :data:`SURE`, by a t-test of pairs.

    Everywhere where nothing can be said: figures are quantised, and may differ by the same in all of a few seeds.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2 or stdev(differences) < TINY:
        return -math.inf, math.inf
    found = ttest_rel(a, b).confidence_interval(SURE)
    return float(found.low), float(found.high)


def by_chance(a: Sequence[float], b: Sequence[float]) -> float:
    """Probability of such differences between equal means, by the same test; 1 where nothing can be said."""
    return 1.0 if interval(a, b)[1] == math.inf else float(ttest_rel(a, b).pvalue)


def holm(probabilities: Sequence[float]) -> list[bool]:
    """Which stay below ``1 - SURE`` when corrected for their number."""
    told, left = set[int](), len(probabilities)
    for i in sorted(range(left), key=probabilities.__getitem__):
        if probabilities[i] * left >= 1 - SURE:
            break
        told.add(i)
        left -= 1
    return [i in told for i in range(len(probabilities))]


def write(args: argparse.Namespace) -> None:
    """Means and spreads over the seeds, as Markdown and as JSON."""
    lines, figures, seeds = [], {}, range(args.seeds)
    for model in args.models:
        teachers = [json.loads(result_file(args, model, TEACHER, s).read_text(encoding="utf-8")) for s in seeds]
        shown: dict[str, list[dict[str, Any]]] = {
            row["name"]: [rows[i] for rows in teachers] for i, row in enumerate(teachers[0])
        }
        for variant in asked(args, model):
            files = [result_file(args, model, variant, seed) for seed in seeds]
            shown[variant] = [json.loads(f.read_text(encoding="utf-8")) for f in files]
        columns = {
            k: c for k, c in COLUMNS.items() if any(row.get(k) is not None for rows in shown.values() for row in rows)
        }
        lines += [f"### {model}", "", "| | " + " | ".join(title for title, _ in columns.values()) + " |"]
        lines += ["|---|" + "---|" * len(columns)]
        figures[model] = shown
        for name, rows in shown.items():
            cells = []
            for key, (_, form) in columns.items():
                values = [float(row[key]) for row in rows if row.get(key) is not None]
                spread = f" ± {form.format(stdev(values))}" if len(values) > 1 and key != "cycles" else ""
                cells.append(form.format(mean(values)) + spread if values else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", *directions(shown), ""]
    hidden = ("only", "processes", "output")
    settings = {k: v for k, v in vars(args).items() if k not in hidden} | {"code": code()}
    lines.append(
        f"{args.seeds} seeds, mean ± standard deviation. Differences are intervals of {SURE:.0%} of a t-test of pairs "
        "by seed; two variants are told apart where theirs leaves out 0, and a star says that this holds with Holm's "
        "correction over a model's rows too. `dmd`'s pairs come on top of its evaluations. "
        f"{json.dumps(settings)}"
    )
    (args.output / "methods.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.output / "methods.json").write_text(json.dumps({"settings": settings, "rows": figures}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
