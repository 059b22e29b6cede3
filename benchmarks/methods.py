"""Every method beside every other, at equal compute: python benchmarks/methods.py (or: make methods).

Each variant trains in a process of its own, on one thread or on the GPU, for the same number of network
evaluations (a forward counts 1 a sample, a forward with gradient 3), with the same rates, batch and seeds.
Compared is with the teacher at full steps on other noise. Results of finished runs are kept in
``--output/methods/`` by their settings and the commit, and not repeated; table and figures go to
``--output/methods.md`` and ``methods.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).parent
VARIANTS: dict[str, dict[str, Any]] = {
    "dmd2": {"name": "dmd2"},
    "dmd2, not normalised": {"name": "dmd2", "normaliser": "none"},
    "phased": {"name": "phased"},
    "phased, normalised": {"name": "phased", "normaliser": "distance"},
    "decoupled (hybrid)": {"name": "decoupled"},
    "decoupled, constrained": {"name": "decoupled", "decouple": {"schedule": "constrained"}},
    "decoupled, full": {"name": "decoupled", "decouple": {"schedule": "full"}},
    "decoupled, coupled": {"name": "decoupled", "decouple": {"schedule": "coupled"}},
    "CA alone": {"name": "decoupled", "decouple": {"match": 0.0}},
    "DM alone": {"name": "decoupled", "decouple": {"augment": 0.0}},
    "amd": {"name": "amd"},
    "dp_dmd": {"name": "dp_dmd"},
}
COLUMNS = {
    "cycles": ("updates", "{:.0f}"),
    "frechet": ("Fréchet", "{:.1f}"),
    "joint": ("joint", "{:.3f}"),
    "coverage_entropy": ("coverage entropy", "{:.3f}"),
    "missing_modes": ("missing modes", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "flow": ("flow", "{:.2f}"),
    "saturation": ("saturation", "{:.3f}"),
}
TEACHER, REFERENCE, UNDISTILLED = "teacher", "reference", "undistilled"
PROBE = 12
"""Cycles over which a variant's network evaluations are counted before it trains."""


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wan22-tiny"], help="zoo names")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=float, default=3200.0, help="network evaluations, times the batch")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        model, variant, seed = json.loads(args.only)
        one(args, model, variant, seed)
        return
    folder = args.output / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    references = [(model, TEACHER, 0) for model in args.models]
    run_all(args, references)  # students are measured against their clips
    run_all(args, [(m, v, s) for s in range(args.seeds) for m in args.models for v in args.variants])
    write(args)


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
            code = process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            running.append((job, process))
            continue
        if code:
            for _, other in running:
                other.terminate()
            raise SystemExit(f"{job} ended with {code}; what is finished is kept, the same command goes on")


def result_file(args: argparse.Namespace, model: str, variant: str, seed: int) -> Path:
    """Where the figures of a run are kept; its settings are part of the name."""
    settings = f"{args.evaluations:g}-{args.batch}-{args.guidance:g}-{args.samples}-{commit()}"
    name = variant.replace(" ", "-").replace(",", "").strip("()")
    return Path(args.output) / "methods" / f"{model}_{name}_{seed}_{settings}.json"


@cache
def commit() -> str:
    """The commit that is measured, with a mark if files differ from it."""
    ask = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def one(args: argparse.Namespace, model: str, variant: str, seed: int) -> None:
    """Train and measure one variant, or sample the teacher."""
    import torch

    from raydmd.evaluation.evaluate import evaluate
    from raydmd.evaluation.samples import Samples, evaluation_prompts
    from raydmd.guidance import Guidance
    from raydmd.models import load_conditions, load_family, load_teacher
    from raydmd.models.places import locate
    from raydmd.process import step_grid
    from raydmd.rewards.engine import load_reward_engine
    from raydmd.serving.engine import TeacherEngine
    from raydmd.serving.local import LocalClient
    from raydmd.training.events import EventLog
    from raydmd.training.export import load_student, solver, student_experts
    from raydmd.training.finish import Sampler
    from raydmd.training.session import FolderSession
    from raydmd.training.worker import Job, Worker
    from raydmd.zoo.judge import AttributeJudge

    torch.set_num_threads(1)
    device = torch.device(args.device)
    out = result_file(args, model, variant, seed)
    clips = out.parent / f"{model}_{args.guidance:g}_{args.samples}.pt"
    with tempfile.TemporaryDirectory(prefix="raydmd-methods-") as scratch:
        recipe = recipe_of(args, model, variant, seed, Path(scratch))
        recipe.folder.mkdir(parents=True)
        family, place = load_family(recipe.model), locate(recipe.model)
        judge = AttributeJudge.load(place.judge)
        texts = evaluation_prompts(args.samples, seed=recipe.evaluation.seed)
        prompts = place.prompts.read_text(encoding="utf-8").splitlines()
        table = load_conditions(family.encode(prompts, Path(scratch) / "conditions"))
        unique = list(dict.fromkeys(texts))
        asked = load_conditions(family.encode(unique, Path(scratch) / "conditions"))
        rows = [1 + unique.index(t) for t in texts]
        teacher = load_teacher(family, "fp32", device=device)
        few, full = step_grid(recipe.method.steps, recipe.method.shift), step_grid(40, recipe.method.shift)
        guided, plain = Guidance(args.guidance), Guidance()

        def sampled(name: str, experts: Any, grid: list[float], guidance: Guidance, **options: Any) -> Samples:
            made = Sampler(name, name, experts, grid, guidance, **options)
            return made.run(recipe, family, asked, rows, texts, device)

        if variant == TEACHER:
            made = [
                sampled(REFERENCE, teacher, full, guided, salt=1),
                sampled(TEACHER, teacher, full, guided),
                sampled(f"{UNDISTILLED}, {recipe.method.steps} steps unguided", teacher, few, plain),
                sampled(f"{UNDISTILLED}, {recipe.method.steps // 2} steps guided", teacher, few[::2], guided),
            ]
            torch.save(made, clips)
            out.write_text(json.dumps(evaluate(made[0], made[1], made[2:], judge).to_json()["rows"], indent=1))
            return
        session = FolderSession(recipe.folder, device)
        asks = LocalClient(TeacherEngine(teacher, table))
        rewards = LocalClient(load_reward_engine(recipe, prompts, args.device)) if recipe.method.adapt else None

        def train(cycles: int, warmup: int, folder: Path) -> Any:
            given = {"cycles": cycles, "fake_warmup": warmup}
            sized = recipe.model_copy(update={"training": recipe.training.model_copy(update=given)})
            session.folder = folder
            folder.mkdir(parents=True, exist_ok=True)
            job = Job(recipe=sized, family=family, conditions=table)
            Worker(job, asks, session, EventLog(folder / "events.jsonl"), rewards).run()
            return load_student(sized, family, max(folder.glob("cycle-*final")))

        count = Counter(type(next(iter(teacher.modules.values())).network), args.batch)
        with count:
            train(PROBE, 0, Path(scratch) / "probe")
        phases, warmup = 1 + len(recipe.method.boundaries), recipe.training.fake_warmup
        per_cycle = count.total / PROBE
        with count:
            train(phases, warmup, Path(scratch) / "warm")
        warm = count.total - (PROBE + phases) * per_cycle  # all phases' warm-up; the run below has the same
        cycles = max(phases, math.floor((args.evaluations - warm) / per_cycle))
        student = student_experts(recipe, family, train(cycles, warmup, recipe.folder))
        for module in student.modules.values():
            module.to(device)
        made = sampled("student", student, few, plain, renoise=solver(recipe) == "renoise")
        reference, floor, *_ = torch.load(clips, weights_only=False)
        row = evaluate(reference, floor, [made], judge).row("student")
        row |= {"cycles": cycles, "per_cycle": per_cycle, "warm_up": warm}
        out.write_text(json.dumps(row, indent=1))


class Counter:
    """Counts network evaluations per sample while it is entered: a forward is 1, one with gradient 3.

    Args:
        network: class of the networks that count.
        batch: samples that make one.
    """

    def __init__(self, network: type, batch: int) -> None:
        self.network, self.batch, self.total = network, batch, 0.0

    def __enter__(self) -> None:
        import torch

        def hook(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(module, self.network):
                value = output[0] if isinstance(output, tuple) else output.sample
                self.total += len(value) / self.batch * (3.0 if value.requires_grad else 1.0)

        self._handle = torch.nn.modules.module.register_module_forward_hook(hook)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def recipe_of(args: argparse.Namespace, model: str, variant: str, seed: int, folder: Path) -> Any:
    """The recipe of a variant: the zoo's settings, another method."""
    from raydmd.recipe import Recipe, derive

    training = {
        "batch": args.batch,
        "fake_updates": 3,
        "fake_warmup": 30,
        "student": {"rate": 2e-4, "lora": None},
        "fake": {"rate": 6e-4},
        "precision": "fp32",
        "sharding": "ddp",
        "ema": 0.99,
        "decay": 0.4,
    }
    method = {"name": "dmd2"} if variant == TEACHER else VARIANTS[variant]
    return derive(
        Recipe(name="run", output=folder),
        {
            "seed": seed,
            "model.path": model,
            "training": training,
            "method": method | {"guidance": args.guidance},
            "evaluation": {"samples": args.samples},
        },
    )


def write(args: argparse.Namespace) -> None:
    """Means and spreads over the seeds, as Markdown and as JSON."""
    lines, figures = [], {}
    for model in args.models:
        shown = {
            row["name"]: [row] for row in json.loads(result_file(args, model, TEACHER, 0).read_text(encoding="utf-8"))
        }
        for variant in args.variants:
            files = [result_file(args, model, variant, seed) for seed in range(args.seeds)]
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
        lines.append("")
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("only", "processes")
    }
    lines.append(f"{args.seeds} seeds, mean ± standard deviation; {json.dumps(settings)}")
    (args.output / "methods.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.output / "methods.json").write_text(json.dumps({"settings": settings, "rows": figures}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
