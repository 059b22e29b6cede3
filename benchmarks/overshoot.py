"""Where guided distribution matching comes to rest, in closed form: python benchmarks/overshoot.py.

A prompt is a Gaussian inside a wide one, so that the teacher's predictions, and those of a perfect fake score, are
known exactly. The student is a Gaussian too, and moves along the gradient that the real score terms give its samples
until it rests: that is what a method's schedule and normaliser make of a teacher's guidance once nothing is left to
blame on networks. The teacher's own guided sampler stands above it. Prints a table, writes ``results/overshoot.json``.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from bench import HERE, code, keep
from torch import Tensor

from raydmd.draws import Draws
from raydmd.guidance import Guidance
from raydmd.methods.presets import build_method
from raydmd.methods.rollout import Sample
from raydmd.methods.terms import Answer, Query
from raydmd.models.base import Routing
from raydmd.process import RectifiedFlow, step_grid
from raydmd.recipe_method import Method as Settings

MEAN, STD = 1.0, 0.32
"""Of the prompt's samples, in every dimension."""
WIDE = 1.05
"""Standard deviation without a prompt, around 0."""
BATCH, WIDTH = 64, 64
SCHEDULES = ("coupled", "full", "constrained", "hybrid")
NORMALISERS = ("x0", "none", "distance", "noisy_distance")
TIMES = {"uniform": 1.0, "shifted": 5.0}
"""Where the scores are taken, as a shift of uniform times."""
SAMPLER_STEPS = 200
REST = 0.3
"""Share of the updates, the last ones, whose mean is where the student rests."""


def main() -> None:
    """Let every combination come to rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "overshoot.json")
    args = parser.parse_args()
    print(f"prompt: mean {MEAN}, standard deviation {STD}\n")
    print("| guidance | times | normaliser | " + " | ".join(SCHEDULES) + " |\n|---|---|---|" + "---|" * len(SCHEDULES))
    rows = []
    for scale in args.guidance:
        mean, std = sampled(scale)
        rows.append({"guidance": scale, "sampler": [mean, std]})
        print(f"| {scale:g} | | the teacher's sampler | {mean:.2f} ± {std:.2f} | | | |", flush=True)
        for (times, shift), normaliser in product(TIMES.items(), NORMALISERS):
            common = {"guidance": scale, "normaliser": normaliser, "times_shift": shift}
            found = {s: rest(common | {"decouple": {"schedule": s}}, args.updates) for s in SCHEDULES}
            rows.append(common | found)
            cells = " | ".join(f"{m:.2f} ± {d:.2f}" for m, d in found.values())
            print(f"| {scale:g} | {times} | {normaliser} | {cells} |", flush=True)
            keep(args.output, {"settings": {"updates": args.updates, "code": code()}, "rows": rows})


def predicted(x_t: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """Clean prediction of a Gaussian under the rectified flow, shape of ``x_t``."""
    t = t.view(-1, 1)
    gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
    return mean + gain * (x_t - (1 - t) * mean)


def answer(query: Query) -> Answer:
    """The teacher's, exact."""
    cond, uncond = predicted(query.x_t, query.t, MEAN, STD), predicted(query.x_t, query.t, 0.0, WIDE)
    return Answer(value=cond, uncond=uncond) if query.split else Answer(value=query.guidance.combine(cond, uncond))


def fake_score(query: Query, *, mean: float, std: float) -> Tensor:
    """A perfect one."""
    return predicted(query.x_t, query.t, mean, std)


def rest(settings: dict[str, Any], updates: int) -> tuple[float, float]:
    """Mean and standard deviation at which the student comes to rest."""
    method = build_method(Settings(name="decoupled", **settings), Routing(("one",)), RectifiedFlow(), "flow")
    (phase,) = method.phases
    mean, std, seen = MEAN, STD, []
    size = 0.0
    for i in range(updates):
        draws = Draws(0, f"{i}", range(BATCH))
        x = mean + std * draws.normal("sample", (WIDTH,))
        entered = method.rollout.grid[i % (len(method.rollout.grid) - 1)]
        level = torch.zeros(BATCH)
        sample = Sample(x=x, x0=x, s=level, exit_step=0, entered=entered, noise=x)
        queries = method.score.queries(sample, phase, draws, 0.0)
        fake = partial(fake_score, mean=mean, std=std)
        gradient = method.score.gradient(sample, queries, [answer(q) for q in queries], fake, None, 0.0)
        size += (float(gradient.abs().mean()) - size) / min(i + 1, 100)
        rate = 0.02 / (1 + 4 * i / updates) / size
        wider = float(((x - mean) * (gradient - gradient.mean())).mean()) / std**2
        mean -= rate * float(gradient.mean())
        std *= min(max(1 - rate * wider, 0.9), 1.1)
        seen.append((mean, std))
    last = torch.tensor(seen[-int(REST * updates) :]).mean(0)
    return float(last[0]), float(last[1])


def sampled(scale: float) -> tuple[float, float]:
    """Mean and standard deviation of what the guided teacher's deterministic sampler makes."""
    grid, guidance = step_grid(SAMPLER_STEPS, Settings().shift), Guidance(scale)
    x = Draws(0, "sampler", range(BATCH)).normal("noise", (WIDTH,))
    for now, then in pairwise(grid):
        t = torch.full((BATCH,), now)
        x0 = guidance.combine(predicted(x, t, MEAN, STD), predicted(x, t, 0.0, WIDE))
        x = x + (then - now) / now * (x - x0)
    return float(x.mean()), float(x.std())


if __name__ == "__main__":
    main()
