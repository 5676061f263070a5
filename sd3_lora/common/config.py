"""Flags that several scripts have. Nothing here is heavy to import: a mistyped flag is answered at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from sd3_lora.common.command_line import WrongFlags, less_than_one
from sd3_lora.common.placement_flags import Switch, is_on

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
BUCKET_FLAGS = ("use_aspect_ratio_bucket", "bucket_step", "bucket_min", "bucket_max", "bucket_no_upscale")


def missing_path(name: str) -> str | None:
    """Why a name that no file or folder has cannot be a hub id, which is owner/name; else None.

    What is meant as a path is not to be sent to the hub.
    """
    if os.path.exists(name):
        return None
    owner = name.split("/")[0]
    if not _HUB_ID.fullmatch(name) or name.endswith(".safetensors"):
        return f"there is no {name}: check the path"
    if os.path.isdir(owner):
        return f"there is no {name} in the folder {owner}: check the path, or start elsewhere if the hub's is meant"
    return None


@dataclass(frozen=True)
class PictureFlags:
    """Which pictures, and their prompt: of both stage-one scripts and of training, whose groups begin with these."""

    instance_data_dir: str | None = field(
        default=None,
        metadata={
            "aliases": ["--local_data_dir"],
            "help": "Folder of pictures of the subject, with captions beside them where there are any (dog.txt for "
            "dog.jpg, or metadata.jsonl). Default in stage one: the folder dog, or examples/robot; in training: the "
            "pictures that the embeddings file knows.",
        },
    )
    instance_prompt: str | None = field(
        default=None,
        metadata={
            "help": "The prompt of pictures without a caption: 'a photo of sks dog'. Default in training: the one that "
            "stage one was given. precompute_latents.py only checks that equal pictures have equal captions.",
        },
    )
    recursive: bool = field(default=False, metadata={"help": "Read pictures in subfolders too."})

    def picture_flags(self) -> dict[str, Any]:
        """The flags that name the same pictures and prompt again, for a command in a message."""
        return {
            "instance_data_dir": self.instance_data_dir,
            "instance_prompt": self.instance_prompt,
            "recursive": self.recursive,
        }


@dataclass(frozen=True)
class CropFlags(PictureFlags):
    """Which pictures, and how they are cropped: of the latents' script and of training."""

    skip_broken: bool = field(default=False, metadata={"help": "Leave out pictures that do not decode."})
    resolution: int | None = field(
        default=None,
        metadata={"help": "Side of the square crops in pixels. Default: the model's own (diffusers: 512)."},
    )
    center_crop: bool = field(
        default=False, metadata={"help": "One crop of each picture, from its centre: the same as --num_crops 1."}
    )
    use_aspect_ratio_bucket: bool = field(
        default=False,
        metadata={
            "help": "Crop each picture to one of several shapes, that nearest to its own, with no more pixels than the "
            "square of --resolution. Default: all to that square."
        },
    )
    bucket_step: int | None = field(
        default=None,
        metadata={"help": "Pixels of which a bucket's sides are multiples. Default: 64, at most resolution / 8."},
    )
    bucket_min: int | None = field(
        default=None, metadata={"help": "A bucket's shortest side in pixels. Default: half the resolution."}
    )
    bucket_max: int | None = field(
        default=None, metadata={"help": "A bucket's longest side in pixels. Default: twice the resolution."}
    )
    bucket_no_upscale: bool = field(
        default=False,
        metadata={"help": "Enlarge no picture: a small one has a bucket of its own size, cut to --bucket_step."},
    )

    def crop_flags(self) -> dict[str, Any]:
        """The flags that crop to the same shapes again, for a command in a message."""
        return {name: getattr(self, name) for name in ("resolution", "center_crop", *BUCKET_FLAGS)}

    def crop_faults(self) -> Iterator[str]:
        """What is wrong with these flags, a sentence each."""
        yield from less_than_one(self, "bucket_step", "bucket_min", "bucket_max")
        if not self.use_aspect_ratio_bucket:
            for name in BUCKET_FLAGS:
                if getattr(self, name):
                    yield f"--{name} needs --use_aspect_ratio_bucket: add it, or leave --{name} out"


@dataclass(frozen=True)
class ModelConfig:
    """Which model; every script has these flags."""

    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub id of an SD3 pipeline, such as stabilityai/stable-diffusion-3-medium-diffusers. "
            "Without it: the bundled miniature."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    variant: str | None = field(default=None, metadata={"help": "Which weight files of the model, such as fp16."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where hub downloads are kept."})

    @property
    def is_miniature(self) -> bool:
        """Whether no model was named, so that the bundled one is meant."""
        return self.pretrained_model_name_or_path is None

    def flags(self) -> dict[str, Any]:
        """The flags that name the same model again, for a command in a message."""
        return {
            "pretrained_model_name_or_path": self.pretrained_model_name_or_path,
            "revision": self.revision,
            "variant": self.variant,
            "cache_dir": self.cache_dir,
        }


@dataclass(frozen=True)
class DeviceConfig:
    """Where to compute, and whether always alike; every script has these flags."""

    device: Literal["auto", "cuda", "cpu"] = field(
        default="auto", metadata={"help": "auto takes the GPU where there is one."}
    )
    deterministic: Switch = field(
        default="auto",
        metadata={
            "nargs": "?",
            "const": "on",
            "help": "Training gives the same bits each time on one machine. auto: where that costs nothing, on GPUs "
            "since Ampere with Triton. on: everywhere, else slower. off: torch's kernels.",
        },
    )

    @property
    def must_be_deterministic(self) -> bool | None:
        """Whether numbers are to be the same each time, or need not be; None for auto."""
        return is_on(self.deterministic)

    def flags(self) -> dict[str, Any]:
        """The flag that names the same device again, for a command in a message."""
        return {"device": None if self.device == "auto" else self.device}


@dataclass(frozen=True)
class BudgetConfig:
    """How much memory may be used; every script has these flags."""

    vram_budget_gib: float | None = field(
        default=None,
        metadata={
            "help": "GiB of GPU memory to stay under, CUDA's own included. Default: what is free. Without a GPU the "
            "same plan is made, and nothing is capped."
        },
    )
    plan: bool = field(default=False, metadata={"help": "Print what would be kept where and its peak, and exit."})

    def flags(self) -> dict[str, Any]:
        """The flag that sets the same budget again, for a command in a message."""
        return {"vram_budget_gib": self.vram_budget_gib}

    def __post_init__(self) -> None:
        if self.vram_budget_gib is not None and not 0 < self.vram_budget_gib < float("inf"):
            raise WrongFlags(
                [f"--vram_budget_gib {self.vram_budget_gib:g} must be a positive number: type for example 8"]
            )
