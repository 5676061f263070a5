"""Flags that several scripts have. Nothing here is heavy to import: a mistyped flag is answered at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from sd3_lora.common.command_line import WrongFlags, less_than_one
from sd3_lora.common.defaults import MINIATURE
from sd3_lora.common.placement_flags import Switch, is_on

LoraStart = Literal["gaussian", "default", "pissa", "olora"]
ExportFormat = Literal["kohya", "a1111"]
LoraType = Literal["lora", "lokr", "loha"]

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
AUGMENTATION_FLAGS = ("num_augmented", "rotation_degrees", "brightness_range")
BUCKET_FLAGS = ("use_aspect_ratio_bucket", "bucket_step", "bucket_min", "bucket_max", "bucket_no_upscale")


def groups_of(flags: object) -> list[Any]:
    """The groups of all the flags of a script, to save them.

    Args:
        flags: a dataclass of groups.
    """
    return [getattr(flags, group.name) for group in fields(flags)]  # type: ignore[arg-type]


def group_classes(flags: type) -> tuple[type, ...]:
    """The classes of such a dataclass' groups, to parse them."""
    return tuple(get_type_hints(flags).values())


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
    concepts_list: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with several subjects, each with instance_prompt and instance_data_dir, and on request "
            "class_prompt, class_data_dir and repeats. In place of --instance_data_dir and --instance_prompt."
        },
    )
    repeats: int = field(default=1, metadata={"help": "How many times each picture comes in a pass."})
    repeats_from_folders: bool = field(
        default=False,
        metadata={"help": "Read subfolders such as `10_sks dog`, whose names say the repeats and the prompt."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the hub or in a folder, read once by the library datasets and laid out here."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which configuration of the data set."})
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the data set with the pictures. Default: the first that has them."}
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "Column with the captions. Default: all pictures have --instance_prompt."}
    )
    caption_prefix: str | None = field(
        default=None, metadata={"help": "Put before each caption (not before --instance_prompt)."}
    )
    caption_suffix: str | None = field(
        default=None, metadata={"help": "Put behind each caption (not behind --instance_prompt)."}
    )
    trigger_word: str | None = field(
        default=None,
        metadata={"help": "What stands for [trigger] in captions, their prefix and suffix, and --instance_prompt."},
    )
    use_filename_as_label: bool = field(
        default=False, metadata={"help": "Each picture's caption is its name: `sks dog_01.jpg` is 'sks dog'."}
    )
    use_txt_as_label: bool = field(
        default=False, metadata={"help": "Each picture's captions are those of its .txt; one without is refused."}
    )
    shuffle_tags: int = field(
        default=0,
        metadata={
            "nargs": "?",
            "const": 8,
            "help": "How many orders of the tags of each comma-separated caption are embedded, its own included; 8 "
            "where no number is given.",
        },
    )
    keep_tags: int = field(default=0, metadata={"help": "How many of the first tags stay first."})

    def picture_flags(self) -> dict[str, Any]:
        """The flags that name the same pictures and prompts again, for a command in a message."""
        flags = {flag.name: (getattr(self, flag.name), flag.default) for flag in fields(PictureFlags)}
        return {name: None if value == default else value for name, (value, default) in flags.items()}

    def picture_faults(self) -> Iterator[str]:
        """What is wrong with these flags, a sentence each."""
        yield from less_than_one(self, "repeats")
        if self.shuffle_tags < 0 or self.keep_tags < 0:
            yield "--shuffle_tags and --keep_tags must not be negative"
        if self.keep_tags and not self.shuffle_tags:
            yield "--keep_tags needs --shuffle_tags"
        if self.use_filename_as_label and self.use_txt_as_label:
            yield "--use_filename_as_label and --use_txt_as_label exclude each other: type one of them"
        sources = ("instance_data_dir", "concepts_list", "dataset_name")
        named = [f"--{name}" for name in sources if getattr(self, name) is not None]
        if len(named) > 1:
            yield f"{' and '.join(named)} exclude each other: type one of them"
        for name in ("instance_prompt", "repeats_from_folders"):
            if self.concepts_list is not None and getattr(self, name):
                yield f"--{name} has no place beside --concepts_list, which says it of each concept: leave it out"
        if self.repeats_from_folders and self.dataset_name is not None:
            yield "--repeats_from_folders reads folders, and a data set has none: leave it out"
        for name in ("dataset_config_name", "image_column", "caption_column"):
            if getattr(self, name) is not None and self.dataset_name is None:
                yield f"--{name} needs --dataset_name"


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
    num_augmented: int | None = field(
        default=None,
        metadata={
            "help": "Further variants of each crop, turned and brightened or darkened a little; a crop's are the same "
            "in each run. Default in stage one: none; in training: as cached."
        },
    )
    rotation_degrees: float | None = field(
        default=None,
        metadata={
            "help": "They are turned by up to so many degrees, either way, and enlarged until no corner is empty. "
            "Default: 5."
        },
    )
    brightness_range: float | None = field(
        default=None, metadata={"help": "Their brightness is multiplied by 1 - this to 1 + this. Default: 0.1."}
    )
    mask_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of masks for --masked_loss: dog.png for dog.jpg, or dog-masklabel.png beside it; white is "
            "trained on. (kohya: conditioning_data_dir.)"
        },
    )
    alpha_mask: bool = field(
        default=False, metadata={"help": "The pictures' own alpha is their mask: what is opaque is trained on."}
    )

    def crop_flags(self) -> dict[str, Any]:
        """The flags that crop to the same shapes again, for a command in a message."""
        return {name: getattr(self, name) for name in ("resolution", "center_crop", *BUCKET_FLAGS, *AUGMENTATION_FLAGS)}

    def mask_flags(self) -> dict[str, Any]:
        """The flags that name the same masks again, for a command in a message."""
        return {"mask_data_dir": self.mask_data_dir, "alpha_mask": self.alpha_mask}

    @property
    def has_masks(self) -> bool:
        """Whether masks are named."""
        return self.alpha_mask or self.mask_data_dir is not None

    def crop_faults(self) -> Iterator[str]:
        """What is wrong with these flags, a sentence each."""
        if self.alpha_mask and self.mask_data_dir is not None:
            yield "--mask_data_dir and --alpha_mask exclude each other: type one of them"
        yield from less_than_one(self, "bucket_step", "bucket_min", "bucket_max")
        yield from self._augmentation_faults()
        if not self.use_aspect_ratio_bucket:
            for name in BUCKET_FLAGS:
                if getattr(self, name):
                    yield f"--{name} needs --use_aspect_ratio_bucket: add it, or leave --{name} out"

    def _augmentation_faults(self) -> Iterator[str]:
        if self.num_augmented is not None and self.num_augmented < 0:
            yield f"--num_augmented {self.num_augmented} must not be negative"
        degrees, brightness = self.rotation_degrees, self.brightness_range
        if degrees is not None and not 0 <= degrees <= 45:
            yield f"--rotation_degrees {degrees:g} must be at least 0 and at most 45"
        if brightness is not None and not 0 <= brightness < 1:
            yield f"--brightness_range {brightness:g} must be at least 0 and less than 1"
        if degrees == 0 and brightness == 0:
            yield "--rotation_degrees 0 and --brightness_range 0 change nothing: leave one of them out"
        for name in AUGMENTATION_FLAGS[1:]:
            if getattr(self, name) is not None and not self.num_augmented:
                yield f"--{name} needs --num_augmented: type for example --num_augmented 2"


@dataclass(frozen=True)
class ModelConfig:
    """Which model; every script has these flags."""

    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub id of an SD3 pipeline, such as stabilityai/stable-diffusion-3-medium-diffusers; or "
            "one safetensors file that `python -m sd3_lora.convert` has laid out. Without it: the bundled miniature."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    variant: str | None = field(default=None, metadata={"help": "Which weight files of the model, such as fp16."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where hub downloads are kept."})

    @property
    def is_miniature(self) -> bool:
        """Whether no model was named, so that the bundled one is meant."""
        return self.pretrained_model_name_or_path is None

    @property
    def is_bundled(self) -> bool:
        """Whether the bundled miniature is meant, named or not: a CPU is enough for it."""
        return self.is_miniature or Path(str(self.pretrained_model_name_or_path)).resolve() == MINIATURE

    def flags(self) -> dict[str, Any]:
        """The flags that name the same model again, for a command in a message."""
        return {
            "pretrained_model_name_or_path": self.pretrained_model_name_or_path,
            "revision": self.revision,
            "variant": self.variant,
            "cache_dir": self.cache_dir,
        }


@dataclass(frozen=True)
class LoraBaseConfig(ModelConfig):
    """Which base model; of the commands that change a LoRA's form."""

    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of the LoRA's base model. Default: the one that its training noted."},
    )


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
            "since Ampere with Triton, but not where blocks are compiled. on: everywhere, slower on older GPUs, and "
            "without compiling. off: torch's kernels.",
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
