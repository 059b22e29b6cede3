"""Decoupled DMD of Lumina-Image 2.0, text to image, four steps (arXiv:2511.22677).

Without arguments: the zoo's lumina2-tiny on a local Ray, in minutes. With --model and --prompts: real weights with the
paper's settings. The paper gives no rates, batch or guidance for it: those here are
DMD2's for SDXL, and the pipeline's own guidance.
"""

from raydmd.cli import experiment
from raydmd.recipe import Model, Placement, Recipe, Role, Training
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Method
from raydmd.zoo.settings import on_zoo

PAPER = Recipe(
    name="decoupled-lumina2",
    model=Model(path="Alpha-VLLM/Lumina-Image-2.0", height=1024, width=1024),
    method=Method(name="decoupled", steps=4, shift=6.0, guidance=4.0),
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

ZOO = on_zoo(PAPER, "lumina2-tiny")

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
