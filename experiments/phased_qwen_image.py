"""Phased DMD of Qwen-Image, text to image, four steps in two phases (arXiv:2510.27684).

Without arguments: a Qwen-Image pipeline with random weights on a local Ray, in minutes. With --model and --prompts:
real weights with the paper's settings. A student of two phases is two sets of adapters, which take turns in the stock
pipeline (its model card says how).

The paper trains on seven aspect ratios of about 1382x1382 pixels, and lists neither them nor their weights: these are
Qwen-Image's own, equally often, sides rounded to multiples of 32, so that two or four workers can share a sample. That
choice is ours.
"""

from raydmd.cli import experiment
from raydmd.recipe import Lora, Model, Placement, Recipe, Role, Training
from raydmd.recipe_data import Data, Size
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Method
from raydmd.zoo.settings import on_zoo

SIDES = ((1376, 1376), (1824, 1024), (1024, 1824), (1600, 1184), (1184, 1600), (1696, 1120), (1120, 1696))
"""Width and height: 1:1, 16:9, 9:16, 4:3, 3:4, 3:2, 2:3."""

PAPER = Recipe(
    name="phased-qwen-image",
    model=Model(path="Qwen/Qwen-Image", height=1376, width=1376, negative_prompt=" "),
    data=Data(sizes=tuple(Size(height=height, width=width) for width, height in SIDES)),
    # The grid is 1, 0.9, 0.75, 0.5: the first phase's samples end at 0.75.
    method=Method(name="phased", steps=4, shift=3.0, boundaries=(0.76,), guidance=4.0),
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

ZOO = on_zoo(PAPER, "qwen-image-untrained")

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
