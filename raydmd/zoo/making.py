"""What the makers of zoo pipelines share: their command line, encoded samples, the judges, the folder they write."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from raydmd.zoo.judge import AttributeJudge, Body, train_judge
from raydmd.zoo.make_vae import LATENT_NOISE, encode_clips, fix_latent_statistics, train_vae
from raydmd.zoo.world import SIZE, Items

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKLWan, DiffusionPipeline

DATA = Path(__file__).parent / "data"
PICTURES = 32_768
"""That a pipeline of pictures is trained on."""
Parts = TypeVar("Parts")


def start(doc: str | None, name: str, minutes: float, world: type[Items]) -> tuple[argparse.Namespace, Items]:
    """Read a maker's command line and the data.

    Args:
        doc: of the script.
        name: of the zoo member.
        minutes: default wall time for all stages.
        world: what is rendered.

    Returns:
        The arguments ``work`` (a folder that is there), ``minutes`` and ``target``, and the world.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages' results")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"wall time for all stages (default {minutes})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--target", type=Path, default=DATA / name)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        return args, world(args.data)
    except FileNotFoundError as error:
        sys.exit(str(error))


def encoded(work: Path, vae: AutoencoderKLWan | AutoencoderKL, world: Items, *, count: int) -> tuple[Tensor, list[str]]:
    """Raw latents of ``count`` rendered samples, and their captions."""
    file = work / "latents.pt"
    if not file.is_file():
        latents, prompts, _ = encode_clips(vae, world, count=count, seed=7)
        torch.save((latents, prompts), file)
    latents, prompts = torch.load(file, weights_only=True)
    return latents, prompts


def autoencoder(work: Path, build: Callable[[], AutoencoderKL], world: Items, *, minutes: float) -> AutoencoderKL:
    """An autoencoder of pictures, trained in one stage.

    Args:
        work: folder for the stages' results.
        build: what is trained.
        world: of pictures.
        minutes: wall time to spend.

    Returns:
        It with its latents' statistics, in evaluation mode.
    """
    done = work / "vae"
    if not done.is_dir():
        vae = build()
        print(f"vae: {train_vae(vae, world, minutes=minutes, seed=0, batch=16):.2f} dB")
        fix_latent_statistics(vae, world, seed=5)
        vae.save_pretrained(done)
    return read_autoencoder(done)


def read_autoencoder(folder: Path) -> AutoencoderKL:
    """A trained autoencoder of pictures, fp32, in evaluation mode."""
    return AutoencoderKL.from_pretrained(folder).float().eval().requires_grad_(False)


def text_to_image(
    folder: Path, kind: type[Parts], train: Callable[..., Parts], vae: AutoencoderKL, world: Items, *, minutes: float
) -> Parts:
    """A pipeline's parts, trained on :data:`PICTURES` rendered pictures unless they are in their folder.

    Args:
        folder: with a folder for each part, beside the other stages' results.
        kind: a dataclass whose fields are the parts, of classes that read and write folders.
        train: of normalised latents, their captions, ``minutes`` and a ``seed``.
        vae: encodes the pictures.
        world: renders them.
        minutes: wall time to spend.

    Returns:
        The parts, as they were read from the folder.
    """
    if not folder.is_dir():
        latents, prompts = encoded(folder.parent, vae, world, count=PICTURES)
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        for name, part in vars(train(latents, prompts, minutes=minutes, seed=0)).items():
            part.save_pretrained(folder / name)
    return kind(**{name: part.from_pretrained(folder / name) for name, part in get_type_hints(kind).items()})


JUDGES: dict[str, Body] = {"judge": "conv", "reward": "attention"}
"""One for evaluation, one to be rewarded by, another kind of network from another seed: no student is measured by what
it was trained on."""


def attribute_judges(
    work: Path, vae: AutoencoderKLWan | AutoencoderKL, world: Items, *, minutes: float
) -> dict[str, AttributeJudge]:
    """Both judges, trained on real samples and on what the autoencoder makes of them, for ``minutes`` in all."""
    return {
        name: _attribute_judge(work / f"{name}.safetensors", vae, world, body, minutes=minutes / len(JUDGES), seed=i)
        for i, (name, body) in enumerate(JUDGES.items())
    }


def read_judges(folder: Path) -> dict[str, AttributeJudge]:
    """Both judges of another member of the zoo that shows the same world."""
    return {name: AttributeJudge.load(folder / f"{name}.safetensors") for name in JUDGES}


def _attribute_judge(
    done: Path, vae: AutoencoderKLWan | AutoencoderKL, world: Items, body: Body, *, minutes: float, seed: int
) -> AttributeJudge:
    if not done.is_file():

        @torch.no_grad()
        def render(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            drawn = int(torch.randint(2**31, (), generator=generator))
            clips, labels = world.clips(world.language.draw(batch, seed=drawn, keep=0.0), generator=generator)
            half = batch // 2
            z = vae.encode(clips[:half]).latent_dist.mode()
            clips[:half] = vae.decode(z + LATENT_NOISE * torch.randn(z.shape, generator=generator)).sample
            clips = clips if clips.ndim == 5 else clips[:, :, None]
            return (clips.permute(0, 2, 1, 3, 4) / 2 + 0.5).clamp(0, 1), labels

        train_judge(render, minutes=minutes, seed=seed, language=world.language, body=body).save(done)
    return AttributeJudge.load(done)


def write(target: Path, pipeline: DiffusionPipeline, judges: dict[str, AttributeJudge]) -> None:
    """Write the zoo member: the pipeline as diffusers saves it, judges, prompts, and what places.py reads."""
    pipeline.save_pretrained(target)
    for file in target.glob("*/config.json"):  # diffusers notes where a part was loaded from: folders of this machine
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, judge in judges.items():
        judge.save(target / f"{name}.safetensors")
    language = judges["judge"].language
    prompts = [c.text for c in language.draw(2048, seed=11)]
    (target / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    about = {
        "frames": language.frames,
        "height": SIZE,
        "width": SIZE,
        "prompts": "prompts.txt",
        **{name: f"{name}.safetensors" for name in judges},
    }
    (target / "raydmd.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    total = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"wrote {target}: {total / 1e6:.1f} MB")
