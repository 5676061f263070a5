"""The ladder of memory tricks on this machine: one trick a row, what it saves, and what it costs.

Each row is the real script with the flags of that row, a process of its own: stage one, and a few training steps of the
bundled miniature. On a CPU the memory is the host's, on a GPU the device's. It takes a minute or two.

    python -m sd3_lora.tricks
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command line is read: Ctrl-C shows no traceback

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sd3_lora.common.command_line import CommandLine, less_than_one, require_right

STAGE_ONE, TRAINING = "stage one", "training"
BAR_WIDTH = 24


@dataclass(frozen=True)
class TricksConfig:
    """What is measured, and where the table and the drawing go."""

    output_dir: str = field(default="tricks", metadata={"help": "Folder for ladder.json and ladder.svg."})
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The model: a hub id or folder. Default: the bundled miniature; with --plan, SD3-Medium."},
    )
    resolution: int | None = field(
        default=None, metadata={"help": "Pixels of a picture's side. Default: 512; with --plan, 1024."}
    )
    max_train_steps: int = field(default=3, metadata={"help": "Training steps of each row."})
    device: Literal["auto", "cuda", "cpu"] = field(
        default="auto", metadata={"help": "Where to compute; auto means a GPU if there is one."}
    )
    plan: bool = field(
        default=False,
        metadata={"help": "Run nothing: print what the plan predicts for each row on a large GPU; no GPU is needed."},
    )

    def __post_init__(self) -> None:
        require_right(less_than_one(self, "resolution", "max_train_steps"))


COMMAND_LINE = CommandLine("-m sd3_lora.tricks", __doc__, (TricksConfig,))
if __name__ == "__main__":
    COMMAND_LINE.answer_at_once()

import datetime
import html
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from sd3_lora.common.command_line import UserError, exit_code, require_writable_folder, write_text_atomically
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.defaults import EXAMPLE_PROMPT, EXAMPLE_SUBJECT, MINIATURE, PROJECT_FOLDER
from sd3_lora.common.devices import choose_device
from sd3_lora.common.known_models import HUB_IDS
from sd3_lora.common.model_files import ModelFiles, library_versions
from sd3_lora.transformer.lora import LORA_FILE

import torch
from safetensors.torch import load_file

SCRIPT = "train_dreambooth_sd3_lora_miniature.py"
LARGE_GPU_GIB = "999"  # so that a row's own flags decide, and no card
MEASURED_PX, PLANNED_PX = 512, 1024
COLUMNS = ("", "by", "GiB", "loaded", "", "ms a step", "loss", "numbers")
TO_THE_RIGHT = (2, 3, 5, 6)


@dataclass(frozen=True)
class Rung:
    """A row of the ladder.

    Attributes:
        name: what is done, in a few words.
        trick: the flag that does it; empty for the first row.
        flags: all flags of the row, those of the rows above among them.
        beside: the name of the row with which its numbers are compared; None where it has other inputs.
        on_gpu: whether it changes something on a GPU alone.
    """

    name: str
    trick: str
    flags: tuple[str, ...]
    beside: str | None = None
    on_gpu: bool = False


@dataclass(frozen=True)
class Row:
    """What a row came to.

    Attributes:
        before_gib: the peak while the model was loaded: libraries and weights.
        peak_gib: the peak of the whole run, of the host on a CPU and of the GPU's tensors on a GPU.
        host_gib: the host's peak.
        numbers: the trained LoRA beside that of another row: the same bits, or how far off.
        failed: why there is no figure; empty where there is.
    """

    part: str
    name: str
    trick: str
    before_gib: float = 0.0
    peak_gib: float = 0.0
    host_gib: float = 0.0
    elapsed_s: float = 0.0
    step_ms: float | None = None
    loss: float | None = None
    numbers: str = ""
    failed: str = ""


def rungs(blocks: int, resolution: int, half_precision: str) -> Iterator[Rung]:
    """The ladder, from the most memory to the least; each row keeps the flags of those above, but for "instead".

    Args:
        blocks: of the transformer.
        resolution: of the first rows, in pixels; the last has half of it.
        half_precision: fp16 or bf16.
    """
    size, scores = ("--resolution", str(resolution)), ("--attention_kernel", "math")
    plain = (*size, "--mixed_precision", "no", "--recompute_blocks", "0", "--capture", "off", "--compile", "off")
    first = Rung("attention keeps every score", " ".join(scores), (*plain, *scores))
    yield first
    fused = Rung("fused attention", "--attention_kernel auto", plain, first.name)
    yield fused
    half = ("--mixed_precision", half_precision)
    kept: tuple[str, ...] = (*size, *half, "--recompute_blocks", "0", "--compile", "off")
    yield Rung("base in 16 bits", " ".join(half), (*kept, "--capture", "off"), fused.name)
    yield Rung("step as one CUDA graph", "--capture auto", kept, "base in 16 bits", on_gpu=True)
    kept = (*kept, "--use_8bit_adam")
    yield Rung("Adam's state in 8 bits", "--use_8bit_adam", kept, "base in 16 bits")
    again = ("--recompute_blocks", str(blocks))
    kept = (*size, *half, *again, "--compile", "off", "--use_8bit_adam")
    recomputed = Rung("all blocks recomputed", " ".join(again), kept, "Adam's state in 8 bits")
    yield recomputed
    nf4, streamed = ("--base_precision", "nf4"), ("--stream_blocks", str(blocks))
    yield Rung("base in 4 bits", " ".join(nf4), (*kept, *nf4), recomputed.name)
    kept = (*kept, *streamed)
    yield Rung("instead: 16-bit base streamed", " ".join(streamed), kept, recomputed.name, on_gpu=True)
    offload = ("--offload_inputs", "on")
    kept = (*kept, *offload, "--stream_buffers", "2")
    yield Rung("block inputs offloaded", " ".join(offload), kept, recomputed.name, on_gpu=True)
    smaller = ("--resolution", str(resolution // 2))
    last = (*smaller, *half, *again, "--compile", "off", "--use_8bit_adam", *nf4)
    yield Rung("half the side, base in 4 bits", " ".join(smaller), last)


def run_python(words: Sequence[str]) -> tuple[int, str, str]:
    """Runs a script of the project; its exit code, and what it wrote to stdout and stderr."""
    done = subprocess.run(
        [sys.executable, PROJECT_FOLDER / words[0], *words[1:]],
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "TQDM_DISABLE": "1"},
        check=False,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    return done.returncode, done.stdout, done.stderr


def reason(code: int, said: str) -> str:
    """Why a script failed, by the last line of its stderr; empty where it did not."""
    lines = [line for line in said.splitlines() if line.strip()] or [f"exit code {code}"]
    return lines[-1].removeprefix("error: ") if code else ""


class Workshop:
    """Where the runs' files are, and what is common to all runs.

    Args:
        folder: of files that are thrown away at the end.
        model: a folder or a hub id.
        device: on which all is computed.
    """

    def __init__(self, folder: Path, model: str, device: torch.device):
        self.folder = folder
        self._device = device
        self._model = ("--pretrained_model_name_or_path", model)
        self._pictures = ("--instance_data_dir", str(EXAMPLE_SUBJECT), "--instance_prompt", EXAMPLE_PROMPT)
        self.embeddings = folder / "embeddings.parquet"

    def run(self, script: str, *words: object) -> str:
        """Runs a script of the project; returns why it failed, or nothing."""
        given = [script, *self._model, *self._pictures, "--device", self._device.type, *map(str, words)]
        code, _, said = run_python(given)
        return reason(code, said)

    def row(self, part: str, name: str, trick: str, record: Path) -> Row:
        """The figures that a script noted."""
        noted = json.loads(record.read_text(encoding="utf-8"))
        host = [stage["peak_host_gib"] for stage in noted["stages"]]
        peaks = [stage["peak_device_gib"] for stage in noted["stages"]] if self._device.type == "cuda" else host
        elapsed_s = round(sum(stage["elapsed_s"] for stage in noted["stages"]), 1)
        row = Row(part, name, trick, round(peaks[0], 3), round(max(peaks), 3), round(max(host), 3), elapsed_s)
        if part == TRAINING:
            row = replace(row, step_ms=round(noted["ms_a_step"], 1), loss=noted["loss"])
        return row

    def latents(self, resolution: int, *flags: str) -> Path:
        """The folder of latents of one size."""
        return self.folder / "-".join(["latents", str(resolution), *(flag.strip("-") for flag in flags)])


def stage_one_rows(workshop: Workshop, resolution: int) -> Iterator[Row]:
    """Both scripts of stage one, and the VAE in tiles; each is a row.

    Raises:
        UserError: one of them failed, without which nothing can be trained.
    """
    tile = str(resolution // 2)
    runs = [
        ("text encoders, one at a time", "compute_embeddings.py", (), workshop.embeddings),
        ("VAE, whole pictures", "precompute_latents.py", (), workshop.latents(resolution)),
        ("VAE, pictures in tiles", "precompute_latents.py", ("--vae_tile", tile), None),
    ]
    for name, script, flags, path in runs:
        output = path or workshop.latents(resolution, *flags)
        size = () if path == workshop.embeddings else ("--resolution", resolution)
        fault = workshop.run(script, *size, *flags, "--output_path", output)
        if fault and path:
            raise UserError(f"{script} failed: {fault}")
        trick = " ".join(flags) or script
        record = output.with_suffix(".json") if path == workshop.embeddings else output / "run.json"
        yield Row(STAGE_ONE, name, trick, failed=fault) if fault else workshop.row(STAGE_ONE, name, trick, record)


def training_rows(workshop: Workshop, ladder: Sequence[Rung], steps: int) -> Iterator[Row]:
    """A run of the training script for each rung."""
    loras: dict[str, Path] = {}
    for number, rung in enumerate(ladder):
        resolution = int(rung.flags[rung.flags.index("--resolution") + 1])
        latents, output = workshop.latents(resolution), workshop.folder / f"rung-{number}"
        files = ("--data_df_path", workshop.embeddings, "--latents_path", latents, "--output_dir", output)
        fault = (
            "" if latents.is_dir() else workshop.run("precompute_latents.py", *rung.flags[:2], "--output_path", latents)
        )
        fault = fault or workshop.run(
            SCRIPT, *rung.flags, *files, "--max_train_steps", steps, "--seed", 0, "--report_to", "none"
        )
        if fault:
            yield Row(TRAINING, rung.name, rung.trick, failed=fault)
            continue
        loras[rung.name] = output / LORA_FILE
        row = workshop.row(TRAINING, rung.name, rung.trick, output / "run.json")
        yield replace(row, numbers=compared(loras[rung.name], loras.get(rung.beside or "")))


def compared(path: Path, other: Path | None) -> str:
    """What a LoRA's numbers are beside another's, in words: the norm of the difference as a share of the norm."""
    if other is None:
        return ""
    ours, theirs = load_file(path), load_file(other)
    if all(torch.equal(ours[name], theirs[name]) for name in theirs):
        return "the same bits"
    off = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    return f"off by {math.sqrt(off / sum(float(tensor.square().sum()) for tensor in theirs.values())):.1e}"


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, with a bar of the memory each; below it why a row has no figure."""
    most = max((row.peak_gib for row in rows), default=0.0) or 1.0
    lines = [COLUMNS]
    for row in rows:
        bar = "#" * max(1, round(BAR_WIDTH * row.peak_gib / most))
        loaded = f"{row.before_gib:.2f}" if row.part == TRAINING else ""
        figures = (f"{row.peak_gib:.2f}", loaded, bar) if not row.failed else ("–", "", "")
        lines.append((row.name, row.trick, *figures, *(shown(row.step_ms, ".0f"), shown(row.loss, ".6f"), row.numbers)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = [
        "  ".join(f"{cell:{'>' if at in TO_THE_RIGHT else '<'}{widths[at]}}" for at, cell in enumerate(line)).rstrip()
        for line in lines
    ]
    return "\n".join([*text, *(f"{row.name}: {row.failed}" for row in rows if row.failed)])


def shown(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else f"{value:{form}}"


def drawn(rows: Sequence[Row], title: str) -> str:
    """The table as an SVG, light or dark as the page around it; the lighter part of a bar is training's own."""
    rows = [row for row in rows if not row.failed]
    most = max((row.peak_gib for row in rows), default=0.0) or 1.0
    height = 64 + 26 * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height}" width="840" height="{height}" role="img">',
        f"<title>{html.escape(title)}</title>",
        "<style>svg{font:13px system-ui,sans-serif;background:#fff}text{fill:#1f2328}.low{fill:#59636e}"
        ".before{fill:#0969da}.work{fill:#54aeff}@media(prefers-color-scheme:dark){svg{background:#0d1117}"
        "text{fill:#e6edf3}.low{fill:#9198a1}.before{fill:#1f6feb}.work{fill:#79c0ff}}</style>",
        f'<text x="12" y="22">{html.escape(title)}</text>',
        '<text class="low" x="240" y="46">dark: libraries and weights, before training</text>'
        '<text class="low" x="600" y="46">GiB</text><text class="low" x="650" y="46">ms a step</text>'
        '<text class="low" x="730" y="46">numbers</text>',
    ]
    for place, row in enumerate(rows):
        y, whole = 52 + 26 * place, 340 * row.peak_gib / most
        loaded = 340 * row.before_gib / most if row.part == TRAINING else 0.0
        lines += [
            f'<text x="12" y="{y + 15}">{html.escape(row.name)}</text>',
            f'<rect class="work" x="240" y="{y + 3}" width="{whole:.1f}" height="16"/>',
            f'<rect class="before" x="240" y="{y + 3}" width="{min(loaded, whole):.1f}" height="16"/>',
            f'<text x="600" y="{y + 15}">{row.peak_gib:.2f}</text>',
            f'<text class="low" x="650" y="{y + 15}">{shown(row.step_ms, ".0f")}</text>',
            f'<text class="low" x="730" y="{y + 15}">{html.escape(row.numbers)}</text>',
        ]
    return "\n".join([*lines, "</svg>\n"])


def write_result(rows: Sequence[Row], folder: Path, facts: dict[str, Any], title: str) -> None:
    """Writes ladder.json and ladder.svg."""
    result = json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=2, ensure_ascii=False)
    write_text_atomically(folder / "ladder.json", result + "\n")
    write_text_atomically(folder / "ladder.svg", drawn(rows, title))


def print_plans(model: str, resolution: int) -> None:
    """What the training script plans for each row, in its own words; nothing is loaded.

    Raises:
        UserError: the script cannot plan for this model.
    """
    blocks = ModelFiles(ModelConfig(pretrained_model_name_or_path=model), True).read_config("transformer")["num_layers"]
    print(f"{model} at {resolution} px, one picture a step, on a GPU that is large enough:")
    for rung in rungs(blocks, resolution, "fp16"):
        words = [*rung.flags, "--pretrained_model_name_or_path", model, "--plan", "--vram_budget_gib", LARGE_GPU_GIB]
        code, out, said = run_python([SCRIPT, *words])
        if code:
            raise UserError(reason(code, said))
        peak = [line for line in out.splitlines() if line.startswith("predicted peak")]
        print(f"\n{rung.name}" + (f" ({rung.trick})" if rung.trick else ""), *peak, sep="\n  ", flush=True)


def measure(config: TricksConfig, model: str, resolution: int, device: torch.device) -> list[Row]:
    """All rows, each announced when it is done."""
    on_gpu = device.type == "cuda"
    blocks = ModelFiles(ModelConfig(pretrained_model_name_or_path=model)).read_config("transformer")["num_layers"]
    ladder = [rung for rung in rungs(blocks, resolution, "fp16" if on_gpu else "bf16") if on_gpu or not rung.on_gpu]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="sd3_lora_tricks_", ignore_cleanup_errors=True) as folder:
        workshop = Workshop(Path(folder), model, device)
        for part in (stage_one_rows(workshop, resolution), training_rows(workshop, ladder, config.max_train_steps)):
            for row in part:
                rows.append(row)
                print(f"[{len(rows)}/{3 + len(ladder)}] {row.name}" + (": not here" if row.failed else ""), flush=True)
    return rows


def run(argv: Sequence[str] | None) -> None:
    """From top to bottom."""
    (config,) = COMMAND_LINE.parse(argv)
    if config.plan:
        print_plans(config.pretrained_model_name_or_path or HUB_IDS["sd3-medium"], config.resolution or PLANNED_PX)
        return
    folder, model = Path(config.output_dir), config.pretrained_model_name_or_path or str(MINIATURE)
    device, resolution = (
        choose_device(config.device, ModelConfig(pretrained_model_name_or_path=model)),
        config.resolution or MEASURED_PX,
    )
    require_writable_folder(folder)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    name = "the miniature" if model == str(MINIATURE) else model
    what = "GiB of GPU memory for tensors" if device.type == "cuda" else "GiB of host memory"
    title = f"{name} at {resolution} px on {machine}: {what}"
    print(f"{title}; a minute or two, one process a row", flush=True)
    rows = measure(config, model, resolution, device)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine,
        "versions": library_versions(),
        "model": name,
        "resolution_px": resolution,
        "steps": config.max_train_steps,
        "device": device.type,
    }
    write_result(rows, folder, facts, title)
    print(
        f"\n{table(rows)}\n\nnumbers: the trained LoRA beside that of an earlier row, the difference as a share of it\n"
        f"wrote {folder / 'ladder.json'} and {folder / 'ladder.svg'}; a page for each: docs/tricks/"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return exit_code(run, argv)


if __name__ == "__main__":
    sys.exit(main())
