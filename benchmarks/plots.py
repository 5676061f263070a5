"""What the plots share: the ink of a light and of a dark page, the file of a figure, and the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

INK = {"light": ("#1f2328", "#59636e", "#d1d9e0"), "dark": ("#f0f6fc", "#9198a1", "#3d444d")}  # text, lesser, lines
WIDTH_INCHES = 9.6


def same_file_each_time(name: str) -> Any:
    """Inside the block a figure of the same numbers becomes the same file.

    Args:
        name: of the figure.
    """
    return plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "font.family": "DejaVu Sans"})


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a figure without its date, and frees it."""
    figure.savefig(path, transparent=True, metadata={"Date": None}, format=path.suffix[1:], dpi=110)
    plt.close(figure)


def draw_for_both_pages(
    description: str, source: str, save: Callable[[dict[str, Any], Path, str], None], argv: Sequence[str] | None
) -> int:
    """The command line of a plot; returns its exit code.

    Args:
        description: the script's docstring.
        source: the command that writes the result.
        save: draws a result to a path in a theme of `INK`.
        argv: the arguments.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("result", type=Path, help=f"A JSON file of `{source}`.")
    parser.add_argument("path", type=Path, help="Where to, without -light.svg and -dark.svg.")
    parser.add_argument("--format", default="svg", choices=["svg", "png"])
    flags = parser.parse_args(argv)
    result = json.loads(flags.result.read_text(encoding="utf-8"))
    for theme in INK:
        save(result, flags.path.with_name(f"{flags.path.name}-{theme}.{flags.format}"), theme)
    return 0
