"""What the benchmarks on the zoo share: a teacher in this process, training without Ray, samples and their figures."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import raydmd
from raydmd.evaluation.evaluate import evaluate
from raydmd.evaluation.metrics import SMALLEST_GROUP, coverage
from raydmd.evaluation.samples import Samples, evaluation_prompts
from raydmd.guidance import Guidance
from raydmd.models import load_family, load_teacher
from raydmd.models.base import Conditions
from raydmd.models.places import locate
from raydmd.process import step_grid
from raydmd.rewards.classifier import ClassifierReward
from raydmd.rewards.engine import load_reward_engine
from raydmd.serving.engine import TeacherEngine
from raydmd.serving.local import LocalClient
from raydmd.training.checkpoint import STUDENT
from raydmd.training.clips import Sampler, ask, decoded, draw_here
from raydmd.training.events import EventLog
from raydmd.training.export import load_student, solver, student_experts
from raydmd.training.pairing import check_pairs, open_pairs
from raydmd.training.session import FolderSession
from raydmd.training.worker import Job, Worker
from raydmd.zoo.judge import AttributeJudge

if TYPE_CHECKING:
    import torch

    from raydmd.models.base import Experts
    from raydmd.recipe import Recipe

HERE = Path(__file__).parent
MODELS: dict[str, dict[str, Any]] = {
    "wan22-tiny": {"shift": 5.0, "guidance": 4.0},
    "sd35-tiny": {"shift": 3.0, "guidance": 3.5},
}
"""Settings of a method that are the model's."""
BOUNDARIES = {"wan22-tiny": [0.875], "sd35-tiny": [0.8]}
"""Of two phases of two steps each, by model."""
TEACHER_STEPS = 40
LOW = 0.05
"""Share of the reference's samples that count as low in reward."""
SUBSETS = 50
"""Random choices of equally many right samples of each prompt, over which their coverage is averaged."""


class Bench:
    """A zoo model with its teacher in this process.

    Args:
        recipe: names model, method, seed and evaluation.
        cache: folder for encoded prompts.
        device: for everything.
    """

    def __init__(self, recipe: Recipe, cache: Path, device: torch.device) -> None:
        self.recipe, self.cache, self.device = recipe, cache, device
        place = locate(recipe.model)
        self.family = load_family(recipe.model)
        self.judge = AttributeJudge.load(place.judge)
        self.prompts = place.prompts.read_text(encoding="utf-8").splitlines()
        self.table = Conditions.read(self.family.encode(self.prompts, cache))
        self.teacher = load_teacher(self.family, "fp32", device=device)
        self.asks = LocalClient(TeacherEngine(self.teacher, self.table))
        self.network = type(next(iter(self.teacher.modules.values())).network)
        e = recipe.evaluation
        self._texts = evaluation_prompts(e.samples, seed=e.seed, language=self.judge.language)
        kept = recipe.data.model_copy(update={"cache": cache})
        self._asked = ask(recipe.model_copy(update={"data": kept}), self.family, self._texts, device)

    def sample(self, name: str, experts: Experts, grid: list[float], guidance: Guidance, **options: Any) -> Samples:
        """Clips of the evaluation's prompts."""
        sampler = Sampler(name, name, grid, guidance, **options)
        return decoded(self._asked, sampler, draw_here(self._asked, sampler, experts))

    def teacher_samples(self) -> list[Samples]:
        """The reference (the teacher on other noise), the teacher, and the teacher undistilled at few steps."""
        m = self.recipe.method
        few, full = step_grid(m.steps, m.shift), step_grid(TEACHER_STEPS, m.shift)
        guided = Guidance(m.guidance)
        made = [
            self.sample("reference", self.teacher, full, guided, salt=1),
            self.sample("teacher", self.teacher, full, guided),
            self.sample(f"undistilled, {m.steps} steps unguided", self.teacher, few, Guidance()),
            self.sample(f"undistilled, {m.steps // 2} steps guided", self.teacher, few[::2], guided),
        ]
        for module in self.teacher.modules.values():  # sampling leaves it on the CPU
            module.to(self.device)
        return made

    def train(self, recipe: Recipe) -> tuple[str, Path]:
        """Train without Ray; what it ended as, and the last checkpoint."""
        folder = recipe.folder
        folder.mkdir(parents=True, exist_ok=True)
        rewards = None
        if recipe.method.adapt:
            rewards = LocalClient(load_reward_engine(recipe, self.prompts, str(self.device)))
        pairing = None
        if paired := check_pairs(recipe, self.family):
            pairing = open_pairs(recipe, self.family, self.family.encode(paired, self.cache), self.device)
        job = Job(recipe=recipe, family=self.family, conditions=self.table, pairing=pairing)
        session = FolderSession(folder, self.device)
        worker = Worker(job, self.asks, session, EventLog(folder / "events.jsonl"), rewards)
        end, checkpoint = worker.run(), max(folder.glob("cycle-*"))
        if not (checkpoint / STUDENT).is_dir():  # a stop's checkpoint is for resuming
            worker.student.settle()  # the average, as of a finished run
            worker.student.write(checkpoint / STUDENT, rank=0)
        return end, checkpoint

    def student_samples(self, recipe: Recipe, checkpoint: Path) -> Samples:
        """What a checkpoint's student makes of the evaluation's prompts."""
        student = student_experts(recipe, self.family, load_student(recipe, self.family, checkpoint))
        grid = step_grid(recipe.method.steps, recipe.method.shift)
        return self.sample("student", student, grid, Guidance(), renoise=solver(recipe) == "renoise")

    def rows(self, reference: Samples, floor: Samples, others: list[Samples]) -> list[dict[str, Any]]:
        """Figures of the reference, the floor and others, with the held-out reward."""
        rows = evaluate(reference, floor, others, self.judge).to_json()["rows"]
        return [r | self._rewarded(s, reference) for r, s in zip(rows, [reference, floor, *others], strict=True)]

    def _rewarded(self, samples: Samples, reference: Samples) -> dict[str, float]:
        """The evaluation judge's reward, and the share below the reference's lowest :data:`LOW`."""
        reward = ClassifierReward(self.judge)
        own, theirs = reward(samples.clips, samples.prompts), reward(reference.clips, reference.prompts)
        found = {"reward": float(own.mean()), "low": float((own < theirs.quantile(LOW)).float().mean())}
        right = (own > math.log(0.5)).tolist()  # on average: what shows something else is no mode of its prompt
        predictions = self.judge.predict(samples.clips)
        together: dict[str, list[int]] = {}
        for i, prompt in enumerate(samples.prompts):
            if right[i]:
                together.setdefault(prompt, []).append(i)
        # As many of every prompt: an entropy of fewer samples is lower, whatever they show.
        together = {p: rows for p, rows in together.items() if len(rows) >= SMALLEST_GROUP}
        draw, seen = random.Random(0), []
        for _ in range(SUBSETS if together else 0):
            kept = [i for rows in together.values() for i in draw.sample(rows, SMALLEST_GROUP)]
            part = {k: v[kept] for k, v in predictions.items()}
            prompts = [samples.prompts[i] for i in kept]
            seen.append(coverage(prompts, part, self.judge.language)["grouped"].get("mean", {}).get("entropy"))
        if seen and None not in seen:
            found["coverage_right"] = fmean(seen)
        return found


@cache
def code() -> str:
    """The state of what is measured: the imported package and this file."""
    digest, root = hashlib.sha256(), Path(raydmd.__file__).parent
    found = sorted(f for f in root.rglob("*") if f.is_file() and f.suffix in (".py", ".safetensors", ".json"))
    for file in (*found, Path(__file__)):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:10]


def keep(file: Path, found: Any) -> None:
    """Write JSON at once or not at all."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
