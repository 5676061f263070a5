"""What grows in a long job: memory and files over 20,000 steps, and memory with 10,000 pictures, 1 % of them broken.

The model is a tiny random SD3, so that a step takes milliseconds: what leaks or piles up does so with each step or
picture, whatever the model's size. Each script runs in a process of its own, whose memory is read every half second;
`device` is what the driver says is in use, less what was before: nothing else may use the GPU.

    python benchmarks/long.py steps pictures --result FILE
    python benchmarks/long.py steps --steps 4000 --device cuda --result FILE
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "miniature"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.command_line import write_text_atomically
from sd3_lora.common.defaults import MINIATURE, PROJECT_FOLDER
from sd3_lora.common.devices import choose_device

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from evaluate import VERSIONS, circumstances
from PIL import Image
from pipeline import in_use
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

MIB = 1024**2
SIDE, PROMPT = 64, "a photo of sks robot"
BROKEN_EVERY = 100  # 1 %
WARM_UP = 0.2  # of a run, before its memory is compared with that of its end
TRAIN, LATENTS, EMBEDDINGS = "train_dreambooth_sd3_lora_miniature.py", "precompute_latents.py", "compute_embeddings.py"


def save_tiny_sd3(folder: Path) -> None:
    """A random SD3 of few weights, for pictures of 64 px."""
    torch.manual_seed(0)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(MINIATURE / name, folder / name)
    shutil.copy(MINIATURE / "model_index.json", folder / "model_index.json")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    transformer = {"sample_size": SIDE // 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    transformer |= {"caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 24}
    config = {**SD3Transformer2DModel.load_config(MINIATURE / "transformer"), **transformer, "pos_embed_max_size": 16}
    SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    vae = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": SIDE}
    AutoencoderKL.from_config({**AutoencoderKL.load_config(MINIATURE / "vae"), **vae}).save_pretrained(folder / "vae")
    for name, width in (("text_encoder", 8), ("text_encoder_2", 16)):
        sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        clip = CLIPTextConfig.from_pretrained(MINIATURE / name, **sizes)
        CLIPTextModelWithProjection(clip).save_pretrained(folder / name)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 2}
    T5EncoderModel(T5Config.from_pretrained(MINIATURE / "text_encoder_3", **sizes)).save_pretrained(
        folder / "text_encoder_3"
    )


def save_pictures(folder: Path, count: int) -> None:
    """Random pictures, each another; every hundredth is cut off in its middle."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"{index:05d}.png"
        Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path, compress_level=1)
        if index % BROKEN_EVERY == BROKEN_EVERY - 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@dataclass(frozen=True)
class Watched:
    """A script that ran to its end.

    Attributes:
        elapsed_s: from start to end.
        code: its exit code.
        out: what it printed, errors included.
        host: (place, bytes) of its resident memory at each look; the place is that of `progress`.
        device: likewise of the first GPU, by the driver.
    """

    elapsed_s: float
    code: int
    out: str
    host: list[tuple[int, int]]
    device: list[tuple[int, int]]

    @property
    def peak(self) -> int:
        """The most host memory, in bytes."""
        return max((size for _, size in self.host), default=0)


def watch(words: Sequence[object], log: Path, progress: Callable[[], int] = lambda: 0) -> Watched:
    """Runs Python with these words, and looks at its memory every half second.

    Args:
        words: the script and its flags.
        log: gets what it prints.
        progress: how far it is, such as in steps.
    """
    before, start, host, device = in_use(), time.perf_counter(), [], []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        resident = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                place = progress()
                host.append((place, resident.memory_info().rss))
                device.append((place, in_use() - before))
            except psutil.Error:  # it has just ended
                break
            time.sleep(0.5)
        code = process.wait()
    return Watched(time.perf_counter() - start, code, log.read_text(errors="replace"), host, device)


def growth(looks: Sequence[tuple[int, int]], last: int) -> dict[str, float]:
    """By how many percent memory is larger in the last tenth of a run than in the tenth after its warm-up."""

    def between(begin: float, end: float) -> float:
        return median([size for place, size in looks if begin * last <= place <= end * last] or [0])

    early, late = between(WARM_UP, WARM_UP + 0.1), between(0.9, 1.0)
    return {
        "early_mib": round(early / MIB, 1),
        "late_mib": round(late / MIB, 1),
        "growth_percent": round(100 * (late / early - 1), 2) if early else 0.0,
    }


def shared_flags(folder: Path, pictures: Path, device: str) -> list[object]:
    """Of every script."""
    model = ["--pretrained_model_name_or_path", folder / "model", "--instance_data_dir", pictures]
    return [*model, "--device", device]


def stage_one(folder: Path, pictures: Path, out: Path, device: str) -> tuple[Watched, Watched]:
    """Both artefacts of the pictures."""
    shared = shared_flags(folder, pictures, device)
    text = ["--instance_prompt", PROMPT, "--max_sequence_length", 20, "--output_path", out / "embeddings.parquet"]
    embeddings = watch([PROJECT_FOLDER / EMBEDDINGS, *shared, *text], folder / "embeddings.log")
    words = [PROJECT_FOLDER / LATENTS, *shared, "--skip_broken", "--output_path", out / "latents"]
    return embeddings, watch(words, folder / "latents.log")


def training_words(folder: Path, pictures: Path, out: Path, arguments: argparse.Namespace) -> list[object]:
    """Of a training on `stage_one`'s artefacts, with as few trained weights as may be."""
    words = [PROJECT_FOLDER / TRAIN, *shared_flags(folder, pictures, arguments.device), "--instance_prompt", PROMPT]
    words += ["--data_df_path", out / "embeddings.parquet", "--latents_path", out / "latents", "--seed", 0]
    words += ["--report_to", "none", "--lora_layers", "attn.to_q", "--output_dir", out / "lora"]
    return words


def steps_row(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A long training: whether memory grows, what is written."""
    pictures, out, steps = folder / "few", folder / "few-out", arguments.steps
    save_pictures(pictures, 8)
    stage_one(folder, pictures, out, arguments.device)
    losses, words = out / "lora" / "losses.jsonl", training_words(folder, pictures, out, arguments)
    words += ["--max_train_steps", steps, "--checkpointing_steps", max(1, steps // 20), "--checkpoints_total_limit", 2]
    ran = watch(words, folder / "steps.log", lambda: losses.read_bytes().count(b"\n") if losses.exists() else 0)
    if ran.code:
        return {"name": f"{steps} steps", "failed": ran.out.splitlines()[-3:]}
    files = [path for path in (out / "lora").rglob("*") if path.is_file()]
    return {
        "name": f"{steps} steps",
        "elapsed_s": round(ran.elapsed_s, 1),
        "host": growth(ran.host, steps),
        "device": growth(ran.device, steps),
        "checkpoints": len(list((out / "lora").glob("checkpoint-*"))),
        "losses_bytes_a_step": round(losses.stat().st_size / steps, 1),
        "written_mib": round(sum(path.stat().st_size for path in files) / MIB, 2),
        "printed_lines": len(ran.out.splitlines()),
    }


def pictures_rows(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Stage one and 50 steps on 100 pictures and on many, in peaks of host memory."""
    for count in (100, arguments.pictures):
        pictures, out = folder / f"pictures-{count}", folder / f"out-{count}"
        save_pictures(pictures, count)
        embeddings, latents = stage_one(folder, pictures, out, arguments.device)
        words = [*training_words(folder, pictures, out, arguments), "--max_train_steps", 50]
        trained = watch(words, folder / f"train-{count}.log")
        broken = [f"{index:05d}.png" for index in range(BROKEN_EVERY - 1, count, BROKEN_EVERY)]
        row: dict[str, Any] = {"name": f"{count} pictures"}
        for name, ran in (("embeddings", embeddings), ("latents", latents), ("training", trained)):
            row[name] = {"code": ran.code, "elapsed_s": round(ran.elapsed_s, 1), "peak_mib": round(ran.peak / MIB, 1)}
            if ran.code:
                row[name]["failed"] = ran.out.splitlines()[-3:]
        yield row | {
            "cached": len(list((out / "latents").glob("*.safetensors"))),
            "broken": len(broken),
            "broken_named": sum(name in latents.out for name in broken),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("rows", nargs="+", choices=["steps", "pictures"])
    parser.add_argument("--steps", type=int, default=20_000, help="Of the long training.")
    parser.add_argument("--pictures", type=int, default=10_000, help="Of the large folder.")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--work", type=Path, default=Path("outputs/long"), help="A new folder for what is made.")
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    arguments = parser.parse_args(argv)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    save_tiny_sd3(arguments.work / "model")
    result: dict[str, Any] = {**circumstances(choose_device(arguments.device), VERSIONS), "rows": []}
    for name in arguments.rows:
        rows = [steps_row(arguments, arguments.work)] if name == "steps" else pictures_rows(arguments, arguments.work)
        for row in rows:
            print(json.dumps(row), flush=True)
            result["rows"].append(row)
            if arguments.result:
                write_text_atomically(arguments.result, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
