"""Prints a result as the Markdown table that the documents show.

python benchmarks/tables.py benchmarks/results/pipeline-sd3-medium-h100.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dreambooth_scores import table


def pipeline_table(result: dict[str, Any]) -> str:
    """A row for each script run, under a line that says what was measured on what."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "diffusers", "bitsandbytes"))
    lines = [
        "| script run | seconds | device GiB | of it, tensors | host GiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        peaks = (row["device_gib"], row["allocated_gib"], row["host_gib"])
        numbers = " | ".join([f"{row['elapsed_s']:.0f}", *(f"{peak:.2f}" for peak in peaks)])
        lines.append(f"| {row['name']} | {numbers} |")
    model, side = result["model"], result["resolution_px"]
    lines += ["", f"{result['machine']}, {result['date']}, {versions}; {model} at {side} px with random weights."]
    return "\n".join(lines)


def dreambooth_table(result: dict[str, Any]) -> str:
    """The trainers' scores beside the targets, and a line that says of what and with which settings."""
    settings, versions = result["settings"], result["versions"]
    subjects = len({row["subject"] for row in result["rows"]})
    said = (
        f"{result['machine']}, {result['date']}, torch {versions['torch']}, diffusers {versions['diffusers']}; "
        f"{subjects} subjects, {settings['prompts']} prompts each, {settings['steps']} steps of "
        f"{settings['train_batch_size']}, rank {settings['rank']}, learning rate {settings['learning_rate']:g}, "
        f"guidance {settings['guidance']:g}."
    )
    return f"{table(result['means'])}\n\n{said}"


def printer(name: str) -> Callable[[dict[str, Any]], str]:
    """By the file's name, which begins with what made it."""
    tables = {"pipeline": pipeline_table, "dreambooth": dreambooth_table, "memory": memory_table, "plans": plans_table}
    return tables[re.split(r"[-.]", name)[0]]


def memory_table(result: dict[str, Any]) -> str:
    """Each row that was measured: what ran, and its peak, predicted and measured."""
    lines = [
        "| | resolution | pictures, rank | predicted GiB | measured | host GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    seen = set()
    for row in result["rows"]:
        what = _what(row)
        key = (what, row["model"], row["resolution"], row["batch"], row["rank"])
        if "measured_gib" not in row or key in seen:
            continue
        seen.add(key)
        numbers = f"{row['predicted_gib']:.2f} | {row['measured_gib']:.2f} | {row['host_gib']:.2f}"
        shape = f"{row['batch']}, {row['rank']}" if row.get("plan") else "–"
        lines.append(f"| {row['model']}, {what} | {row['resolution']} | {shape} | {numbers} |")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "diffusers", "bitsandbytes"))
    return "\n".join([*lines, "", f"{result['machine']}, {result['date']}, {versions}; random weights."])


def _what(row: dict[str, Any]) -> str:
    """A row's work in a few words."""
    if row.get("script") == "precompute_latents.py":
        return "VAE encodes a picture in tiles"
    if row.get("script") == "inference.py":
        return f"{row['name'].replace('draw', 'a whole picture')}"
    base, _, blocks = row["plan"].partition("; ")
    base = re.sub(r" block by block( \(.* pinned\))?$", "", base)  # pinned: not told by the first results
    base = base.removeprefix("base ").replace(", on the device", "").replace("unchanged", "16-bit")
    base = base.replace("16-bit, streamed from host memory", "16-bit streamed")
    return f"{base.replace('in 4 bits (nf4)', 'nf4')}, {blocks.split(' computed')[0]} anew"


def plans_table(result: dict[str, Any]) -> str:
    """For each budget and model what is predicted at each resolution: the peak, and how it is reached."""
    rows = {(row["name"], row["model"], row["resolution"]): row for row in result["rows"]}
    names = list(dict.fromkeys(name for name, _, _ in rows if "auto" not in name))
    models = list(dict.fromkeys(model for _, model, _ in rows))
    sizes = sorted({size for _, _, size in rows})
    lines = [
        f"| GPU memory | model | {' | '.join(f'{size} px' for size in sizes)} |",
        "| ---: | --- |" + " --- |" * len(sizes),
    ]
    for name in names:
        for model in models:
            cells = [_cell(rows[name, model, size], rows[f"{name}, auto", model, size]) for size in sizes]
            lines.append(f"| {name if model == models[0] else ''} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(exact: dict[str, Any], auto: dict[str, Any]) -> str:
    """R: all on the device, a share of the blocks computed anew; S: streamed; 4: in 4 bits."""
    if "plan" not in exact:
        return f"4S {auto['predicted_gib']:.1f}" if "plan" in auto else "–"
    if "streamed" in exact["plan"]:
        return f"S {exact['predicted_gib']:.1f}"
    anew, count = re.findall(r"(\d+) of (\d+) blocks", exact["plan"])[0]
    return f"{exact['predicted_gib']:.1f}" + (f", {anew}/{count} anew" if anew != "0" else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("result", type=Path, help="A JSON file of results/.")
    flags = parser.parse_args(argv)
    result = json.loads(flags.result.read_text(encoding="utf-8"))
    print(printer(flags.result.name)(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
