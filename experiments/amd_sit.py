"""AMD of SiT-XL/2, class-conditional pictures of ImageNet 256 (arXiv:2602.07345).

Without arguments: an untrained network and classifier on a local Ray, in minutes. With --model and --prompts: real
weights, as a DiTPipeline with a FlowMapEulerDiscreteScheduler; prompts are class numbers, 0 to 999. With a table of
betas for a scheduler (facebook/DiT-XL-2-256) it is a DiT, and takes --method.shift=1. The paper's text was not to be
had: the reward for ImageNet is not known, a classifier's log-probability is this project's choice, and so are steps,
guidance, batch and rates.
"""

from raydmd.cli import experiment
from raydmd.recipe import Model, Placement, Recipe, Role, Training
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Adapt, Method, Reward
from raydmd.zoo.settings import on_zoo

PAPER = Recipe(
    name="amd-sit",
    model=Model(path="./sit-xl-2-256"),
    method=Method(
        name="amd",
        steps=4,
        shift=1.0,
        guidance=4.0,
        solver="euler",
        adapt=Adapt(rewards=(Reward(kind="class", path="facebook/convnextv2-large-1k-224"),)),
    ),
    training=Training(
        cycles=20_000,
        batch=256,
        fake_updates=5,
        student=Role(rate=2e-6, betas=(0.0, 0.999)),
        fake=Role(rate=4e-7, betas=(0.0, 0.999)),
        precision="bf16",
    ),
    evaluation=Evaluation(samples=256, per_prompt=4),
    placement=Placement(
        workers=8,
        teachers=2,
        rewards=2,
        worker_cpus=4,
        teacher_cpus=4,
        worker_gpus=1,
        teacher_gpus=1,
        reward_gpus=1,
    ),
)

ZOO = on_zoo(PAPER, "sit-untrained", **{"method.adapt.rewards": [{"kind": "class"}]})

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
