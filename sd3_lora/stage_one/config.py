"""The flags of stage one. Nothing here is heavy to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sd3_lora.common.command_line import less_than_one, require_right, split_prompt
from sd3_lora.common.config import CropFlags, PictureFlags
from sd3_lora.common.defaults import EMBEDDINGS_PATH, LATENTS_PATH


@dataclass(frozen=True)
class EmbeddingConfig(PictureFlags):
    """What to embed, how, and where to write it."""

    instance_prompt: str | None = field(  # as in `PictureFlags`, and by the name that the reference's script has for it
        default=None,
        metadata={"aliases": ["--prompt"], "help": "The prompt with the identifier: 'a photo of sks dog'."},
    )
    class_prompt: str | None = field(
        default=None, metadata={"help": "The same without the identifier: 'a photo of a dog'."}
    )
    class_captions: bool = field(
        default=False, metadata={"help": "Embed the captions beside the class pictures of --class_data_dir too."}
    )
    class_data_dir: str | None = field(
        default=None, metadata={"help": "Their folder. Default: those of --concepts_list."}
    )
    class_prompts_file: str | None = field(
        default=None, metadata={"help": "Text file with the prompts of class pictures to be drawn, one a line."}
    )
    validation_prompt: list[str] = field(
        default_factory=list, metadata={"action": "extend", "help": "Prompts that will be drawn after training."}
    )
    prompts_file: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Text file with more such prompts, one a line; # begins a comment. May be repeated.",
        },
    )
    subject: str | None = field(
        default=None,
        metadata={"help": "What stands for {} in these prompts, such as those of examples/prompts: 'sks dog'."},
    )
    negative_prompt: str | None = field(
        default=None, metadata={"help": "The negative prompt for inference.py; the empty prompt is always embedded."}
    )
    max_sequence_length: int = field(default=77, metadata={"help": "T5 tokens of a prompt, 1 to 512."})
    t5_precision: Literal["int8", "nf4", "fp16", "fp32"] | None = field(
        default=None,
        metadata={"help": "Of T5's weights. Default: that of an existing file, else int8 on a GPU, fp32 on a CPU."},
    )
    t5_stream: bool = field(
        default=False, metadata={"help": "Keep one T5 block at a time on the device (fp16 or fp32): the least memory."}
    )
    output_path: str = field(default=EMBEDDINGS_PATH, metadata={"help": "The parquet file to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a file that was made with other settings."})

    def __post_init__(self) -> None:
        faults = [*self.picture_faults(), *split_prompt("validation_prompt", self.validation_prompt)]
        if self.class_captions and self.class_data_dir is None and self.concepts_list is None:
            faults.append("--class_captions needs the folder of the class pictures: type --class_data_dir FOLDER")
        if self.class_data_dir is not None and not self.class_captions:
            faults.append("--class_data_dir has no effect without --class_captions: add it, or leave the folder out")
        require_right(faults)


@dataclass(frozen=True)
class LatentConfig(CropFlags):
    """Which pictures, which crops of them, and where to write."""

    alpha_background: Literal["white", "mean"] = field(
        default="white", metadata={"help": "What shows through transparent pixels: white or the mean colour."}
    )
    num_crops: int = field(
        default=3,
        metadata={
            "help": "Crops of a picture that is not square, evenly spread along its longer side (diffusers: one, "
            "from a random place)."
        },
    )
    random_flip: bool = field(default=False, metadata={"help": "Cache the mirrored twin of each crop too."})
    vae_precision: Literal["fp32", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "Of the VAE and of the stored posteriors. Default: that of an existing cache, else fp32."},
    )
    vae_batch_size: int | None = field(
        default=None,
        metadata={"help": "Crops in one forward of the VAE. Default: as many as make one of 1024 pixels, and fit."},
    )
    vae_tile: str = field(
        default="auto",
        metadata={
            "help": "What the VAE encodes at a time: whole pictures, or overlapping tiles of this side, a multiple of "
            "32 pixels; the numbers differ a little. auto: whole where that fits, else the largest tile that does."
        },
    )
    class_data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of class pictures, to be encoded too: the first --num_class_images of it, by name."},
    )
    num_class_images: int = field(default=100, metadata={"help": "How many class pictures, at the most."})
    output_path: str = field(default=LATENTS_PATH, metadata={"help": "The folder to write."})
    overwrite: bool = field(default=False, metadata={"help": "Replace files that were made with other settings."})

    def __post_init__(self) -> None:
        require_right(
            [
                *self.picture_faults(),
                *less_than_one(self, "num_crops", "vae_batch_size", "num_class_images"),
                *self.crop_faults(),
            ]
        )

    def batch_size(self, resolution: int) -> int:
        """Crops in one forward, at the most: by default what takes as much as one of 1024 px, and no more than 16."""
        return self.vae_batch_size or max(1, min(16, (1024 // resolution) ** 2))

    @property
    def crops(self) -> int:
        """How many crops of a picture that is not square."""
        return 1 if self.center_crop else self.num_crops


@dataclass(frozen=True)
class CaptioningConfig:
    """Which pictures to caption, by which model, and in which words."""

    instance_data_dir: str | None = field(
        default=None, metadata={"aliases": ["--local_data_dir"], "help": "Folder of the pictures."}
    )
    recursive: bool = field(default=False, metadata={"help": "Caption pictures in subfolders too."})
    caption_model: str = field(
        default="Salesforce/blip-image-captioning-large",
        metadata={
            "help": "Folder or hub id of a model that captions pictures: of BLIP's kind, or of Florence's "
            "(florence-community/Florence-2-base with --caption_task '<DETAILED_CAPTION>')."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where hub downloads are kept."})
    caption_task: str = field(
        default="",
        metadata={"help": "What the model is told: the beginning of the caption (BLIP), or a task (Florence)."},
    )
    caption_prefix: str = field(default="", metadata={"help": "Written before each caption: 'a photo of sks dog, '."})
    caption_suffix: str = field(default="", metadata={"help": "Written behind each caption."})
    max_new_tokens: int = field(default=60, metadata={"help": "The longest caption, in the model's tokens."})
    caption_batch_size: int = field(default=8, metadata={"help": "Pictures at a time; fewer where memory runs out."})

    def __post_init__(self) -> None:
        require_right(less_than_one(self, "max_new_tokens", "caption_batch_size"))
