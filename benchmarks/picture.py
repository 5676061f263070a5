"""From process start to PNG: inference.py beside diffusers' own pipeline with model offload, on the same files.

Every picture is drawn by a process of its own, text encoders included, in turns, with the files in the page cache.
`device` is the most that the driver said was in use meanwhile, less what was in use before: nothing else may use the
GPU.

    python benchmarks/picture.py --models /tmp/models --result FILE

The model is made in `--models` where it is not there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.defaults import PROJECT_FOLDER
from sd3_lora.common.devices import choose_device
from sd3_lora.common.memory import free_memory

from evaluate import VERSIONS, circumstances
from memory import with_encoders
from pipeline import run_process

PROMPT = "a photo of sks dog"
STOCK = "diffusers' pipeline, model offload"


def commands(model: Path, output: Path, flags: argparse.Namespace) -> dict[str, list[object]]:
    """By name, what is run: a script and its flags."""
    words: list[object] = ["--pretrained_model_name_or_path", model, "--prompt", PROMPT, "--outdir", output]
    words += ["--data_df_path", output / "none.parquet", "--num_steps", flags.steps, "--device", flags.device]
    words += ["--height", flags.size, "--width", flags.size]
    ours = [PROJECT_FOLDER / "inference.py", *words]
    if flags.device == "cuda":
        ours += ["--t5_precision", "fp16", "--t5_stream", "--mixed_precision", "fp16", "--vae_precision", "fp16"]
    stock = [Path(__file__).parent / "stock_picture.py", "--model", model, "--prompt", PROMPT, "--steps", flags.steps]
    stock += ["--size", flags.size, "--device", flags.device, "--output_path", output / "stock.png"]
    return {
        STOCK: stock,
        "inference.py within 5.3 GiB": [*ours, "--vram_budget_gib", 5.3],
        "inference.py within 3.2 GiB, nf4 base": [*ours, "--vram_budget_gib", 3.2, "--base_precision", "nf4"],
    }


def measure(name: str, words: Sequence[object], output: Path) -> dict[str, Any]:
    """Runs the command in a new process; how long it took, and the most that it had of the device."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    took, finished = run_process(words)
    row: dict[str, Any] = {"name": name, **took}
    if "failed" in row or not list(output.rglob("*.png")):
        return row | {"failed": finished.stderr.strip().splitlines()[-3:]}
    if (output / "run.json").is_file():
        stages = json.loads((output / "run.json").read_text(encoding="utf-8"))["stages"]
        row["stage_s"] = {stage["name"]: round(stage["elapsed_s"], 2) for stage in stages}
        row["host_gib"] = round(max(stage["peak_host_gib"] for stage in stages), 2)
    return row


def read_through(folder: Path) -> None:
    """Has the weights' files in the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="Where the random model is, or is made.")
    parser.add_argument("--turns", type=int, default=2, help="How often each is run.")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, default=1024, help="Height and width in pixels.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="Begin no row after so many seconds.")
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    flags = parser.parse_args(argv)
    start, rows = time.perf_counter(), []
    flags.models.mkdir(parents=True, exist_ok=True)
    model = with_encoders(flags.models, "sd3-medium", "text")
    free_memory(choose_device(flags.device))
    for folder in (model / "text_encoder_3", model / "text_encoder_2", model / "transformer"):
        read_through(folder.resolve())
    output = flags.models / "picture"
    for name, words in [item for _ in range(flags.turns) for item in commands(model, output, flags).items()]:
        if time.perf_counter() - start > flags.stop_after:
            print(f"stopped before {name}", flush=True)
            break
        rows.append(measure(name, words, output))
        print(rows[-1], flush=True)
        if flags.result:
            result = {**circumstances(choose_device(flags.device), (*VERSIONS, "bitsandbytes")), "rows": rows}
            flags.result.write_text(json.dumps({**result, "size": flags.size, "steps": flags.steps}, indent=1) + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
