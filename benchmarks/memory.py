"""Peaks of the scripts under budgets, predicted and measured, on full-size models with random weights.

Each row is a run of one of the scripts on fabricated files, in this process, so that the libraries are imported once.
`predicted` and `measured` are the script's own figures; `driver` is the most that the driver said was in use meanwhile,
less what was in use before this process: nothing else may use the GPU. `step_ms` is the median over the steps after the
first.

    python benchmarks/memory.py accuracy --models /tmp/models --result FILE
    python benchmarks/memory.py text ladder saving --models /tmp/models --result "results/{set}-h100.json"

The models are made in `--models` where they are not there (`random_sd3.py`). A row that fails is noted with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import shutil
import statistics
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import BudgetConfig, ModelConfig
from sd3_lora.common.devices import choose_device, choose_training_dtype, planned_device
from sd3_lora.common.memory import GIB, drop_workspaces, free_memory
from sd3_lora.common.model_files import TEXT_COMPONENTS, ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.processes import in_processes
from sd3_lora.common.records import InstanceImage, LatentMask, LatentPosterior, PromptEmbedding
from sd3_lora.common.stage_report import PeakSampler
from sd3_lora.gpu.budget import BudgetTooSmall, driver_bytes, open_budget
from sd3_lora.plan.step_time import bytes_a_second, measure_flops_a_byte
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.crop_boxes import crop_boxes
from sd3_lora.stage_one.embedding_store import write_embeddings
from sd3_lora.stage_one.latent_cache import LatentCache
from sd3_lora.training.config import TrainingFlags

import random_sd3
import torch
from evaluate import VERSIONS, circumstances
from memory_cases import DRAW, EMBED, LATENTS, SETS, SIZES_PX, TRAIN, Case
from PIL import Image
from placements import placement_of

PROMPT, CLASS_PROMPT, PICTURES = "a photo of sks dog", "a photo of a dog", 4
DRAWN = (PROMPT, CLASS_PROMPT, f"{PROMPT} in a forest", f"{PROMPT} on a beach")  # validation pictures
# Those that the fabricated embeddings have, with their roles.
PROMPTS = {
    PROMPT: ("instance",),
    CLASS_PROMPT: ("class",),
    **dict.fromkeys(DRAWN[2:], ("validation",)),
    "": ("negative", "empty"),
}


def model_folder(models: Path, name: str) -> Path:
    """The model, made now if it is not there; its text encoders are the miniature's."""
    folder = models / name
    if not (folder / "model_index.json").is_file():
        random_sd3.save(name, folder, ["transformer", "vae"])
        for resolution in SIZES_PX:
            fabricate_stage_one(folder, resolution)
    return folder


def with_encoders(models: Path, name: str, encoders: str) -> Path:
    """The same model with text encoders of full size, made now if they are not there.

    Args:
        models: folder of the models.
        name: of the model.
        encoders: "text" for all three, "clips" for the two whose LoRA can be trained.
    """
    folder = models / f"{name}-with-{encoders}"
    if not (folder / "model_index.json").is_file():
        folder.mkdir(exist_ok=True)
        for component in ("transformer", "vae"):
            link = folder / component
            link.unlink(missing_ok=True)
            link.symlink_to((model_folder(models, name) / component).resolve(), target_is_directory=True)
        random_sd3.save(name, folder, [encoders])
    return folder


def is_asked(only: Sequence[str] | None, *words: str) -> bool:
    """Whether a row is wanted whose name and flags these are: one of `only` is in them, or there is none."""
    return not only or any(part in " ".join(words) for part in only)


def fabricate_stage_one(model: Path, resolution: int, *sizes: PictureSize, masked: bool = False) -> tuple[Path, Path]:
    """An embeddings file and a latent cache of random tensors in the sizes of the real ones.

    Args:
        model: whose widths they have.
        resolution: of the cache, in pixels.
        sizes: of the pictures' crops, in turn; squares of the resolution by default.
        masked: whether each has a mask: its left half.
    """
    files = ModelFiles(ModelConfig(pretrained_model_name_or_path=str(model)))
    config = files.read_config("transformer")
    name = "-".join(["latents", *map(str, sizes or [resolution]), *(["masked"] if masked else [])])
    embeddings, latents = model / "embeddings.parquet", model / name
    images = [InstanceImage(f"{index:064x}", Path(f"{index}.png"), PROMPT) for index in range(PICTURES)]
    if not embeddings.is_file():
        generator = torch.Generator().manual_seed(0)
        rows = [
            PromptEmbedding(
                prompt,
                roles,
                tuple(image.image_id for image in images) if prompt == PROMPT else (),
                torch.randn(154, config["joint_attention_dim"], generator=generator).half(),
                torch.randn(config["pooled_projection_dim"], generator=generator).half(),
            )
            for prompt, roles in PROMPTS.items()
        ]
        write_embeddings(embeddings, files.provenance(TEXT_COMPONENTS, "fp16", 77), rows)
    if not latents.is_dir():
        latents.mkdir()
        cache = LatentCache(latents, files.provenance(["vae"], "fp32", resolution), "white")
        for image, size in zip(images, itertools.cycle(sizes or [PictureSize.square(resolution)]), strict=False):
            box = crop_boxes(size.width, size.height, size, 1, False)[0]
            shape = (config["in_channels"], *size.latent(8))
            mean, std, mask = torch.randn(shape), torch.rand(shape) / 10, torch.zeros(1, *shape[1:]).half()
            mask[..., : shape[-1] // 2] = 1
            masks = [LatentMask(box.name, mask, "fabricated")] if masked else []
            posterior = LatentPosterior(image.image_id, box.name, mean, std)
            cache.add(image, (size.width, size.height), [posterior], masks=masks)
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


def call(case: Case, model: Path, words: Sequence[object], device: str) -> dict[str, Any]:
    """Runs the script; what a row says of a refusal, empty where there was none."""
    words = ["--pretrained_model_name_or_path", model, "--device", device, *words, *case.flags]
    body = in_processes(script_of(case).run) if case.script in (EMBED, LATENTS) else script_of(case).run
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            body([str(word) for word in words])
        except (UserError, torch.OutOfMemoryError) as error:
            return refusal(error)
    return {}


def refusal(error: Exception) -> dict[str, Any]:
    """What a row says of it: the sentence for people, and the budget that would do where one was too small."""
    needed = {"needed_gib": error.needed_gib} if isinstance(error, BudgetTooSmall) else {}
    return {"failed": f"error: {error}", **needed}


def script_of(case: Case) -> Any:
    """The script's module."""
    return importlib.import_module(case.script.removesuffix(".py"))


def training_words(case: Case) -> list[object]:
    """The training script's flags that decide its memory."""
    words: list[object] = ["--resolution", case.resolution, "--train_batch_size", case.batch, "--rank", case.rank]
    return [*words, *(["--use_8bit_adam"] if case.use_8bit_adam else [])]


def words_of(case: Case, models: Path, model: Path, output: Path) -> list[object]:
    """The script's flags: stage one's fabricated files or pictures in, `output` out."""
    if case.script == EMBED:
        words = ["--instance_data_dir", noise_picture(models, 512), "--instance_prompt", PROMPT]
        more = [f"--validation_prompt={PROMPT}, picture {index}" for index in range(1, case.batch)]
        return [*words, *more, "--output_path", output / "run.parquet"]
    if case.script == LATENTS:
        words = ["--instance_data_dir", noise_picture(models, case.resolution), "--instance_prompt", PROMPT]
        return [*words, "--resolution", case.resolution, "--output_path", output]
    embeddings, latents = fabricate_stage_one(model, case.resolution)
    if case.script == DRAW:
        lora = ["--lora", trained_folder(models)] if case.with_lora else []
        size = ["--height", case.resolution, "--width", case.resolution]
        return ["--data_df_path", embeddings, "--prompt", PROMPT, "--outdir", output, *size, *lora]
    words = [*training_words(case), "--data_df_path", embeddings, "--latents_path", latents, "--seed", 0]
    return [*words, "--output_dir", output, "--max_train_steps", case.steps, "--report_to", "none"]


def trained_folder(models: Path) -> Path:
    """Where this process' last LoRA is."""
    return models / f"lora-{os.getpid()}"


def plan_case(case: Case, model: Path, device: str) -> dict[str, Any]:
    """What is planned for 16-bit training."""
    script = script_of(case)
    words = ["--pretrained_model_name_or_path", model, "--device", device, "--mixed_precision", "bf16"]
    words += [*training_words(case), *case.flags]
    flags = TrainingFlags(*script.COMMAND_LINE.parse([str(word) for word in words]))
    gpu, files = choose_device(device), ModelFiles(flags.model)
    dtype = choose_training_dtype(flags.run.mixed_precision, planned_device(device, gpu, True)).dtype
    try:
        task = script.training_task(flags, files, Buckets.square(case.resolution), dtype, gpu, processes=1)
        plan = script.make_plan(task, open_budget(flags.budget, gpu))
    except UserError as error:
        return {**asdict(case), **refusal(error)}
    row = {**asdict(case), "placement": placement_of(asdict(plan.placement))}
    return row | {"predicted_gib": round(plan.forecast.peak_bytes / GIB, 2)}


@contextlib.contextmanager
def weights_beside(components: Sequence[str], device: str) -> Iterator[dict[str, float]]:
    """Float32 weights on the device, of the sizes of the components'; GiB of each."""
    with torch.device("meta"):
        shapes = {name: [p.shape for p in random_sd3.make(name).parameters()] for name in components}
    held = [
        torch.ones(shape, dtype=torch.float32, device=choose_device(device))  # zeros would be no memory on a host
        for found in shapes.values()
        for shape in found
    ]
    yield {name: round(sum(4 * shape.numel() for shape in found) / GIB, 3) for name, found in shapes.items()}
    held.clear()


@contextlib.contextmanager
def step_times(case: Case) -> Iterator[list[float]]:
    """When each optimizer step was over, in seconds; the device is waited for."""
    times: list[float] = []
    if case.script != TRAIN:
        yield times
        return
    take_step = script_of(case).optimizer_step

    def timed(*words: Any) -> Any:
        result = take_step(*words)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return result

    with mock.patch.object(script_of(case), "optimizer_step", timed):
        yield times


def run_case(case: Case, models: Path, device: str, driver_before: int) -> dict[str, Any]:
    """Runs the script once; what it said of its memory and time.

    `driver_before` bytes were in use when this process began.
    """
    if "--plan" in case.flags:
        return plan_case(case, hollow_model(models, case.model), device)
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)  # the last row's cap
        drop_workspaces(choose_device(device))  # one for each stream of the last row
    if case.script == EMBED:
        model = with_encoders(models, case.model, "text")
    else:
        trains_clips = "--train_text_encoder" in case.flags
        model = with_encoders(models, case.model, "clips") if trains_clips else model_folder(models, case.model)
    output = trained_folder(models) if case.script == TRAIN else models / f"output-{os.getpid()}"
    shutil.rmtree(output, ignore_errors=True)
    if case.script == EMBED:
        output.mkdir()
    words = words_of(case, models, model, output)
    free_memory(choose_device(device))  # what the last row left in the allocator's cache would be counted
    start = time.perf_counter()
    with contextlib.ExitStack() as held:
        beside_gib = held.enter_context(weights_beside(case.beside, device))
        times = held.enter_context(step_times(case))
        sampler = held.enter_context(PeakSampler(lambda: driver_bytes(0) or 0, interval_s=0.1))
        refused = call(case, model, words, device)
    row: dict[str, Any] = {**asdict(case), "elapsed_s": round(time.perf_counter() - start, 1)}
    if refused:
        return row | refused
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    plan = record["plan"]
    placed = {name: value for name, value in plan.items() if name != "host_bytes"}
    row |= {"placement": placement_of(placed)} if case.script in (TRAIN, DRAW) else {"settings": placed}
    row["parts_gib"] = {name: round(size / GIB, 3) for name, size in record["predicted_parts"].items()}
    row["predicted_gib"] = round(record["predicted_bytes"] / GIB, 3)
    row |= {"beside_gib": beside_gib} if beside_gib else {}
    if case.streamed:
        gpu = choose_device(device)
        row["link_gb_per_s"] = round(bytes_a_second(gpu) / 1e9, 1) if gpu.type == "cuda" else None
        row["flops_a_byte"] = round(measure_flops_a_byte(gpu, torch.float16))
    row["measured_gib"] = round(record["measured_bytes"] / GIB, 3)
    row["driver_gib"] = round((sampler.peak - driver_before) / GIB, 3)
    stages = record["stages"]
    row["allocated_gib"] = {stage["name"]: round(stage["peak_device_gib"], 3) for stage in stages}
    row["reserved_gib"] = {stage["name"]: round(stage["peak_reserved_gib"], 3) for stage in stages}
    row["host_gib"] = round(max(stage["peak_host_gib"] for stage in stages), 2)
    row["stage_s"] = {stage["name"]: round(stage["elapsed_s"], 2) for stage in stages}
    if case.script == TRAIN:
        row |= {"execution": record["execution"], "ms_a_step": round(record["ms_a_step"])}
    if len(times) > 2:
        row["step_ms"] = round(1000 * statistics.median(after - before for before, after in pairwise(times)), 1)
    return row


def run_until_it_fits(case: Case, run: Callable[[Case], dict[str, Any]]) -> dict[str, Any]:
    """Runs the case: where it may be made to fit (`largest`, `smallest`), what was refused before is in the row."""
    refused: list[str] = []
    sizes = sorted(SIZES_PX, reverse=True) if case.largest else [case.resolution]
    for size in sizes:
        row = run(replace(case, resolution=size))
        if "needed_gib" not in row:
            break
        refused.append(row["failed"])
    needed_gib = row.get("needed_gib") if case.smallest else None
    if needed_gib:
        refused = [row["failed"]]
        flags = list(case.flags)
        flags[flags.index("--vram_budget_gib") + 1] = needed_gib
        row = run(replace(case, flags=tuple(flags)))
    return row | ({"refused": refused} if refused else {})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 1 where a row failed, other than by a script's own refusal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--models", type=Path, required=True, help="Where the random models are, or are made.")
    parser.add_argument("--part", default="0/1", help="Every N-th row, from the K-th: K/N, for several GPUs.")
    parser.add_argument("--only", nargs="+", help="Only rows with one of these in their names or flags: compile.")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="Begin no row after so many seconds.")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--result", type=Path, help="JSON file to write; {set} in its name gives each set one.")
    arguments = parser.parse_args(argv)
    first, count = map(int, arguments.part.split("/"))
    start = time.perf_counter()
    results: dict[Path | None, list[dict[str, Any]]] = {}
    arguments.models.mkdir(parents=True, exist_ok=True)
    driver_before = driver_bytes(0) or 0
    open_budget(BudgetConfig(), choose_device(arguments.device))  # CUDA's own memory, measured while it is alone
    cases = [(name, case) for name in arguments.sets for case in SETS[name]()]
    cases = [(name, case) for name, case in cases if is_asked(arguments.only, case.name, *case.flags)]
    for name, case in cases[first::count]:
        if time.perf_counter() - start > arguments.stop_after:
            print(f"stopped before {case.name} of {case.model}", flush=True)
            break
        try:
            row = run_until_it_fits(case, lambda c: run_case(c, arguments.models, arguments.device, driver_before))
        except Exception as error:  # the other rows are worth having
            traceback.print_exc()
            row = {**asdict(case), "failed": f"{type(error).__name__}: {error}"}
        path = arguments.result and Path(str(arguments.result).replace("{set}", name))
        rows = results.setdefault(path, [])
        rows.append({"set": name, **row})
        shown = (
            "name",
            "model",
            "resolution",
            "batch",
            "rank",
            "placement",
            "predicted_gib",
            "measured_gib",
            "driver_gib",
        )
        shown += ("host_gib", "step_ms", "execution", "failed", "elapsed_s")
        print({key: row[key] for key in shown if row.get(key) is not None}, flush=True)
        if path:
            result = {**circumstances(choose_device(arguments.device), (*VERSIONS, "bitsandbytes")), "rows": rows}
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failures = [row["failed"] for rows in results.values() for row in rows if "failed" in row]
    return int(any(not failure.startswith("error: ") for failure in failures))


if __name__ == "__main__":
    sys.exit(main())
