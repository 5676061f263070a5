"""Scores the miniature: does a picture show what its prompt asks for? An independent network judges.

    python miniature/evaluate.py --count 512

Prompts name everything ("a photo of a small fish on the left on a striped blue background"), objects in turn, the rest
and the noise by fixed seeds. `--lora` scores the model with a LoRA of diffusers' format. The judge's own accuracy is
printed with every score, and the VAE's PSNR is that on scenes of objects that it has never seen.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from judge import HEADS, JUDGE_FILE, load_judge
from PIL import Image
from render import Renderer
from train_vae import measure_psnr
from world import MINIATURE, PICTURE_PX, Scenes, full_caption, load_objects, object_indices, sample_scenes

GUIDANCE, NUM_STEPS, BATCH_SIZE = 4.0, 20, 32
SEQUENCE_LENGTH = 77
VERSIONS = ("torch", "diffusers", "transformers", "peft", "accelerate")
SHEET_PICTURES = 48
PSNR_SCENES = 64  # measure_psnr draws that many at a time


def load_pipeline(folder: Path, device: torch.device) -> StableDiffusion3Pipeline:
    """The miniature in float32, in which every device draws the same pictures up to rounding."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seed: int,
    guidance: float = GUIDANCE,
    num_steps: int = NUM_STEPS,
    batch_size: int = BATCH_SIZE,
) -> torch.Tensor:
    """A picture of each prompt, `(N, 3, 128, 128)` in [-1, 1] on the CPU.

    Its noise depends on the seed and its place alone: batch size and device change no more than rounding.
    """
    pictures = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        images = pipeline(
            prompt=batch,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))],
            guidance_scale=guidance,
            num_inference_steps=num_steps,
            height=PICTURE_PX,
            width=PICTURE_PX,
            max_sequence_length=SEQUENCE_LENGTH,
            output_type="pt",
        ).images  # (B, 3, H, W) in [0, 1]
        pictures.append(images.cpu().float() * 2 - 1)
    return torch.cat(pictures)


def sample_prompts(count: int, seed: int) -> tuple[Scenes, list[str]]:
    """Scenes of one object that pretraining knew, each object in turn, and their full captions."""
    objects = load_objects()
    seen = object_indices(held_out=False)
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(count, seen, generator)
    shuffled = torch.tensor(seen)[torch.randperm(len(seen), generator=generator)]
    scenes.object[:] = shuffled.repeat(-(-count // len(seen)))[:count]
    return scenes, [full_caption(objects[scenes.object[i]].name, scenes, i) for i in range(count)]


def score(pictures: torch.Tensor, scenes: Scenes, device: torch.device) -> dict[str, float]:
    """The share of pictures in which the judge sees what the scene asks for, for each property."""
    right = load_judge(device).verdict(pictures).right(scenes)
    return {name: round(right[name].float().mean().item(), 4) for name in HEADS}


def held_out_psnr(vae: AutoencoderKL, count: int, device: torch.device) -> float:
    """The VAE's PSNR in decibels on scenes of objects that it has never seen."""
    renderer = Renderer(load_objects(), None, device)
    return measure_psnr(vae, renderer, object_indices(held_out=True), max(count, PSNR_SCENES), seed=2)


def circumstances(device: torch.device, packages: Sequence[str] = VERSIONS) -> dict[str, Any]:
    """The conditions of a result: the date, the GPU's or the processor's name, and the packages' versions."""
    processor = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def save_grid(pictures: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Pictures `(N, 3, H, W)` in [-1, 1] side by side as a PNG; places left over in the last row are black."""
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[2:]
    grid = pictures.new_full((rows * columns, 3, height, width), -1.0)
    grid[: len(pictures)] = pictures
    sheet = grid.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=MINIATURE, help="The pipeline's folder.")
    parser.add_argument("--lora", help="Folder or file of a LoRA in diffusers' format.")
    parser.add_argument("--count", type=int, default=512, help="Prompts.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    parser.add_argument("--num_steps", type=int, default=NUM_STEPS)
    parser.add_argument("--result", type=Path, help="JSON file to write.")
    parser.add_argument("--sheet", type=Path, help=f"PNG to write: the first {SHEET_PICTURES} pictures.")
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(flags.model, device)
    if flags.lora:
        pipeline.load_lora_weights(flags.lora)
    scenes, prompts = sample_prompts(flags.count, flags.seed)
    report: dict[str, Any] = circumstances(device)
    report |= {"prompts": flags.count, "num_steps": flags.num_steps, "guidance": {}}
    report["judge"] = json.loads(JUDGE_FILE.with_suffix(".json").read_text(encoding="utf-8"))
    for guidance in flags.guidance:
        pictures = draw(pipeline, prompts, flags.seed, guidance, flags.num_steps)
        report["guidance"][guidance] = score(pictures, scenes, device)
        print(f"guidance {guidance:g}: {report['guidance'][guidance]}", flush=True)
    report["vae_psnr_db"] = round(held_out_psnr(pipeline.vae, flags.count, device), 2)
    print(f"VAE, scenes of objects never seen: {report['vae_psnr_db']} dB; the judge itself: {report['judge']}")
    if flags.result:
        flags.result.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if flags.sheet:
        save_grid(pictures[:SHEET_PICTURES], flags.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
