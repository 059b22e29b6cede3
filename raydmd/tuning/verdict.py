"""Is what a sweep has found better than what it began from? Both students on seeds that no trial has seen.

Each was trained once: what differs by less than two trainings of one recipe do is luck (``repeats`` tells how much).
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from raydmd.errors import InputError
from raydmd.recipe import derive
from raydmd.serving.order import ANYWHERE
from raydmd.training.folder import finished, locked, same_run, trained
from raydmd.training.run import Surroundings, awaited, conduct, prepare
from raydmd.training.students import EVALUATION

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from raydmd.recipe import Recipe
    from raydmd.serving.pool import Pool
    from raydmd.tuning.rows import Row
    from raydmd.tuning.spec import Sweep

FILE = "verdict.json"
"""In a sweep's folder."""
DEFAULT = "default"
"""Name of the run of the recipe that a sweep began from."""
APART = 10_000
"""Between two held-out seeds; evaluations count on from theirs, by less."""


@dataclass(frozen=True)
class Verdict:
    """Figures of two students on the same held-out seeds.

    Attributes:
        trial: that was the sweep's best.
        seeds: of the evaluations.
        default: a list for each objective, in the order of seeds, of the recipe as it was.
        found: the same of the best trial.
    """

    trial: int
    seeds: list[int]
    default: dict[str, list[float]]
    found: dict[str, list[float]]

    def better(self, name: str, goal: str) -> int:
        """On how many seeds what was found is better in an objective."""
        pairs = zip(self.found[name], self.default[name], strict=True)
        return sum(a < b if goal == "min" else a > b for a, b in pairs)

    def text(self, objectives: Mapping[str, str]) -> str:
        """As a table, and a sentence on the first objective."""
        head = " | ".join(f"{name} {'↓' if goal == 'min' else '↑'}" for name, goal in objectives.items())
        lines = [f"| on {len(self.seeds)} held-out seeds | {head} |", "|---" * (len(objectives) + 1) + "|"]
        for title, figures in (("the recipe as it is", self.default), (f"trial {self.trial:04d}", self.found)):
            cells = " | ".join(_spread(figures[name]) for name in objectives)
            lines.append(f"| {title} | {cells} |")
        name, goal = next(iter(objectives.items()))
        count, of = self.better(name, goal), len(self.seeds)
        word = "beats" if count == of else "does NOT beat"
        lines.append(f"trial {self.trial:04d} {word} the recipe: {name} is better on {count} of {of} seeds")
        return "\n".join(lines)


def kept(folder: Path, best: Row, spec: Sweep) -> Verdict | None:
    """What an earlier command found of the same trial."""
    try:
        found = Verdict(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if spec.verdict and (found.trial, len(found.seeds)) == (best.root, spec.verdict.seeds) else None


def judge(spec: Sweep, base: Recipe, best: Row, pool: Pool | None, stop: Path, tags: Mapping[str, str]) -> Verdict:
    """Train the recipe as it is, unless that is done, and compare.

    Args:
        spec: the sweep.
        base: the recipe that its trials differ from; their output is its.
        best: a finished trial whose folder is here.
        pool: of the teacher, as far as evaluations ask it.
        stop: a file that stops it.
        tags: of the MLflow run.

    Raises:
        Held: if another cluster is at it.
        RunStopped: and what else :func:`raydmd.training.run.conduct` does.
    """
    assert spec.verdict is not None
    print(f"verdict: the recipe as it is, against trial {best.root:04d}", flush=True)
    default = derive(base, {"name": DEFAULT})
    prepared = prepare(default)
    with locked(default.folder):
        if not finished(default.folder):
            same_run(default, default.folder)
            conduct(prepared, stop, surroundings=Surroundings({**tags, "raydmd.trial": DEFAULT}, tracked=True))
    found = derive(base, {**best.changes, "name": f"{best.root:04d}"})
    seeds = [base.evaluation.seed + APART * (k + 1) for k in range(spec.verdict.seeds)]
    figures: dict[str, dict[str, list[float]]] = {}
    for recipe in (default, found):
        rows = [_measured(recipe, seed, prepared.prompts, pool, stop) for seed in seeds]
        figures[recipe.name] = {name: [row[f"{EVALUATION}{name}"] for row in rows] for name in spec.objectives}
    verdict = Verdict(best.root, seeds, figures[default.name], figures[found.name])
    text = json.dumps({k: getattr(verdict, k) for k in ("trial", "seeds", "default", "found")}, indent=1)
    (base.output.parent / FILE).write_text(text + "\n", encoding="utf-8")
    return verdict


def _measured(recipe: Recipe, seed: int, prompts: list[str], pool: Pool | None, stop: Path) -> dict[str, float]:
    from raydmd.training.finish import final_figures

    checkpoint = trained(recipe.folder)
    if checkpoint is None:
        raise InputError(f"{recipe.folder} has no final checkpoint any more; the verdict needs it")
    p, held_out = recipe.placement, derive(recipe, {"evaluation.seed": seed})
    task = ray.remote(final_figures).options(
        num_cpus=min(p.teacher_cpus, p.worker_cpus),
        num_gpus=p.worker_gpus if pool else p.teacher_gpus or p.worker_gpus,
        max_retries=1,
        scheduling_strategy=ANYWHERE,
    )
    reference = task.remote(held_out, str(checkpoint), prompts, pool.client_spec() if pool else None)
    found: dict[str, float] = awaited(reference, held_out, stop, pool, "the verdict")
    return found


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"
