"""The flags of drawing. Nothing here is heavy to import."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sd3_lora.common.command_line import less_than_one, require_right, split_prompt
from sd3_lora.common.config import BudgetConfig, DeviceConfig, ModelConfig, missing_path
from sd3_lora.common.defaults import EMBEDDINGS_PATH, LATENTS_PATH, LORA_FOLDER
from sd3_lora.common.placement_flags import BaseFlags, Switch

SchedulerName = Literal["euler", "heun", "dpmpp_2m", "unipc"]
# By name: what other programs call it.
SCHEDULERS: dict[SchedulerName, str] = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M", "unipc": "UniPC"}
PictureFormat = Literal["png", "jpg", "webp"]
SKIP_LAYER_DEFAULTS = {"scale": 2.8, "start": 0.01, "stop": 0.2}  # diffusers' and SD3.5-Medium's


@dataclass(frozen=True)
class InferenceConfig:
    """What to draw, with which LoRA, and where to."""

    lora: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Folder, file or hub id of a LoRA; several are added up in each picture, and to compare them is "
            "a run for each. Without it: the model as it is (on the "
            f"miniature, {LORA_FOLDER} where that is there).",
        },
    )
    lora_scale: list[float] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Strength of each --lora; default 1. Several for one --lora, such as 0 0.5 1: all is drawn with "
            "each of them; 0 is the base.",
        },
    )
    identifier_embedding: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "File of an identifier's embedding; may be repeated. Those beside a --lora are found without it.",
        },
    )
    compare: bool = field(
        default=False, metadata={"help": "Draw without any LoRA too, from the same noise, and put both side by side."}
    )
    prompt: list[str] = field(
        default_factory=list, metadata={"action": "extend", "help": "What to draw; may be repeated."}
    )
    prompts_file: str | None = field(
        default=None,
        metadata={
            "help": "Text file with prompts, one a line; # begins a comment. Three sets are in examples/prompts: "
            "recontextualization.txt, art.txt and property.txt."
        },
    )
    subject: str | None = field(
        default=None,
        metadata={"help": "What stands for {} in the prompts, such as those of examples/prompts: 'sks dog'."},
    )
    negative_prompt: str = field(default="", metadata={"help": "What not to draw."})
    num_images: int = field(
        default=1,
        metadata={
            "aliases": ["--num_images_per_prompt", "--num-images-per-prompt"],
            "help": "Pictures of each prompt.",
        },
    )
    num_steps: int = field(
        default=28,
        metadata={"aliases": ["--num_inference_steps", "--num-inference-steps"], "help": "Denoising steps."},
    )
    guidance: float = field(
        default=7.0,
        metadata={
            "aliases": ["--guidance_scale", "--guidance-scale"],
            "help": "Classifier-free guidance; 1 or less is without.",
        },
    )
    scheduler: SchedulerName = field(
        default="euler",
        metadata={
            "help": "Which steps lead from noise to a picture. heun calls the transformer twice a step; dpmpp_2m and "
            "unipc are as exact in fewer steps."
        },
    )
    timestep_shift: float | None = field(
        default=None, metadata={"help": "Shift of the noise levels. Default: the model's own, 3.0 in SD3."}
    )
    skip_guidance_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Skip-layer guidance, for SD3.5-Medium: the blocks to leave out, such as 7 8 9."},
    )
    skip_layer_guidance_scale: float | None = field(
        default=None, metadata={"help": f"Its strength; {SKIP_LAYER_DEFAULTS['scale']:g} where none is given."}
    )
    skip_layer_guidance_start: float | None = field(
        default=None,
        metadata={"help": f"After which share of the steps; {SKIP_LAYER_DEFAULTS['start']:g} where none is given."},
    )
    skip_layer_guidance_stop: float | None = field(
        default=None,
        metadata={"help": f"Until which share of the steps; {SKIP_LAYER_DEFAULTS['stop']:g} where none is given."},
    )
    height: int | None = field(default=None, metadata={"help": "In pixels. Default: the LoRA's resolution."})
    width: int | None = field(default=None, metadata={"help": "In pixels. Default: the LoRA's resolution."})
    seed: int = field(default=0, metadata={"help": "Of the starting noise, which all prompts share."})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Pictures denoised together. Default: on a GPU as many as are fastest and fit; on a CPU 1."},
    )
    outdir: str = field(
        default="images",
        metadata={
            "aliases": ["--output_dir", "--output-dir"],
            "help": "Where the pictures go. Pictures of other settings that are there keep their names.",
        },
    )
    format: PictureFormat = field(
        default="png", metadata={"help": "Of the pictures and of the contact sheet; settings are noted in each."}
    )
    data_df_path: str = field(
        default=EMBEDDINGS_PATH, metadata={"help": "An embeddings file; its prompts need no text encoder."}
    )
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "T5 tokens. Default: as the LoRA's training."}
    )
    t5_precision: Literal["int8", "nf4", "fp16", "fp32"] | None = field(
        default=None, metadata={"help": "Of T5, for prompts that have no embedding yet."}
    )
    t5_stream: bool = field(default=False, metadata={"help": "Keep one T5 block at a time on the device."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Of the transformer. Default: fp16 on a GPU, fp32 on a CPU."}
    )
    unmerged: bool = field(
        default=False,
        metadata={
            "help": "Keep LoRAs beside the base's weights, as in training: slower. Without it they are added to the "
            "weights where these can be changed, and rounded with them."
        },
    )
    compile: Switch = field(
        default="auto",
        metadata={
            "help": "Compile the transformer's blocks: a quarter of a minute once, less time a step, other roundings. "
            "auto: on a GPU, where the pictures to come repay it."
        },
    )
    capture: Switch = field(
        default="auto",
        metadata={
            "help": "Capture the transformer's forward as one CUDA graph and replay it: the same kernels, launched at "
            "once. auto: where the run can have it."
        },
    )
    vae_precision: Literal["fp32", "fp16", "bf16"] = field(default="fp32", metadata={"help": "Of the VAE."})
    vae_tile: str = field(
        default="auto",
        metadata={
            "help": "What the VAE decodes at a time: whole pictures, or overlapping tiles of this side, a multiple of "
            "32 pixels; the picture differs a little. auto: whole where that fits, else the largest tile that does."
        },
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(self, "num_images", "num_steps", "batch_size", "height", "width")
        yield from split_prompt("prompt", self.prompt)
        if self.seed < 0:
            yield f"--seed {self.seed} must be at least 0: there is no random seed here, so type any number"
        for name, values in (("guidance", [self.guidance]), ("lora_scale", self.lora_scale)):
            yield from (f"--{name} {value:g} must be a finite number" for value in values if not math.isfinite(value))
        yield from self._schedule_faults()
        yield from (f"--lora: {fault}" for fault in map(missing_path, self.lora) if fault)
        for path in self.identifier_embedding:
            if not Path(path).expanduser().exists():
                yield f"--identifier_embedding {path} is not there: check the path"
        if self.lora_scale and len(self.lora) != 1 and len(self.lora_scale) != len(self.lora):
            added = "" if len(self.lora) < 2 else ", since they are added up; several strengths are of one --lora alone"
            yield f"{len(self.lora)} --lora and {len(self.lora_scale)} --lora_scale: give one for each{added}"

    def _schedule_faults(self) -> Iterator[str]:
        if self.timestep_shift is not None and not 0 < self.timestep_shift < math.inf:
            yield f"--timestep_shift {self.timestep_shift:g} must be a positive number: 3.0 is SD3's own"
        flags = {name: getattr(self, f"skip_layer_guidance_{name}") for name in SKIP_LAYER_DEFAULTS}
        given = [f"--skip_layer_guidance_{name}" for name, value in flags.items() if value is not None]
        if given and not self.skip_guidance_layers:
            yield f"{given[0]} needs --skip_guidance_layers: type the blocks to leave out, such as 7 8 9"
        if self.skip_guidance_layers and self.guidance <= 1:
            yield f"--skip_guidance_layers needs --guidance above 1, not {self.guidance:g}"
        if flags["scale"] is not None and not math.isfinite(flags["scale"]):
            yield f"--skip_layer_guidance_scale {flags['scale']:g} must be a finite number"
        start, stop = (SKIP_LAYER_DEFAULTS[name] if flags[name] is None else flags[name] for name in ("start", "stop"))
        if self.skip_guidance_layers and not 0 <= start < stop <= 1:
            yield f"skip-layer guidance from {start:g} to {stop:g} of the steps: both are shares, the first the smaller"


@dataclass(frozen=True)
class DrawingFlags:
    """All the flags of drawing, by group, in the order of `--help_all`."""

    drawing: InferenceConfig
    base: BaseFlags
    model: ModelConfig
    device: DeviceConfig
    budget: BudgetConfig


@dataclass(frozen=True)
class ClassDrawingConfig:
    """Which class pictures to draw, and where to."""

    class_prompt: str | None = field(
        default=None,
        metadata={"help": "What to draw, a prompt without the identifier: 'a photo of a dog'."},
    )
    class_prompts_file: str | None = field(
        default=None,
        metadata={
            "help": "Text file with prompts that are drawn in turn in its place, one a line; each picture gets its own "
            "as a caption (class_0000.txt), which --class_captions reads."
        },
    )
    class_data_dir: str | None = field(
        default=None, metadata={"help": "Where the pictures go; pictures that are there already are counted."}
    )
    num_class_images: int = field(default=100, metadata={"help": "How many pictures there will be in the folder."})
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = field(
        default=None, metadata={"help": "Of the transformer; no is fp32. Default: fp16 on a GPU, fp32 on a CPU."}
    )
    sample_batch_size: int = field(default=4, metadata={"help": "Pictures denoised together, or as many as fit."})
    num_steps: int = field(default=28, metadata={"help": "Denoising steps."})
    guidance: float = field(default=7.0, metadata={"help": "Classifier-free guidance; 1 or less is without."})
    resolution: int | None = field(
        default=None, metadata={"help": "Of training: side of the pictures in pixels. Default: the model's own."}
    )
    height: int | None = field(
        default=None, metadata={"help": "In pixels, for --use_aspect_ratio_bucket. Default: the resolution."}
    )
    width: int | None = field(default=None, metadata={"help": "Likewise."})
    seed: int = field(default=0, metadata={"help": "Of the starting noise."})
    data_df_path: str = field(
        default=EMBEDDINGS_PATH, metadata={"help": "The embeddings file; it must have the class prompt."}
    )
    latents_path: str = field(
        default=LATENTS_PATH,
        metadata={"help": "The cache that gets the latents: precompute_latents.py's."},
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(
            self, "num_class_images", "sample_batch_size", "num_steps", "resolution", "height", "width"
        )
        if self.class_prompt is None:
            yield 'nothing to draw: type --class_prompt "a photo of a dog"'
        if self.class_data_dir is None:
            yield "there is no folder to draw into: type --class_data_dir FOLDER"
        if self.seed < 0:
            yield f"--seed {self.seed} must be at least 0"
        if not math.isfinite(self.guidance):
            yield f"--guidance {self.guidance:g} must be a finite number"
