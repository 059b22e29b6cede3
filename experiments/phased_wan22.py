"""Phased DMD of a two-expert Wan2.2 text-to-video pipeline (arXiv:2510.27684).

Without arguments: the zoo's wan22-tiny on a local Ray, in minutes. With --model and --prompts: real weights with the
paper's settings, its mix of sizes among them; what is evaluated is 480x832.
"""

from raydmd.cli import experiment
from raydmd.recipe import Lora, Model, Placement, Recipe, Role, Training
from raydmd.recipe_checkpoints import Checkpoints
from raydmd.recipe_data import Data, Size
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Method
from raydmd.zoo.settings import on_zoo

PAPER = Recipe(
    name="phased-wan22",
    model=Model(path="Wan-AI/Wan2.2-T2V-A14B-Diffusers", frames=81, height=480, width=832),
    data=Data(
        sizes=(
            Size(height=720, width=1280, weight=0.1),
            Size(height=1280, width=720, weight=0.1),
            Size(height=480, width=832, weight=0.4),
            Size(height=832, width=480, weight=0.4),
        )
    ),
    method=Method(name="phased", steps=4, shift=5.0, boundaries=(0.875,), guidance=4.0),
    training=Training(
        cycles=1000,
        batch=64,
        fake_updates=5,
        student=Role(rate=5e-5, betas=(0.0, 0.999), lora=Lora(rank=64, alpha=8.0)),
        fake=Role(rate=4e-7, betas=(0.0, 0.999)),
        precision="bf16",
        sharding="fsdp",
        gradient_checkpointing=True,
        offload_activations=True,
    ),
    # A cycle takes about three minutes on 64 H100s, longer than clouds' notices: half an hour is lost at most.
    checkpoints=Checkpoints(every=10),
    evaluation=Evaluation(samples=8, batch=1, grid=4),
    placement=Placement(
        workers=64, teachers=8, batch_items=1, worker_cpus=4, teacher_cpus=4, worker_gpus=1, teacher_gpus=1
    ),
)

ZOO = on_zoo(PAPER, "wan22-tiny", cycles=360)

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
