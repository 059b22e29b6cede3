"""Train the zoo's autoencoders: AutoencoderKLWan on clips, AutoencoderKL on pictures.

Two stages, because later stages train on its latents: first encoder and decoder together, then the
decoder alone while the latents stay what they are. What was learnt the hard way is in ``docs/log.md``:
clips span +-0.8 because decode clamps at +-1, and the mode plus a little noise replaces
``sample()`` because an untrained posterior variance drowns the latents.
"""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

if TYPE_CHECKING:
    from raydmd.zoo.world import Items

LATENT_NOISE = 0.05
CLIP_SCALE, PICTURE_SCALE = 0.6, 0.35
"""Standard deviations of normalised latents. At 1 the few attributes of a clip, spread over 768 numbers,
are decided within the first step from noise, and two guided steps of the undistilled teacher are as good
as forty: nothing would be left to distil. Smaller latents decide later (measured in docs/log.md); pictures,
of 256 numbers, need it more."""


def build_vae() -> AutoencoderKLWan:
    """An untrained AutoencoderKLWan: 9x32x32 frames to latents of 16x3x4x4."""
    vae = AutoencoderKLWan(
        base_dim=20,
        z_dim=16,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        # As in Wan2.2's own autoencoder, 2x2 patches come before the first convolution: full resolution
        # is where a CPU spends its time.
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    for module in vae.modules():  # on a CPU the 3-D convolutions run about twice as fast channels-last
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def build_image_vae(channels: tuple[int, ...] = (16, 32, 64), latents: int = 4) -> AutoencoderKL:
    """An untrained AutoencoderKL, by default from 32x32 pixels to latents of 4x8x8.

    Args:
        channels: of each level; every level but the last halves a side.
        latents: channels of a latent.
    """
    levels = len(channels)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=8,
        sample_size=32,
        # As SD3's own has it.
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.to(memory_format=torch.channels_last)


def build_deeper_vae(shallow: AutoencoderKL) -> AutoencoderKL:
    """An AutoencoderKL from 32x32 pixels to latents of 16x4x4: as many numbers, on half the side.

    It begins with what fits of a trained one of a level less: the levels at the pixels' end, which cost most to train.

    Args:
        shallow: as :func:`build_image_vae` makes it by default.
    """
    vae = build_image_vae((16, 32, 64, 64), 16)
    own, taken = vae.state_dict(), dict[str, Tensor]()
    for name, weight in shallow.state_dict().items():
        # A decoder's levels are counted from its latent.
        moved = re.sub(r"(?<=decoder\.up_blocks\.)\d", lambda level: str(int(level[0]) + 1), name)
        if moved in own and own[moved].shape == weight.shape:
            taken[moved] = weight
    vae.load_state_dict(own | taken)
    return vae


def train_vae(
    vae: AutoencoderKLWan | AutoencoderKL,
    world: Items,
    *,
    minutes: float,
    seed: int,
    decoder_only: bool = False,
    batch: int = 8,
) -> float:
    """Train in place for a fixed time.

    Args:
        vae: the autoencoder.
        world: renders what it reads.
        minutes: wall time to spend.
        seed: of the samples.
        decoder_only: leave encoder and latents as they are.
        batch: samples per update.

    Returns:
        The peak signal-to-noise ratio on the last 20 batches, in dB.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [vae.decoder, vae.post_quant_conv] if decoder_only else [vae]
    params = [p for part in parts if part is not None for p in part.parameters()]
    vae.requires_grad_(False)
    for p in params:
        p.requires_grad_(True)
    peak = 1e-3
    optimizer = torch.optim.AdamW(params, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    start, step = time.monotonic(), 0
    recent: list[float] = []
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50) * (1 - done) + 1e-5
        captions = world.language.draw(batch, seed=seed * 1_000_003 + step)
        clips = _channels_last(world.clips(captions, generator=generator)[0])
        with torch.set_grad_enabled(not decoder_only):
            z = vae.encode(clips).latent_dist.mode()
        out = vae.decode(z + LATENT_NOISE * torch.randn(z.shape, generator=generator)).sample
        # Items cover a small part of the frame: without the weight, black is a good answer for too long.
        weight = 1 + 3 * (clips.amax(1, keepdim=True) > -0.75)
        error = out - clips
        loss = (weight * (4 * error.square() + 0.1 * error.abs())).mean()
        if not decoder_only:
            loss = loss + 1e-4 * z.square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(params, 5.0)
        optimizer.step()
        recent = [*recent[-19:], float(F.mse_loss(out.detach(), clips))]
        if step % 20 == 0:
            print(
                f"vae step {step} {done:.0%} psnr {_psnr(recent):.2f} dB, latent std {float(z.detach().std()):.2f}",
                flush=True,
            )
        step += 1
    return _psnr(recent)


@torch.no_grad()
def fix_latent_statistics(vae: AutoencoderKLWan | AutoencoderKL, world: Items, *, seed: int) -> None:
    """Write the latents' mean and standard deviation into the VAE's config, as the pipeline expects.

    Wan's has one of each per channel; AutoencoderKL has one shift and one scaling factor for all.
    """
    z = encode_clips(vae, world, count=512, seed=seed)[0]
    if isinstance(vae, AutoencoderKL):
        vae.register_to_config(shift_factor=float(z.mean()), scaling_factor=PICTURE_SCALE / float(z.std()))
        return
    std = z.std((0, 2, 3, 4)) / CLIP_SCALE
    vae.register_to_config(latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=std.tolist())


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLWan | AutoencoderKL, world: Items, *, count: int, seed: int
) -> tuple[Tensor, list[str], Tensor]:
    """Render and encode clips or pictures.

    Returns:
        Raw latents, not normalised, ``(N, 16, 3, 4, 4)`` or ``(N, 4, 8, 8)``, captions, and attribute
        indices ``(N, 4)``.
    """
    generator = torch.Generator().manual_seed(seed)
    captions = world.language.draw(count, seed=seed)
    latents, labels = [], []
    for i in range(0, count, 64):
        clips, label = world.clips(captions[i : i + 64], generator=generator)
        latents.append(vae.encode(_channels_last(clips)).latent_dist.mode())
        labels.append(label)
    return torch.cat(latents), [c.text for c in captions], torch.cat(labels)


def _channels_last(clips: Tensor) -> Tensor:
    return clips.contiguous(memory_format=torch.channels_last_3d if clips.ndim == 5 else torch.channels_last)


def _psnr(mse: list[float]) -> float:
    return 10 * math.log10(4 / (sum(mse) / len(mse)))
