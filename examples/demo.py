"""The four scripts one after another, on the bundled miniature and examples/robot, with a table of what each took.

    python examples/demo.py --output_dir outputs/demo

Each script is a process of its own, as on a command line. Run it again: what is done is not done twice.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT_FOLDER = Path(__file__).resolve().parent.parent
SUBJECT, PROMPT, PROMPTS_FILE = "examples/robot", "a photo of sks robot", "examples/prompts.txt"
CLASS_PROMPT, PRIOR_PROMPTS_FILE = "a photo of a robot", "benchmarks/prior_prompts.txt"
DRAWING_STEPS, GUIDANCE = 20, 3.0
EMA_NAME = "pytorch_lora_weights_ema.safetensors"  # the moving average of the LoRA
# The preset of docs/methods.md: it draws a new object best, and forgets next to nothing of the others. In the miniature
# an object's name becomes its looks in the first blocks' feed-forward layers of the text stream.
STEPS, TRAIN_BATCH_SIZE, RANK = 150, 2, 8
PRESET = (
    *("--lora_layers", "ff_context.net.0.proj,ff_context.net.2", "--lora_blocks", "0,1,2"),
    *("--learning_rate", "2e-3", "--use_ema", "--ema_decay", "0.98"),
    *("--prior_term", "prediction", "--prior_term_weight", "3", "--prior_share", "1"),
    *("--prior_prompts_file", PRIOR_PROMPTS_FILE),
)


@dataclass(frozen=True)
class Stage:
    """One script of the demo.

    Attributes:
        name: in the table.
        words: the script and its flags; paths are relative to the project folder.
        record: the JSON file in which the script notes what each part of its work took.
    """

    name: str
    words: tuple[str, ...]
    record: Path


@dataclass(frozen=True)
class Row:
    """One line of the table; None where the work was done before."""

    name: str
    elapsed_s: float | None
    peak_host_gib: float | None
    peak_device_gib: float | None
    wrote: str


def plan_stages(folder: Path, max_train_steps: int, num_steps: int) -> list[Stage]:
    """The scripts to run, in order, with all that they write under `folder`."""
    embeddings, latents, lora = folder / "embeddings.parquet", folder / "latents", folder / "lora"
    pictures = folder / "pictures"
    model = ("--pretrained_model_name_or_path", "miniature")
    train = (
        *("--train_batch_size", str(TRAIN_BATCH_SIZE), "--rank", str(RANK), *PRESET),
        *("--seed", "0", "--report_to", "none"),
        *("--max_train_steps", str(max_train_steps), "--checkpointing_steps", "50", "--checkpoints_total_limit", "1"),
        *("--resume_from_checkpoint", "latest"),
    )
    draw = ("inference.py", *model, "--prompts_file", PROMPTS_FILE, "--data_df_path", str(embeddings))
    draw = (*draw, "--num_steps", str(num_steps), "--guidance", f"{GUIDANCE:g}", "--batch_size", "4", "--seed", "0")
    return [
        Stage(
            "compute_embeddings.py",
            (
                *("compute_embeddings.py", *model, "--instance_data_dir", SUBJECT, "--instance_prompt", PROMPT),
                *("--class_prompt", CLASS_PROMPT, "--prompts_file", PROMPTS_FILE, "--prompts_file", PRIOR_PROMPTS_FILE),
                *("--output_path", str(embeddings)),
            ),
            embeddings.with_suffix(".json"),
        ),
        Stage(
            "precompute_latents.py",
            ("precompute_latents.py", *model, "--instance_data_dir", SUBJECT, "--output_path", str(latents)),
            latents / "run.json",
        ),
        Stage(
            "train_dreambooth_sd3_lora_miniature.py",
            (
                *("train_dreambooth_sd3_lora_miniature.py", *model, "--instance_data_dir", SUBJECT),
                *("--data_df_path", str(embeddings), "--latents_path", str(latents), "--output_dir", str(lora)),
                *train,
            ),
            lora / "run.json",
        ),
        Stage(
            "inference.py",
            (*draw, "--outdir", str(pictures / "without_lora")),
            pictures / "without_lora" / "run.json",
        ),
        Stage(
            "inference.py --lora",
            (*draw, "--lora", str(lora / EMA_NAME), "--outdir", str(pictures / "with_lora")),
            pictures / "with_lora" / "run.json",
        ),
    ]


def run_python(words: Sequence[str]) -> int:
    """Runs a script of the project, its output going where ours goes; returns its exit code."""
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",  # beside other work, threads that wait busily cost a CPU ten times the time
        **os.environ,
        "PYTHONUNBUFFERED": "1",  # or its lines would come after its progress bars
    }
    return subprocess.run([sys.executable, *words], cwd=PROJECT_FOLDER, env=environment, check=False).returncode


def modified_ns(path: Path) -> int:
    """When the file was last written; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def read_row(stage: Stage, before_ns: int) -> Row:
    """The table's line from what the script noted, if it did any work since `before_ns`."""
    path = PROJECT_FOLDER / stage.record
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    parts = record["stages"] if modified_ns(path) != before_ns else []
    if not parts:
        return Row(stage.name, None, None, None, "nothing new: done before")
    return Row(
        stage.name,
        sum(part["elapsed_s"] for part in parts),
        max(part["peak_host_gib"] for part in parts),
        max(part["peak_device_gib"] for part in parts),
        record["wrote"],
    )


def table(rows: Sequence[Row], total_s: float) -> str:
    """The rows as aligned text, with a line for what the processes took beside their work."""

    def number(value: float | None, form: str) -> str:
        return form.format(value) if value else "–"

    worked_s = sum(row.elapsed_s or 0 for row in rows)
    cells = [("", "time", "peak host", "peak device", "wrote")]
    for row in rows:
        host, device = (number(peak, "{:.2f} GiB") for peak in (row.peak_host_gib, row.peak_device_gib))
        cells.append((row.name, number(row.elapsed_s, "{:.1f} s"), host, device, row.wrote))
    cells.append(("loading Python's libraries, five times", f"{total_s - worked_s:.1f} s", "", "", ""))
    cells.append(("in all", f"{total_s:.1f} s", "", "", ""))
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = [
        f"{line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]:>{widths[3]}}  {line[4]}"
        for line in cells
    ]
    rule = "─" * max(map(len, lines))
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:-2], rule, *lines[-2:]))


def run_demo(folder: Path, max_train_steps: int, num_steps: int) -> int:
    """All of it; returns the exit code of the first script that fails, or 0."""
    stages = plan_stages(folder, max_train_steps, num_steps)
    rows = []
    start = time.perf_counter()
    for number, stage in enumerate(stages, start=1):
        print(f"\n[{number}/{len(stages)}] python {shlex.join(stage.words)}", flush=True)
        before_ns = modified_ns(PROJECT_FOLDER / stage.record)
        code = run_python(stage.words)
        if code:
            print(
                f"\nthe demo stopped at {stage.name}: the reason is above; to start anew, delete {folder}", flush=True
            )
            return code
        rows.append(read_row(stage, before_ns))
    total_s = time.perf_counter() - start

    sheet, pictures = folder / "contact_sheet.png", folder / "pictures"
    sheet_rows = [
        *("--row", f"The subject: {SUBJECT}", SUBJECT),
        *("--row", "Drawn without the LoRA", str(pictures / "without_lora")),
        *("--row", "Drawn with the LoRA", str(pictures / "with_lora")),
    ]
    print(flush=True)
    title = f"Miniature SD3, {max_train_steps} training steps"
    code = run_python(["examples/contact_sheet.py", "--title", title, *sheet_rows, "--output_path", str(sheet)])
    if code:
        return code
    print(f"\n{table(rows, total_s)}\n")
    print(f"Look at {sheet}; the pictures themselves are in {pictures}, the LoRA in {folder / 'lora'}.")
    print("The miniature has learnt a small world that has no robot in it: all it knows of one is from the LoRA.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", default="outputs/demo", help="Where everything goes. Default: %(default)s.")
    parser.add_argument("--max_train_steps", type=int, default=STEPS, help="Training steps. Default: %(default)s.")
    parser.add_argument("--num_steps", type=int, default=DRAWING_STEPS, help="Drawing steps. Default: %(default)s.")
    flags = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a Windows console may lack a dash
    folder = Path(flags.output_dir).resolve()
    if folder.is_relative_to(PROJECT_FOLDER):
        folder = folder.relative_to(PROJECT_FOLDER)  # the scripts run in the project folder: shorter to read
    try:
        return run_demo(folder, flags.max_train_steps, flags.num_steps)
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
