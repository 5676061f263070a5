"""What `--help` shows of each script: the flags that most people need, by subject, each with an example.

`--help_all` shows every flag, with its whole text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

WIDTH = 80  # columns; with MOST_LINES the size of a usual terminal, twice as high
MOST_LINES = 40


@dataclass(frozen=True)
class HelpPart:
    """Some flags of one subject.

    Attributes:
        title: the subject.
        example: some of them as they are typed.
        flags: flag → what it does, in a few words.
    """

    title: str
    example: str
    flags: Mapping[str, str]

    def lines(self, column: int) -> Iterator[str]:
        """The part, with texts that begin in this column."""
        yield ""
        yield f"{self.title}:"
        yield from (f"  {'--' + name:<{column}}{text}" for name, text in self.flags.items())
        yield f"  for example: {self.example}"


def help_lines(script: str, description: str, parts: Sequence[HelpPart]) -> Iterator[str]:
    """The whole help of a script."""
    column = max(len(name) for part in parts for name in part.flags) + 4
    yield f"usage: python {script} [flags]"
    yield ""
    yield from textwrap.wrap(description, WIDTH)
    for part in parts:
        yield from part.lines(column)
    yield ""
    yield f"All flags: python {script} --help_all"


def _model_and_memory(**more: str) -> HelpPart:
    flags = {
        "pretrained_model_name_or_path": "folder, file or hub id; else the miniature",
        **more,
        "vram_budget_gib": "GiB of GPU memory to stay under",
        "plan": "print what goes where and its peak, and exit",
        "device": "cuda or cpu; auto takes a GPU if there is one",
    }
    return HelpPart("Model and memory", "--vram_budget_gib 8 --plan", flags)


_PICTURES = {
    "instance_data_dir": "folder of pictures, captions beside them",
    "instance_prompt": "prompt of pictures without a caption",
}
_FILES = {
    "data_df_path": "what compute_embeddings.py wrote",
    "latents_path": "what precompute_latents.py wrote",
}
SHORT_HELP: dict[str, tuple[HelpPart, ...]] = {
    "compute_embeddings.py": (
        HelpPart(
            "Prompts",
            '--instance_data_dir dog --instance_prompt "a photo of sks dog"',
            {
                **_PICTURES,
                "class_prompt": "the same without the rare word",
                "validation_prompt": "what will be drawn later; several in quotes",
                "prompts_file": "text file with more of them, one a line",
                "output_path": "the parquet file to write",
            },
        ),
        _model_and_memory(
            t5_precision="int8, nf4, fp16 or fp32",
            t5_stream="half a block of T5 at a time: least memory",
        ),
    ),
    "precompute_latents.py": (
        HelpPart(
            "Pictures",
            "--instance_data_dir dog --resolution 1024",
            {
                "instance_data_dir": _PICTURES["instance_data_dir"],
                "resolution": "side of the square crops in pixels",
                "num_crops": "of a picture that is not square; default 3",
                "use_aspect_ratio_bucket": "crop to the nearest of several shapes",
                "random_flip": "cache mirrored twins too",
                "skip_broken": "leave out pictures that do not decode",
                "output_path": "the folder to write",
            },
        ),
        _model_and_memory(vae_precision="fp32, fp16 or bf16"),
    ),
    "train_dreambooth_sd3_lora_miniature.py": (
        HelpPart(
            "What to train on",
            '--instance_data_dir dog --instance_prompt "a photo of sks dog"',
            {**_PICTURES, **_FILES, "resolution": "side of the crops in pixels"},
        ),
        HelpPart(
            "How to train",
            "--max_train_steps 500 --learning_rate 1e-4 --rank 8",
            {
                "max_train_steps": "optimizer steps; default 500",
                "learning_rate": "default 1e-4",
                "rank": "width of the LoRA; default 4",
                "train_batch_size": "pictures in memory at a time",
                "gradient_accumulation_steps": "so many times, for one step",
                "with_prior_preservation": "against drift: class pictures too",
                "seed": "for the same LoRA again",
            },
        ),
        HelpPart(
            "What is written, and when",
            '--resume_from_checkpoint latest --validation_prompt "a sks dog"',
            {
                "output_dir": "folder of the LoRA",
                "checkpointing_steps": "default: about ten in a run",
                "resume_from_checkpoint": "latest goes on where it stopped",
                "validation_prompt": "what to draw while training",
            },
        ),
        _model_and_memory(),
    ),
    "inference.py": (
        HelpPart(
            "What to draw",
            '--lora sd3-dreambooth-lora --prompt "a sks dog on a beach"',
            {
                "lora": "folder, file or hub id; several are added up",
                "lora_scale": "its strength; 0 0.5 1 draws with each",
                "prompt": "what to draw; several in quotes",
                "prompts_file": "text file with prompts, one a line",
                "compare": "without the LoRA too, side by side",
                "outdir": "the folder of the pictures",
            },
        ),
        HelpPart(
            "How to draw",
            "--num_images 4 --num_steps 28 --guidance 5 --seed 1",
            {
                "num_images": "of each prompt",
                "num_steps": "of denoising; default 28",
                "guidance": "how closely to follow the prompt",
                "seed": "of the starting noise",
                "height": "in pixels; default: that of the training",
                "width": "likewise",
                "data_df_path": "embeddings that are there already",
            },
        ),
        _model_and_memory(),
    ),
    "draw_class_pictures.py": (
        HelpPart(
            "Class pictures",
            '--class_prompt "a photo of a dog" --class_data_dir dogs',
            {
                "class_prompt": "the prompt without the rare word",
                "class_data_dir": "the folder to draw into",
                "num_class_images": "how many it is to hold",
                "resolution": "their side in pixels",
                **_FILES,
            },
        ),
        _model_and_memory(sample_batch_size="pictures drawn together"),
    ),
    "caption_images.py": (
        HelpPart(
            "Captions",
            '--instance_data_dir dog --caption_prefix "a photo of sks dog, "',
            {
                "instance_data_dir": "folder of the pictures",
                "caption_model": "which model describes them",
                "caption_prefix": "written before each caption",
                "caption_suffix": "written behind each caption",
                "caption_batch_size": "pictures at a time",
                "device": "cuda or cpu; auto takes a GPU if there is one",
            },
        ),
    ),
    "app.py": (
        HelpPart(
            "The page",
            "--port 7861",
            {
                "output_dir": "folder of the projects; default outputs/app",
                "port": "of the page; default 7860",
                "host": "who may open it; default: this machine alone",
            },
        ),
    ),
}
