"""From a mask file to class numbers: which PNG files are masks, and which class each of their values stands for.

A mask holds one number a pixel: a greyscale PNG of 1 to 16 bits its grey values, a palette PNG its indices, never its
colours. Like its picture it is turned upright by its own EXIF orientation, and is then as large as the upright picture.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..images import UnreadableImageError, _reason

#: The class number of pixels that count in no loss and no score.
IGNORED = 255

_MODES = ("1", "L", "P", "I", "I;16", "I;16B")

#: Pillow stretches greys of 2 and 4 bits over 0 to 255, by these factors.
_STRETCHED = {"L;2": 85, "L;4": 17}


class WrongMaskError(UnreadableImageError):
    """A sound file that is no mask of this data set; the message is the reason in one line."""


def read_mask(path: Path) -> np.ndarray:
    """The numbers that a mask file holds, upright.

    Args:
        path: of the PNG file.

    Returns:
        ``[H, W]`` integers as they stand in the file: uint8, or a wider type for a file of 16 bits.

    Raises:
        WrongMaskError: colours instead of numbers, or another format than PNG.
        UnreadableImageError: broken, truncated or empty.
    """
    try:
        with Image.open(path) as opened:
            if opened.format != "PNG" or opened.mode not in _MODES:
                found = f"is a {opened.format} of mode {opened.mode}"
                raise WrongMaskError(f"{found}; a mask must be a greyscale or palette PNG whose pixels are class numbers")
            stretched = _STRETCHED.get(str(opened.tile[0][3]), 1)
            values = np.asarray(ImageOps.exif_transpose(opened))
    except WrongMaskError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their format made them trip over
        raise UnreadableImageError(_reason(error)) from error
    return (values.astype(np.uint8) if values.dtype == bool else values) // stretched


class ClassTable:
    """Which class each value of a data set's masks stands for.

    Args:
        classes: value in the file, 0 to 255, -> class number, or `IGNORED`; any other value is an error.
        allowed: the known values in words, for messages.
    """

    def __init__(self, classes: Mapping[int, int], *, allowed: str):
        self.allowed = allowed
        self._table = np.full(256, -1, dtype=np.int16)
        for value, number in classes.items():
            self._table[value] = number

    def numbers(self, values: np.ndarray) -> np.ndarray:
        """Class numbers of a mask's values.

        Args:
            values: ``[H, W]`` integers of `read_mask`.

        Returns:
            ``[H, W]`` uint8: class numbers, and `IGNORED`.

        Raises:
            WrongMaskError: a value that stands for no class.
        """
        outside = (values < 0) | (values > 255) if values.dtype != np.uint8 else np.zeros(values.shape, dtype=bool)
        numbers = self._table[np.where(outside, 0, values)]
        unknown = outside | (numbers < 0)
        if unknown.any():
            raise WrongMaskError(f"holds class value {values[unknown].min()}; {self.allowed}")
        return numbers.astype(np.uint8)
