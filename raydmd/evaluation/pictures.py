"""Clips as pictures: frame strips, animations, contact sheets; figures over time as SVG."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raydmd.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from raydmd.evaluation.samples import Samples

STRIP_FRAMES = 5
"""Frames of a strip, evenly spaced from the first to the last."""
MAX_ROWS = 16

_SMALL, _TALL, _GAP = 64, 96, 2
_PAPER, _INK, _MUTED = (255, 255, 255), (28, 28, 30), (110, 110, 116)
_MILLISECONDS = 140
LINE = 17
"""Height of a line of text, pixels."""
DECADES = 100.0
"""Times its smallest value that a curve's largest is drawn as it is."""


def display_size(clip: Tensor) -> tuple[int, int]:
    """Width and height in pixels at which a frame of ``(F, 3, H, W)`` is shown.

    Small frames are doubled, tall ones shrunk to 96 pixels.
    """
    height, width = clip.shape[-2:]
    if height <= _SMALL:
        return 2 * width, 2 * height
    return max(1, round(width * min(1.0, _TALL / height))), min(height, _TALL)


def strip(clip: Tensor, *, frames: int = STRIP_FRAMES) -> Image.Image:
    """Frames of one clip side by side, with transparent gaps that keep black frames apart.

    Args:
        clip: ``(F, 3, H, W)`` in [0, 1].
        frames: at most this many.
    """
    count = min(frames, clip.shape[0])
    last = clip.shape[0] - 1
    chosen = [round(i * last / (count - 1)) for i in range(count)] if count > 1 else [0]
    width, height = display_size(clip)
    sheet = Image.new("RGBA", ((width + _GAP) * count - _GAP, height))
    for place, index in enumerate(chosen):
        sheet.paste(_frame(clip[index]), (place * (width + _GAP), 0))
    return sheet


def picture(clip: Tensor) -> tuple[str, bytes]:
    """A clip ``(F, 3, H, W)`` in [0, 1] at its own size: the file's ending and content, PNG or animated WebP."""
    if len(clip) == 1:
        return ".png", png(_image(clip[0]))
    return ".webp", _webp([_image(frame) for frame in clip])


def animation(clip: Tensor) -> bytes:
    """A clip ``(F, 3, H, W)`` in [0, 1] as endless lossless WebP, as large as it is shown; a still of one frame."""
    return _webp([_frame(frame) for frame in clip])


def _webp(frames: list[Image.Image]) -> bytes:
    out = io.BytesIO()
    frames[0].save(
        out,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        # A pause at the end, or the jump back reads as motion.
        duration=[_MILLISECONDS] * (len(frames) - 1) + [5 * _MILLISECONDS],
        loop=0,
        lossless=True,
    )
    return out.getvalue()


def png(image: Image.Image) -> bytes:
    """An image as PNG."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def same_rows(contact: Sequence[Samples]) -> int:
    """How many rows samples share on a contact sheet, at most ``MAX_ROWS``.

    Raises:
        InputError: if there are no samples or they were made from different prompts.
    """
    if not contact:
        raise InputError("a contact sheet needs samples")
    for other in contact[1:]:
        if other.prompts != contact[0].prompts:
            raise InputError(
                f"a contact sheet's samples must share their prompts: '{contact[0].name}' and '{other.name}' do not"
            )
    return min(len(contact[0]), MAX_ROWS)


def contact_sheet(contact: Sequence[Samples], *, frames: int = STRIP_FRAMES) -> Image.Image:
    """Rows are prompts, column groups are samplers, frames run from left to right.

    Args:
        contact: samplers with the same prompts, and for a fair look the same seeds.
        frames: of each clip, at most.

    Raises:
        InputError: if there are no samples or they were made from different prompts.
    """
    rows, font = same_rows(contact), ImageFont.load_default(size=13)
    strips = [[strip(s.clips[row], frames=frames) for row in range(rows)] for s in contact]
    heights = [max(column[row].height for column in strips) for row in range(rows)]
    widths = [column[0].width for column in strips]
    titles = [_wrap(s.title, font, width) for s, width in zip(contact, widths, strict=True)]
    caption, gap, margin = 200, 16, 16
    head = 13 + LINE * max(map(len, titles))
    sheet = Image.new(
        "RGB",
        (
            2 * margin + caption + sum(widths) + gap * len(widths),
            2 * margin + head + sum(heights) + 6 * rows,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    left = margin + caption + gap
    for title, column, width in zip(titles, strips, widths, strict=True):
        draw.multiline_text((left, margin + 4), "\n".join(title), fill=_INK, font=font)
        top = margin + head
        for picture, height in zip(column, heights, strict=True):
            sheet.paste(picture, (left, top), picture)
            top += height + 6
        left += width + gap
    top = margin + head
    for prompt, height in zip(contact[0].prompts[:rows], heights, strict=True):
        lines = _wrap(prompt, font, caption)[: max(1, height // LINE)]
        draw.multiline_text((margin, top + 2), "\n".join(lines), fill=_MUTED, font=font)
        top += height + 6
    return sheet


def curve(points: Sequence[tuple[int, float]], marks: Sequence[int] = ()) -> str | None:
    """One figure over the cycles as inline SVG; colours come from the page's ``currentColor``.

    Positive values that span more than :data:`DECADES` are drawn by their logarithms, and the axis says so: phases have
    losses of different sizes.

    Args:
        points: cycle and value; values that are not finite are left out.
        marks: cycles with an upright line, if they are within the points'.

    Returns:
        The SVG element, or ``None`` if fewer than two points are left.
    """
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    if len(kept) < 2:
        return None
    width, height, left, right, top, bottom = 350, 150, 62, 10, 10, 22
    xs, ys = [x for x, _ in kept], [y for _, y in kept]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    decades = y0 > 0 and y1 > DECADES * y0
    scale: Callable[[float], float] = math.log if decades else float
    wide, tall = (x1 - x0) or 1, (scale(y1) - scale(y0)) or 1.0

    def place(x: float, y: float) -> str:
        across = left + (x - x0) / wide * (width - left - right)
        down = height - bottom - (scale(y) - scale(y0)) / tall * (height - top - bottom)
        return f"{across:.1f},{down:.1f}"

    line = " ".join(place(x, y) for x, y in kept)
    uprights = "".join(f"M{place(x, y1)}V{height - bottom}" for x in marks if x0 < x < x1)
    floor, text = height - bottom, 'fill="currentColor" font-size="11" opacity=".65"'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" fill="none">'
        f'<path d="M{left} {top}H{width - right}M{left} {floor}H{width - right}" '
        'stroke="currentColor" opacity=".18"/>'
        + (f'<path d="{uprights}" stroke="currentColor" opacity=".4" stroke-dasharray="3 3"/>' if uprights else "")
        + f'<polyline points="{line}" stroke="var(--accent)" stroke-width="1.6" '
        'stroke-linejoin="round"/>'
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end" {text}>{y1:.3g}</text>'
        f'<text x="{left - 6}" y="{floor + 4}" text-anchor="end" {text}>{y0:.3g}</text>'
        + (f'<text x="{left - 6}" y="{(top + floor) / 2 + 4:g}" text-anchor="end" {text}>log</text>' if decades else "")
        + f'<text x="{left}" y="{height - 6}" {text}>{x0}</text>'
        f'<text x="{width - right}" y="{height - 6}" text-anchor="end" {text}>{x1}</text>'
        "</svg>"
    )


def _image(frame: Tensor) -> Image.Image:
    pixels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _frame(frame: Tensor) -> Image.Image:
    image, size = _image(frame), display_size(frame[None])
    # Nearest shows the pixels the student made; a large frame that shrinks must not alias.
    larger = size[1] >= image.height
    resample = Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS
    return image.resize(size, resample)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels; words that are longer are cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-1]
        lines = [*lines, word] if lines[-1] else [word]
    return lines
