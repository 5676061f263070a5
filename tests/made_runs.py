"""A folder as a run leaves it, made by hand, for the tests of its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd3_lora.common.model_files import MINIATURE
from sd3_lora.common.run_record import NotedPicture
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.training.checkpoints import write_pictures

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

GIB = 1024**3


def stage(name: str, elapsed_s: float, device_gib: float = 0.0, host_gib: float = 0.5) -> dict[str, Any]:
    return {
        "name": name,
        "elapsed_s": elapsed_s,
        "peak_device_gib": 0.9 * device_gib,
        "peak_reserved_gib": device_gib,
        "peak_host_gib": host_gib,
    }


def write_losses(folder: Path, steps: int) -> list[dict[str, Any]]:
    draws, lines = np.random.default_rng(0), []
    for step in range(1, steps + 1):
        sigmas = [round(float(sigma), 4) for sigma in draws.uniform(size=2)]
        loss = float(1 / step**0.2 + draws.normal() / 20)
        rest = {"gradient_norm": 0.5, "learning_rate": 1e-4, "skipped": False, "sigmas": sigmas}
        lines.append({"step": step, "loss": loss, **rest})
    (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def write_drawn(folder: Path, steps: list[int], prompts: list[str], side: int = 64, noise: int = 8) -> None:
    draws = np.random.default_rng(1)
    for step in steps:
        place = folder / "samples" / f"step_{step:06d}"
        place.mkdir(parents=True, exist_ok=True)
        for index, prompt in enumerate(prompts):
            coarse = Image.fromarray(draws.integers(0, 256, (noise, noise, 3), dtype=np.uint8))
            text = PngInfo()
            text.add_itxt("sd3_lora", json.dumps({"prompt": prompt, "image_index": 0}))
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(place / f"{index:02d}.png", pnginfo=text)


def write_photos(folder: Path, captions: list[str]) -> list[NotedPicture]:
    folder.mkdir()
    noted = []
    for index, caption in enumerate(captions):
        path = folder / f"photo {index}.png"
        Image.effect_noise((96, 64), 90 + index).convert("RGB").save(path)
        noted.append(NotedPicture(hash_file(path), path.name, caption, ("64x64+16+0", "64x64+16+0-flip")))
    return noted


def make_run(
    tmp_path: Path,
    steps: int = 60,
    captions: tuple[str, ...] = ("a photo of sks dog", "a photo of sks dog in the snow"),
    prompts: tuple[str, ...] = ("a photo of sks dog on a red background", "a photo of a dog"),
    drawn_at: tuple[int, ...] = (0, 30, 60),
    side: int = 64,
    noise: int = 8,
) -> Path:
    """A finished run, as of a GPU.

    Args:
        tmp_path: where all of it goes.
        steps: that it took.
        captions: of its pictures.
        prompts: that were drawn.
        drawn_at: which steps.
        side: of the drawn pictures, in pixels.
        noise: of their colours, along a side.
    """
    folder = tmp_path / "lora"
    folder.mkdir()
    pictures = write_photos(tmp_path / "photos", list(captions))
    write_pictures(folder, pictures)
    lines = write_losses(folder, steps)
    if drawn_at:
        write_drawn(folder, list(drawn_at), list(prompts), side, noise)
    measured = [
        {"step": step, "training_loss": 0.4, "subject_loss": 0.5 + abs(step - 40) / 100, "class_loss": step / 1000}
        for step in range(0, steps + 1, 10)
    ]
    (folder / "early_warning.jsonl").write_text("".join(json.dumps(each) + "\n" for each in measured))
    embeddings, latents = tmp_path / "embeddings.json", tmp_path / "latents" / "run.json"
    latents.parent.mkdir()
    flags = {"instance_data_dir": str(tmp_path / "photos"), "pretrained_model_name_or_path": str(MINIATURE)}
    text = {**flags, "instance_prompt": "a photo of sks dog", "class_prompt": "a photo of a dog"}
    text |= {"output_path": str(embeddings.with_suffix(".parquet"))}
    stages = [stage("encode with CLIP-L", 2.0, 1.0), stage("encode with T5 (fp16)", 20.0, 9.0)]
    embeddings.write_text(json.dumps({"flags": text, "stages": stages, "predicted_bytes": 10 * GIB}))
    made = {"flags": {**flags, "output_path": str(latents.parent)}, "stages": [stage("encode pictures", 8.0, 4.0)]}
    latents.write_text(json.dumps(made))
    training = {
        **flags,
        "data_df_path": text["output_path"],
        "latents_path": str(latents.parent),
        "output_dir": str(folder),
        "seed": None,
        "max_train_steps": steps,
        "rank": 8,
        "use_rslora": False,
        "validation_prompt": list(prompts),
        "vram_budget_gib": 12.0,
    }
    values = {
        "flags": training,
        "model": str(MINIATURE),
        "precision": "bf16",
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
        "plan": {"blocks": 24, "recomputed": 3},
        "predicted_parts": {"weights": 4 * GIB, "activations": 6 * GIB},
        "predicted_bytes": 10 * GIB,
        "trigger": captions[0] if captions else None,
        "max_sequence_length": 77,
        "seed": 1234,
        "wrote": "x",
        "stages": [stage("load transformer", 5.0, 4.1), stage("train", 300.0, 9.4)],
        "measured_bytes": int(9.8 * GIB),
        "steps": steps,
        "ms_a_step": 600.0,
        "loss": float(np.mean([line["loss"] for line in lines[-50:]])),
    }
    (folder / "run.json").write_text(json.dumps(values))
    return folder
