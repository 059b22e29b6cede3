"""AMD of Stable Diffusion XL, text to image, four steps (arXiv:2602.07345).

Without arguments: the zoo's sdxl-tiny with a judge's reward on a local Ray, in minutes. With --model and --prompts:
real weights with the paper's settings. The paper's text was not to be had: its reward is HPSv2, all else here is
DMD2's without its GAN, and this project's reading. --method.adapt.rewards names a converted HPSv2
(raydmd/rewards/convert.py).
"""

from dmd2_sdxl import PAPER as DMD2

from raydmd.cli import experiment
from raydmd.recipe import derive
from raydmd.zoo.settings import on_zoo

SHARED = DMD2.method.model_dump(include={"steps", "shift", "guidance"})


PAPER = derive(
    DMD2,
    {
        "name": "amd-sdxl",
        "method": {"name": "amd", "adapt": {"rewards": [{"kind": "hps", "path": "./hpsv2"}]}} | SHARED,
        "placement.workers": 32,  # four samples each: a group of one prompt
        "placement.rewards": 4,
        "placement.reward_gpus": 1,
    },
)

REWARDS = {"method.adapt.rewards": [{"kind": "zoo"}], "method.adapt.epsilon": 0.1}
ZOO = on_zoo(PAPER, "sdxl-tiny", **REWARDS, **{"method.guidance": 3.5})

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
