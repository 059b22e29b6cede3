"""DMD2 of Stable Diffusion XL, text to image, four steps (arXiv:2405.14867).

Without arguments: the zoo's sdxl-tiny, without the GAN's real pictures, on a local Ray, in minutes. With --model and
--prompts: real weights with the paper's settings. Its GAN needs pictures: --method.gan.data names their folder.
"""

from pathlib import Path

from raydmd.cli import experiment
from raydmd.recipe import Model, Placement, Recipe, Role, Training
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_gan import Gan
from raydmd.recipe_method import Method
from raydmd.zoo.settings import on_zoo

PAPER = Recipe(
    name="dmd2-sdxl",
    model=Model(path="stabilityai/stable-diffusion-xl-base-1.0", height=1024, width=1024),
    method=Method(name="dmd2", steps=4, shift=1.0, guidance=8.0, gan=Gan(data=Path("real"), weight=5e-3)),
    training=Training(
        cycles=20_000,
        batch=128,
        fake_updates=5,
        warmup=500,
        student=Role(rate=5e-7, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        fake=Role(rate=5e-7, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        precision="bf16",
        sharding="fsdp",
        gradient_checkpointing=True,
    ),
    evaluation=Evaluation(samples=8, batch=1, grid=4),
    placement=Placement(workers=64, teachers=8, worker_cpus=4, teacher_cpus=4, worker_gpus=1, teacher_gpus=1),
)

ZOO = on_zoo(PAPER, "sdxl-tiny", **{"method.gan": None, "method.guidance": 3.5})

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
