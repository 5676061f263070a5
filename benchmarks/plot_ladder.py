"""Draws the ladder: a bar a row, its parts in colours, beside it the step's time and whether numbers change.

    python benchmarks/plot_ladder.py benchmarks/results/ladder-h100.json docs/ladder

writes docs/ladder-light.svg and docs/ladder-dark.svg, the same on a light and on a dark page. Needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from plots import INK, WIDTH_INCHES, draw_for_both_pages, same_file_each_time, write_figure

PARTS = ("CUDA itself", "transformer's weights", "VAE's", "text encoders'", "activations and the rest")
COLOURS = {
    "light": ("#8c959f", "#0969da", "#8250df", "#bf3989", "#d4a72c"),
    "dark": ("#6e7681", "#388bfd", "#a371f7", "#db61a2", "#d29922"),
}
ROW_INCHES = 0.34
HOST, STEP, NUMBERS = 1.2, 1.37, 1.42  # where the columns are, in widths of the axes


def parts_of(row: dict[str, Any]) -> list[float]:
    """GiB by part, in the order of `PARTS`: known but for the last, which is what the driver counted beside them."""
    beside, parts = row.get("beside_gib", {}), row["parts_gib"]
    text = sum(size for name, size in beside.items() if name.startswith("text_encoder"))
    known = [parts["CUDA"], parts["weights"], beside.get("vae", 0.0), text]
    return [*known, max(0.0, row["driver_gib"] - sum(known))]


def draw(axes: Axes, rows: Sequence[dict[str, Any]], theme: str) -> None:
    """The bars, and the columns beside them."""
    text, lesser, lines = INK[theme]
    most = max(row["driver_gib"] for row in rows)
    for place, row in enumerate(rows):
        left = 0.0
        for size, colour in zip(parts_of(row), COLOURS[theme], strict=True):
            axes.barh(place, size, left=left, height=0.62, color=colour, linewidth=0)
            left += size
        gib = f"{row['driver_gib']:.1f}" if row["driver_gib"] >= 10 else f"{row['driver_gib']:.2f}"
        axes.text(left + 0.01 * most, place, gib, va="center", color=text, fontsize=9.5, weight="bold")
        axes.text(HOST * most, place, f"{row['host_gib']:.1f}", va="center", ha="right", color=lesser, fontsize=9.5)
        axes.text(STEP * most, place, f"{row['step_ms']:.0f}", va="center", ha="right", color=lesser, fontsize=9.5)
        ink = text if row["exactness"] == "exact" else lesser
        axes.text(NUMBERS * most, place, row["exactness"], va="center", color=ink, fontsize=9.5)
    for column, words, side in (
        (HOST, "host GiB", "right"),
        (STEP, "ms a step", "right"),
        (NUMBERS, "numbers", "left"),
    ):
        axes.text(column * most, -0.85, words, va="center", ha=side, color=lesser, fontsize=8.5)
    axes.set_xlim(0, most)
    axes.set_ylim(len(rows) - 0.5, -1.2)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9.5, color=text)
    axes.set_xticks([0, *(gib for gib in (8, 16, 24, 32, 40) if gib <= most)])
    axes.tick_params(length=0, labelcolor=lesser)
    axes.tick_params(axis="y", labelcolor=text, pad=6)
    axes.set_xlabel("GiB of GPU memory in use", color=lesser, fontsize=8.5, loc="left")
    axes.grid(axis="x", color=lines, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(result: dict[str, Any], path: Path, theme: str) -> None:
    """One picture."""
    rows = [row for row in result["rows"] if row["name"] != "warm-up" and "failed" not in row]
    with same_file_each_time("ladder"):
        height = ROW_INCHES * len(rows) + 1.35
        figure, axes = plt.subplots(figsize=(WIDTH_INCHES, height))
        draw(axes, rows, theme)
        figure.subplots_adjust(left=0.255, right=0.7, top=1 - 0.42 / height, bottom=0.62 / height)
        patches = [plt.Rectangle((0, 0), 1, 1, color=colour, linewidth=0) for colour in COLOURS[theme]]
        figure.legend(
            patches,
            PARTS,
            loc="upper left",
            bbox_to_anchor=(0.005, 1.0),
            ncols=len(PARTS),
            frameon=False,
            fontsize=8.5,
            labelcolor=INK[theme][1],
            handlelength=0.9,
            handleheight=0.9,
            columnspacing=1.8,
            handletextpad=0.5,
        )
        write_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return draw_for_both_pages(__doc__, "memory.py ladder", save, argv)


if __name__ == "__main__":
    sys.exit(main())
