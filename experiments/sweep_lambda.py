"""Sweep of DP-DMD's lambda: how strongly, and for how many of the teacher's steps, the first step is anchored.

The paper (arXiv:2602.03139) trades quality against diversity by it and takes 0.05 with K = 5 of 30: two objectives, and
their front. Without arguments: twelve trials with early stopping on the zoo's sd35-tiny, one teacher for all. With
--model and --prompts: the same space on real weights.
"""

from dp_dmd_sd35 import PAPER as DP_DMD

from raydmd.cli_sweep import sweep_experiment
from raydmd.recipe import derive
from raydmd.zoo.settings import SWEPT, on_zoo

SWEEP = {
    "name": "lambda",
    "objectives": {"frechet": "min", "coverage_entropy": "max"},
    "space": {
        "method.anchor.weight": {"low": 0.005, "high": 1.0, "log": True},
        "method.anchor.steps": {"low": 2, "high": 15},
        "method.guidance": {"low": 2.0, "high": 5.0},
    },
    "search": {"kind": "tpe", "startup": 6},
    "stopping": {"reduction": 3.0},
    "budget": {"trials": 12},
    "verdict": {"seeds": 3},
}

PAPER = derive(DP_DMD, {"evaluation": {"every": 200, "samples": 64}})
ZOO = on_zoo(DP_DMD, "sd35-tiny", cycles=180, **SWEPT)

if __name__ == "__main__":
    sweep_experiment(zoo=ZOO, paper=PAPER, sweep=SWEEP, doc=__doc__)
