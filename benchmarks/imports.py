"""From a command to its work: what each script imports before it begins, beside the libraries' own imports.

Processes take turns, and a round before the first warms the page cache and writes the bytecode. `import torch,
diffusers, transformers` is what a person would type; the last two import almost nothing of themselves then. A script
needs their classes, so that the same with these classes stands beside it. A script ends where its work would begin.
`job` rows are the bundled miniature's four commands, whole processes.

    python benchmarks/imports.py --result benchmarks/results/imports-cpu.json
    git worktree add ../before COMMIT
    python benchmarks/imports.py --before ../before --result FILE
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.defaults import PROJECT_FOLDER

import torch
from evaluate import circumstances

TYPED = "import torch, diffusers, transformers"
CLASSES = (
    f"{TYPED}\n"
    "from diffusers import AutoencoderKL, SD3Transformer2DModel\n"
    "from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast"
)
PIPELINE = f"{TYPED}\nfrom diffusers import StableDiffusion3Pipeline"
# Each with the flags that it cannot begin without.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "compute_embeddings.py": (),
    "precompute_latents.py": (),
    "train_dreambooth_sd3_lora_miniature.py": (),
    "inference.py": (),
    "draw_class_pictures.py": ("--class_prompt", "a robot", "--class_data_dir", "class"),
    "caption_images.py": ("--instance_data_dir", "examples/robot"),
}
TRAINING_STEPS, DRAWING_STEPS = "3", "4"
JOB: dict[str, tuple[str, ...]] = {
    "compute_embeddings.py": (),
    "precompute_latents.py": (),
    "train_dreambooth_sd3_lora_miniature.py": ("--max_train_steps", TRAINING_STEPS),
    "inference.py": ("--num_steps", DRAWING_STEPS),
}


@dataclass(frozen=True)
class Case:
    """A process to be timed.

    Attributes:
        name: of the row.
        arguments: of Python.
        build: the checkout that it runs; empty for the libraries alone.
        folder: where it runs.
    """

    name: str
    arguments: tuple[str, ...]
    build: str
    folder: Path


def until_work(script: str, flags: Sequence[str]) -> str:
    """Python code that runs a script up to where its work would begin."""
    return (
        "import os, runpy, sys\n"
        "from sd3_lora.common import command_line\n"
        "command_line.exit_code = lambda *_: os._exit(0)\n"
        f"sys.argv = {[script, *flags]!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )


def cases(builds: Mapping[str, Path], job_folder: Path) -> list[Case]:
    """All processes of a round, those of one script in both builds one after the other."""
    here = PROJECT_FOLDER
    found = [
        Case(name, ("-c", f"{code}\nimport os; os._exit(0)"), "", here)
        for name, code in ((TYPED, TYPED), ("with the classes of both", CLASSES), ("with the pipeline", PIPELINE))
    ]
    for script, flags in SCRIPTS.items():
        for build, checkout in builds.items():
            found.append(Case(script, ("-c", until_work(script, flags)), build, checkout))
    for script, flags in JOB.items():
        for build, checkout in builds.items():
            folder = job_folder / build
            found.append(Case(f"job: {script}", (str(checkout / script), *flags), build, folder))
    return found


def run(case: Case) -> tuple[float, float]:
    """Its seconds, and its CPU seconds (of the user and of the system).

    Raises:
        RuntimeError: it failed, with its last lines.
    """
    case.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(case.folder) if case.build else ""}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    finished = subprocess.run(
        [sys.executable, *case.arguments], cwd=case.folder, env=environment, capture_output=True, text=True
    )
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if finished.returncode:
        raise RuntimeError(f"{case.name} ({case.build}): {finished.stderr.strip()[-1000:]}")
    return elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(builds: Mapping[str, Path], rounds: int) -> list[dict[str, Any]]:
    """A row for each case."""
    with tempfile.TemporaryDirectory() as folder:
        found = cases(builds, Path(folder) / "jobs")
        taken: list[list[tuple[float, float]]] = [[] for _ in found]
        for number in range(rounds + 1):
            shutil.rmtree(Path(folder) / "jobs", ignore_errors=True)
            for case, seconds in zip(found, taken, strict=True):
                once = run(case)
                if number:
                    seconds.append(once)
                print(f"{number} {case.name} {case.build}: {once[0]:.2f} s, {once[1]:.2f} CPU s", flush=True)
    typed = statistics.median(cpu for _, cpu in taken[0])
    rows = []
    for case, seconds in zip(found, taken, strict=True):
        cpu = statistics.median(each for _, each in seconds)
        row = {"name": case.name, "build": case.build, "elapsed_s": round(min(each for each, _ in seconds), 2)}
        rows.append({**row, "cpu_s": round(cpu, 2), "of_typed": round(cpu / typed, 2)})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--before", type=Path, help="A checkout of an earlier build, which runs in turns with this.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--result", type=Path, required=True)
    flags = parser.parse_args(argv)
    builds = {"before": flags.before.resolve()} if flags.before else {}
    rows = measure({**builds, "now": PROJECT_FOLDER}, flags.rounds)
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")
    facts = {**circumstances(torch.device("cpu"), packages), "python": sys.version.split()[0], "rounds": flags.rounds}
    settings = {"training_steps": TRAINING_STEPS, "drawing_steps": DRAWING_STEPS}
    flags.result.write_text(json.dumps({**facts, **settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
