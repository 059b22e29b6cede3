"""DMD of Stable Diffusion 1.5, text to image, one step (arXiv:2311.18828, appendix B, LAION-6.25+).

Without arguments: a Stable Diffusion pipeline with random weights on a local Ray, in minutes. With --model and
--prompts: real weights with the paper's settings. The script makes its noise-image pairs first (50 steps of DDIM
where the paper has PNDM), if there are none; a stopped run goes on with them.
"""

from raydmd.cli import experiment
from raydmd.recipe import Model, Placement, Recipe, Role, Training
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Method
from raydmd.recipe_regression import Regression
from raydmd.zoo.settings import on_zoo

PAPER = Recipe(
    name="dmd-sd15",
    model=Model(path="stable-diffusion-v1-5/stable-diffusion-v1-5", height=512, width=512),
    method=Method(
        name="dmd", steps=1, shift=1.0, guidance=3.0, regression=Regression(weight=0.25, steps=50, batch=1152)
    ),
    training=Training(
        cycles=20_000,
        batch=2304,
        fake_updates=1,
        warmup=500,
        student=Role(rate=1e-5, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        fake=Role(rate=1e-5, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        precision="bf16",
        sharding="fsdp",
        gradient_checkpointing=True,
    ),
    evaluation=Evaluation(samples=8, batch=1, grid=4),
    placement=Placement(workers=72, teachers=8, worker_cpus=4, teacher_cpus=4, worker_gpus=1, teacher_gpus=1),
)

ZOO = on_zoo(
    PAPER, "sd15-untrained", **{"method.regression": {"loss": "l2", "batch": None, "steps": 50, "pairs": None}}
)

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__, pairs=(96, 500_000))
