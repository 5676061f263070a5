"""The benchmark's trainers: the project's own scripts and diffusers' script, run on a subject.

diffusers' script is run twice: told the same (the captions and layers too), and with one prompt for all pictures and
the layers that it trains if not told otherwise. Steps, batch, rank, learning rate and seed are the same for all three.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shlex
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.transformer.lora import LORA_FILE

from dreambooth_subjects import Subject
from evaluate import SEQUENCE_LENGTH, VERSIONS
from world import PICTURE_PX

TRAINERS = {
    "before": "without a LoRA",
    "ours": "ours",
    "ours_nf4": "ours, trained on an nf4 base",
    "diffusers": "diffusers' script, told the same",
    "diffusers_defaults": "diffusers' script, one prompt, its layers",
    "given": "the given LoRA",
}
OURS, OURS_NF4, PEERS = "ours", "ours_nf4", ("diffusers", "diffusers_defaults")
PEER_SCRIPT = Path("examples/dreambooth/train_dreambooth_lora_sd3.py")


def trainers(flags: argparse.Namespace) -> list[str]:
    """Whose LoRAs are scored."""
    if flags.lora:
        return ["given"]
    return [OURS, *([OURS_NF4] if flags.nf4 else []), *(PEERS if flags.peer else [])]


def shared_words(flags: argparse.Namespace, subject: Subject, trainer: str) -> list[str]:
    """What all trainers are told, in the same words: our flags have diffusers' names."""
    words = {
        "pretrained_model_name_or_path": flags.model,
        "instance_prompt": subject.prompt,
        "output_dir": subject.lora(trainer),
        "resolution": PICTURE_PX,
        "max_sequence_length": SEQUENCE_LENGTH,
        "max_train_steps": flags.steps,
        "learning_rate": f"{flags.learning_rate:g}",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "rank": flags.rank,
        "train_batch_size": flags.train_batch_size,
        "seed": flags.seed,
        "mixed_precision": flags.mixed_precision,
        "checkpointing_steps": flags.steps + 1,
    }
    if trainer != "diffusers_defaults":
        words |= {"lora_layers": flags.lora_layers, "lora_blocks": flags.lora_blocks}
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def our_words(flags: argparse.Namespace, subject: Subject, trainer: str = OURS) -> list[tuple[str, list[str]]]:
    """The project's scripts with their flags, in order; both of our trainers train on the same files."""
    embeddings, latents = subject.folder / "ours" / "embeddings.parquet", subject.folder / "ours" / "latents"
    device = ["--device", flags.device]
    data = ["--pretrained_model_name_or_path", str(flags.model), "--instance_data_dir", str(subject.captioned)]
    prompts = ["--instance_prompt", subject.prompt, "--class_prompt", subject.class_prompt]
    # fp32, because diffusers' script encodes in the precision of its weights.
    text = ["--max_sequence_length", str(SEQUENCE_LENGTH), "--t5_precision", "fp32", "--output_path", str(embeddings)]
    resume = ["--resume_from_checkpoint", "latest", "--report_to", "none"]
    stored = ["--data_df_path", str(embeddings), "--latents_path", str(latents)]
    train = [*shared_words(flags, subject, trainer), *data[2:], *stored, *device, *resume]
    train += ["--base_precision", "nf4"] if trainer == OURS_NF4 else []
    drawing, prior = [], class_words(flags, subject)
    if prior:
        how = ["--num_steps", str(flags.num_steps), "--guidance", f"{flags.guidance:g}", "--seed", str(flags.seed)]
        how += ["--resolution", str(PICTURE_PX)]
        drawing = [("draw_class_pictures", [*data[:2], *prior, *how, *stored, *device])]
        train += ["--with_prior_preservation", *prior]
    more = shlex.split(flags.train_flags)
    if "--prior_prompts_file" in more:  # all that training reads is embedded
        text += ["--prompts_file", more[more.index("--prior_prompts_file") + 1]]
    return [
        ("compute_embeddings", [*data, *prompts, *text, *device]),
        ("precompute_latents", [*data, "--resolution", str(PICTURE_PX), "--output_path", str(latents), *device]),
        *drawing,
        ("train_dreambooth_sd3_lora_miniature", [*train, *more]),
    ]


def class_words(flags: argparse.Namespace, subject: Subject) -> list[str]:
    """Which class pictures; nothing without --class_images."""
    if not flags.class_images:
        return []
    words = ["--class_prompt", subject.class_prompt, "--class_data_dir", str(subject.folder / "ours" / "class")]
    return [*words, "--num_class_images", str(flags.class_images)]


def peer_words(flags: argparse.Namespace, subject: Subject, trainer: str) -> list[str]:
    """The command line of diffusers' script."""
    data = ["--instance_data_dir", str(subject.pictures)]
    if trainer == "diffusers":
        data = ["--dataset_name", str(subject.captioned), "--image_column", "image", "--caption_column", "text"]
    words = [flags.peer_python, str(Path(flags.peer) / PEER_SCRIPT), *shared_words(flags, subject, trainer)]
    return [*words, *data, *shlex.split(flags.peer_flags)]


def train(flags: argparse.Namespace, subject: Subject, trainer: str) -> None:
    """Has a trainer make its LoRA of the five pictures."""
    if trainer in (OURS, OURS_NF4):
        train_ours(flags, subject, trainer)
    else:
        train_peer(flags, subject, trainer)


def train_ours(flags: argparse.Namespace, subject: Subject, trainer: str) -> None:
    """Stages one and two in this process: to import the libraries for each would take longer than the work.

    Raises:
        UserError: one of the scripts refused.
    """
    log = subject.folder / trainer / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    for script, words in our_words(flags, subject, trainer):
        with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
            code = importlib.import_module(script).main(words)
        if code:
            raise UserError(f"{script}.py failed on {subject.name}:\n{last_lines(log)}")


def train_peer(flags: argparse.Namespace, subject: Subject, trainer: str) -> None:
    """The script of diffusers as it is, in its own Python.

    Raises:
        UserError: it failed, or there is no LoRA after it.
    """
    log = subject.folder / trainer / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"} if flags.device == "cpu" else {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **hidden}
    with log.open("a", encoding="utf-8") as stream:
        words = peer_words(flags, subject, trainer)
        finished = subprocess.run(words, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    lora = subject.lora(trainer) / LORA_FILE
    if finished.returncode or not lora.is_file():
        lora.unlink(missing_ok=True)  # or the next run would take it for finished
        raise UserError(f"{TRAINERS[trainer]}, failed on {subject.name}:\n{last_lines(log)}")


def last_lines(log: Path) -> str:
    """The end of what a trainer printed."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])


def describe_peer(flags: argparse.Namespace) -> dict[str, Any]:
    """Which script of diffusers ran, and with which versions."""
    code = (
        "import importlib.metadata as m, json, sys; print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    output = subprocess.run([flags.peer_python, "-c", code, *VERSIONS], capture_output=True, text=True, check=True)
    return {"script": file_hash(Path(flags.peer) / PEER_SCRIPT), "versions": json.loads(output.stdout)}


def file_hash(path: Path) -> str:
    """The start of a file's sha256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
