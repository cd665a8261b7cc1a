"""The charts of a report: each drawn once by matplotlib, as a PNG and as SVG for the page.

In the SVG, colors are the page's variables, so that it is light or dark as the page is.
"""

import io
import re
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from wds_convnext.errors import UsageError
from wds_convnext.lettering import Lettering
from wds_convnext.report.measures import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Drawn = ParamSpec("Drawn")

INK, LINE, ACCENT, SECOND = "#1b1b1f", "#d5d5dd", "#2f6fde", "#d9622b"
_VARIABLES = {INK: "--ink", LINE: "--line", ACCENT: "--accent", SECOND: "--second"}
_SIZE = (4.6, 3.1)  # inches
_MAX_NAMED = 40  # classes with a row of their own in the chart of accuracies
_MAX_CELLS = 30  # classes with a number in each cell
_MAX_LETTERS = 26  # of a class name
MAX_ROWS = 120  # rows of a matrix; more classes are put together
# Of a matrix of up to so many rows: a cell's side in inches, the size of names in points.
_CELLS = ((_MAX_CELLS, 0.42, 8), (60, 0.2, 7), (MAX_ROWS, 0.11, 6.2))
_STYLE: Any = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def require_matplotlib() -> None:
    """Refuse a report without the package that draws it.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "matplotlib is not installed. pip install 'wds-convnext[report]'."
        ) from None


def render(figure: "Figure", name: str) -> tuple[bytes, str]:
    """A figure as a PNG and as SVG to stand in a page."""
    import matplotlib

    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(png, format="png", dpi=130, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r"\1", text, count=1)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return png.getvalue(), text


def _styled(draw: Callable[Drawn, "Figure"]) -> Callable[Drawn, "Figure"]:
    """A function that draws in this page's style."""

    @wraps(draw)
    def styled(*args: Drawn.args, **kwargs: Drawn.kwargs) -> "Figure":
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def _figure(size: tuple[float, float] = _SIZE) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


@_styled
def curves(title: str, lines: dict[str, list[tuple[float, float]]], *, unit: str) -> "Figure":
    """Values by step, a line for each name."""
    figure, axes = _figure()
    for color, (name, points) in zip((ACCENT, SECOND), lines.items()):
        steps, values = zip(*points)
        marker = "o" if len(points) < 40 else ""
        axes.plot(steps, values, color=color, label=name, marker=marker, markersize=3)
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(axis="y")
    if len(lines) > 1:
        axes.legend()
    return figure


@_styled
def reliability(found: Calibration) -> "Figure":
    """Accuracy by confidence, and how many samples there are of each."""
    figure, axes = _figure((4.6, 3.6))
    edges = np.linspace(0, 1, len(found.counts) + 1)
    width = edges[1] * 0.92
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.bar(edges[:-1] + edges[1] / 2, np.nan_to_num(found.accuracies), width, color=ACCENT)
    shares = found.counts / found.counts.sum()
    axes.step(edges, [*shares, shares[-1]], where="post", color=SECOND, label="share of samples")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title="Reliability")
    axes.legend(loc="upper left")
    return figure


@_styled
def accuracies(
    names: Sequence[str], shares: np.ndarray, lows: np.ndarray, highs: np.ndarray
) -> "Figure":
    """Accuracy of each class with its interval, the worst first; named where they are few."""
    order = np.argsort(shares, kind="stable")
    x, low, high = (100 * values[order] for values in (shares, lows, highs))
    places = np.arange(len(order))
    if len(order) > _MAX_NAMED:
        figure, axes = _figure()
        axes.fill_between(places, low, high, color=ACCENT, alpha=0.25, linewidth=0)
        axes.plot(places, x, color=ACCENT)
        axes.set(xlabel="classes, the worst first", ylabel="accuracy, %", ylim=(-2, 102))
    else:
        figure, axes = _figure((4.6, 0.9 + 0.2 * len(order)))
        axes.hlines(places, low, high, color=ACCENT, alpha=0.45, linewidth=3)
        axes.plot(x, places, "o", color=ACCENT, markersize=5)
        _set_names(axes.yaxis, [names[i] for i in order.tolist()], size=8)
        axes.invert_yaxis()
        axes.set(xlabel="accuracy, %", xlim=(-2, 102))
    axes.grid(axis="y" if len(order) > _MAX_NAMED else "x")
    return figure


@_styled
def matrix(counts: np.ndarray, names: Sequence[str]) -> "Figure":
    """A confusion matrix, its classes in the order given; many of them put together in groups.

    Cells are shares of their row, by their cube roots: one color on the diagonal, one for errors.
    """
    counts, labels = _grouped(counts, names)
    size = len(counts)
    cell, font = next(sizes for most, *sizes in _CELLS if size <= most)
    longest = min(_MAX_LETTERS, max(map(len, labels)))
    side = max(2.0, size * cell) + 0.9 + longest * font / 100  # a letter's width in inches
    figure, axes = _figure((side, side))
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(_colored(shares), interpolation="none")
    # Held at their end, so that in the SVG, too, a browser's wider font grows away from the cells.
    upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
    _set_names(axes.xaxis, labels, size=font, **upright)
    _set_names(axes.yaxis, labels, size=font)
    axes.tick_params(length=0)
    if size <= _MAX_CELLS:
        for row, column in zip(*counts.nonzero()):
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7)
    axes.set(xlabel="predicted", ylabel="label")
    axes.spines[:].set_visible(True)
    return figure


def _grouped(counts: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    if len(counts) <= MAX_ROWS:
        return counts, list(names)
    num_groups = MAX_ROWS // 3
    starts = [group * len(counts) // num_groups for group in range(num_groups)]
    ends = [*starts[1:], len(counts)]
    grouped = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
    labels = [f"{names[a][:10]} - {names[b - 1][:10]} ({b - a})" for a, b in zip(starts, ends)]
    return grouped, labels


def _colored(shares: np.ndarray) -> np.ndarray:
    """RGBA of two colors, by how opaque they are, so that they stand on light and dark."""
    from matplotlib.colors import to_rgb

    pixels = np.empty((*shares.shape, 4))
    pixels[..., :3] = to_rgb(SECOND)
    pixels[range(len(shares)), range(len(shares)), :3] = to_rgb(ACCENT)
    pixels[..., 3] = np.cbrt(shares) * 0.85
    return pixels


def _set_names(axis: "Axis", names: Sequence[str], *, size: float, **kwargs: Any) -> None:
    """Name the ticks 0, 1, …: no formulas, in fonts that have the letters, nothing too long."""
    # Cut before they are set: an axis writes its labels into the texts again when it is drawn.
    cut = [n if len(n) <= _MAX_LETTERS else n[: _MAX_LETTERS - 1] + "…" for n in names]
    chosen = [_lettering().choose(name) for name in cut]
    axis.set_ticks(range(len(names)), [drawn for drawn, _ in chosen], fontsize=size, **kwargs)
    for text, (_, font) in zip(axis.get_ticklabels(), chosen):
        text.set_parse_math(False)
        if isinstance(font.path, str):
            text.set_fontproperties(_font(font.path, size))


@cache
def _lettering() -> Lettering:
    return Lettering(12)


def _font(path: str, size: Any) -> Any:
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=path, size=size)
