"""AMD of Wan2.1 1.3B, text to video, four steps (arXiv:2602.07345).

Without arguments: the zoo's wan22-tiny with a judge's reward on a local Ray, in minutes. With --model and --prompts:
real weights with the paper's settings. The paper's text was not to be had: the reward for video is not known,
PickScore is this project's choice, and so are the rates.
"""

from raydmd.cli import experiment
from raydmd.recipe import Model, Placement, Recipe, Role, Training
from raydmd.recipe_evaluation import Evaluation
from raydmd.recipe_method import Adapt, Method, Reward
from raydmd.zoo.settings import on_zoo

PAPER = Recipe(
    name="amd-wan21",
    model=Model(path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", frames=81, height=480, width=832),
    method=Method(name="amd", steps=4, shift=5.0, guidance=5.0, adapt=Adapt(rewards=(Reward(kind="pick"),))),
    training=Training(
        cycles=1000,
        batch=64,
        fake_updates=5,
        student=Role(rate=2e-6, betas=(0.0, 0.999)),
        fake=Role(rate=4e-7, betas=(0.0, 0.999)),
        precision="bf16",
        sharding="fsdp",
        gradient_checkpointing=True,
    ),
    evaluation=Evaluation(samples=8, batch=1, grid=4),
    placement=Placement(
        workers=16,
        teachers=4,
        rewards=4,
        worker_cpus=4,
        teacher_cpus=4,
        worker_gpus=1,
        teacher_gpus=1,
        reward_gpus=1,
    ),
)

ZOO = on_zoo(PAPER, "wan22-tiny", **{"method.adapt.rewards": [{"kind": "zoo"}], "method.adapt.epsilon": 0.1})

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
