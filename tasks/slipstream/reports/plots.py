"""The plots of a report, drawn with matplotlib: quality against latency, latency distributions, the timeline.

Each of the three returns a `Figure`, or None if there is nothing to draw. Text stays text in the SVG, so that it can be
read and searched and uses the page's font.
"""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from slipstream.contract.evidence import Latency, Row
from slipstream.reports import wording
from slipstream.reports.document import Report, TimelinePoint
from slipstream.reports.theme import LIGHT, SERIES

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slipstream",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDTH_IN = 10.0


def draw(report: Report) -> dict[str, Figure]:
    """Return a figure by name for each plot that has something to draw."""
    with matplotlib.rc_context(STYLE):
        drawn = {"pareto": pareto(report), "latency": latency(report), "timeline": timeline(report)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def svg(figure: Figure) -> str:
    """Return a figure as SVG text; the same figure gives the same text."""
    with matplotlib.rc_context(STYLE), io.StringIO() as out:
        figure.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()


def png(figure: Figure) -> bytes:
    """Return a figure as PNG at twice its size on a page, on the light theme's background."""
    with io.BytesIO() as out:
        figure.savefig(out, format="png", dpi=200, facecolor=LIGHT["paper"])
        return out.getvalue()


def _axes(height_in: float, rows: int = 1, ratios: Sequence[float] = (1,)) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, gridspec_kw={"height_ratios": list(ratios)})


TICKS = ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))
"""Where a decade of a logarithmic axis may have its ticks, sparsest first."""


def _plain_log_ticks(axis: Axis) -> None:
    """Use 1, 2, 5 … 10 instead of powers of ten, or more on an axis so short that it would show fewer than three."""
    low, high = axis.get_view_interval()
    places = [LogLocator(subs=subs) for subs in TICKS]
    tick_counts = [sum(low <= tick <= high for tick in place.tick_values(low, high)) for place in places]
    axis.set_major_locator(next((p for p, n in zip(places, tick_counts, strict=True) if n >= 3), places[-1]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def colours(report: Report) -> dict[str, str]:
    """Return colors of targets, in the order in which the targets appear."""
    targets = list(dict.fromkeys(target_of(r.cell) for r in report.rows))
    return {t: LIGHT[SERIES[i % len(SERIES)]] for i, t in enumerate(targets)}


def recipe_of(cell: str) -> str:
    """Return `int8` for `int8@server`."""
    return cell.partition("@")[0]


def target_of(cell: str) -> str:
    """Return `server` for `int8@server`."""
    return cell.partition("@")[2]


def pareto(report: Report) -> Figure | None:
    """Draw quality against the time per request in the run in which all engines took turns, which decides the release.

    Return None without such a run: no engine passed. Vertical bars are the confidence bounds of the drop, horizontal
    ones those of the ratio to the fastest engine. The frontier is that of the passing engines; others are hollow.
    """
    rows = [r for r in report.rows if r.evidence and r.standing]
    if not rows:
        return None
    figure, axes = _axes(4.7)
    palette = colours(report)
    _limits(axes, report, rows)
    _frontier(axes, [r for r in rows if r.status == "passed"])
    for row in rows:
        _engine_point(axes, row, palette[target_of(row.cell)])
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.16)
    _plain_log_ticks(axes.xaxis)
    axes.set_xlabel("time of a request at batch 1, ms, all engines in one run, log")
    axes.set_ylabel(f"{wording.metric(report.objective.metric)} on held-out data, %")
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    _legend(axes, palette, rows)
    _labels(figure, axes, rows)
    return figure


def _place(row: Row) -> tuple[float, float]:
    """Return an engine's position on the plot: milliseconds in the run of all engines, quality in percent."""
    assert row.evidence is not None and row.standing is not None
    return row.standing.ms, row.evidence.engine_quality


def _limits(axes: Axes, report: Report, rows: Sequence[Row]) -> None:
    floor = max(r.evidence.baseline_quality for r in rows if r.evidence) - report.objective.max_drop
    axes.axhline(floor, color=LIGHT["bad"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"allowed drop: {report.objective.max_drop:g} points",
        (1, floor),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=LIGHT["bad"],
        fontsize=8.5,
    )


def _frontier(axes: Axes, passed: Sequence[Row]) -> None:
    """Return steps along the engines that no other passing engine beats on both axes."""
    best: list[tuple[float, float]] = []
    for x, y in sorted((_place(r) for r in passed), key=lambda p: (p[0], -p[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    if len(best) > 1:
        xs, ys = zip(*best, strict=True)
        axes.plot(xs, ys, drawstyle="steps-post", color=LIGHT["good"], linewidth=1.3, alpha=0.7, zorder=1)


def _engine_point(axes: Axes, row: Row, colour: str) -> None:
    assert row.evidence is not None
    x, y = _place(row)
    drop = row.evidence.drop_pp
    errors = [[max(drop.high - drop.estimate, 0)], [max(drop.estimate - drop.low, 0)]]
    times = row.standing.relative if row.standing else None
    sideways = (
        [[x * max(1 - times.low / times.estimate, 0)], [x * max(times.high / times.estimate - 1, 0)]] if times else None
    )
    solid = row.status in ("passed", "reference")
    axes.errorbar(
        x,
        y,
        yerr=errors,
        xerr=sideways,
        color=colour,
        marker="D" if row.status == "reference" else "o",
        markersize=6 if row.status == "reference" else 7.5,
        markerfacecolor=colour if solid else LIGHT["paper"],
        markeredgewidth=1.5,
        elinewidth=1.1,
        capsize=2.5,
        alpha=1 if solid else 0.75,
        zorder=3,
    )
    if row.release:
        axes.plot(x, y, marker="o", markersize=15, markerfacecolor="none", color=LIGHT["good"], markeredgewidth=1.7)


def _legend(axes: Axes, palette: dict[str, str], rows: Sequence[Row]) -> None:
    def mark(label: str, colour: str, marker: str = "o", fill: str | None = None, size: float = 7) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, label=label, markersize=size,
                      markerfacecolor=colour if fill is None else fill, markeredgewidth=1.4)  # fmt: skip

    statuses = {r.status for r in rows}
    entries = [mark(target, colour) for target, colour in palette.items()]
    entries += [mark("baseline", LIGHT["muted"], "D", size=6)] if "reference" in statuses else []
    entries += (
        [mark("not passed", LIGHT["muted"], fill=LIGHT["paper"])] if statuses & {"rejected", "inconclusive"} else []
    )
    entries += [mark("picked", LIGHT["good"], fill="none", size=11)] if any(r.release for r in rows) else []
    axes.legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(entries), frameon=False,
                handletextpad=0.3, columnspacing=1.4, borderaxespad=0.2)  # fmt: skip


def _labels(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    """Put recipe names next to the points, each at the first of eight positions in the plot where it covers nothing."""
    figure.canvas.draw()
    x_min, x_max = axes.bbox.x0, axes.bbox.x1
    occupied = [_box(axes.transData.transform(_place(r)), 10, 10) for r in rows]
    scale = figure.dpi / 72
    for row in sorted(rows, key=lambda r: (not r.release, r.status != "passed")):
        x, y = axes.transData.transform(_place(row))
        text = recipe_of(row.cell)
        half = len(text) * 2.9 * scale
        spots = [(half + 11, 0), (-half - 11, 0), (half + 8, 11), (-half - 8, 11), (half + 8, -11), (-half - 8, -11),
                 (0, 17), (0, -17)]  # fmt: skip
        boxes = [(dx, dy, _box((x + dx * 1.0, y + dy * scale), half, 6 * scale)) for dx, dy in spots]
        inside = [b for b in boxes if x_min <= b[2][0] and b[2][2] <= x_max] or boxes
        dx, dy, box = next((b for b in inside if not any(_overlap(b[2], t) for t in occupied)), inside[0])
        occupied.append(box)
        axes.annotate(text, _place(row), xytext=(dx / scale, dy), textcoords="offset points", ha="center",
                      va="center", fontsize=8.5, fontweight="bold" if row.release else "normal",
                      color=LIGHT["ink"] if row.status in ("passed", "reference") else LIGHT["muted"],
                      bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.8}, zorder=2)  # fmt: skip


Box = tuple[float, float, float, float]


def _box(centre: tuple[float, float], half_width: float, half_height: float) -> Box:
    x, y = centre
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def latency(report: Report) -> Figure | None:
    """Draw one line for each engine: p5 to p95 thin, the middle half thick, the median as a dot, p99 as a tick."""
    lines = _latency_lines(report)
    if not lines:
        return None
    figure, axes = _axes(0.9 + 0.34 * len(lines))
    for y, (_, measured, colour, strong) in enumerate(lines):
        q = measured.quantiles_ms
        alpha = 1 if strong else 0.55
        if len(q) == 101:
            axes.plot([q[5], q[95]], [y, y], color=colour, linewidth=1.3, alpha=alpha, solid_capstyle="butt")
            axes.plot([q[25], q[75]], [y, y], color=colour, linewidth=7, alpha=0.45 * alpha, solid_capstyle="butt")
        axes.plot(measured.p50_ms, y, marker="o", color=colour, markersize=5.5, alpha=alpha)
        end = measured.p50_ms
        if measured.p99_ms is not None:
            end = measured.p99_ms
            axes.plot(end, y, marker="|", color=colour, markersize=11, markeredgewidth=1.8, alpha=alpha)
        axes.annotate(wording.milliseconds(end), (end, y), xytext=(8, 0), textcoords="offset points", va="center",
                      fontsize=8.5, color=LIGHT["muted"])  # fmt: skip
    axes.set_yticks(range(len(lines)), [name for name, *_ in lines])
    axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    _plain_log_ticks(axes.xaxis)
    axes.grid(visible=True, axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "latency at batch 1, ms, log  (dot: median, bar: middle half, line: p5 to p95, tick and number: p99)"
    )
    return figure


def _latency_lines(report: Report) -> list[tuple[str, Latency, str, bool]]:
    """Return (label, latency, color, whether it passed), fastest first, including the framework's eager run."""
    palette = colours(report)
    lines = [
        (f"{recipe_of(r.cell)} · {target_of(r.cell)}" + (" ◂" if r.release else ""), r.evidence.latency,
         palette[target_of(r.cell)], r.status in ("passed", "reference"))
        for r in report.rows
        if r.evidence
    ]  # fmt: skip
    eager = [r.evidence.eager for r in report.rows if r.evidence and r.evidence.eager]
    if eager:
        middle = sorted(eager, key=lambda e: e.p50_ms)[len(eager) // 2]
        lines.append((f"{report.framework} eager", middle, LIGHT["ink"], True))
    return sorted(lines, key=lambda line: line[1].p50_ms)


def timeline(report: Report) -> Figure | None:
    """Draw above, who answers the traffic; below, the latency that clients saw and the errors."""
    points = report.timeline
    if not points:
        return None
    figure, (shares, times) = _axes(3.9, rows=2, ratios=(1.15, 1))
    xs = [p.at_s for p in points]
    end = xs[-1] + max((xs[-1] - xs[0]) / max(len(xs) - 1, 1), 1)
    edges = [*xs, end]
    champion = [p.champion_weight for p in points]
    shares.stairs(champion, edges, fill=True, color=LIGHT["muted"], alpha=0.28)
    shares.stairs([100.0] * len(points), edges, baseline=champion, fill=True, color=LIGHT["accent"], alpha=0.55)
    shares.set(ylim=(0, 100), ylabel="share of traffic, %", xlim=(edges[0], end))
    _phases(shares, points, end)
    _latency_and_errors(times, points)
    times.set_xlabel("seconds since the small-scale test began")
    return figure


def _phases(axes: Axes, points: Sequence[TimelinePoint], end: float) -> None:
    """Draw names of the phases above the plot, with a line where each begins."""
    starts = [p for i, p in enumerate(points) if i == 0 or points[i - 1].phase != p.phase]
    finishes = [p.at_s for p in starts[1:]] + [end]
    for point, finish in zip(starts, finishes, strict=True):
        if point is not starts[0]:
            axes.axvline(point.at_s, color=LIGHT["paper"], linewidth=1.4)
        axes.annotate(point.phase, ((point.at_s + finish) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 5),
                      textcoords="offset points", ha="center", fontsize=8.5)  # fmt: skip
    axes.annotate("champion", (0.006, 0.06), xycoords="axes fraction", fontsize=8.5, color=LIGHT["muted"])
    axes.annotate("challenger", (0.994, 0.06), xycoords="axes fraction", fontsize=8.5, ha="right")


def _latency_and_errors(axes: Axes, points: Sequence[TimelinePoint]) -> None:
    for name, colour, series in (
        ("p99", LIGHT["second"], [(p.at_s, p.p99_ms) for p in points if p.p99_ms is not None]),
        ("p50", LIGHT["accent"], [(p.at_s, p.p50_ms) for p in points if p.p50_ms is not None]),
    ):
        if series:
            xs, ys = zip(*series, strict=True)
            axes.plot(xs, ys, color=colour, marker="o", markersize=3.5, linewidth=1.3, label=name)
    failed = [(p.at_s, p.errors) for p in points if p.errors]
    top = axes.get_ylim()[1]
    for x, errors in failed:
        axes.annotate(wording.count(errors, "error"), (x, top), color=LIGHT["bad"], fontsize=8.5, va="top")
        axes.axvline(x, color=LIGHT["bad"], linewidth=0.9, alpha=0.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("client latency, ms")
    axes.grid(visible=True, axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0.1)
