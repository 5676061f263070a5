"""Peaks of training under budgets, predicted and measured, on full-size models with random weights.

Each row is a run of the training script on fabricated stage-one files, in this process, so that the libraries are
imported once. `predicted` and `measured` are the script's own figures; `driver` is the most that the driver said was in
use meanwhile, less what was in use before this process: nothing else may use the GPU.

    python benchmarks/memory.py accuracy --models /tmp/models --result FILE
    python benchmarks/memory.py targets cards --models /tmp/models --result FILE

The models are made in `--models` where they are not there (`random_sd3.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.budget import driver_bytes
from sd3_lora.devices import choose_device
from sd3_lora.embedding_store import write_embeddings
from sd3_lora.images import crop_boxes
from sd3_lora.latent_cache import LatentCache
from sd3_lora.memory import GIB, PeakSampler, free_memory
from sd3_lora.model_files import TEXT_COMPONENTS, ModelConfig, ModelFiles
from sd3_lora.records import InstanceImage, LatentPosterior, PromptEmbedding

import random_sd3
import torch
from evaluate import VERSIONS, circumstances
from PIL import Image

PROMPT, PICTURES = "a photo of sks dog", 4
SIZES_PX = (512, 768, 1024)
CARDS_GIB = (2, 3, 4, 6, 8, 12, 15)


@dataclass(frozen=True)
class Case:
    """One run of the training script.

    Attributes:
        name: of the row.
        model: of `random_sd3.TRANSFORMERS`.
        resolution: in pixels.
        batch: pictures in a micro-batch.
        rank: of the LoRA.
        flags: more of the script's.
        steps: optimizer steps.
        script: which of the four.
    """

    name: str
    model: str
    resolution: int = 1024
    batch: int = 1
    rank: int = 4
    flags: tuple[str, ...] = ()
    steps: int = 3
    script: str = "train_dreambooth_sd3_lora_miniature.py"


def accuracy_cases() -> Iterator[Case]:
    """Three models, three resolutions, batches of 1 and 4, ranks 4 and 128; none, some and all blocks computed anew."""
    grid = itertools.product((4, 1), (4, 128), SIZES_PX, random_sd3.TRANSFORMERS)
    for number, (batch, rank, resolution, model) in enumerate(grid):
        flags = (("--gradient_checkpointing",), ("--vram_budget_gib", "30"), ())[number % 3]
        yield Case("accuracy", model, resolution, batch, rank, flags)


def target_cases() -> Iterator[Case]:
    """The least memory of each model and size, exact and in 4 bits; and the steps that are to be compared.

    The budgets are a little above what the plan needs.
    """

    def budget(gib: float, *more: str) -> tuple[str, ...]:
        return ("--vram_budget_gib", str(gib), *more)

    nf4, all_blocks = ("--base_precision", "nf4"), ("--gradient_checkpointing",)
    yield Case("warm-up", "sd3-medium", 512)
    for resolution, gib in ((1024, 1.8), (512, 1.5)):
        for _ in range(2):  # in turns: the machine is noisy
            yield Case("resident, all blocks anew", "sd3-medium", resolution, flags=all_blocks, steps=12)
            yield Case("streamed", "sd3-medium", resolution, flags=budget(gib), steps=12)
    yield Case("16-bit base", "sd3-medium", flags=budget(5.2))
    yield Case("nf4", "sd3-medium", flags=budget(3.0, *nf4), steps=12)
    yield Case("nf4", "sd3-medium", 512, flags=budget(2.2, *nf4), steps=12)
    yield Case("streamed", "sd3.5-medium", flags=budget(2.2))
    yield Case("nf4", "sd3.5-medium", flags=budget(3.6, *nf4))
    bf16 = ("--mixed_precision", "bf16")
    yield Case("3 pictures, rank 128, bf16", "sd3.5-medium", batch=3, rank=128, flags=(*all_blocks, *bf16), steps=12)
    yield Case("nf4", "sd3.5-large", flags=budget(7.5, *nf4))
    yield Case("streamed", "sd3.5-large", flags=budget(3.4))


def card_cases() -> Iterator[Case]:
    """What fits cards as people own them: exact, and in 4 bits where the exact base would have to be streamed."""
    for gib, model, resolution in itertools.product(CARDS_GIB, random_sd3.TRANSFORMERS, SIZES_PX):
        yield Case(f"{gib} GiB", model, resolution, flags=("--vram_budget_gib", str(gib), "--plan"))
        flags = ("--vram_budget_gib", str(gib), "--base_precision", "auto", "--plan")
        yield Case(f"{gib} GiB, auto", model, resolution, flags=flags)


def picture_cases() -> Iterator[Case]:
    """The VAE in tiles, and whole pictures: exact, in 4 bits, streamed."""
    for gib in (2.2, 6.0):
        flags = ("--vram_budget_gib", str(gib))
        yield Case(f"encode within {gib} GiB", "sd3-medium", flags=flags, script="precompute_latents.py")
    for gib, more in ((5.3, ()), (3.2, ("--base_precision", "nf4")), (2.4, ())):
        flags = ("--vram_budget_gib", str(gib), *more)
        yield Case(f"draw within {gib} GiB", "sd3-medium", flags=flags, script="inference.py")


SETS = {"accuracy": accuracy_cases, "targets": target_cases, "pictures": picture_cases, "cards": card_cases}


def model_folder(models: Path, name: str) -> Path:
    """The model, made now if it is not there."""
    folder = models / name
    if not (folder / "model_index.json").is_file():
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)  # the last row's cap
        random_sd3.save(name, folder, ["transformer", "vae"])
        for resolution in SIZES_PX:
            fabricate_stage_one(folder, resolution)
    return folder


def fabricate_stage_one(model: Path, resolution: int) -> tuple[Path, Path]:
    """An embeddings file and a latent cache of random tensors in the sizes of the real ones."""
    files = ModelFiles(ModelConfig(pretrained_model_name_or_path=str(model)))
    config = files.read_config("transformer")
    embeddings, latents = model / "embeddings.parquet", model / f"latents-{resolution}"
    images = [InstanceImage(f"{index:064x}", Path(f"{index}.png"), PROMPT) for index in range(PICTURES)]
    if not embeddings.is_file():
        generator = torch.Generator().manual_seed(0)
        rows = [
            PromptEmbedding(
                prompt,
                roles,
                tuple(image.image_id for image in images) if prompt else (),
                torch.randn(154, config["joint_attention_dim"], generator=generator).half(),
                torch.randn(config["pooled_projection_dim"], generator=generator).half(),
            )
            for prompt, roles in ((PROMPT, ("instance",)), ("", ("negative", "empty")))
        ]
        write_embeddings(embeddings, files.provenance(TEXT_COMPONENTS, "fp16", 77), rows)
    if not latents.is_dir():
        latents.mkdir()
        cache = LatentCache(latents, files.provenance(["vae"], "fp32", resolution), "white")
        box = crop_boxes(resolution, resolution, resolution, 1, False)[0]
        shape = (config["in_channels"], resolution // 8, resolution // 8)
        for image in images:
            mean, std = torch.randn(shape), torch.rand(shape) / 10
            cache.add(image, (resolution, resolution), [LatentPosterior(image.image_id, box.name, mean, std)])
    return embeddings, latents


def noise_picture(models: Path, resolution: int) -> Path:
    """A folder with one picture."""
    folder = models / f"noise-{resolution}"
    folder.mkdir(exist_ok=True)
    Image.effect_noise((resolution, resolution), 80).convert("RGB").save(folder / "noise.png")
    return folder


def hollow_model(models: Path, name: str) -> Path:
    """A model whose transformer's file has its header, and holes for weights: enough for --plan."""
    folder = models / f"hollow-{name}"
    if not (folder / "model_index.json").is_file():
        random_sd3.save(name, folder, [])
        with torch.device("meta"):
            transformer = random_sd3.make_transformer(name)
        shutil.rmtree(folder / "transformer")
        transformer.save_config(folder / "transformer")
        header: dict[str, Any] = {}
        size = 0
        for key, tensor in transformer.state_dict().items():
            end = size + 2 * tensor.numel()
            header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [size, end]}
            size = end
        text = json.dumps(header).encode()
        with (folder / "transformer" / "diffusion_pytorch_model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + size)
    return folder


def call(case: Case, model: Path, words: Sequence[object], device: str) -> tuple[str, str | None]:
    """Runs the script; what it said, and its last line where it was refused."""
    words = ["--pretrained_model_name_or_path", model, "--device", device, *words, *case.flags]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(case.script.removesuffix(".py")).main([str(word) for word in words])
    return out.getvalue(), err.getvalue().strip().splitlines()[-1] if code else None


def training_words(case: Case) -> list[object]:
    """The training script's flags that decide its memory."""
    words: list[object] = ["--resolution", case.resolution, "--train_batch_size", case.batch, "--rank", case.rank]
    return [*words, "--use_8bit_adam"]


def plan_case(case: Case, model: Path, device: str) -> dict[str, Any]:
    """What --plan says of 16-bit training."""
    said, refused = call(case, model, [*training_words(case), "--mixed_precision", "bf16"], device)
    if refused:
        return {**asdict(case), "failed": refused}
    (plan,) = re.findall(r"^plan: (.*)$", said, re.MULTILINE)
    (peak,) = re.findall(r"^predicted peak: .* = ([\d.]+) GiB$", said, re.MULTILINE)
    return {**asdict(case), "plan": plan, "predicted_gib": float(peak)}


def run_case(case: Case, models: Path, device: str, driver_before: int) -> dict[str, Any]:
    """Runs the script once; what it said of its memory and time.

    `driver_before` bytes were in use when this process began.
    """
    if "--plan" in case.flags:
        return plan_case(case, hollow_model(models, case.model), device)
    model = model_folder(models, case.model)
    embeddings, latents = fabricate_stage_one(model, case.resolution)
    output = models / f"output-{os.getpid()}"
    shutil.rmtree(output, ignore_errors=True)
    words: list[object]
    if case.script == "inference.py":
        words = ["--data_df_path", embeddings, "--prompt", PROMPT, "--outdir", output]
        words += ["--height", case.resolution, "--width", case.resolution]
    elif case.script == "precompute_latents.py":
        words = ["--instance_data_dir", noise_picture(models, case.resolution), "--instance_prompt", PROMPT]
        words += ["--resolution", case.resolution, "--output_path", output]
    else:
        words = [*training_words(case), "--data_df_path", embeddings, "--latents_path", latents, "--seed", 0]
        words += ["--output_dir", output, "--max_train_steps", case.steps, "--report_to", "none"]
    free_memory(choose_device(device))  # what the last row left in the allocator's cache would be counted
    start = time.perf_counter()
    with PeakSampler(lambda: driver_bytes(0) or 0, interval_s=0.2) as sampler:
        said, refused = call(case, model, words, device)
    row: dict[str, Any] = {**asdict(case), "elapsed_s": round(time.perf_counter() - start, 1)}
    row["plan"] = (re.findall(r"^plan: (.*)$", said, re.MULTILINE) or [None])[0]
    if refused:
        return row | {"failed": refused}
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    if "plan" in record:
        row["parts_gib"] = {name: round(size / GIB, 3) for name, size in record["plan"]["parts"].items()}
        row["predicted_gib"] = round(sum(record["plan"]["parts"].values()) / GIB, 3)
    else:
        row["said"] = [line for line in said.splitlines() if " = " in line or "peak" in line]
        row["predicted_gib"] = round(record["predicted_bytes"] / GIB, 3)
    row["measured_gib"] = round(record["measured_bytes"] / GIB, 3)
    row["driver_gib"] = round((sampler.peak - driver_before) / GIB, 3)
    stages = record["stages"]
    row["allocated_gib"] = {stage["name"]: round(stage["peak_device_gib"], 3) for stage in stages}
    row["host_gib"] = round(max(stage["peak_host_gib"] for stage in stages), 2)
    row["stage_s"] = {stage["name"]: round(stage["elapsed_s"], 2) for stage in stages}
    row["ms_a_step"] = next(map(int, re.findall(r"(\d+) ms a step", said)), None)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--models", type=Path, required=True, help="Where the random models are, or are made.")
    parser.add_argument("--part", default="0/1", help="Every N-th row, from the K-th: K/N, for several GPUs.")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="Begin no row after so many seconds.")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    arguments = parser.parse_args(argv)
    first, count = map(int, arguments.part.split("/"))
    start, rows = time.perf_counter(), []
    driver_before = driver_bytes(0) or 0
    cases = [case for name in arguments.sets for case in SETS[name]()]
    for case in cases[first::count]:
        if time.perf_counter() - start > arguments.stop_after:
            break
        rows.append(run_case(case, arguments.models, arguments.device, driver_before))
        shown = ("name", "model", "resolution", "batch", "rank", "plan", "predicted_gib", "measured_gib", "driver_gib")
        print({key: rows[-1].get(key) for key in (*shown, "ms_a_step", "failed", "elapsed_s")}, flush=True)
        if arguments.result:
            result = {
                **circumstances(choose_device(arguments.device), (*VERSIONS, "bitsandbytes")),
                "rows": rows,
            }
            arguments.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
