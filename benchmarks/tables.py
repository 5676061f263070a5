"""Prints a result of `pipeline.py` or `dreambooth.py` as the Markdown table that the documents show.

python benchmarks/tables.py benchmarks/results/pipeline-sd3-medium-h100.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("result", type=Path, help="JSON file that pipeline.py or dreambooth.py wrote.")
    flags = parser.parse_args(argv)
    result = json.loads(flags.result.read_text(encoding="utf-8"))
    print(dreambooth_table(result) if "means" in result else pipeline_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
