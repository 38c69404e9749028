"""Pictures of samples: a grid with one row per class, and the path from noise to an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from .extras import require

_GAP = 4
_BACKGROUND = 255
_INK = 40


def _font(size: int) -> Any:
    return require("PIL.ImageFont").load_default(size)


def draw_grid(
    images: torch.Tensor,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    tile: int = 56,
) -> None:
    """Writes a PNG of images in rows and columns, enlarged without smoothing.

    Args:
        images: (rows, columns, 1, H, W) in [-1, 1]; values outside are clipped.
        path: the PNG file.
        title: a line above the grid.
        row_labels: one text left of each row, or none.
        column_labels: one text above each column, or none.
        tile: least side of an enlarged image in pixels; the scale is a whole number.
    """
    image_module, draw_module = require("PIL.Image"), require("PIL.ImageDraw")
    rows, columns, _, height, width = images.shape
    scale = -(-tile // max(height, width))
    gray = images.detach().cpu().squeeze(2).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    pixels = gray.repeat_interleave(scale, 2).repeat_interleave(scale, 3).numpy()  # (rows, columns, H s, W s)
    step_y, step_x = height * scale + _GAP, width * scale + _GAP

    title_font, font = _font(18), _font(15)
    margin = 12
    left = margin + (max(int(font.getlength(text)) for text in row_labels) + 10 if row_labels else 0)
    top = margin + (30 if title else 0) + (24 if column_labels else 0)
    size_x = left + columns * step_x - _GAP + margin
    size_x = max(size_x, int(title_font.getlength(title)) + 2 * margin)
    canvas = image_module.new("L", (size_x, top + rows * step_y - _GAP + margin), _BACKGROUND)
    draw = draw_module.Draw(canvas)
    if title:
        draw.text((margin, margin - 2), title, fill=_INK, font=title_font)
    for column, text in enumerate(column_labels):
        draw.text((left + column * step_x + width * scale // 2, top - 6), text, fill=_INK, font=font, anchor="ms")
    for row in range(rows):
        if row_labels:
            middle = (left - 10, top + row * step_y + height * scale // 2)
            draw.text(middle, row_labels[row], fill=_INK, font=font, anchor="rm")
        for column in range(columns):
            canvas.paste(image_module.fromarray(pixels[row, column]), (left + column * step_x, top + row * step_y))
    canvas.save(path)
