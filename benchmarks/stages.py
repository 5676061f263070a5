"""Stage one's throughput beside the reference's way of doing the same, in one process on one GPU; and the whole job.

The reference's way is one item at a time: a picture is decoded, resized and encoded by a VAE in float32, as diffusers'
sd3_lora_colab script does whenever it needs it; a prompt goes through `encode_prompt` of a stock pipeline that holds
all encoders. It is measured on the first `--reference_items`, and its time for more is its load and so many times more.
The scripts' times are of their whole `main`, what they load and write included, the libraries' import not.

    python benchmarks/random_sd3.py sd3-medium /tmp/sd3-medium
    python benchmarks/stages.py encoders latents text job --model /tmp/sd3-medium --peer ../diffusers --result FILE
    git worktree add ../before COMMIT
    python benchmarks/stages.py job --before ../before --model /tmp/sd3-medium --result FILE
    sudo python benchmarks/stages.py job --cold --before ../before --model /tmp/sd3-medium --result FILE
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
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from precompute_latents import MOST_THREADS, LatentConfig, decode
from sd3_lora.common.defaults import PROJECT_FOLDER
from sd3_lora.common.devices import choose_device, cpu_cores
from sd3_lora.common.memory import GIB, free_memory
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.image_files import hash_file

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from evaluate import VERSIONS, circumstances
from photos import fabricate_photos
from PIL import Image, ImageOps
from pipeline import measure, run_process
from safetensors.torch import load_file
from step import REFERENCE
from transformers import BitsAndBytesConfig, T5EncoderModel
from transformers.utils import logging as transformers_logging
from vae_rows import Pair, Row, decoder_rows, distance, encoder_rows, load_vae, timed

PROMPT, SEQUENCE_LENGTH, STEPS, ACCUMULATION = "a photo of sks dog", 77, 500, 4


def call(script: str, words: Sequence[object]) -> float:
    """Runs a script in this process; its seconds.

    Raises:
        RuntimeError: it failed, with its last line.
    """
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)  # what an earlier call was capped at
    out, err = io.StringIO(), io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(script).main([str(word) for word in words])
    if code:
        raise RuntimeError(err.getvalue().strip().splitlines()[-1])
    return time.perf_counter() - start


# Pictures to latents


@torch.no_grad()
def reference_latents(paths: Sequence[Path], vae: AutoencoderKL, side: int) -> list[Pair]:
    """Pictures from their files to their posteriors on the host, everything after the other."""
    pairs = []
    for path in paths:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        scale = side / min(picture.size)
        width, height = (round(scale * length) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)  # as ours is, which is compared
        left, top = (width - side) // 2, (height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        posterior = vae.encode(pixels.to(vae.device)).latent_dist
        pairs.append((posterior.mean[0].cpu(), posterior.std[0].cpu()))
    return pairs


def decode_ms(photos: Sequence[Path], side: int, threads: int) -> float:
    """Milliseconds a photo to decode, resize and crop some, in so many threads."""

    def one(path: Path) -> None:
        decode(InstanceImage("", path, ""), LatentConfig(center_crop=True), Buckets.square(side), ())

    few = (list(photos) * 4)[: 4 * threads]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, few[:threads]))
        start = time.perf_counter()
        list(pool.map(one, few))
        return round(1000 * (time.perf_counter() - start) / len(few), 2)


def cache_latents(arguments: argparse.Namespace, photos: Sequence[Path], precision: str) -> tuple[Row, Path]:
    """Runs the script on the photos, one crop each; its times, and the cache."""
    pictures, output = arguments.output_dir / "pictures", arguments.output_dir / "latents"
    for folder in (pictures, output):
        shutil.rmtree(folder, ignore_errors=True)
    pictures.mkdir()
    for path in photos:
        (pictures / path.name).hardlink_to(path)
    words = ["--pretrained_model_name_or_path", arguments.model, "--instance_data_dir", pictures, "--center_crop"]
    words += ["--resolution", arguments.resolution, "--vae_precision", precision, "--output_path", output]
    elapsed_s = call("precompute_latents", [*words, "--device", arguments.device.type])
    (stage,) = json.loads((output / "run.json").read_text(encoding="utf-8"))["stages"]
    row: Row = {"name": precision, "items": len(photos), "elapsed_s": round(elapsed_s, 2)}
    row |= {"encode_s": round(stage["elapsed_s"], 2), "ms_an_item": round(1000 * elapsed_s / len(photos), 1)}
    return row | {"reserved_gib": round(stage["peak_reserved_gib"], 2)}, output


def cached(folder: Path, photo: Path) -> Pair:
    """The one posterior of a photo."""
    (mean, std) = (tensor for _, tensor in sorted(load_file(folder / f"{hash_file(photo)}.safetensors").items()))
    return mean, std


def latent_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Caching so many photos of each size, one crop each, in each precision, beside the reference's way."""
    device, side = arguments.device, arguments.resolution
    for size in arguments.sizes:
        photos = fabricate_photos(arguments.output_dir / f"{size[0]}x{size[1]}", max(arguments.items), size)
        megabytes = sum(path.stat().st_size for path in photos) / len(photos) / 1e6
        shared: Row = {"set": "latents", "photo_px": list(size), "photo_mb": round(megabytes, 2), "resolution": side}
        vae, load_s = timed(device, load_vae, arguments, torch.float32)
        few = photos[: arguments.reference_items]
        reference_latents(few[:1], vae, side)  # the kernels are loaded
        expected, few_s = timed(device, reference_latents, few, vae, side)
        del vae
        free_memory(device)
        each_s = few_s / len(few)
        row: Row = {"name": "reference", "items": len(few), "load_s": round(load_s, 2)}
        row |= {"ms_an_item": round(1000 * each_s, 1), "decode_ms": decode_ms(photos, side, 1)}
        yield shared | row | {"decode_in_threads_ms": decode_ms(photos, side, min(MOST_THREADS, cpu_cores()))}
        for precision, count in itertools.product(arguments.vae_precisions, arguments.items):
            row, folder = cache_latents(arguments, photos[:count], precision)
            found = [cached(folder, path) for path in few[:count]]
            row |= compared(load_s + count * each_s, row["elapsed_s"])
            yield shared | row | distance(found, expected[:count], ("mean", "std"))


def compared(reference_s: float, elapsed_s: float) -> Row:
    """The reference's time for the same, and how many times as long it is."""
    return {"reference_s": round(reference_s, 2), "ratio": round(reference_s / elapsed_s, 2)}


# Prompts to embeddings


def captions(count: int) -> list[str]:
    """Distinct captions, each of more than 77 tokens, as a captioning model writes them."""
    words = "a photo of sks dog lying on a wooden floor beside a window in the soft light of a late summer afternoon"
    return [f"number {index}: {' and '.join([words] * 4)}" for index in range(count)]


def load_reference_pipeline(arguments: argparse.Namespace) -> StableDiffusion3Pipeline:
    """The stock pipeline with its three encoders, T5 in 8 bits as the reference has it."""
    t5 = T5EncoderModel.from_pretrained(
        arguments.model,
        subfolder="text_encoder_3",
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": arguments.device},
        dtype=torch.float16,
    )
    dtype = torch.float16 if arguments.device.type == "cuda" else torch.float32
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        arguments.model, text_encoder_3=t5, transformer=None, vae=None, torch_dtype=dtype
    )
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.to(arguments.device)
    return pipeline


@torch.no_grad()
def reference_embeddings(
    prompts: Sequence[str], pipeline: StableDiffusion3Pipeline, device: torch.device
) -> list[Pair]:
    """Prompts one after another through all encoders, to the host."""
    pairs = []
    for prompt in prompts:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=SEQUENCE_LENGTH
        )
        pairs.append((embeds[0].cpu(), pooled[0].cpu()))
    return pairs


def embed(arguments: argparse.Namespace, prompts: Sequence[str], flags: Sequence[str]) -> tuple[Row, Path]:
    """Runs the script on the prompts; its times, and the file."""
    pictures, output = arguments.output_dir / "one-photo", arguments.output_dir / "text.parquet"
    fabricate_photos(pictures, 1, (640, 480))
    output.unlink(missing_ok=True)
    prompts_file = arguments.output_dir / "prompts.txt"
    prompts_file.write_text("\n".join(prompts), encoding="utf-8")
    words = ["--pretrained_model_name_or_path", arguments.model, "--instance_data_dir", pictures]
    words += ["--instance_prompt", PROMPT, "--prompts_file", prompts_file, "--output_path", output]
    words += ["--max_sequence_length", SEQUENCE_LENGTH, "--device", arguments.device.type, *flags]
    elapsed_s = call("compute_embeddings", words)
    stages: dict[str, float] = {}
    run = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    for stage in run["stages"]:
        stages[stage["name"]] = round(stages.get(stage["name"], 0) + stage["elapsed_s"], 2)
    row: Row = {"set": "text", "items": len(prompts), "elapsed_s": round(elapsed_s, 2), "stage_s": stages}
    row |= {f"{name}_gib": round(run[f"{name}_bytes"] / GIB, 2) for name in ("predicted", "measured")}
    return row | {"ms_an_item": round(1000 * elapsed_s / len(prompts), 1)}, output


def text_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Embedding so many captions, T5 streamed in 16 bits and resident in 8, beside the reference's way."""
    device = arguments.device
    pipeline, load_s = timed(device, load_reference_pipeline, arguments)
    few = captions(arguments.reference_items)
    reference_embeddings(few[:1], pipeline, device)
    expected, few_s = timed(device, reference_embeddings, few, pipeline, device)
    del pipeline
    free_memory(device)
    each_s = few_s / len(few)
    row: Row = {"set": "text", "name": "reference", "items": len(few), "load_s": round(load_s, 2)}
    yield row | {"ms_an_item": round(1000 * each_s, 1)}
    for precision, count in itertools.product(arguments.t5_precisions, arguments.items):
        flags = ["--t5_precision", precision, *(["--t5_stream"] if precision == "fp16" else [])]
        row, path = embed(arguments, captions(count), flags)
        with EmbeddingStore(path) as store:
            found = [(row.prompt_embeds, row.pooled_prompt_embeds) for row in store.read_all(few[:count])]
        row |= {"name": "fp16, one block at a time" if precision == "fp16" else precision}
        row |= compared(load_s + count * each_s, row["elapsed_s"])
        yield row | distance(found, expected[:count], ("embeds", "pooled"))


# The whole job


WARM = 5  # steps before the clock starts


def job_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Five photos to a LoRA, each script a process of its own: ours, and the reference's with the same settings."""
    out = arguments.output_dir / "job"
    shutil.rmtree(out, ignore_errors=True)
    photos = out / "photos"
    for path in fabricate_photos(photos, 5, arguments.sizes[-1]):
        path.rename(path.with_suffix(".jpeg"))  # the reference looks for no other
    if arguments.before:
        yield from build_rows(arguments, out)
        return
    training = ["--resolution", arguments.resolution, "--mixed_precision", "fp16", "--use_8bit_adam"]
    training += ["--gradient_accumulation_steps", ACCUMULATION, "--train_batch_size", 1, "--seed", 0]
    training += ["--pretrained_model_name_or_path", arguments.model, "--instance_data_dir", photos]
    training += ["--instance_prompt", PROMPT, "--learning_rate", "5e-5", "--lr_scheduler", "constant"]
    jobs = {"ours": our_scripts}
    if arguments.peer:
        jobs["the reference"] = reference_scripts
    found: dict[str, float] = {}
    for whose, scripts in jobs.items():
        rows = []
        for row in scripts(arguments, out, [*training, "--rank", 4, "--lr_warmup_steps", 0]):
            rows.append(row)
            yield {"set": "job", **row, "name": f"{whose}: {row['name']}"}
        if any("failed" in row for row in rows):
            continue
        elapsed_s, last = sum(row["elapsed_s"] for row in rows), rows[-1]
        found[whose] = elapsed_s + (STEPS - last["steps"]) * last["ms_a_step"] / 1000
        row = {"set": "job", "name": f"{whose}: photos to LoRA", "elapsed_s": round(elapsed_s, 1)}
        row["job_s"] = round(found[whose], 1)
        yield row | ({"ratio": round(found[whose] / found["ours"], 2)} if "ours" in found else {})


def our_scripts(arguments: argparse.Namespace, out: Path, training: Sequence[object]) -> Iterator[Row]:
    """Stage one's two scripts and training."""
    device = ["--device", arguments.device.type]
    shared = ["--pretrained_model_name_or_path", arguments.model, "--instance_data_dir", out / "photos", *device]
    embeddings, latents, lora = out / "embeddings.parquet", out / "latents", out / "lora"
    words = [*shared, "--instance_prompt", PROMPT, "--output_path", embeddings]
    yield measure("compute_embeddings", "compute_embeddings.py", words, embeddings.with_suffix(".json"))
    words = [*shared, "--resolution", arguments.resolution, "--output_path", latents]
    yield measure("precompute_latents", "precompute_latents.py", words, latents / "run.json")
    words = [*training, *device, "--data_df_path", embeddings, "--latents_path", latents, "--output_dir", lora]
    words += ["--max_train_steps", arguments.steps, "--report_to", "none"]
    row = measure("training", "train_dreambooth_sd3_lora_miniature.py", words, lora / "run.json")
    if "failed" not in row:
        ms = json.loads((lora / "run.json").read_text(encoding="utf-8"))["ms_a_step"]
        row |= {"steps": arguments.steps, "ms_a_step": round(ms, 1)}
    yield row


def build_rows(arguments: argparse.Namespace, out: Path) -> Iterator[Row]:
    """The README's commands in this build and in one before it, in turns, each with empty caches of compiled kernels.

    Without --cold the first round's imports come from a cold disk, so the builds take the first turn alternately.
    """
    builds = {"before": arguments.before.resolve(), "after": PROJECT_FOLDER}
    totals: dict[str, list[float]] = {name: [] for name in builds}
    for number in range(1, arguments.rounds + 1):
        for name in list(builds)[:: 1 if number % 2 else -1]:
            folder = out / f"{name}-{number}"
            caches = {f"{owner}_CACHE_DIR": str(folder / owner.lower()) for owner in ("TORCHINDUCTOR", "TRITON")}
            rows = []
            for words, report in readme_commands(arguments, out / "photos", folder):
                row: Row = {"set": "job", "name": f"{name}: {words[0]}", "round": number}
                if arguments.cold:
                    drop_page_cache()
                    row["cold"] = True
                    caches["PYTHONPYCACHEPREFIX"] = str(folder / f"bytecode-{words[0]}")
                row |= run_process([builds[name] / str(words[0]), *words[1:]], dict(caches))[0]
                rows.append(row if "failed" in row else row | divided(row["elapsed_s"], report, arguments.steps))
                yield rows[-1]
            if not any("failed" in row for row in rows):
                total = sum(row["elapsed_s"] for row in rows) + (STEPS - arguments.steps) * rows[-1]["ms_a_step"] / 1000
                totals[name].append(round(total, 1))
    if all(totals.values()):
        means = {name: round(sum(values) / len(values), 1) for name, values in totals.items()}
        for name, mean in means.items():
            row = {"set": "job", "name": f"{name}: photos to LoRA", "each_job_s": totals[name], "job_s": mean}
            yield row | {"of_before": round(mean / means["before"], 3)}


def drop_page_cache() -> None:
    """Has Linux forget the files that it read, as if the machine had just been started; only root may."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")


def readme_commands(arguments: argparse.Namespace, photos: Path, out: Path) -> list[tuple[list[object], Path]]:
    """The README's three commands, and where each leaves its `run.json`."""
    shared = ["--pretrained_model_name_or_path", arguments.model, "--instance_data_dir", photos]
    shared += ["--device", arguments.device.type]
    size, embeddings, latents = ["--resolution", arguments.resolution], out / "embeddings.parquet", out / "latents"
    prompts = ["--instance_prompt", PROMPT]
    text = [*shared, *prompts, "--validation_prompt", f"{PROMPT} in a bucket", "--output_path", embeddings]
    training = [*shared, *prompts, *size, "--data_df_path", embeddings, "--latents_path", latents]
    training += ["--gradient_accumulation_steps", ACCUMULATION, "--max_train_steps", arguments.steps, "--seed", 0]
    if arguments.steps < STEPS and arguments.device.type == "cuda":  # so few would not repay the kernels of 500
        training += ["--compile", "on"]
    training += ["--checkpointing_steps", 100, "--resume_from_checkpoint", "latest", "--output_dir", out / "lora"]
    return [
        (["compute_embeddings.py", *text], embeddings.with_suffix(".json")),
        (["precompute_latents.py", *shared, *size, "--output_path", latents], latents / "run.json"),
        (["train_dreambooth_sd3_lora_miniature.py", *training], out / "lora" / "run.json"),
    ]


def divided(elapsed_s: float, report: Path, steps: int) -> Row:
    """Where a script's seconds went: its stages; of training the steps, and what was compiled and captured before the
    first; the rest is starting: imports, the GPU, plans, opening and writing files.
    """
    run = json.loads(report.read_text(encoding="utf-8"))
    stages = {stage["name"]: round(stage["elapsed_s"], 2) for stage in run["stages"]}
    row: Row = {"start_s": round(elapsed_s - sum(stages.values()), 2), "stage_s": stages}
    if run.get("ms_a_step") is not None:
        row |= {"ms_a_step": round(run["ms_a_step"], 1), "steps_s": round(steps * run["ms_a_step"] / 1000, 2)}
        row["compile_s"] = round(stages["train"] - row["steps_s"], 2)
    return row


def reference_scripts(arguments: argparse.Namespace, out: Path, training: Sequence[object]) -> Iterator[Row]:
    """Its embeddings and its training, which encodes its photos with the VAE whenever it needs them."""
    here, script = Path(__file__).parent, arguments.peer / REFERENCE
    embeddings, report = out / "reference.parquet", out / "reference.json"
    words = [here / "reference_embeddings.py", arguments.model, script.with_name("compute_embeddings.py")]
    words += ["--prompt", PROMPT, "--local_data_dir", out / "photos", "--output_path", embeddings]
    yield {"name": "compute_embeddings", **run_process(words)[0]}
    words = [here / "timed_peer.py", "to_the_end", WARM, arguments.peer_steps, report, script, *training]
    words += ["--gradient_checkpointing"]
    words += ["--data_df_path", embeddings, "--output_dir", out / "reference"]
    words += ["--max_train_steps", arguments.peer_steps, "--report_to", "tensorboard"]
    row: Row = {"name": "training", **run_process(words)[0]}
    if "failed" not in row:
        ms = json.loads(report.read_text(encoding="utf-8"))["ms"]
        row |= {"steps": arguments.peer_steps, "ms_a_step": round(ms, 1)}
    yield row


# Several GPUs


def stored(embeddings: Path) -> list[str]:
    """The captions in a file, sorted."""
    with EmbeddingStore(embeddings) as store:
        return sorted(prompt for prompt in store.prompts if prompt.startswith("number "))


def stored_hashes(latents: Path) -> list[str]:
    """Of which photos a cache has files, sorted."""
    return sorted(path.stem for path in latents.glob("*.safetensors"))


def gpu_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Stage one on one GPU and on all, and whether all that was asked for is there, once."""
    out, count = arguments.output_dir / "gpus", max(arguments.items)
    shutil.rmtree(out, ignore_errors=True)
    photos = fabricate_photos(out / "photos", count, arguments.sizes[0])
    hashes, asked = sorted(hash_file(photo) for photo in photos), sorted(captions(count))
    (out / "prompts.txt").write_text("\n".join(asked), encoding="utf-8")
    shared = ["--pretrained_model_name_or_path", arguments.model, "--instance_data_dir", out / "photos"]
    text = [*shared, "--instance_prompt", PROMPT, "--prompts_file", out / "prompts.txt", "--t5_stream"]
    text += ["--t5_precision", "fp16", "--max_sequence_length", SEQUENCE_LENGTH]
    pictures = [*shared, "--resolution", arguments.resolution, "--center_crop", "--vae_precision", "fp16"]
    for processes in (1, max(2, torch.cuda.device_count())):
        latents, embeddings = out / f"latents-{processes}", out / f"text-{processes}.parquet"
        for script, flags, output, report in (
            ("precompute_latents", pictures, latents, latents / "run.json"),
            ("compute_embeddings", text, embeddings, embeddings.with_suffix(".json")),
        ):
            row = measure(script, f"{script}.py", [*flags, "--output_path", output], report, processes)
            row |= {"set": "gpus", "gpus": processes, "items": count}
            if "failed" not in row:
                row["work_s"] = round(sum(stage["elapsed_s"] for stage in row["stages"]), 2)
                row["each_once"] = hashes == stored_hashes(output) if output == latents else asked == stored(output)
            yield row


SETS = {
    "encoders": encoder_rows,
    "decoders": decoder_rows,
    "latents": latent_rows,
    "text": text_rows,
    "job": job_rows,
    "gpus": gpu_rows,
}


def size_of(word: str) -> tuple[int, int]:
    """`4000x3000` → (4000, 3000)."""
    width, height = map(int, word.split("x"))
    return width, height


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--model", required=True, help="A folder that random_sd3.py made, or a real model's.")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--items", type=int, nargs="+", default=[1, 100, 1000], help="Pictures or captions.")
    parser.add_argument("--reference_items", type=int, default=50, help="How many the reference's way is measured on.")
    parser.add_argument("--sizes", type=size_of, nargs="+", default=[(1600, 1200), (4000, 3000)], help="Of the photos.")
    parser.add_argument("--vae_precisions", nargs="+", choices=["fp32", "fp16", "bf16"], default=["fp16", "fp32"])
    parser.add_argument("--t5_precisions", nargs="+", choices=["fp16", "int8"], default=["fp16", "int8"])
    parser.add_argument("--steps", type=int, default=STEPS, help="Of the job; with fewer its time for 500 is reckoned.")
    parser.add_argument("--before", type=Path, help="A checkout of an earlier build: the job in both, in turns.")
    parser.add_argument("--rounds", type=int, default=2, help="Of the job in both builds.")
    parser.add_argument(
        "--cold", action="store_true", help="Libraries, weights and bytecode come from the disk for each script (root)."
    )
    parser.add_argument("--peer", type=Path, help="A clone of diffusers; without it the job is ours alone.")
    parser.add_argument("--peer_steps", type=int, default=30, help="Of the reference's job, reckoned to 500.")
    parser.add_argument("--stop_after", type=float, default=float("inf"), help="Begin no row after so many seconds.")
    parser.add_argument("--device", type=choose_device, default="auto", help="auto, cuda or cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/stages"))
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    arguments = parser.parse_args(argv)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # it says of every long caption that it is cut
    start, rows = time.perf_counter(), []
    for row in (row for name in arguments.sets for row in SETS[name](arguments)):
        rows.append(row)
        print(
            json.dumps({key: value for key, value in row.items() if key not in ("set", "flags", "stages")}), flush=True
        )
        if arguments.result:
            result = {
                **circumstances(arguments.device, (*VERSIONS, "bitsandbytes")),
                "cores": cpu_cores(),
                "decoding_threads": min(MOST_THREADS, cpu_cores()),
                "model": Path(arguments.model).name,
                "rows": rows,
            }
            arguments.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if time.perf_counter() - start > arguments.stop_after:
            break
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
