"""One PNG with the activation maps of several models: a row a stage, a column a model, one colour scale for all of them.

Heat lies over the picture in grey, brought to its size bilinearly, in viridis, whose steps look equal. All panels of a sheet
share their limits, the smallest and largest value of any of them rounded outwards, which the bar shows in numbers: an equal
colour is an equal cosine. Names are text and nothing else. How it looks is a choice.
"""

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..contracts import UserError
from .activation_maps import MapPanels, ModelMaps, Query

View = Literal["heat", "pca"]

#: Inches. A panel has this area, unless it grows too narrow for its text or too long for a page.
_AREA, _LONGEST, _NARROWEST = 6.5, 6.0, 2.1
_LEFT, _GAP, _RIGHT, _TOP, _NAMES, _CAPTION, _BAR, _BOTTOM = 0.45, 0.15, 0.2, 0.45, 0.42, 0.5, 0.85, 0.1
#: Of a line of the notes below.
_NOTE = 0.14
#: Share of the heat in a panel; the rest is the picture in grey, which should be seen and not pass for heat.
_HEAT = 0.8
#: Limits are rounded outwards to multiples of this.
_STEP = 0.05
#: A sheet of very many panels is drawn coarser, so that its longer side has no more pixels than this.
_MOST_PIXELS = 12000


@dataclass(frozen=True, kw_only=True)
class SheetLayout:
    """Where things lie, in inches from the upper left corner.

    Attributes:
        size: (width, height) of the sheet.
        picture: (width, height) of a drawn picture.
        columns: left edges of the picture's column and of each model's.
        rows: upper edges of the panels of each row.
        column: width of a column, at least the picture's.
    """

    size: tuple[float, float]
    picture: tuple[float, float]
    columns: tuple[float, ...]
    rows: tuple[float, ...]
    column: float


def sheet_layout(panels: MapPanels, views: Sequence[View] = ("heat",)) -> SheetLayout:
    """The layout of `draw_sheet`, from the shape of the picture and the numbers of models and rows alone."""
    height, width = panels.image.shape[-2:]
    shape = width / height
    wide = min(math.sqrt(_AREA * shape), _LONGEST, _LONGEST * shape)
    tall = wide / shape
    column = max(wide, _NARROWEST)
    rows = ("heat" in views) * len(panels.shown) + ("pca" in views)
    columns = tuple(_LEFT + place * (column + _GAP) for place in range(1 + len(panels.models)))
    tops = tuple(_TOP + _NAMES + place * (tall + _CAPTION) for place in range(rows))
    below = (_BAR if "heat" in views else 0) + _NOTE * len(_notes(panels, views)) + _BOTTOM
    return SheetLayout(
        size=(columns[-1] + column + _RIGHT, tops[-1] + tall + _CAPTION + below),
        picture=(wide, tall),
        columns=columns,
        rows=tops,
        column=column,
    )


def colour_limits(models: Iterable[ModelMaps]) -> tuple[float, float]:
    """Limits of a sheet: smallest and largest heat of all its panels, rounded outwards."""
    heat = torch.cat([maps.heat.flatten() for maps in models]).double()
    heat = heat[heat.isfinite()]
    if not len(heat):
        return 0.0, 1.0
    # A cosine that rounding leaves a hair outside of a multiple does not need a step more.
    low = round(math.floor(float(heat.min()) / _STEP + 1e-3) * _STEP, 10)
    high = round(math.ceil(float(heat.max()) / _STEP - 1e-3) * _STEP, 10)
    return (low, high) if low < high else (low - _STEP, high)


def draw_sheet(panels: MapPanels, *, title: str = "", views: Sequence[View] = ("heat",), dpi: int = 150) -> bytes:
    """Draw the maps of one picture.

    Args:
        panels: what `activation_maps.map_panels` returns, with colours where ``pca`` is asked for.
        title: stands above, e.g. the picture's name.
        views: ``heat`` (activation maps, a row a stage) and ``pca`` (colours of the final patch tokens, one row).
        dpi: pixels an inch of `sheet_layout`.

    Returns:
        A PNG file.

    Raises:
        UserError: no view, or ``pca`` without colours.
    """
    if not views or not set(views) <= {"heat", "pca"}:
        raise UserError("view", " ".join(views) or None, "choose heat, pca or both")
    if "pca" in views and any(maps.colours is None for maps in panels.models.values()):
        raise UserError("view", "pca", "needs maps made with colours=True")
    with warnings.catch_warnings():
        # A letter that the font lacks becomes a box; that is no reason to speak, nor where warnings are errors, to stop.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        return _Sheet(panels, views, dpi).draw(title)


class _Sheet:
    """The figure while it is drawn."""

    def __init__(self, panels: MapPanels, views: Sequence[View], dpi: int):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # without pyplot, so that no window system is asked for

        self.panels, self.views = panels, views
        self.layout = sheet_layout(panels, views)
        self.dpi = min(dpi, _MOST_PIXELS / max(self.layout.size))
        self.figure = Figure(figsize=self.layout.size, dpi=self.dpi, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self.pixels = tuple(max(1, round(side * self.dpi)) for side in self.layout.picture)
        self.limits = colour_limits(panels.models.values())

    def draw(self, title: str) -> bytes:
        layout, panels = self.layout, self.panels
        self.text(title, _LEFT, 0.1, size=11, width=layout.size[0] - _LEFT - _RIGHT, weight="bold")
        for left, (name, maps) in zip(layout.columns[1:], panels.models.items(), strict=True):
            self.text(name, left, _TOP, size=10, width=layout.column, weight="bold")
            self.text(f"{maps.grid[0]} x {maps.grid[1]} patches", left, _TOP + 0.2, size=8, width=layout.column)
        picture = self.resized(panels.image, self.pixels).permute(1, 2, 0)
        rows = layout.rows[: len(panels.shown)] if "heat" in self.views else ()
        for place, top in enumerate(rows):
            self.side(f"stage {panels.shown[place]} of {panels.stages}", top)
            self.picture(picture, 0, top, mark=True)
            for column, maps in enumerate(panels.models.values(), start=1):
                self.picture(self.heat(maps.heat[place]), column, top, mark=True)
                self.text(self.agreement(maps, place), layout.columns[column], self.below(top), size=8, width=layout.column)
        if "pca" in self.views:
            top = layout.rows[-1]
            self.side("colours", top)
            self.picture(picture, 0, top)
            for column, maps in enumerate(panels.models.values(), start=1):
                assert maps.colours is not None
                self.picture(maps.colours, column, top)
                self.text(self.alike(maps), layout.columns[column], self.below(top), size=8, width=layout.column)
        if rows:
            self.text(_query_text(panels.query), layout.columns[0], self.below(rows[0]), size=8, width=layout.column)
            self.bar()
        self.notes()
        self.canvas.draw()
        file = io.BytesIO()
        # Without the alpha channel, all of it opaque, that matplotlib would write.
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3]).save(file, format="PNG", dpi=(self.dpi, self.dpi))
        return file.getvalue()

    # --- what panels hold

    def heat(self, heat: Tensor) -> Tensor:
        """``[H, W, 3]``: colours of the heat over the grey picture, at the size drawn."""
        colours = torch.from_numpy(self.scale().to_rgba(self.resized(heat[None], self.pixels)[0].numpy())[..., :3])
        red, green, blue = self.resized(self.panels.image, self.pixels)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        return _HEAT * colours + (1 - _HEAT) * grey[..., None]

    def scale(self) -> Any:
        """Values to colours, the same for every panel."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        return ScalarMappable(Normalize(*self.limits), "viridis")

    def agreement(self, maps: ModelMaps, place: int) -> str | tuple[str, str]:
        """What stands under a panel of heat."""
        if len(self.panels.models) == 1:
            return ""
        if maps.agreement is None or maps.all_tokens is None:
            return "other grid, not compared"
        if maps is next(iter(self.panels.models.values())):
            return "reference"
        return f"agreement {maps.agreement[place]:.3f}", f"all tokens {maps.all_tokens[place]:.3f}"

    def alike(self, maps: ModelMaps) -> str:
        """What stands under a panel of colours."""
        if len(self.panels.models) == 1:
            return ""
        if maps.colours_agreement is None:
            return "other grid, not compared"
        if maps is next(iter(self.panels.models.values())):
            return "reference"
        return f"agreement of colours {maps.colours_agreement:.3f}"

    @staticmethod
    def resized(image: Tensor, pixels: Sequence[int]) -> Tensor:
        """``[C, h, w]`` bilinearly at (width, height) pixels."""
        size = (pixels[1], pixels[0])
        return F.interpolate(image[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]

    # --- where they stand

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes at a place in inches from the upper left corner."""
        wide, tall = self.layout.size
        return self.figure.add_axes((left / wide, 1 - (top + height) / tall, width / wide, height / tall))

    def picture(self, rgb: Tensor, column: int, top: float, *, mark: bool = False) -> None:
        """An RGB picture ``[h, w, 3]`` in a row and column; where it has fewer pixels than drawn, they stay squares."""
        width, height = self.layout.picture
        axes = self.axes(self.layout.columns[column], top, width, height)
        axes.imshow(rgb.clamp(0, 1).numpy(), interpolation="nearest", aspect="auto", extent=(0, 1, 1, 0))
        axes.set_axis_off()
        if mark and not isinstance(self.panels.query, str):
            size = self.panels.image.shape
            x, y = self.panels.query[0] / size[-1], self.panels.query[1] / size[-2]
            for colour, edge in (("black", 3.0), ("white", 1.5)):
                axes.plot([x], [y], "o", markersize=8, fillstyle="none", color=colour, markeredgewidth=edge)

    def below(self, top: float) -> float:
        return top + self.layout.picture[1] + 0.06

    def side(self, text: str, top: float) -> None:
        """A row's name, along its left edge."""
        wide, tall = self.layout.size
        place = (0.2 / wide, 1 - (top + self.layout.picture[1] / 2) / tall)
        self.figure.text(*place, text, rotation=90, ha="center", va="center", fontsize=9, parse_math=False, usetex=False)

    def bar(self) -> None:
        """The colour scale, in the colours that it has over a grey picture."""
        from matplotlib.ticker import MaxNLocator

        left, right = self.layout.columns[1], self.layout.columns[-1] + self.layout.column
        low, high = self.limits
        top = self.layout.rows[-1] + self.layout.picture[1] + _CAPTION
        axes = self.axes(left, top + 0.05, min(right - left, 6.0), 0.16)
        colours = _HEAT * self.scale().to_rgba(torch.linspace(low, high, 512)[None].numpy())[..., :3] + (1 - _HEAT) * 0.5
        axes.imshow(colours, aspect="auto", extent=(low, high, 0, 1))
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}" if abs(value) > 1e-9 else "0")
        axes.tick_params(labelsize=8)
        lines = (f"cosine to the query, {low:.4g} to {high:.4g}", "one scale for all panels")
        self.text(lines, left, top + 0.45, size=8, width=right - left)

    def notes(self) -> None:
        """What the numbers and colours are."""
        lines = _notes(self.panels, self.views)
        top = self.layout.size[1] - _BOTTOM - _NOTE * len(lines)
        for place, line in enumerate(lines):
            width = self.layout.size[0] - _LEFT - _RIGHT
            self.text(line, _LEFT, top + _NOTE * place, size=7, width=width, colour="#444444")

    def text(self, text: str | tuple[str, ...], left: float, top: float, *, size: float, width: float,
             weight: str = "normal", colour: str = "black") -> None:  # fmt: skip
        """Lines of text from their upper left corner, smaller and then shortened where they would be too wide."""
        lines = [_printable(line) for line in ((text,) if isinstance(text, str) else text)]
        longest = max(lines, key=len)[:400]
        while size > 6.5 and self.width(longest, size, weight) > width:
            size -= 0.5
        lines = [self.shortened(line, size, weight, width) for line in lines]
        wide, tall = self.layout.size
        for place, line in enumerate(lines):
            # By their baselines: the upper edge of letters depends on which they are.
            base = top + (1 + 1.3 * place) * size / 72
            self.figure.text(left / wide, 1 - base / tall, line, va="baseline", fontsize=size, fontweight=weight,
                             color=colour, parse_math=False, usetex=False)  # fmt: skip

    def shortened(self, line: str, size: float, weight: str, width: float) -> str:
        """A line with an ellipsis in its middle where it is too wide: names differ at their ends."""
        kept = min(len(line), 400)
        short = line if kept == len(line) else _middle_out(line, kept)
        while kept > 2 and self.width(short, size, weight) > width:
            kept -= max(1, kept // 20)
            short = _middle_out(line, kept)
        return short

    def width(self, line: str, size: float, weight: str) -> float:
        """Inches of a line."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        renderer: Any = self.canvas.get_renderer()
        return renderer.get_text_width_height_descent(line, font, False)[0] / self.dpi


def _middle_out(line: str, kept: int) -> str:
    return f"{line[: kept // 2]}…{line[len(line) - (kept - kept // 2) :]}"


def _printable(text: str) -> str:
    """On one line, in letters that can be drawn: control characters and bytes that are no UTF-8 become escapes."""
    text = " ".join(text.split()).encode(errors="backslashreplace").decode()
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _query_text(query: Query) -> str:
    kinds = {"class": "class token", "mean": "mean patch token"}
    return f"query: {kinds[query] if isinstance(query, str) else 'the patch under the ring'}"


def _notes(panels: MapPanels, views: Sequence[View]) -> list[str]:
    """Lines for the foot of a sheet, short enough for the narrowest."""
    several, lines = len(panels.models) > 1, []
    if "heat" in views and several:
        lines.append("agreement: cosine of this map to the reference's; 1 is equal")
        lines.append("all tokens: the same with every patch as the query, in the mean")
    if "pca" in views:
        lines.append("colours: three principal components of the final patch tokens")
        if several:
            lines[-1] += ","
            lines.append("turned towards the reference's; agreement: cosine between the spaces they span")
    return lines
