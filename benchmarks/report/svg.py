"""Charts as SVG, drawn by matplotlib: text stays text, colours are the page's, the same bytes each time."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from multisa.benchmarks.report.cells import short
from multisa.benchmarks.report.charts import Bar, Bars, Chart, Front, Lines, Series, Stacks
from multisa.runtime.errors import BackendUnavailable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_WIDTH = 7.2  # inches, of which the page makes its own width
# Colours that nothing else has; each is replaced by the page's variable, which differs by light and dark.
_INK, _SOFT, _LINE, _CARD = "#010101", "#020202", "#030303", "#040404"
_SERIES = tuple(f"#0{index}0{index}1{index}" for index in range(8))
_VARIABLES = {
    _INK: "--ink",
    _SOFT: "--soft",
    _LINE: "--line",
    _CARD: "--card",
    **{colour: f"--c{index}" for index, colour in enumerate(_SERIES)},
}
_TICK, _ENTRY = 42, 46  # characters of a line beside a bar (of two), of an entry of a legend
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MOST_TICKS = 10  # that points of a curve have of their own
_DASHES = ("-", "--", ":", "-.")
_SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that sizes are the same everywhere
    "font.size": 10,
    "text.parse_math": False,  # a dollar in a name is a dollar
    **dict.fromkeys(("text.color", "axes.labelcolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _SOFT),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), _LINE),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "legend.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "legend.fontsize": 9,
}


def draw(charts: list[Chart]) -> list[str]:
    """One <svg> element for each chart, to stand in a page that defines the variables of page.css.

    Raises BackendUnavailable where matplotlib is not installed.
    """
    try:
        import matplotlib
        import matplotlib.style
    except ImportError as error:
        raise BackendUnavailable(
            "matplotlib is not installed, which draws the plots", remedy="pip install matplotlib"
        ) from error
    drawn = []
    for chart in charts:
        # The salt names what the SVG refers to within itself; pages hold several, so each has its own.
        settings = {**_SETTINGS, "svg.hashsalt": chart.title}
        with matplotlib.style.context(["default", settings]), warnings.catch_warnings():
            # Only sizes are taken from this font: the browser has others for the letters it lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            drawn.append(_finished(_figure(chart), chart.title))
    return drawn


def _figure(chart: Chart) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _height(chart)), layout="constrained")
    axes = figure.add_subplot()
    match chart:
        case Front():
            _draw_front(figure, axes, chart)
        case Lines():
            _draw_lines(figure, axes, chart)
        case Bars():
            _draw_bars(axes, chart)
        case Stacks():
            _draw_stacks(figure, axes, chart)
    return figure


def _lines(text: str, width: int, most: int) -> str:
    """`text` in at most so many lines: what is longer would leave the axes no room."""
    return "\n".join(textwrap.wrap(text, width, max_lines=most, placeholder=" …"))


def _height(chart: Chart) -> float:
    """Inches: bars are of one thickness, lines have room for their legend."""
    if isinstance(chart, Bars):
        return 0.8 + 0.34 * len(chart.bars)
    if isinstance(chart, Stacks):
        return 1.1 + 0.34 * len(chart.labels)
    return 3.6 + 0.2 * math.ceil(len(chart.series) / 2)


def _finished(figure: "Figure", title: str) -> str:
    """The figure as an element of a page: no prolog, no metadata, colours as variables."""
    from xml.sax.saxutils import quoteattr

    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # Ids that every chart numbers from 1 and nothing refers to; the others are made with the salt.
    text = re.sub(r'<(\w+) id="[A-Za-z0-9.]+_\d+"', r"<\1", text)
    text = re.sub(r'style="[^"]*"', lambda style: _with_variables(style[0]), text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None, "matplotlib writes a viewBox"
    head = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {size[0]} role="img" aria-label={quoteattr(title)}>'
    )
    return head + text[text.index(">") + 1 :].strip()


def _with_variables(style: str) -> str:
    for colour, variable in _VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--font)", style)


def _colour(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _look(series: Series) -> dict[str, Any]:
    marker, dash = _MARKERS[series.style % len(_MARKERS)], _DASHES[series.style % len(_DASHES)]
    width = 2.6 if series.strong else 1.6
    return {"color": _colour(series.colour), "marker": marker, "linestyle": dash, "linewidth": width}


def _draw_front(figure: "Figure", axes: "Axes", chart: Front) -> None:
    line = [chart.series[index] for index in chart.best]
    axes.step([s.xs[0] for s in line], [s.ys[0] for s in line], where="post", color=_SOFT, linewidth=1.2)
    for series in chart.series:
        look = {**_look(series), "linestyle": "none", "markersize": 9}
        axes.plot(series.xs, series.ys, label=_lines(series.name, _ENTRY, 1), **look)
        if series.strong:
            axes.plot(series.xs, series.ys, "o", markersize=17, markerfacecolor="none", markeredgecolor=_INK)
    _log_axis(axes, "x", [series.xs[0] for series in chart.series])
    low, high = min(s.ys[0] for s in chart.series), max(s.ys[0] for s in chart.series)
    # At least a point high: differences of hundredths are not to look like cliffs.
    room = max(0.12 * (high - low), (1 - (high - low)) / 2)
    axes.set_ylim(low - room, high + room)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(linewidth=0.6)
    _legend(figure, len(chart.series))


def _draw_lines(figure: "Figure", axes: "Axes", chart: Lines) -> None:
    for series in chart.series:
        axes.plot(series.xs, series.ys, label=_lines(series.name, _ENTRY, 1), markersize=5, **_look(series))
        if chart.ideal and len(series.xs) > 1:
            ideal = [series.ys[0] * x / series.xs[0] for x in series.xs]
            axes.plot(series.xs, ideal, color=_colour(series.colour), linestyle=(0, (2, 4)), linewidth=1)
    places = sorted({x for series in chart.series for x in series.xs})
    if chart.log_x:
        _log_axis(axes, "x", places)
    if chart.log_y:
        _log_axis(axes, "y", [y for series in chart.series for y in series.ys])
    else:
        axes.set_ylim(bottom=0)
    if len(places) <= _MOST_TICKS:
        axes.set_xticks(places, [short(place) for place in places])
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(linewidth=0.6)
    _legend(figure, len(chart.series))


def _draw_bars(axes: "Axes", chart: Bars) -> None:
    places = range(len(chart.bars))
    values = [bar.value for bar in chart.bars]
    lowest = 1.0
    if chart.log:
        marks = [] if chart.mark is None else [chart.mark]
        lowest = min([*values, *marks]) / 1.5
    for place, bar in zip(places, chart.bars, strict=True):
        _draw_bar(axes, place, bar, chart.mark if chart.log and chart.mark else 0.0)
    if chart.mark is not None:
        axes.axvline(chart.mark, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(places, [_lines(bar.label, _TICK, 2) for bar in chart.bars])
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=9)
    # Room for the text at the end of the longest bar.
    room = 1 + 0.011 * max(len(bar.text) for bar in chart.bars) / 0.5
    if chart.log:
        _log_axis(axes, "x", [lowest, *values])
        span = max(max(values) / lowest, 10.0)
        axes.set_xlim(lowest, lowest * span**room)
    else:
        axes.set_xlim(0, max([*values, chart.mark or 0]) * room or 1)
    axes.set_xlabel(chart.x_label)
    axes.grid(axis="x", linewidth=0.6)


def _draw_bar(axes: "Axes", place: int, bar: Bar, start: float) -> None:
    axes.barh(place, bar.value - start, left=start, height=0.66, color=_colour(bar.colour))
    end = max(bar.value, start)
    axes.annotate(
        bar.text,
        (end, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        weight="bold" if bar.strong else "normal",
    )


def _draw_stacks(figure: "Figure", axes: "Axes", chart: Stacks) -> None:
    places = range(len(chart.labels))
    left = [0.0] * len(chart.labels)
    for part, name in enumerate(chart.parts):
        widths = [100 * shares[part] for shares in chart.shares]
        axes.barh(
            places,
            widths,
            left=left,
            height=0.66,
            color=_colour(part),
            edgecolor=_CARD,
            label=_lines(name, _ENTRY // 2, 1),
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, text in zip(places, chart.texts, strict=True):
        axes.annotate(text, (100, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, [_lines(label, _TICK, 2) for label in chart.labels])
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.set_xlim(0, 142)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("% of the time")
    figure.legend(loc="outside upper center", ncols=min(len(chart.parts), 6))


def _log_axis(axes: "Axes", which: str, values: list[float]) -> None:
    """A logarithmic axis with ticks written as numbers, as many as its range needs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = min(values), max(values)
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis: Axis = axes.xaxis if which == "x" else axes.yaxis
    if low == high:
        (axes.set_xlim if which == "x" else axes.set_ylim)(low / 2, high * 2)
    ratio = high / low
    steps = (1.0, 2.0, 3.0, 5.0, 7.0) if ratio < 10 else (1.0, 2.0, 5.0) if ratio < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda place, _: short(place)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure", series: int) -> None:
    figure.legend(loc="outside lower center", ncols=min(series, 2))
