"""The four scripts one after another on a model, each in its own process, with the peaks of each stage.

`device` is the most that the driver said was in use while the script ran, less what was before (the CUDA context
included; nothing else may use the GPU); `allocated` and `host` are the scripts' own figures.

    python benchmarks/random_sd3.py sd3-medium /tmp/sd3-medium
    python benchmarks/pipeline.py --model /tmp/sd3-medium --instance_data_dir dog --resolution 1024
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.defaults import PROJECT_FOLDER
from sd3_lora.common.devices import choose_device
from sd3_lora.common.memory import GIB
from sd3_lora.common.stage_report import PeakSampler
from sd3_lora.gpu.budget import driver_bytes

import torch
from evaluate import VERSIONS, circumstances


def in_use() -> int:
    """Bytes of the first GPU, by all processes."""
    return (driver_bytes(0) or 0) if torch.cuda.is_available() else 0


def run_process(
    words: Sequence[object], environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """Runs Python with these words: what that took of time and of the first GPU, and what came out.

    The environment is added to this process' own. Of the GPU it is the most that the driver said was in use meanwhile,
    less what was before; 0 without one.
    """
    before, start = in_use(), time.perf_counter()
    with PeakSampler(in_use) as sampler:
        finished = subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    row: dict[str, Any] = {"elapsed_s": round(time.perf_counter() - start, 2)}
    row |= {"device_gib": round((sampler.peak - before) / GIB, 2)}
    return row | ({"failed": finished.stderr.strip().splitlines()[-1:]} if finished.returncode else {}), finished


def measure(name: str, script: str, flags: Sequence[object], report: Path, processes: int = 1) -> dict[str, Any]:
    """Runs one script, with torchrun if in several processes, and returns what it took; its report is in `report`."""
    shared = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    took, _ = run_process([*shared, PROJECT_FOLDER / script, *flags])
    row: dict[str, Any] = {"name": name, "script": script, "flags": list(map(str, flags)), **took}
    if "failed" in row:
        return row
    record = json.loads(report.read_text(encoding="utf-8"))
    stages = record["stages"]
    row["stages"] = [{k: round(v, 3) if isinstance(v, float) else v for k, v in s.items()} for s in stages]
    row["allocated_gib"] = round(max((stage["peak_device_gib"] for stage in stages), default=0.0), 2)
    row["host_gib"] = round(max((stage["peak_host_gib"] for stage in stages), default=0.0), 2)
    return row | {key: record[key] for key in ("precision", "plan", "execution", "ms_a_step") if key in record}


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All measurements: stage one in every T5 precision, latents, training, and one picture."""
    out = arguments.output_dir
    model = ["--pretrained_model_name_or_path", arguments.model]
    pictures = [*model, "--instance_data_dir", arguments.instance_data_dir]
    prompt, size = "a photo of sks dog", ["--resolution", arguments.resolution]
    measured = []

    def add(name: str, script: str, flags: Sequence[object], report: Path) -> None:
        row = measure(name, script, flags, report)
        measured.append(row)
        print(json.dumps({k: v for k, v in row.items() if k not in ("flags", "stages")}), flush=True)

    for precision in arguments.t5:
        path = out / f"{precision}.parquet"
        kind = ["--t5_precision", precision.removesuffix("-streamed")]
        kind += ["--t5_stream"] if precision.endswith("-streamed") else []
        flags = [*pictures, "--instance_prompt", prompt, "--output_path", path, *kind]
        add(f"embeddings, T5 {precision}", "compute_embeddings.py", flags, path.with_suffix(".json"))
    for precision in ("fp32", "fp16"):
        path = out / f"latents-{precision}"
        flags = [*pictures, *size, "--vae_precision", precision, "--output_path", path]
        add(f"latents, VAE {precision}", "precompute_latents.py", flags, path / "run.json")
    embeddings = out / f"{arguments.t5[0]}.parquet"
    for checkpointing in (True, False):
        path = out / f"lora-{'recomputed' if checkpointing else 'kept'}"
        flags = [
            *pictures,
            *size,
            "--instance_prompt",
            prompt,
            "--data_df_path",
            embeddings,
            "--mixed_precision",
            "fp16",
        ]
        flags += ["--latents_path", out / "latents-fp32", "--output_dir", path, "--max_train_steps", arguments.steps]
        flags += ["--use_8bit_adam", "--seed", 0, "--report_to", "none"]
        flags += ["--gradient_checkpointing"] if checkpointing else []
        name = f"{arguments.steps} steps, fp16, {'all' if checkpointing else 'no'} blocks recomputed"
        add(name, "train_dreambooth_sd3_lora_miniature.py", flags, path / "run.json")
    flags = [*model, "--lora", out / "lora-recomputed", "--prompt", prompt, "--outdir", out / "images"]
    flags += ["--data_df_path", embeddings]
    add("one picture, 28 steps", "inference.py", flags, out / "images" / "run.json")
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 1 where a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--instance_data_dir", required=True, help="folder of pictures")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--t5", nargs="+", default=["int8", "nf4", "fp16", "fp16-streamed"])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--result", type=Path, help="JSON file to write")
    arguments = parser.parse_args(argv)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    measured = rows(arguments)
    result = {
        **circumstances(choose_device("auto"), (*VERSIONS, "bitsandbytes")),
        "model": Path(arguments.model).name,
        "resolution_px": arguments.resolution,
        "rows": measured,
    }
    if arguments.result:
        arguments.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in row for row in measured))


if __name__ == "__main__":
    sys.exit(main())
