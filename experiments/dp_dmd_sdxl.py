"""DP-DMD of Stable Diffusion XL, text to image, four steps (arXiv:2602.03139, appendix C).

Without arguments: the zoo's sdxl-tiny on a local Ray, in minutes. With --model and --prompts: real weights with the
paper's settings.
"""

from raydmd.cli import experiment
from raydmd.recipe import Model, Placement, Recipe, Role, Training
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Anchor, Method
from raydmd.zoo.settings import on_zoo

# 6,000 iterations as the authors' code counts them: five of the fake score for each of the student.
PAPER = Recipe(
    name="dp-dmd-sdxl",
    model=Model(path="stabilityai/stable-diffusion-xl-base-1.0", height=1024, width=1024),
    method=Method(name="dp_dmd", steps=4, shift=1.0, guidance=8.0, anchor=Anchor(steps=5, of=50, weight=0.05)),
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

ZOO = on_zoo(PAPER, "sdxl-tiny", **{"method.guidance": 3.5})

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
