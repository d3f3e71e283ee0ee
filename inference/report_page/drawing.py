"""Pictures drawn once: as SVG that takes the page's colours, light or dark, and as PNG on white.

Colours are Okabe and Ito's, and viridis for depth, which differ for all eyes. In the SVG each
becomes a variable of the page's style sheet, where the dark scheme has a lighter one.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

INK, MUTED, GRID = "#1b1f25", "#5a6370", "#dde1e6"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b5638f"
ORANGE, SKY, GREY = "#c98a00", "#3f9fd8", "#8a929c"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "osD^vP"
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "++++")
_STOPS = 12
_TICKS = 9
_DEPTHS = [to_hex(colormaps["viridis"](x)) for x in np.linspace(0.0, 0.82, _STOPS)]
_DARK = {
    **{INK: "#e8eaed", MUTED: "#a3acb8", GRID: "#343a43"},
    **{BLUE: "#58aee6", VERMILLION: "#ff8a47", GREEN: "#35c79c", PURPLE: "#e29ac3"},
    **{ORANGE: "#eeb13a", SKY: "#8fd0f7", GREY: "#8d96a1"},
    **{
        light: to_hex(colormaps["viridis"](x))
        for light, x in zip(_DEPTHS, np.linspace(0.34, 1.0, _STOPS), strict=True)
    },
}
_NAMES = {
    **{INK: "ink", MUTED: "muted", GRID: "line", BLUE: "blue", VERMILLION: "vermillion"},
    **{GREEN: "green", PURPLE: "purple", ORANGE: "orange", SKY: "sky", GREY: "grey"},
    **{color: f"depth-{i}" for i, color in enumerate(_DEPTHS)},
}
_STYLE: dict[str, Any] = {
    **{"font.family": "DejaVu Sans", "font.size": 9.0, "axes.titlesize": 9.5},
    **{"axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10.0},
    **{"text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK},
    **{"axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED},
    **{"xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    **{"axes.facecolor": "none", "legend.frameon": False, "legend.fontsize": 8.5},
    **{"lines.linewidth": 1.6, "lines.markersize": 5.0, "hatch.linewidth": 0.6},
    **{"svg.fonttype": "none", "text.parse_math": False, "axes.unicode_minus": True},
}


@dataclass(frozen=True)
class Picture:
    """A picture to be drawn."""

    name: str
    """Of its files."""
    alt: str
    """What it shows, for those who do not see it."""
    draw: Callable[[Figure], None]
    inches: tuple[float, float]


@dataclass(frozen=True)
class Drawn:
    """The same, drawn."""

    name: str
    svg: str
    """For a page, whose colours it takes."""
    png: bytes


def depth_color(E: int, L: int) -> str:
    """Return the colour of exit E of L layers."""
    return _DEPTHS[round((E - 1) / max(1, L - 1) * (_STOPS - 1))]


def style_variables() -> str:
    """Return the colours as CSS: the light ones, and the dark ones where the reader asks so."""
    light = "".join(f"--{name}:{color};" for color, name in _NAMES.items())
    dark = "".join(f"--{name}:{_DARK[color]};" for color, name in _NAMES.items())
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def drawn(picture: Picture) -> Drawn:
    """Draw a picture: for a page without a size of its own, and on white, 180 dots an inch."""
    text, image = StringIO(), BytesIO()
    with rc_context(_STYLE | {"svg.hashsalt": picture.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font has not
        figure = Figure(figsize=picture.inches, layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        picture.draw(figure)
        figure.savefig(text, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # it is laid out
        figure.savefig(image, format="png", dpi=180, facecolor="white")
    return Drawn(picture.name, _for_a_page(picture, text.getvalue()), image.getvalue())


def _for_a_page(picture: Picture, svg: str) -> str:
    """Make the colours of an SVG variables of the page, and its ids its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{picture.name}-", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), svg)
    label = f'role="img" aria-label="{escape(picture.alt)}"'
    return re.sub(r'^<svg([^>]*?) width="[^"]*"', rf"<svg {label}\1", svg, count=1)


def _variable(color: str) -> str:
    return f"var(--{_NAMES[color]})" if color in _NAMES else color


def exit_ticks(axis: Axis, L: int) -> None:
    """Put ticks at exits of L layers, at whole numbers alone."""
    few = L <= _TICKS
    axis.set_major_locator(
        FixedLocator([*range(1, L + 1)]) if few else MaxNLocator(integer=True, nbins=_TICKS)
    )


def light_grid(axes: Axes, *, axis: str = "both") -> None:
    """Draw thin lines at the ticks."""
    axes.grid(visible=True, axis=axis, linewidth=0.6)  # type: ignore[arg-type]
    axes.tick_params(length=0)


def within(values: Sequence[float] | np.ndarray, share: float = 0.5) -> tuple[float, float]:
    """Return limits of an axis or a colour scale that a few far values do not set.

    Args:
        values: Some not finite.
        share: Percent of the values left out at each end.
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return 0.0, 1.0
    low, high = np.percentile(known, [share, 100.0 - share])
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)
