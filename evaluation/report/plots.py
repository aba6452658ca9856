"""Figures as SVG by matplotlib, with colours set by the page: one drawing serves the light and the dark theme.

Marks are drawn in placeholder colours, which are replaced by the page's CSS variables in the finished SVG. Marks with a
name get a tooltip. Text stays text, in the page's own font. A unit of a drawing is a pixel of the page: each figure is
drawn once for a narrow card and once for a wide one, so that its text has the same size in both.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from html import escape
from io import StringIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lowbit.extras import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIABLES = {"ink": "#000001", "muted": "#000002", "grid": "#000003", "card": "#000004"}
VARIABLES |= {"before": "#000010", "after": "#000011"}
HEAT_STEPS = 9
INK, MUTED, GRID, CARD = (VARIABLES[name] for name in ("ink", "muted", "grid", "card"))
BEFORE, AFTER = (VARIABLES[name] for name in ("before", "after"))
TYPE = 12  # pixels; all text of all figures
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lowbit",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": TYPE,
    "axes.titlesize": TYPE,
    "axes.labelsize": TYPE,
    "xtick.labelsize": TYPE,
    "ytick.labelsize": TYPE,
    "text.parse_math": False,  # no TeX: a dollar in a module's name is a dollar
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}
NARROW, WIDE = 334, 522  # pixels of a card's content: on a phone, and on a desktop; style.css swaps them
DPI = 72  # of SVG by matplotlib

Draw = Callable[..., "Drawing | None"]


@cache
def _matplotlib() -> Any:
    """The package. UsageError without it: it belongs to an extra of its own."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ModuleNotFoundError as error:
        raise missing("a page with plots", error) from error
    return matplotlib


def plot(draw: Draw, *values: Any, **settings: Any) -> str | None:
    """A figure at both widths as HTML; None if `draw` has no data."""
    drawn = [draw(*values, width, **settings) for width in (NARROW, WIDE)]
    return (
        "".join(
            f'<div class="plot {name}">{each.svg()}</div>'
            for name, each in zip(("narrow", "wide"), drawn, strict=True)
            if each is not None
        )
        or None
    )


class Drawing:
    """A figure under construction.

    label    description for people who cannot see it
    width, height  in pixels
    tooltips  mark's name -> text
    """

    def __init__(self, label: str, width: int, height: int = 250, rows: int = 1, columns: int = 1) -> None:
        self.label = label
        self.tooltips: dict[str, str] = {}
        with _matplotlib().rc_context(STYLE):
            self.figure = _matplotlib().figure.Figure(figsize=(width / DPI, height / DPI), layout="constrained")
            self.axes: list[Axes] = list(self.figure.subplots(rows, columns, squeeze=False).flat)

    def name(self, text: str) -> str:
        """A new name for a mark with `text` as its tooltip."""
        key = f"mark-{len(self.tooltips)}"
        self.tooltips[key] = text
        return key

    def svg(self) -> str:
        """The finished figure as an SVG element."""
        buffer = StringIO()
        with _matplotlib().rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return _for_page(buffer.getvalue(), self.label, self.tooltips)


def _for_page(svg: str, label: str, tooltips: dict[str, str]) -> str:
    """matplotlib's file as an element of a page: no prolog, no fixed size, CSS colours and fonts, tooltips."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', rf'\1 role="img" aria-label="{escape(label)}"', svg, count=1)
    for name, colour in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    for key, text in tooltips.items():
        svg = svg.replace(f'<g id="{key}">', f'<g class="mark"><title>{escape(text)}</title>', 1)
    return re.sub(r'<g id="[a-z_0-9.]+">', "<g>", svg)


def survival_plot(row: dict[str, Any], width: int) -> Drawing | None:
    """Share of tokens whose divergence exceeds x: the tail shows damage that a mean hides."""
    points = [(kl, share) for kl, share in row.get("survival") or [] if kl > 0]
    if len(points) < 3:
        return None
    drawing = Drawing("Share of tokens whose divergence exceeds a value", width)
    [axes] = drawing.axes
    kls, shares = zip(*points, strict=True)
    axes.plot(kls, shares, color=AFTER, linewidth=2.2)
    axes.fill_between(kls, shares, min(shares), color=AFTER, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(max(min(kls), 1e-5), max(kls) * 6)  # room for the texts
    for key, text in (("kl_mean", "mean"), ("kl_p99", "99%"), ("kl_p999", "99.9%")):
        value = row.get(key)
        if value:
            share = max(_share_at(points, value), min(shares))
            [dot] = axes.plot([value], [share], "o", markerfacecolor=CARD, color=AFTER, markersize=7, markeredgewidth=2)
            dot.set_gid(drawing.name(f"{text}: {value:.4g} nats; {share:.2%} of tokens beyond it"))
            axes.annotate(
                f"{text} {value:.3g}",
                (value, share),
                (7, 4),
                textcoords="offset points",
                color=INK,
                fontsize=TYPE,
            )
    axes.set_xlabel("KL divergence from the original, nats")
    axes.set_ylabel("share of tokens beyond")
    _decades(axes)
    return drawing


def _share_at(points: Sequence[tuple[float, float]], value: float) -> float:
    """The share of tokens beyond `value`, interpolated between known points."""
    ordered = sorted(points)
    for (below, more), (above, fewer) in pairwise(ordered):
        if below <= value <= above:
            part = (value - below) / max(above - below, 1e-30)
            return more + part * (fewer - more)
    return ordered[-1][1]


def _decades(axes: "Axes") -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_matplotlib().ticker.LogLocator(10, numticks=5))
        axis.set_major_formatter(_matplotlib().ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(_matplotlib().ticker.NullLocator())


def position_plot(row: dict[str, Any], width: int) -> Drawing | None:
    """Divergence by position in the window."""
    buckets = row.get("by_position") or []
    if len(buckets) < 2:
        return None
    drawing = Drawing("Mean divergence by position in the window", width)
    [axes] = drawing.axes
    for bucket in buckets:
        begin, span = bucket["from"], bucket["to"] - bucket["from"] + 1
        text = f"tokens {bucket['from']}-{bucket['to']}: KL {bucket['kl']:.4g}, top-1 {bucket['top1']:.1%}"
        [bar] = axes.bar(begin, bucket["kl"], span * 0.86, align="edge", color=AFTER, gid=drawing.name(text))
        bar.set_joinstyle("round")
    axes.axhline(row["kl_mean"], color=INK, linewidth=1.2, dashes=(3, 2))
    axes.annotate(
        f"mean {row['kl_mean']:.3g}",
        (1, row["kl_mean"]),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontsize=TYPE,
        bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )
    axes.set_xlabel("position in the window, tokens")
    axes.set_ylabel("mean KL, nats")
    axes.grid(visible=False, axis="x")
    return drawing


def heat_step(value: float, least: float, most: float) -> int:
    """The index of the colour for `value`, on a logarithmic scale if the values span more than a factor of three."""
    if most <= least:
        return HEAT_STEPS // 2 if value == least else (HEAT_STEPS - 1) * (value > most)
    if least > 0 and most / least > 3:
        part = math.log(max(value, least) / least) / math.log(most / least)
    else:
        part = (value - least) / (most - least)
    return min(max(int(part * HEAT_STEPS), 0), HEAT_STEPS - 1)


def loss_plot(losses: Sequence[float | None], width: int) -> Drawing | None:
    """Relative squared error of each block's output."""
    points = [(index, loss) for index, loss in enumerate(losses) if loss is not None]
    if not points:
        return None
    drawing = Drawing("Squared error of each block's output", width, 300)
    [axes] = drawing.axes
    for index, loss in points:
        axes.bar(index, loss, 0.8, color=AFTER, gid=drawing.name(f"block {index}: {loss:.4g}"))
    axes.set_xlabel("block")
    axes.set_ylabel("relative squared error")
    axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")
    return drawing


def tuning_plot(values: Sequence[float], width: int) -> Drawing | None:
    """Divergence from the unquantized model on the calibration text, step by step of the tuning."""
    if len(values) < 2:
        return None
    drawing = Drawing("Divergence from the original while scales and norms were tuned", width)
    [axes] = drawing.axes
    axes.plot(values, color=AFTER, linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("KL, nats a token")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(integer=True))
    return drawing


def outlier_plot(rows: Sequence[dict[str, Any]], width: int) -> Drawing | None:
    """Largest over median input channel, before and after transforms."""
    if not rows:
        return None
    columns = 2 if len(rows) > 1 else 1
    lines = math.ceil(len(rows) / columns)
    drawing = Drawing("Outliers of each site's inputs, before and after", width, 20 + 140 * lines, lines, columns)
    for axes, row in zip(drawing.axes, rows, strict=False):
        axes.plot(_gaps(row["before"]), color=BEFORE, linewidth=2.6)
        axes.plot(_gaps(row["after"]), color=AFTER, linewidth=1.8)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_matplotlib().ticker.FuncFormatter(lambda value, _: f"{value:g}×"))
        axes.yaxis.set_minor_locator(_matplotlib().ticker.NullLocator())
        axes.yaxis.set_major_locator(
            _matplotlib().ticker.LogLocator(10, (1, 2, 5) if _span(row) < 50 else (1,), numticks=6)
        )
        axes.set_title(short_kinds(row["kinds"]), color=INK, fontsize=TYPE, loc="left")
        axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator(4, integer=True))
        axes.grid(visible=False, axis="x")
    for axes in drawing.axes[len(rows) :]:
        axes.set_visible(False)
    return drawing


def _span(row: dict[str, Any]) -> float:
    """Largest over smallest of a site's values."""
    known = [value for side in ("before", "after") for value in row[side] if value]
    return max(known) / min(known) if known else 1.0


def _gaps(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def short_kinds(kinds: Sequence[str]) -> str:
    """A short form such as `q, k, v` for several kinds; the full name for a single one."""
    if len(kinds) == 1:
        return kinds[0]
    return ", ".join(kind.rpartition(".")[2].removesuffix("_proj") for kind in kinds)


def pareto_plot(
    points: Sequence[dict[str, Any]], x: str, label: str, width: int, larger_is_better: bool = False
) -> Drawing | None:
    """Perplexity over a cost, with the Pareto front.

    points  rows with `name`, `perplexity` and a number under `x`; the unquantized model has `baseline` True
    """
    known = [point for point in points if point.get(x) is not None and point.get("perplexity") is not None]
    if len(known) < 2:
        return None
    drawing = Drawing(f"Perplexity over {label}", width, 300)
    [axes] = drawing.axes
    front = pareto_front([(point[x], point["perplexity"]) for point in known], larger_is_better)
    axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.2, dashes=(3, 2), drawstyle="steps-post", zorder=1)
    for point in known:
        colour, marker = (BEFORE, "D") if point.get("baseline") else (AFTER, "o")
        [dot] = axes.plot(point[x], point["perplexity"], marker, color=colour, markersize=8, zorder=3)
        text = f"{point['name']}: {point[x]:.4g} {label}, perplexity {point['perplexity']:.4f}"
        dot.set_gid(drawing.name(text))
        spot = (point[x], point["perplexity"])
        axes.annotate(point["name"], spot, (7, 6), textcoords="offset points", color=INK, fontsize=TYPE)
    axes.margins(0.18, 0.16)
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity")
    return drawing


def pareto_front(points: Sequence[tuple[float, float]], larger_is_better: bool) -> list[tuple[float, float]]:
    """The points (cost, loss) that no other dominates, by cost."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p[0] if larger_is_better else p[0], p[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def megabytes(nbytes: float) -> str:
    """A size for people: 512 kB, 113.4 MB, 6.02 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes / 1e3:.4g} kB"
