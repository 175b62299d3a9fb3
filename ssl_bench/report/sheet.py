"""Rows of small pictures as one PNG: enlarged, with a word beside each row."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

SIDE = 112  # pixels of a picture's side, at least
GAP, INK, PAPER = 4, (48, 53, 59), (255, 255, 255)


def write(path: Path, rows: Mapping[str, np.ndarray]) -> None:
    """Write a PNG with a row for each label: uint8 (N, S, S, 3), or (N, S, S) in grey.

    Rows may have other sizes S than the first one, and as many pictures. Each is enlarged by the
    whole factor that comes nearest to the size of the first, without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(rows.values()))
    side = first.shape[1] * math.ceil(SIDE / first.shape[1])
    font = ImageFont.load_default(size=15)
    margin = 2 * GAP + math.ceil(max(font.getlength(label) for label in rows))
    cell = side + GAP
    size = (margin + cell * len(first), GAP + cell * len(rows))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (label, pictures) in enumerate(rows.items()):
        top = GAP + number * cell
        draw.text((GAP, top + side // 2), label, fill=INK, font=font, anchor="lm")
        factor = max(1, side // pictures.shape[1])
        for column, picture in enumerate(pictures):
            enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(Image.fromarray(enlarged), (margin + column * cell, top))
    sheet.save(path)
