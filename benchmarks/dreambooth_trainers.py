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
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
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
PRIOR_PROMPTS_FILE = Path(__file__).resolve().parent / "prior_prompts.txt"
PEER_SCRIPT = Path("examples/dreambooth/train_dreambooth_lora_sd3.py")


def trainers(flags: argparse.Namespace) -> list[str]:
    """Whose LoRAs are scored."""
    if flags.lora:
        return ["given"]
    return [OURS, *([OURS_NF4] if flags.nf4 else []), *(PEERS if flags.peer else [])]


def shared_words(flags: argparse.Namespace, subject: Subject, lora: Path, has_layers: bool = True) -> list[str]:
    """What all trainers are told, in the same words: our flags have diffusers' names.

    Args:
        flags: of the benchmark.
        subject: that is trained.
        lora: the folder to write.
        has_layers: whether to say which layers; else the script's own.
    """
    words = {
        "pretrained_model_name_or_path": flags.model,
        "instance_prompt": subject.prompt,
        "output_dir": lora,
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
    if has_layers:
        words |= {"lora_layers": flags.lora_layers, "lora_blocks": flags.lora_blocks}
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class StageOneFiles:
    """Where a subject's artefacts go.

    Attributes:
        embeddings: of the captions, the two prompts and the empty one.
        latents: of the five pictures, and of class pictures.
        class_pictures: the folder of these.
    """

    embeddings: Path
    latents: Path
    class_pictures: Path

    @property
    def stored(self) -> list[str]:
        """The flags that name them for a later script."""
        return ["--data_df_path", str(self.embeddings), "--latents_path", str(self.latents)]


def our_files(subject: Subject) -> StageOneFiles:
    """Of both of our trainers: they train on the same."""
    folder = subject.folder / OURS
    return StageOneFiles(folder / "embeddings.parquet", folder / "latents", folder / "class")


def our_words(flags: argparse.Namespace, subject: Subject, trainer: str = OURS) -> list[tuple[str, list[str]]]:
    """The project's scripts with their flags, in order."""
    files = our_files(subject)
    more = ["--base_precision", "nf4"] if trainer == OURS_NF4 else []
    if flags.class_images:
        more += ["--with_prior_preservation", *class_words(subject, files, flags.class_images)]
    words = [*shared_words(flags, subject, subject.lora(trainer)), *stored_words(flags, subject.captioned, files)]
    train = ("train_dreambooth_sd3_lora_miniature", [*words, *more, *shlex.split(flags.train_flags)])
    return [*stage_one_words(flags, subject, files, flags.class_images), train]


def stage_one_words(
    flags: argparse.Namespace, subject: Subject, files: StageOneFiles, class_images: int
) -> list[tuple[str, list[str]]]:
    """The scripts of stage one with their flags, in order.

    Args:
        flags: of the benchmark.
        subject: whose pictures and prompts.
        files: to write.
        class_images: how many class pictures to draw; 0 for none.
    """
    device = ["--device", flags.device]
    data = ["--pretrained_model_name_or_path", str(flags.model), "--instance_data_dir", str(subject.captioned)]
    prompts = ["--instance_prompt", subject.prompt, "--class_prompt", subject.class_prompt]
    # fp32, because diffusers' script encodes in the precision of its weights.
    text = ["--max_sequence_length", str(SEQUENCE_LENGTH), "--t5_precision", "fp32"]
    text += ["--prompts_file", str(PRIOR_PROMPTS_FILE)]  # for methods that read it
    size = ["--resolution", str(PICTURE_PX)]
    scripts = [
        ("compute_embeddings", [*data, *prompts, *text, "--output_path", str(files.embeddings), *device]),
        ("precompute_latents", [*data, *size, "--output_path", str(files.latents), *device]),
    ]
    if class_images:
        how = ["--num_steps", str(flags.num_steps), "--guidance", f"{flags.guidance:g}", "--seed", str(flags.seed)]
        words = [*data[:2], *class_words(subject, files, class_images), *how, *size, *files.stored, *device]
        scripts.append(("draw_class_pictures", words))
    return scripts


def stored_words(flags: argparse.Namespace, pictures: Path, files: StageOneFiles) -> list[str]:
    """What training is told of the pictures, of stage one's artefacts, and of how it runs."""
    resume = ["--resume_from_checkpoint", "latest", "--report_to", "none"]
    return ["--instance_data_dir", str(pictures), *files.stored, "--device", flags.device, *resume]


def class_words(subject: Subject, files: StageOneFiles, count: int) -> list[str]:
    """Which class pictures."""
    words = ["--class_prompt", subject.class_prompt, "--class_data_dir", str(files.class_pictures)]
    return [*words, "--num_class_images", str(count)]


def peer_words(flags: argparse.Namespace, subject: Subject, trainer: str) -> list[str]:
    """The command line of diffusers' script."""
    data = ["--instance_data_dir", str(subject.pictures)]
    if trainer == "diffusers":
        data = ["--dataset_name", str(subject.captioned), "--image_column", "image", "--caption_column", "text"]
    shared = shared_words(flags, subject, subject.lora(trainer), has_layers=trainer != "diffusers_defaults")
    words = [flags.peer_python, str(Path(flags.peer) / PEER_SCRIPT), *shared]
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
    for script, words in our_words(flags, subject, trainer):
        run_script(script, words, subject.folder / trainer / "log.txt", subject.name)


def run_script(script: str, words: Sequence[str], log: Path, what: str) -> None:
    """One of the project's scripts in this process, its output added to a log.

    Args:
        script: its module.
        words: its command line.
        log: a file.
        what: on which it runs, for the error.

    Raises:
        UserError: it refused.
        KeyboardInterrupt: it was interrupted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        code = importlib.import_module(script).main(words)
    if code > 128:  # a signal's
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{script}.py failed on {what}:\n{last_lines(log)}")


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
