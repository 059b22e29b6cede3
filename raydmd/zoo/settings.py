"""Training settings of the zoo's pipelines, for experiments and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydmd.recipe import derive
from raydmd.recipe_checkpoints import Checkpoints
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_placement import Placement

if TYPE_CHECKING:
    from raydmd.recipe import Recipe

TRAINING: dict[str, Any] = {
    "fake_updates": 3,
    "fake_warmup": 30,
    "student": {"rate": 2e-4, "lora": None},
    "fake": {"rate": 6e-4},
    "precision": "fp32",
    "sharding": "ddp",
    "gradient_checkpointing": False,
    "offload_activations": False,
    "ema": 0.99,
    "decay": 0.4,
}
"""Half a million parameters an expert instead of billions: full fine-tuning, at the rates that such a size needs."""


SWEPT: dict[str, Any] = {
    "placement": Placement(workers=1, worker_cpus=0.5, teacher_cpus=0.25).model_dump(),
    "evaluation": Evaluation(every=20, samples=128, teacher_steps=30).model_dump(),
}
"""Of a sweep's trials: two of them, and their teacher, on two cores; evaluated on their way."""


def on_zoo(paper: Recipe, model: str, *, cycles: int = 200, **changes: Any) -> Recipe:
    """A paper's recipe on a tiny pipeline: its method, at sizes and rates that a laptop trains in minutes.

    Args:
        paper: with the paper's settings.
        model: a zoo name.
        cycles: student updates.
        **changes: whatever else differs, as for :func:`raydmd.recipe.derive`.
    """
    return derive(
        paper,
        {
            "name": f"{paper.name}-{model.rpartition('-')[2]}",
            "output": Path("runs"),
            "model": {"path": model, "frames": None, "height": None, "width": None},
            "data.sizes": (),
            "training": TRAINING | {"cycles": cycles, "batch": 48},
            "checkpoints": Checkpoints().model_dump(),
            "placement": Placement(workers=2).model_dump(),
            "evaluation": Evaluation().model_dump(),
        }
        | changes,
    )
