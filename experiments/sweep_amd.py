"""Sweep of AMD's strengths: how far rewards move the weights of matching and augmentation.

Without arguments: twelve trials with early stopping on the zoo's sd35-tiny, one teacher and one reward for all; what
trains is rewarded by one judge and measured by another. With --model and --prompts: the same space on real weights.
"""

from amd_sdxl import PAPER as AMD
from amd_sdxl import REWARDS

from raydmd.cli_sweep import sweep_experiment
from raydmd.recipe import derive
from raydmd.zoo.settings import SWEPT, on_zoo

SWEEP = {
    "name": "amd",
    "objectives": {"frechet": "min", "joint": "max"},
    "space": {
        "method.adapt.strength": {"low": 0.1, "high": 1.0},
        "method.adapt.fake_strength": {"low": 0.0, "high": 1.0},
        "method.guidance": {"low": 2.0, "high": 6.0},
    },
    "search": {"kind": "tpe", "startup": 6},
    "stopping": {"reduction": 3.0},
    "budget": {"trials": 12},
    "verdict": {"seeds": 3},
}

PAPER = derive(AMD, {"evaluation": {"every": 1000, "samples": 64}})
ZOO = on_zoo(AMD, "sd35-tiny", cycles=180, **REWARDS, **{"method.shift": 3.0, "method.guidance": 3.5}, **SWEPT)

if __name__ == "__main__":
    sweep_experiment(zoo=ZOO, paper=PAPER, sweep=SWEEP, doc=__doc__)
