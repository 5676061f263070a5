"""Draws the map: subject, prompt and drift over the steps, a line for each learning rate.

    python benchmarks/plot_map.py benchmarks/results/map-miniature-h100.json docs/map

writes docs/map-light.svg and docs/map-dark.svg, the same on a light and on a dark page. Needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from plots import INK, WIDTH_INCHES, draw_for_both_pages, same_file_each_time, write_figure

SCORES = ("subject", "prompt", "drift")
HEADS = {
    "plain": "without class pictures",
    "moving average": "its moving average",
    "class pictures": "with class pictures",
}
# From the lowest rate to the highest.
COLOURS = {
    "light": ("#54aeff", "#0969da", "#8250df", "#bf3989", "#d1570a"),
    "dark": ("#a5d6ff", "#388bfd", "#a371f7", "#db61a2", "#f0883e"),
}
PANEL_INCHES, HEAD_INCHES = 2.05, 0.72


def colours_of(rates: Sequence[float], theme: str) -> dict[float, Any]:
    """A colour for each rate, in their order."""
    scale = LinearSegmentedColormap.from_list("rates", COLOURS[theme])
    return {rate: scale(place / max(1, len(rates) - 1)) for place, rate in enumerate(sorted(rates))}


def typed(rate: float) -> str:
    """A learning rate as it is typed: 1.25e-4."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def limits(result: dict[str, Any], score: str) -> tuple[float, float]:
    """The least and the most percent of a row of panels: alike for all variants, wider than what is drawn."""
    values = [point["means"][score] for line in result["lines"] for point in line["points"]]
    known = [value for value in values if value is not None]
    least, most = min(known, default=0.0), max(known, default=100.0)
    margin = 0.06 * max(most - least, 5.0)
    return max(-2.0, least - margin), most + margin


def draw_panel(
    axes: Axes,
    lines: Sequence[dict[str, Any]],
    score: str,
    colours: dict[float, Any],
    baseline: dict[str, Any],
    theme: str,
) -> None:
    """One score of one variant: its lines with their standard errors; a ring at the baseline of docs/methods.md."""
    for line in lines:
        points = [point for point in line["points"] if point["means"][score] is not None]
        steps = [point["steps"] for point in points]
        means = [point["means"][score] for point in points]
        errors = [point["standard_errors"][score] or 0.0 for point in points]
        colour, rate = colours[line["learning_rate"]], line["learning_rate"]
        lower, upper = zip(
            *((mean - error, mean + error) for mean, error in zip(means, errors, strict=True)), strict=True
        )
        axes.fill_between(steps, lower, upper, color=colour, alpha=0.12, linewidth=0)
        axes.plot(steps, means, color=colour, linewidth=1.6, marker="o", markersize=3)
        if line["variant"] == "plain" and rate == baseline["learning_rate"] and baseline["steps"] in steps:
            mean = means[steps.index(baseline["steps"])]
            axes.plot(baseline["steps"], mean, "o", markersize=9, markerfacecolor="none", markeredgecolor=INK[theme][0])


def dress(axes: Axes, steps: Sequence[int], theme: str) -> None:
    """Ticks, a grid, and no frame."""
    text, lesser, rule = INK[theme]
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.tick_params(length=0, labelcolor=lesser, labelsize=8.5)
    axes.grid(color=rule, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.title.set_color(text)


def save(result: dict[str, Any], path: Path, theme: str) -> None:
    """One picture: a column for each variant, a row for each score."""
    text, lesser, _ = INK[theme]
    variants = [name for name in HEADS if any(line["variant"] == name for line in result["lines"])]
    rates = sorted({line["learning_rate"] for line in result["lines"]})
    steps = sorted({point["steps"] for line in result["lines"] for point in line["points"]})
    colours, height = colours_of(rates, theme), PANEL_INCHES * len(SCORES) + HEAD_INCHES
    with same_file_each_time("map"):
        figure, panels = plt.subplots(
            len(SCORES), len(variants), figsize=(WIDTH_INCHES, height), sharex=True, sharey="row", squeeze=False
        )
        for row, score in zip(panels, SCORES, strict=True):
            for axes, variant in zip(row, variants, strict=True):
                lines = [line for line in result["lines"] if line["variant"] == variant]
                draw_panel(axes, lines, score, colours, result["baseline"], theme)
                dress(axes, steps, theme)
            row[0].set_ylim(*limits(result, score))
            row[0].set_ylabel(f"{score}, %", color=lesser, fontsize=9)
        for axes, variant in zip(panels[0], variants, strict=True):
            axes.set_title(HEADS[variant], color=text, fontsize=9.5, weight="bold", loc="left")
        panels[-1][0].set_xlabel("steps", color=lesser, fontsize=8.5, loc="left")
        handles = [plt.Line2D([], [], color=colours[rate], marker="o", markersize=3) for rate in rates]
        handles.append(plt.Line2D([], [], linestyle="", marker="o", markersize=8, mfc="none", mec=text))
        figure.legend(
            handles,
            [*(f"rate {typed(rate)}" for rate in rates), "baseline"],
            loc="upper left",
            bbox_to_anchor=(0.01, 1.0),
            ncols=len(handles),
            frameon=False,
            fontsize=8.5,
            labelcolor=lesser,
            columnspacing=1.6,
            handletextpad=0.5,
        )
        figure.align_ylabels(panels[:, 0])
        figure.subplots_adjust(
            left=0.075, right=0.995, top=1 - 0.62 / height, bottom=0.5 / height, wspace=0.06, hspace=0.12
        )
        write_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return draw_for_both_pages(__doc__, "dreambooth_map.py", save, argv)


if __name__ == "__main__":
    sys.exit(main())
