"""DP-DMD of Stable Diffusion 3.5 medium, text to image (arXiv:2602.03139).

Without arguments: the zoo's sd35-tiny on a local Ray, in minutes. With --model and --prompts: real weights with the
paper's settings.
"""

from raydmd.cli import experiment
from raydmd.recipe import Model, Placement, Recipe, Role, Training
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Anchor, Method
from raydmd.zoo.settings import on_zoo

# 6,000 iterations as the authors' code counts them: five of the fake score for each of the student.
PAPER = Recipe(
    name="dp-dmd-sd35",
    model=Model(path="stabilityai/stable-diffusion-3.5-medium", height=1024, width=1024),
    method=Method(
        name="dp_dmd", steps=4, shift=3.0, guidance=3.5, times=(0.0, 1.0), anchor=Anchor(steps=5, of=30, weight=0.05)
    ),
    training=Training(
        cycles=1000,
        batch=32,
        fake_updates=5,
        student=Role(rate=1e-5, betas=(0.9, 0.999)),
        fake=Role(rate=1e-5, betas=(0.9, 0.999)),
        precision="bf16",
        sharding="fsdp",
        gradient_checkpointing=True,
    ),
    evaluation=Evaluation(samples=8, batch=1, grid=4),
    placement=Placement(workers=8, teachers=1, worker_cpus=4, teacher_cpus=4, worker_gpus=1, teacher_gpus=1),
)

ZOO = on_zoo(PAPER, "sd35-tiny", cycles=400)

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
