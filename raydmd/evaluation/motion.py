"""How much clips move: dense optical flow, and the share of clips that move at all.

Phased DMD reports UniMatch's flow on large videos. No flow network is at hand for clips of 32x32
pixels, so this is Farneback's, averaged over what is not background: compare figures of one report
with each other, never with a paper's.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from raydmd.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LEAST_SIDE = 64
"""Frames are enlarged until their shorter side has this many pixels: 4 times for the zoo."""
_WINDOW = 25
"""Farneback's window on the enlarged frames. At 9, aliased edges triple some clips' flow."""
_CONTRAST = 0.1
"""How much brighter than the background a pixel of the foreground is."""


def optical_flow(clips: Tensor) -> Tensor:
    """Mean speed of what moves, per clip.

    Farneback's flow between neighbouring frames of the brightest channel, on cubically enlarged
    frames; its magnitude is averaged over the foreground, the pixels that in either frame are
    brighter than the clip's background (10th percentile). Without a foreground all pixels count.
    Papers average the flow of a network (UniMatch, RAFT) over the whole picture, which would mostly
    measure how large an item on black is. Residual noise reads as motion: on a clip that does not
    move, or shows nothing, it is all there is.

    Args:
        clips: ``(N, F, 3, H, W)`` in [0, 1], at least 2 frames.

    Returns:
        ``(N,)`` in pixels of the original clip per frame, float32.

    Raises:
        InputError: if the clips are no videos.
    """
    if clips.ndim != 5 or clips.shape[1] < 2:
        raise InputError(f"flow needs clips (N, F >= 2, 3, H, W), given {tuple(clips.shape)}")
    grey = clips.detach().amax(2).float().cpu().numpy()
    # OpenCV starts a thread per core whatever torch was told; on a shared machine that is slow.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(torch.get_num_threads())
    try:
        return torch.tensor([_clip_flow(frames) for frames in grey], dtype=torch.float32)
    finally:
        cv2.setNumThreads(threads)


def dynamic_degree(flow: Tensor, threshold: float) -> float:
    """Share of clips that move more than ``threshold``.

    The idea is VBench's (arXiv:2311.17982); the threshold and the flow are this project's own, so
    the figures can't be compared with VBench's.

    Args:
        flow: ``(N,)``, pixels per frame, see :func:`optical_flow`.
        threshold: pixels per frame.
    """
    return float((flow > threshold).double().mean())


def _clip_flow(frames: NDArray[np.float32]) -> float:
    scale: int = max(1, math.ceil(_LEAST_SIDE / min(frames.shape[1:])))
    large = [_enlarge(frame, scale) for frame in frames]
    bright = float(np.percentile(frames, 10)) + _CONTRAST
    flows = [_pair_flow(first, second, bright) for first, second in pairwise(large)]
    return fmean(flows) / scale


def _pair_flow(first: NDArray[np.float32], second: NDArray[np.float32], bright: float) -> float:
    flow = cv2.calcOpticalFlowFarneback(
        _bytes(first),
        _bytes(second),
        np.empty((*first.shape, 2), np.float32),
        pyr_scale=0.5,
        levels=3,
        winsize=_WINDOW,
        iterations=1,  # three change the zoo's figures by less than 1% and take twice the time
        poly_n=7,
        poly_sigma=1.5,
        flags=0,
    )
    speed = np.hypot(flow[..., 0], flow[..., 1])
    foreground = (first > bright) | (second > bright)
    return float(np.mean(speed[foreground] if foreground.any() else speed))


def _enlarge(frame: NDArray[np.float32], scale: int) -> NDArray[np.float32]:
    large = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    # Cubic interpolation overshoots, and bytes would wrap around.
    return np.clip(large, 0, 1).astype(np.float32)


def _bytes(frame: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(frame * 255).astype(np.uint8)
