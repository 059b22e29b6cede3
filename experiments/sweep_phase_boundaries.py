"""Sweep of Phased DMD's phases: how many, which steps each has, and at which noise levels they end.

Every split gives each phase a step, whatever is drawn (arXiv:2510.27684 has two phases, at 0.875). Without arguments:
twelve trials with early stopping on the zoo's wan22-tiny, one teacher for all. With --model and --prompts: the same
space on real weights.
"""

from phased_wan22 import PAPER as PHASED

from raydmd.cli_sweep import sweep_experiment
from raydmd.recipe import derive
from raydmd.zoo.settings import SWEPT, on_zoo

SWEEP = {
    "name": "phase-boundaries",
    "objectives": {"frechet": "min", "dynamic_degree": "max"},
    "space": {
        "method.boundaries": {"phases": [1, 2]},
        "method.times_shift": {"low": 1.0, "high": 8.0},
        "training.fake_updates": [2, 3, 5],
    },
    "search": {"kind": "tpe", "startup": 6},
    # A phase that has not begun is the teacher's still: rungs say less than elsewhere, so more go on.
    "stopping": {"reduction": 2.0, "grace": 3},
    "budget": {"trials": 12},
    "verdict": {"seeds": 3},
}

PAPER = derive(PHASED, {"evaluation": {"every": 200, "samples": 64}})
ZOO = on_zoo(PHASED, "wan22-tiny", cycles=180, **SWEPT)

if __name__ == "__main__":
    sweep_experiment(zoo=ZOO, paper=PAPER, sweep=SWEEP, doc=__doc__)
