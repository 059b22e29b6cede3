"""Decoupled DMD of Stable Diffusion XL, text to image, four steps (arXiv:2511.22677).

Without arguments: the zoo's sdxl-tiny, without the GAN's real pictures, on a local Ray, in minutes. With --model and
--prompts: real weights with the paper's settings. The paper adopts DMD2's configuration, GAN included, and changes
the schedule alone.
"""

from dmd2_sdxl import PAPER as DMD2

from raydmd.cli import experiment
from raydmd.recipe import derive
from raydmd.zoo.settings import on_zoo

SHARED = DMD2.method.model_dump(include={"steps", "shift", "guidance", "gan", "normaliser"})


PAPER = derive(DMD2, {"name": "decoupled-sdxl", "method": {"name": "decoupled"} | SHARED})

ZOO = on_zoo(PAPER, "sdxl-tiny", **{"method.gan": None, "method.guidance": 3.5})

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
