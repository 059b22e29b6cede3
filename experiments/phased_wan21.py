"""Phased DMD of Wan2.1 as an image model: clips of one frame, four steps in two phases (arXiv:2510.27684).

Without arguments: a Wan pipeline of one expert with random weights on a local Ray, in minutes. With --model and
--prompts: real weights with the paper's settings.
"""

from raydmd.cli import experiment
from raydmd.recipe import Lora, Model, Placement, Recipe, Role, Training, derive
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Method
from raydmd.zoo.settings import on_zoo

PAPER = Recipe(
    name="phased-wan21",
    model=Model(path="Wan-AI/Wan2.1-T2V-14B-Diffusers", frames=1, height=720, width=1280),
    # The grid is 1, 0.9375, 0.8333, 0.625: the first phase's samples end at 0.8333.
    method=Method(name="phased", steps=4, shift=5.0, boundaries=(0.834,), guidance=4.0),
    training=Training(
        cycles=1000,
        batch=64,
        fake_updates=5,
        student=Role(rate=5e-5, betas=(0.0, 0.999), lora=Lora(rank=64, alpha=8.0)),
        fake=Role(rate=4e-7, betas=(0.0, 0.999)),
        precision="bf16",
        sharding="fsdp",
        gradient_checkpointing=True,
    ),
    evaluation=Evaluation(samples=8, batch=1, grid=4),
    placement=Placement(workers=64, teachers=8, worker_cpus=4, teacher_cpus=4, worker_gpus=1, teacher_gpus=1),
)

ZOO = derive(on_zoo(PAPER, "wan21-untrained"), {"model.frames": 1})

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
