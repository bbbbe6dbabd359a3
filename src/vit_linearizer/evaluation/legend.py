"""What the colours of a drawn label map stand for: swatches and names below the picture."""

import math
from collections.abc import Sequence

import matplotlib
from PIL import Image, ImageDraw, ImageFont


def with_legend(picture: Image.Image, rows: Sequence[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """A picture with lines of text and their colours below it, column after column, as many as its width holds.

    Letters grow with the picture, so that a large one may be shown small; a picture narrower than a line gets white beside
    it. The font is DejaVu Sans, which comes with matplotlib: Latin, Greek and Cyrillic letters, no Chinese ones.

    Args:
        picture: RGB; it keeps its pixels, at the top left.
        rows: text and (red, green, blue), 0 to 255, in the order of reading; at least one.

    Returns:
        RGB, at least as wide as the picture and higher.
    """
    side = max(14, round(math.sqrt(picture.width * picture.height) / 32))  # of a letter and of a swatch, in pixels
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", side)
    column = math.ceil(max(font.getlength(text) for text, _ in rows)) + 3 * side
    columns = max(1, min(len(rows), picture.width // column))
    lines, step = -(-len(rows) // columns), round(1.6 * side)
    drawn = Image.new("RGB", (max(picture.width, column), picture.height + lines * step + side), "white")
    drawn.paste(picture)
    draw = ImageDraw.Draw(drawn)
    for place, (text, colour) in enumerate(rows):
        left = side // 2 + column * (place // lines)
        top = picture.height + side // 2 + step * (place % lines) + (step - side) // 2
        draw.rectangle((left, top, left + side, top + side), fill=colour, outline="grey")
        draw.text((left + round(1.5 * side), top + side / 2), text, fill="black", font=font, anchor="lm")
    return drawn
