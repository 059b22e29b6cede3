"""Sweep of Decoupled DMD's schedules: where guidance is augmented, where distributions are matched, and how strongly.

The paper's claim (arXiv:2511.22677, section 4): CA wants levels cleaner than the student's input, DM all of them.
Without arguments: twelve trials with early stopping on the zoo's sd35-tiny, one teacher for all, about a quarter of an
hour on two cores. With --model and --prompts: the same space on real weights.
"""

from decoupled_lumina2 import PAPER as DECOUPLED

from raydmd.cli_sweep import sweep_experiment
from raydmd.recipe import derive
from raydmd.zoo.settings import SWEPT, on_zoo

SWEEP = {
    "name": "ca-dm-schedules",
    "objectives": {"frechet": "min", "coverage_entropy": "max"},
    "space": {
        "method.decouple.schedule": ["hybrid", "constrained", "full", "coupled"],
        "method.decouple.augment": {"low": 0.5, "high": 1.5},
        "method.decouple.augment_times": {
            "of": [[0.02, 0.98], [0.02, 0.75], [0.02, 0.5], [0.25, 0.98]],
            "when": {"method.decouple.schedule": ["hybrid", "constrained", "full"]},
        },
        "method.guidance": {"low": 2.0, "high": 6.0},
    },
    "search": {"kind": "tpe", "startup": 6},
    "stopping": {"reduction": 3.0},
    "budget": {"trials": 12},
    "verdict": {"seeds": 3},
}

PAPER = derive(DECOUPLED, {"evaluation": {"every": 1000, "samples": 64}, "placement.workers": 8})
ZOO = on_zoo(DECOUPLED, "sd35-tiny", cycles=180, **{"method.shift": 3.0, "method.guidance": 3.5}, **SWEPT)

if __name__ == "__main__":
    sweep_experiment(zoo=ZOO, paper=PAPER, sweep=SWEEP, doc=__doc__)
