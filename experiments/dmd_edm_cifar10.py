"""DMD of an EDM network of CIFAR-10, one step (arXiv:2311.18828, appendix B, class-conditional).

Without arguments: an untrained network on a local Ray, in minutes. With --model and --prompts: real weights with the
paper's settings, as a ConsistencyModelPipeline (a UNet2DModel with EDM's preconditioning); prompts are class numbers,
0 to 9. The paper's pairs are of 18 steps of Heun's method; those here are of 100 first-order ones. The script makes
its noise-image pairs first, if there are none; a stopped run goes on with them.
"""

from raydmd.cli import experiment
from raydmd.recipe import Model, Placement, Recipe, Role, Training
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Method
from raydmd.recipe_regression import Regression
from raydmd.zoo.settings import on_zoo

PAPER = Recipe(
    name="dmd-edm-cifar10",
    model=Model(path="./edm-cifar10"),
    method=Method(name="dmd", steps=1, shift=1.0, guidance=1.0, regression=Regression(weight=0.25, steps=100)),
    training=Training(
        cycles=300_000,
        batch=392,
        fake_updates=1,
        warmup=500,
        student=Role(rate=5e-5, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        fake=Role(rate=5e-5, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        precision="fp32",
    ),
    placement=Placement(workers=7, teachers=1, worker_cpus=4, teacher_cpus=4, worker_gpus=1, teacher_gpus=1),
    evaluation=Evaluation(samples=256, per_prompt=4),
)

ZOO = on_zoo(PAPER, "edm-untrained", **{"method.regression": {"loss": "l2"}})

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__, pairs=(96, 100_000))
