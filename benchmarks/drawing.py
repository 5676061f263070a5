"""Pictures a second: inference.py in each of its ways beside diffusers' own pipeline, on the same files and GPU.

Embeddings are given and a random LoRA is attached. `s_a_picture` is of all batches after the first, written as PNG;
`ours` of a row with the weights on the device is what a long run reaches, without loading and compiling. The last rows
are processes of their own: from their start to the first PNG, beside the pipeline with model offload.

    python benchmarks/drawing.py --models /tmp/models --result FILE

The model is made in `--models` where it is not there. The result is written after each row.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import inference
from sd3_lora.common.config import BudgetConfig, ModelConfig
from sd3_lora.common.defaults import PROJECT_FOLDER
from sd3_lora.common.devices import choose_device
from sd3_lora.common.memory import GIB, drop_workspaces, free_memory
from sd3_lora.common.model_files import MINIATURE, TEXT_COMPONENTS, ModelFiles
from sd3_lora.common.records import PromptEmbedding
from sd3_lora.drawing.sampling import Decoder
from sd3_lora.gpu.budget import open_budget
from sd3_lora.stage_one.embedding_store import EmbeddingStore, write_embeddings
from sd3_lora.transformer.lora import target_modules

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from evaluate import VERSIONS, circumstances
from memory import is_asked, model_folder
from PIL import Image
from pipeline import run_process
from safetensors.torch import save_file

PROMPTS = [f"a photo of sks dog, number {number}" for number in range(20)]
RANK, STOCK, OFFLOAD = 16, "diffusers' pipeline", "diffusers' pipeline, model offload"
# How much a LoRA changes the weights: ‖B A‖ / ‖W‖, about that of a subject's after training.
STRENGTH = 0.05


@dataclass(frozen=True)
class Case:
    """One way to draw.

    Attributes:
        name: of the row.
        size: of the pictures, in pixels.
        batch: pictures at a time; None for the plan's choice.
        flags: more of inference.py's.
        same_as: the row with whose pictures these are compared.
    """

    name: str
    size: int
    batch: int | None
    flags: tuple[str, ...] = ()
    same_as: str | None = None

    @property
    def key(self) -> str:
        """By which other rows name it."""
        return f"{self.name}, {self.size} px"

    @property
    def is_process(self) -> bool:
        """Whether it is measured from a process' start."""
        return self.name.endswith("first PNG")


PLAIN = ("--unmerged", "--compile", "off", "--capture", "off")
CAPTURED, COMPILED = ("--compile", "off", "--capture", "on"), ("--compile", "on", "--capture", "on")


def cases(sizes: Sequence[int]) -> list[Case]:
    """All rows, the most important first."""
    large, small = sizes
    exact = (*PLAIN[:3], "--capture", "on")
    return [
        Case(STOCK, large, 4),
        Case("compiled", large, None, COMPILED, "captured"),
        Case(STOCK, small, 1),
        Case("compiled", small, None, COMPILED, "captured"),
        Case(STOCK, small, 4),
        Case("streamed within 2.6 GiB", large, None, ("--vram_budget_gib", "2.6")),
        Case(f"{OFFLOAD}: first PNG", large, 1),
        Case("first PNG", large, None),
        Case("captured", large, None, CAPTURED, "unmerged"),
        Case("unmerged", large, None, exact),
        Case("compiled, cuDNN's attention", large, None, (*COMPILED, "--attention_kernel", "cudnn"), "compiled"),
        Case(STOCK, large, 1),
        Case("captured", small, None, CAPTURED, "unmerged"),
        Case("unmerged", small, None, exact),
        Case("one at a time, compiled", large, 1, COMPILED, "compiled"),
        Case("one at a time, captured", small, 1, CAPTURED, "captured"),
        Case("one at a time, plain, unmerged", large, 1, PLAIN, "unmerged"),
        Case("one at a time, plain, unmerged", small, 1, PLAIN, "unmerged"),
    ]


def embeddings_of(model: Path) -> Path:
    """A file of random embeddings for all prompts, made now if it is not there."""
    path, files = model / "drawing.parquet", ModelFiles(ModelConfig(pretrained_model_name_or_path=str(model)))
    if not path.is_file():
        config, generator = files.read_config("transformer"), torch.Generator().manual_seed(0)
        rows = [
            PromptEmbedding(
                prompt,
                ("validation",) if prompt else ("negative", "empty"),
                (),
                torch.randn(154, config["joint_attention_dim"], generator=generator).half(),
                torch.randn(config["pooled_projection_dim"], generator=generator).half(),
            )
            for prompt in (*PROMPTS, "")
        ]
        write_embeddings(path, files.provenance(TEXT_COMPONENTS, "fp16", 77), rows)
    return path


def lora_of(model: Path) -> Path:
    """A random LoRA of `STRENGTH`, made now if it is not there."""
    folder = model / "random-lora"
    if not folder.is_dir():
        with torch.device("meta"):
            transformer = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(model / "transformer"))
        generator, tensors = torch.Generator().manual_seed(0), {}
        for name in target_modules(transformer, None, None):
            rows, columns = transformer.get_submodule(name).weight.shape
            down = torch.randn(RANK, columns, generator=generator) / columns**0.5
            # W is uniform in ±1/√columns; an entry of B A is √(rank / columns) of one of B.
            up = torch.randn(rows, RANK, generator=generator) * STRENGTH / (3 * RANK) ** 0.5
            tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        folder.mkdir()
        save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"format": "pt"})
    return folder


class Stopwatch:
    """When each batch was done, and how many pictures it had."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, int]] = []
        self.decoded: list[float] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it batches and decoded pictures are noted."""
        denoise, decode = inference.Sampler.denoise, Decoder.decode

        def timed(sampler: Any, noise: torch.Tensor, *rest: Any) -> torch.Tensor:
            latents = denoise(sampler, noise, *rest)
            self.batches.append((time.perf_counter(), len(noise)))
            return latents

        def timed_decode(decoder: Any, plans: Any, latents: Any) -> None:
            decode(decoder, plans, latents)
            self.decoded.append(time.perf_counter())

        with mock.patch.object(inference.Sampler, "denoise", timed), mock.patch.object(Decoder, "decode", timed_decode):
            yield

    def s_a_picture(self) -> float:
        """Seconds of a picture, the first batch left out: of denoising, and of decoding where that comes after."""
        start, end = self.batches[0][0], self.batches[-1][0]
        seconds = (end - start) / sum(count for _, count in self.batches[1:])
        is_after = self.decoded[0] > end and len(self.decoded) > 1
        return seconds + ((self.decoded[-1] - self.decoded[0]) / (len(self.decoded) - 1) if is_after else 0.0)


@dataclass(frozen=True)
class Work:
    """What all rows share."""

    model: Path
    lora: Path
    embeddings: Path
    output: Path
    steps: int
    pictures: int
    device: torch.device

    def words(self, case: Case, output: Path) -> list[object]:
        """The flags of inference.py."""
        # Of smaller pictures more are drawn at a time.
        prompts = 1 if case.is_process else max(3, -(-self.pictures // 4)) * (2 if case.size == 512 else 1)
        words: list[object] = ["--pretrained_model_name_or_path", self.model, "--lora", self.lora, "--outdir", output]
        words += [word for prompt in PROMPTS[:prompts] for word in ("--prompt", prompt)]
        words += ["--num_images", 1 if case.is_process else 4, "--num_steps", self.steps]
        words += ["--data_df_path", self.embeddings, "--max_sequence_length", 77, "--device", self.device.type]
        words += ["--height", case.size, "--width", case.size, *case.flags]
        words += ["--batch_size", case.batch] if case.batch else []
        return [*words, "--mixed_precision", "fp16", "--vae_precision", "fp16"] if self.is_gpu else words

    @property
    def is_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"


def run_ours(case: Case, work: Work) -> dict[str, Any]:
    """Draws with inference.py, in this process."""
    output, watch = work.output / case.key.replace(" ", "-"), Stopwatch()
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    with watch.watching(), contextlib.redirect_stdout(io.StringIO()):
        inference.run([str(word) for word in work.words(case, output)])
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    stages = [stage for stage in record["stages"] if stage["name"].startswith(("denoise", "decode"))]
    return {
        "s_a_picture": round(watch.s_a_picture(), 4),
        "pictures_at_a_time": max(count for _, count in watch.batches),
        "pictures": sum(count for _, count in watch.batches),
        "first_batch_s": round(watch.batches[0][0] - start, 2),
        "elapsed_s": round(time.perf_counter() - start, 1),
        "allocated_gib": round(max(stage["peak_device_gib"] for stage in stages), 2),
        "reserved_gib": round(max(stage["peak_reserved_gib"] for stage in stages), 2),
        "predicted_gib": round(record.get("predicted_bytes", 0) / GIB, 2),
        "measured_gib": round(record.get("measured_bytes", 0) / GIB, 2),
        "execution": record.get("execution"),
        "plan": {key: value for key, value in record["plan"].items() if key in ("merged", "streamed", "buffers")},
    }


def embeds(work: Work, prompts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """What the pipeline is given for each prompt."""
    with EmbeddingStore(work.embeddings) as store:
        rows = {row.prompt: row for row in store.read_all([*prompts, ""])}

    def of(prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        row, dtype = rows[prompt], torch.float16 if work.is_gpu else torch.float32
        return row.prompt_embeds[None].to(work.device, dtype), row.pooled_prompt_embeds[None].to(work.device, dtype)

    names = ("prompt_embeds", "pooled_prompt_embeds")
    negative = dict(zip((f"negative_{name}" for name in names), of(""), strict=True))
    return [{**dict(zip(names, of(prompt), strict=True)), **negative} for prompt in prompts]


def run_stock(case: Case, work: Work, pipeline: Any) -> dict[str, Any]:
    """Draws with diffusers' pipeline, resident; each picture is saved as its documentation has it."""
    prompts = max(2, -(-(work.pictures if case.batch != 1 else 4) // (case.batch or 1)))
    output = work.output / case.key.replace(" ", "-")
    output.mkdir(parents=True, exist_ok=True)
    drawn, saving = 0, 0.0
    given = embeds(work, PROMPTS[:prompts])
    if work.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    for number, one in enumerate([given[0], *given]):  # the first to warm up
        if number == 1:
            start, drawn = time.perf_counter(), 0
        pictures = pipeline(
            **{name: each.repeat(case.batch or 1, *[1] * (each.dim() - 1)) for name, each in one.items()},
            num_inference_steps=work.steps if number else 2,
            guidance_scale=7.0,
            height=case.size,
            width=case.size,
            generator=torch.Generator().manual_seed(0),
        ).images
        before = time.perf_counter()
        for picture in pictures:
            picture.save(output / f"{number:02d}-{drawn:02d}.png")
            drawn += 1
        saving += time.perf_counter() - before if number else 0.0
    elapsed = time.perf_counter() - start
    row = {"s_a_picture": round(elapsed / drawn, 4), "pictures_at_a_time": case.batch, "pictures": drawn}
    row |= {"of_it_saving_s": round(saving / drawn, 4)}
    if work.is_gpu:
        row["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    return row


@contextlib.contextmanager
def stock_pipeline(work: Work) -> Iterator[Any]:
    """The pipeline without its text encoders, resident, the LoRA attached."""
    nothing = dict.fromkeys([*TEXT_COMPONENTS, "text_encoder", "text_encoder_2", "text_encoder_3"])
    dtype = torch.float16 if work.is_gpu else torch.float32
    pipeline = StableDiffusion3Pipeline.from_pretrained(work.model, torch_dtype=dtype, **nothing).to(work.device)
    pipeline.load_lora_weights(work.lora)
    pipeline.set_progress_bar_config(disable=True)
    yield pipeline
    pipeline.maybe_free_model_hooks()
    del pipeline
    gc.collect()
    free_memory(work.device)


def run_first(case: Case, work: Work) -> dict[str, Any]:
    """From a process' start to its first PNG."""
    output = work.output / case.key.replace(" ", "-").replace(":", "")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    words = [PROJECT_FOLDER / "inference.py", *work.words(case, output)]
    if case.name.startswith(OFFLOAD):
        given = output / "embeds.safetensors"
        save_file({name: each.cpu().contiguous() for name, each in embeds(work, PROMPTS[:1])[0].items()}, given)
        words = [Path(__file__).parent / "stock_picture.py", "--model", work.model, "--steps", work.steps]
        words += ["--size", case.size, "--device", work.device.type, "--output_path", output / "stock.png"]
        words += ["--embeds", given, "--lora", work.lora]
    seconds, rows = [], []
    for _ in range(2):  # the first has what it imports and reads in the page cache
        for path in output.rglob("*.png"):
            path.unlink()
        start = time.time()
        took, finished = run_process(words)
        pictures = sorted(output.rglob("*.png"), key=lambda path: path.stat().st_mtime)
        if "failed" in took or not pictures:
            return {**took, "failed": finished.stderr.strip().splitlines()[-3:]}
        seconds.append(round(pictures[0].stat().st_mtime - start, 2))
        rows.append(took)
    return {"first_png_s": min(seconds), "each_s": seconds, **rows[-1]}


def difference(case: Case, work: Work) -> dict[str, float]:
    """How far the pictures are from those of the row that they are compared with, in shares of the full range."""
    other = work.output / Case(case.same_as or "", case.size, None).key.replace(" ", "-")
    folder = work.output / case.key.replace(" ", "-")
    off: list[float] = []
    for path in sorted(folder.glob("*/img_*.png")):
        with contextlib.suppress(FileNotFoundError):
            pair = [np.asarray(Image.open(root / path.relative_to(folder))).astype(float) for root in (folder, other)]
            off.append(float(np.abs(pair[0] - pair[1]).mean()))
    # In 1/255: the mean of a picture's pixels, and of the worst picture.
    return {"mean_off_by": round(sum(off) / len(off), 4), "worst_off_by": round(max(off), 4)} if off else {}


def miniature_difference(work: Work) -> dict[str, Any]:
    """Merged and unmerged on the miniature, whose weights are trained: in float16 on a GPU."""
    model = work.output / "miniature"
    if not model.is_dir():
        shutil.copytree(MINIATURE, model, ignore=shutil.ignore_patterns("*.py", "judge*"))
    small = Work(model, lora_of(model), embeddings_of(model), work.output / "small", work.steps, 8, work.device)
    size = 128
    pair = [Case("merged", size, 4, CAPTURED, "beside"), Case("beside", size, 4, ("--unmerged", *CAPTURED))]
    for case in pair:
        run_ours(case, small)
    return difference(pair[0], small)


def measure(case: Case, work: Work) -> dict[str, Any]:
    """A row."""
    row = {key: value for key, value in asdict(case).items() if value not in (None, ())}
    try:
        if case.is_process:
            return row | run_first(case, work)
        if work.is_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)  # the last row's cap
            drop_workspaces(work.device)
        free_memory(work.device)
        if case.name == STOCK:
            with stock_pipeline(work) as pipeline:
                return row | run_stock(case, work, pipeline)
        return row | run_ours(case, work)
    except Exception as error:  # the other rows are worth having
        traceback.print_exc()
        return row | {"failed": f"{type(error).__name__}: {error}"}


def compare(rows: Sequence[dict[str, Any]], all_cases: Sequence[Case], work: Work) -> None:
    """Adds how far pictures are off, once both rows are there."""
    for row in rows:
        case = next((case for case in all_cases if (case.name, case.size) == (row["name"], row["size"])), None)
        if case and case.same_as and "mean_off_by" not in row:
            row |= difference(case, work)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code: 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="Where the random model is, or is made.")
    parser.add_argument("--model", type=Path, help="Another model's folder; it gets embeddings and a LoRA.")
    parser.add_argument("--sizes", type=int, nargs=2, default=[1024, 512], help="Height and width in pixels.")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=12, help="Of a row, of which the first batch warms up.")
    parser.add_argument("--only", nargs="+", help="Only rows with one of these in their names.")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="Begin no row after so many seconds.")
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    flags = parser.parse_args(argv)
    start, device = time.perf_counter(), choose_device(flags.device)
    open_budget(BudgetConfig(), device)  # CUDA's own memory, measured while it is alone
    flags.models.mkdir(parents=True, exist_ok=True)
    model = flags.model or model_folder(flags.models, "sd3-medium")
    free_memory(device)
    output = flags.models / "drawn"
    work = Work(model, lora_of(model), embeddings_of(model), output, flags.steps, flags.pictures, device)
    wanted = [case for case in cases(flags.sizes) if is_asked(flags.only, case.name)]
    rows: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}

    def save() -> None:
        compare(rows, wanted, work)
        result = {
            **circumstances(device, (*VERSIONS, "bitsandbytes")),
            "steps": flags.steps,
            "lora_rank": RANK,
            **extra,
            "rows": rows,
        }
        if flags.result:
            flags.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for case in wanted:
        if time.perf_counter() - start > flags.stop_after:
            print(f"stopped before {case.key}", flush=True)
            break
        rows.append(measure(case, work))
        save()
        print(f"{time.perf_counter() - start:.0f} s", rows[-1], flush=True)
    if time.perf_counter() - start < flags.stop_after and not flags.only:
        extra["miniature"] = miniature_difference(work)
        save()
        print(extra, flush=True)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
