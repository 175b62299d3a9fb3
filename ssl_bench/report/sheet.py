"""Rows of small pictures as one PNG: enlarged, with a word beside each row."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

SIDE = 112  # pixels of a picture's side, at least
GAP, INK, PAPER = 4, (48, 53, 59), (255, 255, 255)


def write(path: Path, rows: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Write a PNG with a row for each label: uint8 (S, S, 3) each, or (S, S) in grey.

    Each picture has a size S of its own. Without smoothing, it is enlarged by the largest whole
    factor with which it fits its cell; the cell fits each picture of at least SIDE pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    sizes = {len(picture) for pictures in rows.values() for picture in pictures}
    side = max(size * math.ceil(SIDE / size) for size in sizes)
    font = ImageFont.load_default(size=15)
    margin = 2 * GAP + math.ceil(max(font.getlength(label) for label in rows))
    cell = side + GAP
    size = (margin + cell * max(map(len, rows.values())), GAP + cell * len(rows))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (label, pictures) in enumerate(rows.items()):
        top = GAP + number * cell
        draw.text((GAP, top + side // 2), label, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            factor = side // len(picture)
            enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            sheet.paste(Image.fromarray(enlarged), (margin + column * cell, top))
    sheet.save(path)
