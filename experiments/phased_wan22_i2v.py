"""Phased DMD of a two-expert Wan2.2 image-to-video pipeline (arXiv:2510.27684).

Without arguments: an untrained pipeline on a local Ray, in minutes. With --model and --prompts: real weights with the
paper's settings; prompts are a table (JSONL, CSV, TSV, Parquet) with a column of texts and a column `image` of files.
The paper does not say the teacher's guidance for image-to-video: it is the pipeline's own. One size, since a prompt's
picture is encoded once.
"""

from phased_wan22 import PAPER as TEXT_TO_VIDEO

from raydmd.cli import experiment
from raydmd.recipe import derive
from raydmd.zoo.settings import on_zoo

PAPER = derive(
    TEXT_TO_VIDEO,
    {
        "name": "phased-wan22-i2v",
        "model.path": "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        "data.sizes": (),
        "method": {"boundaries": (0.9,), "guidance": 3.5},
    },
)

ZOO = on_zoo(PAPER, "wan22-i2v-untrained")

if __name__ == "__main__":
    experiment(zoo=ZOO, paper=PAPER, doc=__doc__)
