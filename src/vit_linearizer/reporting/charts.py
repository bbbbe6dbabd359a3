"""What all charts of the page share: a figure of plotly without colours, with words on how to read it and its values.

Colours are the page's: a trace carries the number of its series in ``meta``, and report.js paints it light or dark. Plotly
reads labels as markup, so every name passes through `label`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .wording import plain

#: Colours that the page has.
SERIES = 8
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "hexagon")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart.

    Attributes:
        name: says what it shows, also to those who cannot see it.
        caption: how to read it.
        figure: plotly's, see `plotly.graph_objects.Figure`.
        columns: head of the table of its values.
        rows: of the table, as text.
    """

    name: str
    caption: str
    figure: Any
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def label(text: str, most: int = 44) -> str:
    """A name as plotly shows it: markup as text, the middle of a long one left out."""
    text = " ".join(text.split())
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def mark(layout: dict[str, Any], x: float, text: str, *, log: bool) -> None:
    """An upright dotted line with a word beside its upper end."""
    ends = {"xref": "x", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1}
    layout["shapes"].append({"type": "line", **ends, "line": {"dash": "dot", "width": 1.5}})
    layout["annotations"].append(
        {
            "text": text,
            "xref": "x",
            "yref": "paper",
            "x": math.log10(x) if log else x,  # plotly's annotations, unlike its shapes, take the logarithm
            "y": 1,
            "xanchor": "left",
            "yanchor": "top",
            "xshift": 4,
            "showarrow": False,
        }
    )


def make_logarithmic(axis: dict[str, Any], values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5, or at the powers of ten where it is long."""
    low, high = min(values), max(values)
    digits = (1, 2, 5) if high / low < 300 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in digits if low / 2 <= digit * 10.0**power <= high * 2]
    axis |= {"type": "log", "tickvals": ticks, "ticktext": [plain(tick) for tick in ticks]}


def base_layout(x: str, y: str) -> dict[str, Any]:
    """What all charts have in common; nothing to drag or zoom, so that a finger scrolls the page."""
    return {
        "xaxis": {"title": {"text": x}, "fixedrange": True, "automargin": True},
        "yaxis": {"title": {"text": y}, "fixedrange": True, "automargin": True},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "height": 400,
        "autosize": True,
        "dragmode": False,
        "hovermode": "x unified",
        "hoverdistance": -1,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "showlegend": True,
        "shapes": [],
        "annotations": [],
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
    }
