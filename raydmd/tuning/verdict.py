"""Is what a sweep has found better than what it began from? Both students on seeds that no trial has seen.

Each is trained as often as the sweep repeats a setting. Of one training each, what differs by less than two trainings
of one recipe do is luck.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import ray

from raydmd.errors import InputError
from raydmd.recipe import derive
from raydmd.serving.order import ANYWHERE
from raydmd.training.folder import finished, same_run, trained
from raydmd.training.lock import locked
from raydmd.training.prepare import prepare
from raydmd.training.run import Surroundings, awaited, conduct
from raydmd.training.students import EVALUATION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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
        trainings: of each; their figures follow one another.
    """

    trial: int
    seeds: list[int]
    default: dict[str, list[float]]
    found: dict[str, list[float]]
    trainings: int = 1

    def better(self, name: str, goal: str) -> int:
        """How often what was found is better in an objective."""
        pairs = zip(self.found[name], self.default[name], strict=True)
        return sum(a < b if goal == "min" else a > b for a, b in pairs)

    def text(self, objectives: Mapping[str, str]) -> str:
        """As a table, and a sentence on the first objective."""
        head = " | ".join(f"{name} {'↓' if goal == 'min' else '↑'}" for name, goal in objectives.items())
        each = f", {self.trainings} trainings each" if self.trainings > 1 else ""
        lines = [f"| on {len(self.seeds)} held-out seeds{each} | {head} |", "|---" * (len(objectives) + 1) + "|"]
        for title, figures in (("the recipe as it is", self.default), (f"trial {self.trial:04d}", self.found)):
            cells = " | ".join(_spread(figures[name]) for name in objectives)
            lines.append(f"| {title} | {cells} |")
        return "\n".join([*lines, self.sentence(objectives)])

    def sentence(self, objectives: Mapping[str, str]) -> str:
        """Whether what was found is better in the first objective, and how often in the others."""
        pairs = "pairs of seed and training" if self.trainings > 1 else "held-out seeds"
        name, goal = next(iter(objectives.items()))
        of = len(self.found[name])
        word = "beats" if self.better(name, goal) == of else "does NOT beat"
        told = [f"{k} is better on {self.better(k, g)} of {of}" for k, g in objectives.items()]
        return f"trial {self.trial:04d} {word} the recipe: {', '.join(told)} {pairs} (± between them)"


def kept(folder: Path, best: Row, spec: Sweep) -> Verdict | None:
    """What an earlier command found of the same trial."""
    try:
        found = Verdict(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if spec.verdict and (found.trial, len(found.seeds)) == (best.root, spec.verdict.seeds) else None


def judge(
    spec: Sweep,
    base: Recipe,
    best: Row,
    rows: Sequence[Row],
    pool: Pool | None,
    stop: Path,
    tags: Mapping[str, str],
) -> Verdict:
    """Train the recipe as it is, as often as the best setting was trained here, unless that is done, and compare.

    Args:
        spec: the sweep.
        base: the recipe that its trials differ from; their output is its.
        best: a finished trial whose folder is here, and of its repeats some.
        rows: all trials.
        pool: of the teacher, as far as evaluations ask it.
        stop: a file that stops it.
        tags: of the MLflow run.

    Raises:
        Held: if another cluster is at it.
        RunStopped: and what else :func:`raydmd.training.run.conduct` does.
    """
    assert spec.verdict is not None
    print(f"verdict: the recipe as it is, against trial {best.root:04d}", flush=True)
    own = {row.root: row for row in rows if row.root in (best.runs or (best.root,)) and row.values}
    found = [derive(base, {**row.changes, "name": f"{root:04d}"}) for root, row in sorted(own.items())]
    found = [recipe for recipe in found if trained(recipe.folder) is not None]  # others' are elsewhere
    if not found:
        raise InputError(f"{base.output / f'{best.root:04d}'} has no final checkpoint any more; the verdict needs it")
    default = [
        derive(base, {"name": f"{DEFAULT}-{k}" if k else DEFAULT, "seed": base.seed + k}) for k in range(len(found))
    ]
    for recipe in default:
        prepared = prepare(recipe)
        with locked(recipe.folder) as hold:
            if not finished(recipe.folder):
                same_run(recipe, recipe.folder)
                conduct(
                    prepared,
                    stop,
                    surroundings=Surroundings(hold.token, {**tags, "raydmd.trial": recipe.name}, tracked=True),
                )
    seeds = [base.evaluation.seed + APART * (k + 1) for k in range(spec.verdict.seeds)]

    def figures(recipes: Sequence[Recipe]) -> dict[str, list[float]]:
        measured = [_measured(recipe, seed, prepared.prompts, pool, stop) for recipe in recipes for seed in seeds]
        return {name: [row[f"{EVALUATION}{name}"] for row in measured] for name in spec.objectives}

    verdict = Verdict(best.root, seeds, figures(default), figures(found), len(found))
    (base.output.parent / FILE).write_text(json.dumps(asdict(verdict), indent=1) + "\n", encoding="utf-8")
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
    reference = task.remote(held_out, checkpoint, prompts, pool.client_spec() if pool else None)
    found: dict[str, float] = awaited(reference, held_out, stop, pool, "the verdict")
    return found


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"
