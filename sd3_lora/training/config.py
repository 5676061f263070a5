"""The flags of training, with diffusers' names and meanings."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal, get_args, get_type_hints

from sd3_lora.common.command_line import HarmlessFlag, Secret, UserError, less_than_one, require_right
from sd3_lora.common.config import (
    BudgetConfig,
    CropFlags,
    DeviceConfig,
    ExportFormat,
    LoraStart,
    LoraType,
    ModelConfig,
)
from sd3_lora.common.defaults import EMBEDDINGS_PATH, LATENTS_PATH, LORA_FOLDER
from sd3_lora.common.placement_flags import BaseFlags, StepFlags
from sd3_lora.training.optimizer_kinds import (
    ADAMW,
    ADAMW_8BIT,
    ADAMW_SPELLINGS,
    KINDS,
    PRODIGY,
    SCHEDULE_FREE_ADAMW,
    OptimizerKind,
    find_kind,
)
from sd3_lora.training.watch_flags import WatchFlags

PriorTerm = Literal["prediction", "preference"]
# The flags of prior preservation that do nothing unless one of these is there too.
_PRIOR_FLAGS = {
    ("--with_prior_preservation",): (
        "class_data_dir",
        "num_class_images",
        "prior_loss_weight",
        "prior_generation_precision",
        "sample_batch_size",
    ),
    ("--with_prior_preservation", "--prior_term prediction"): ("class_prompt",),
    ("--prior_term",): ("prior_term_weight",),
    ("--prior_term prediction",): ("prior_share", "prior_prompts_file"),
}
WeightingScheme = Literal["logit_normal", "sigma_sqrt", "mode", "cosmap", "none"]
# Those that reach their end with the run, so that a longer run has other rates.
ENDING_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial")
DEFAULT_STEPS = 500  # what the reference's notebook trains a subject of five pictures for

_FREED = "the text encoders are freed before training; only the transformer is trained"
# Flags of diffusers' scripts that are not here, with what to do instead.
REFUSED_FLAGS = {
    "train_text_encoder": _FREED,
    "text_encoder_lr": f"{_FREED}, at --learning_rate",
    "adam_weight_decay_text_encoder": f"{_FREED}; leave it out",
}
# Those that ask for what is always so.
HARMLESS_FLAGS = {
    "cache_latents": HarmlessFlag("latents are always cached"),
    "dataloader_num_workers": HarmlessFlag("batches come from cached tensors, without a loader", takes_value=True),
    "upcast_before_saving": HarmlessFlag("the LoRA is always trained and saved in float32"),
    "local_rank": HarmlessFlag("torchrun and accelerate launch pass it in the environment", takes_value=True),
}


@dataclass(frozen=True)
class DataConfig(CropFlags):
    """What stage one left, and what of it to train on."""

    data_df_path: str = field(
        default=EMBEDDINGS_PATH,
        metadata={
            "help": "What compute_embeddings.py wrote. Where pictures are named, and this is neither named nor there, "
            "that script is run first."
        },
    )
    latents_path: str = field(
        default=LATENTS_PATH,
        metadata={"help": "What precompute_latents.py wrote; where it is not there, that script is run first."},
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "Checked against the embeddings file. Default: whatever it holds (diffusers: 77)."},
    )
    num_crops: int | None = field(
        default=None, metadata={"help": "Train on the crops that this many give; default: all in the cache."}
    )
    random_flip: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Train on the mirrored twins too; `--random_flip no` leaves them out. Default: as cached.",
        },
    )
    caption_dropout: float = field(
        default=0.0, metadata={"help": "Chance that a picture comes with the empty prompt in place of its own."}
    )
    clip_l_dropout: float = field(
        default=0.0,
        metadata={"help": "Chance that a prompt comes with zeros in place of CLIP-L's part (SD3's: 0.464)."},
    )
    clip_g_dropout: float = field(default=0.0, metadata={"help": "Likewise of CLIP-G's part."})
    t5_dropout: float = field(default=0.0, metadata={"help": "Likewise of T5's part."})
    masked_loss: bool = field(
        default=False,
        metadata={
            "help": "Weight the loss by the pictures' masks, which precompute_latents.py caches. Weights are divided "
            "by their mean over a picture's crops (kohya: not divided; OneTrainer: only on request)."
        },
    )
    unmasked_weight: float = field(
        default=0.0,
        metadata={
            "help": "What the masks leave out weighs so much, from 0 to 1, where they weigh 1 (kohya: 0; OneTrainer: "
            "0.1)."
        },
    )

    def __post_init__(self) -> None:
        require_right(
            [
                *self.picture_faults(),
                *less_than_one(self, "num_crops"),
                *self.crop_faults(),
                *self._dropout_faults(),
                *self._mask_faults(),
            ]
        )

    def _dropout_faults(self) -> Iterator[str]:
        for name in ("caption_dropout", "clip_l_dropout", "clip_g_dropout", "t5_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"--{name} must be at least 0 and at most 1"

    @property
    def weight_beside_masks(self) -> float | None:
        """unmasked_weight; None where the loss has no masks."""
        return self.unmasked_weight if self.masked_loss else None

    def _mask_faults(self) -> Iterator[str]:
        if not 0 <= self.unmasked_weight <= 1:
            yield f"--unmasked_weight {self.unmasked_weight:g} must be at least 0 and at most 1"
        if not self.masked_loss:
            for name in ("mask_data_dir", "alpha_mask", "unmasked_weight"):
                if getattr(self, name):
                    yield f"--{name} has no effect without --masked_loss: add that, or leave --{name} out"


@dataclass(frozen=True)
class PriorConfig:
    """Prior preservation, against drift: by pictures of the subject's class, or by what the base itself predicts."""

    with_prior_preservation: bool = field(
        default=False,
        metadata={"help": "Train on as many class pictures as pictures of the subject, --train_batch_size of each."},
    )
    prior_term: PriorTerm | None = field(
        default=None,
        metadata={
            "help": "Prior preservation without class pictures (docs/prior.md). prediction: what the base predicts for "
            "the class prompt on the same noisy latents is to stay. preference: a picture is learned until the base "
            "predicts it worse."
        },
    )
    class_prompt: str | None = field(
        default=None,
        metadata={
            "help": "The instance prompt without the identifier: 'a photo of a dog'. --prior_term prediction takes "
            "stage one's where it is not given."
        },
    )
    class_data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of class pictures; those that are missing are drawn into it by the model itself. Default: "
            "those of --concepts_list, with their class prompts."
        },
    )
    num_class_images: int = field(default=100, metadata={"help": "How many class pictures of a folder."})
    prior_loss_weight: float = field(
        default=1.0, metadata={"help": "The loss is the subject's plus so many times the class pictures'."}
    )
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = field(
        default=None,
        metadata={"help": "Of the transformer that draws them; no is fp32. Default: fp16 on a GPU, fp32 on a CPU."},
    )
    sample_batch_size: int = field(default=4, metadata={"help": "Class pictures drawn together, or as many as fit."})
    prior_term_weight: float | None = field(
        default=None,
        metadata={
            "help": "Of prediction: the loss is the subject's plus so many times the term. Of preference: the larger, "
            "the earlier a picture is learned enough. Default: 1; 10 of preference."
        },
    )
    prior_share: float = field(
        default=0.25,
        metadata={"help": "Part of the pictures on which prediction is measured; the term's weight stays the same."},
    )
    prior_prompts_file: str | None = field(
        default=None,
        metadata={
            "help": "Text file with more prompts for prediction, one a line, taken at random; stage one embeds them."
        },
    )

    def __post_init__(self) -> None:
        require_right([*self._faults(), *self._without_effect()])

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(self, "num_class_images", "sample_batch_size")
        if not 0 <= self.prior_loss_weight < math.inf:
            yield f"--prior_loss_weight {self.prior_loss_weight:g} must be a finite number, not negative"
        if self.prior_term_weight is not None and not 0 < self.prior_term_weight < math.inf:
            yield f"--prior_term_weight {self.prior_term_weight:g} must be positive: leave --prior_term out for none"
        if not 0 < self.prior_share <= 1:
            yield f"--prior_share {self.prior_share:g} must be more than 0 and at most 1: 0.25 is a quarter"
        if not self.with_prior_preservation:
            return
        if self.prior_term is not None:
            yield (
                "--with_prior_preservation and --prior_term are two ways of prior preservation, with and without class "
                "pictures: leave one out"
            )
        if self.class_data_dir is not None or self.class_prompt is not None:
            yield from self.lacking()

    def lacking(self) -> Iterator[str]:
        """What class pictures need and flags do not say; a concepts list may say both."""
        if self.class_prompt is None:
            yield (
                "--with_prior_preservation needs the prompt without the identifier: type --class_prompt "
                '"a photo of a dog"'
            )
        if self.class_data_dir is None:
            yield (
                "--with_prior_preservation needs a folder of class pictures, or an empty one to draw them into: type "
                "--class_data_dir FOLDER"
            )

    def _without_effect(self) -> Iterator[str]:
        """Flags of a way that is not taken."""
        in_force = {"--with_prior_preservation": self.with_prior_preservation, "--prior_term": bool(self.prior_term)}
        in_force["--prior_term prediction"] = self.predicts
        for owners, names in _PRIOR_FLAGS.items():
            if not any(in_force[owner] for owner in owners):
                which = "that" if len(owners) == 1 else "one of them"
                yield from (
                    f"--{name} has no effect without {' or '.join(owners)}: add {which}, or leave --{name} out"
                    for name in names
                    if getattr(self, name) != getattr(type(self), name)
                )

    @property
    def pools(self) -> int:
        """How many pictures come for each of the subject, itself included."""
        return 2 if self.with_prior_preservation else 1

    @property
    def predicts(self) -> bool:
        """Whether pictures come once more with a prior prompt."""
        return self.prior_term == "prediction"

    @property
    def more(self) -> str:
        """What holds a drifting run back more than these flags do."""
        if self.prior_term is not None:
            return "raise --prior_term_weight"
        return "raise --prior_loss_weight" if self.with_prior_preservation else "add --with_prior_preservation"

    @property
    def term_weight(self) -> float:
        """prior_term_weight, or the term's own; 0 without a term."""
        own = {None: 0.0, "prediction": 1.0, "preference": 10.0}[self.prior_term]
        return own if self.prior_term_weight is None else self.prior_term_weight

    @property
    def share(self) -> Fraction:
        """prior_share, exactly as it was typed."""
        return Fraction(repr(float(self.prior_share)))

    def is_even(self, batch_size: int) -> bool:
        """Whether as many pictures of each micro-batch of this size come once more."""
        return not self.predicts or (self.share * batch_size).denominator == 1

    def rows(self, batch_size: int) -> tuple[int, int]:
        """The most rows that a micro-batch adds to the trained model's, and the most that the base gets."""
        added = math.ceil(self.share * batch_size) if self.predicts else 0
        return added, batch_size if self.prior_term == "preference" else added

    def identity(self) -> dict[str, object]:
        """The flags that decide the numbers of a run, beside the class pictures and the prior prompts themselves."""
        names = ("with_prior_preservation", "num_class_images", "prior_loss_weight", "prior_term", "prior_share")
        return {
            **{f"--{name}": getattr(self, name) for name in names},
            "--class_prompt": self.class_prompt if self.with_prior_preservation else None,
            "--prior_term_weight": self.term_weight if self.prior_term else None,
        }

    def sentence(self) -> str:
        """The term and its weight, to be added to a sentence; nothing without one."""
        if self.prior_term is None:
            return ""
        part = f" on {self.prior_share:g} of the pictures" if self.predicts and self.prior_share < 1 else ""
        return f", prior term {self.prior_term} × {self.term_weight:g}{part}"


@dataclass(frozen=True)
class LoraFlags:
    """The shape of the LoRA."""

    rank: int = field(default=4, metadata={"help": "Width of the update matrices."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / rank. Default: rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Chance of dropping an input of the LoRA."})
    lora_layers: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated layers, such as attn.to_k,attn.to_q, or presets: attention, attention+mlp, "
            "second_attention (of SD3.5-Medium). Default: all of joint attention."
        },
    )
    lora_blocks: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated indices of transformer blocks, such as 12,13, or presets: early (the first half), "
            "late (the rest). Default: all."
        },
    )
    rank_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Ranks of single layers, such as attn.to_q=8,ff.net.2=16; the first that fits counts. Their alpha "
            "is in proportion."
        },
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the update by alpha / sqrt(rank) (rsLoRA), not alpha / rank."}
    )
    use_dora: bool = field(
        default=False,
        metadata={"help": "Train the magnitudes of the layers' outputs too (DoRA); not with streamed blocks."},
    )
    init_lora_weights: LoraStart = field(
        default="gaussian",
        metadata={
            "help": "gaussian (as diffusers) and default (as PEFT) start from nothing; pissa and olora from the "
            "largest part of the weights, and save twice the rank."
        },
    )
    lora_type: LoraType = field(
        default="lora",
        metadata={"help": "lora, or LyCORIS' lokr and loha, whose file ComfyUI and inference.py read."},
    )
    lokr_factor: int = field(
        default=-1,
        metadata={
            "help": "Rows and columns of a LoKr's first matrix; the larger, the fewer numbers. -1 is about the square "
            "root of the layer's."
        },
    )
    init_lora: str | None = field(
        default=None,
        metadata={"help": "Start from this LoRA: a folder, file or hub id, of this or another program."},
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(self, "rank")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            yield "--lora_alpha must be positive"
        if not 0 <= self.lora_dropout < 1:
            yield "--lora_dropout must be at least 0 and less than 1"
        if self.init_lora_weights in ("pissa", "olora"):
            start = f"--init_lora_weights {self.init_lora_weights}"
            if self.use_dora:
                yield f"{start} and --use_dora are two kinds of LoRA: leave one out"
            if self.init_lora is not None:
                yield f"{start} and --init_lora are two ways to start: leave one out"
            if self.lora_dropout:
                yield f"{start} and --lora_dropout: it would drop a part of the model itself: leave one out"
        yield from self._type_faults()
        for entry in self._split(self.rank_pattern) or ():
            layer, _, rank = entry.partition("=")
            if not layer.strip() or not rank.strip().isdecimal() or int(rank) < 1:
                yield f"--rank_pattern {self.rank_pattern} cannot be read: type for example attn.to_q=8,ff.net.2=16"

    def _type_faults(self) -> Iterator[str]:
        if self.lokr_factor != -1 and self.lokr_factor < 1:
            yield f"--lokr_factor {self.lokr_factor} must be at least 1, or -1 for about the square root"
        if self.lokr_factor != -1 and self.lora_type != "lokr":
            yield f"--lokr_factor {self.lokr_factor} is of --lora_type lokr: add that, or leave it out"
        if self.lora_type == "lora":
            return
        of_plain_lora = {
            "--use_dora": self.use_dora,
            "--use_rslora": self.use_rslora,
            f"--init_lora_weights {self.init_lora_weights}": self.init_lora_weights != "gaussian",
            f"--lora_dropout {self.lora_dropout:g}": self.lora_dropout > 0,
        }
        for flag, typed in of_plain_lora.items():
            if typed:
                yield f"{flag} is of a plain LoRA, not of --lora_type {self.lora_type}: leave one out"

    @property
    def alpha(self) -> float:
        """lora_alpha, or the rank."""
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def layers(self) -> list[str] | None:
        """lora_layers as a list."""
        return self._split(self.lora_layers)

    @property
    def blocks(self) -> list[str] | None:
        """lora_blocks as a list of indices and presets."""
        return self._split(self.lora_blocks)

    @property
    def ranks(self) -> dict[str, int]:
        """rank_pattern as layer → rank."""
        entries = (entry.partition("=") for entry in self._split(self.rank_pattern) or ())
        return {layer.strip(): int(rank) for layer, _, rank in entries}

    @staticmethod
    def _split(words: str | None) -> list[str] | None:
        return [word.strip() for word in words.split(",")] if words else None


@dataclass(frozen=True)
class AverageFlags:
    """The moving average of the LoRA."""

    use_ema: bool = field(
        default=False,
        metadata={"help": "Keep an exponential moving average of the LoRA too, and write it beside the LoRA."},
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={"help": "The largest decay of that average; step n has at most (1 + n) / (10 + n)."},
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if not 0 <= self.ema_decay < 1:
            yield f"--ema_decay {self.ema_decay:g} must be at least 0 and less than 1: 0.9999 is usual"
        elif self.ema_decay != AverageFlags.ema_decay and not self.use_ema:
            yield f"--ema_decay {self.ema_decay:g} is of --use_ema: add that, or leave it out"


def _prodigy_switch(text: str) -> Any:
    """A flag of Prodigy that is on unless it says no."""
    return field(default=None, metadata={"nargs": "?", "const": True, "help": f"{text} Default: yes."})


@dataclass(frozen=True)
class OptimizerConfig:
    """How the LoRA is updated."""

    optimizer: str = field(
        default=ADAMW.name,
        metadata={"help": f"{', '.join(kind.name for kind in KINDS)}: each from its library (docs/optimizers.md)."},
    )
    use_8bit_adam: bool = field(default=False, metadata={"help": "Keep AdamW's state in 8 bits (bitsandbytes)."})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"Peak learning rate. Default: {ADAMW.learning_rate:g}; 1 with prodigy, which multiplies it."
        },
    )
    lr_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Learning rates of single layers or of parts of them, such as attn=5e-5,ff.net.2.lora_B=1e-3; the "
            "first that fits counts, and others have --learning_rate."
        },
    )
    scale_lr: bool = field(
        default=False, metadata={"help": "Multiply the learning rates by batch size, accumulation steps and processes."}
    )
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
    ] = field(default="constant", metadata={"help": "The schedule of the learning rate."})
    lr_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps of warmup, for schedules that warm up (diffusers: 500)."}
    )
    lr_num_cycles: int = field(default=1, metadata={"help": "Restarts of cosine_with_restarts."})
    lr_power: float = field(default=1.0, metadata={"help": "Power of polynomial."})
    lr_step_rules: str | None = field(
        default=None, metadata={"help": "Of piecewise_constant: 1:100,0.1 is full rate for 100 steps, then a tenth."}
    )
    adam_beta1: float | None = field(
        default=None,
        metadata={"help": "Decay of the first moment (adafactor has none). Default: 0.9."},
    )
    adam_beta2: float | None = field(
        default=None,
        metadata={"help": "Decay of the second moment (adafactor has its own). Default: 0.999; 0.99 with lion_8bit."},
    )
    adam_weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of the optimizer."})
    adam_epsilon: float | None = field(
        default=None,
        metadata={"help": "Epsilon of the optimizer (lion_8bit has none, adafactor its own). Default: 1e-8."},
    )
    prodigy_beta3: float | None = field(
        default=None, metadata={"help": "Decay of Prodigy's averages. Default: the square root of --adam_beta2."}
    )
    prodigy_decouple: bool | None = _prodigy_switch("Prodigy decays weights as AdamW does, not as Adam.")
    prodigy_use_bias_correction: bool | None = _prodigy_switch("Prodigy corrects its moments' bias, as Adam.")
    prodigy_safeguard_warmup: bool | None = _prodigy_switch("Prodigy's estimate leaves out the rate while it warms up.")
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})

    def __post_init__(self) -> None:
        if find_kind(self.optimizer) is None:
            names = ", ".join(kind.name for kind in KINDS)
            require_right([f"--optimizer {self.optimizer} is unknown: type one of {names}"])
        require_right([*self._misfits(), *self._rate_faults(), *self._faults()])

    @property
    def kind(self) -> OptimizerKind:
        """Of the optimizer."""
        kind = find_kind(self.optimizer) or ADAMW
        return ADAMW_8BIT if kind == ADAMW and self.use_8bit_adam else kind

    @property
    def rate(self) -> float:
        """learning_rate, or the optimizer's own."""
        return self.kind.learning_rate if self.learning_rate is None else self.learning_rate

    @property
    def rates(self) -> dict[str, float]:
        """lr_pattern as layer → learning rate.

        Raises:
            ValueError: it cannot be read.
        """
        entries = [entry.partition("=") for entry in self.lr_pattern.split(",")] if self.lr_pattern else []
        rates = {layer.strip(): float(rate) for layer, _, rate in entries}
        if not all(layer and 0 < rate < math.inf for layer, rate in rates.items()):
            raise ValueError(self.lr_pattern)
        return rates

    @property
    def betas(self) -> tuple[float, float] | None:
        """adam_beta1 and adam_beta2, or the optimizer's own; None where it has none."""
        if self.kind.beta1 is None or self.kind.beta2 is None:
            return None
        return (
            self.kind.beta1 if self.adam_beta1 is None else self.adam_beta1,
            self.kind.beta2 if self.adam_beta2 is None else self.adam_beta2,
        )

    @property
    def epsilon(self) -> float | None:
        """adam_epsilon, or the optimizer's own; None where it has none."""
        return self.kind.epsilon if self.adam_epsilon is None else self.adam_epsilon

    def prodigy_options(self) -> dict[str, Any]:
        """What Prodigy alone is told, with diffusers' defaults."""
        return {
            "beta3": self.prodigy_beta3,
            "decouple": self.prodigy_decouple is not False,
            "use_bias_correction": self.prodigy_use_bias_correction is not False,
            "safeguard_warmup": self.prodigy_safeguard_warmup is not False,
        }

    def identity(self) -> dict[str, Any]:
        """Field → what decides the numbers, alike for all ways to ask for the same."""
        beta1, beta2 = self.betas or (None, None)
        is_8bit = self.kind == ADAMW_8BIT
        switches = {
            f"prodigy_{name}": None if value else "no"
            for name, value in self.prodigy_options().items()
            if name != "beta3"
        }
        return {
            **asdict(self),
            "optimizer": ADAMW.name if is_8bit else self.kind.name,
            "use_8bit_adam": is_8bit,
            "learning_rate": self.rate,
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "adam_epsilon": self.epsilon,
            **switches,
        }

    def earlier_spellings(self) -> frozenset[str]:
        """Of the optimizer's name in `identity`: earlier builds noted it as it was typed."""
        return ADAMW_SPELLINGS if self.identity()["optimizer"] == ADAMW.name else frozenset()

    def _misfits(self) -> Iterator[str]:
        """What cannot work together."""
        kind, name = self.kind, f"--optimizer {self.kind.name}"
        if not kind.is_installed:
            yield f"{name} needs {kind.package}, which is not installed: type `pip install {kind.package}`"
        if self.use_8bit_adam and kind != ADAMW_8BIT:
            yield f"--use_8bit_adam is of AdamW, not of {name}: leave one of them out"
        for flag, typed, has in (
            ("adam_beta1", self.adam_beta1, kind.beta1),
            ("adam_beta2", self.adam_beta2, kind.beta2),
            ("adam_epsilon", self.adam_epsilon, kind.epsilon),
        ):
            if typed is not None and has is None:
                yield f"--{flag} does nothing with {name}: leave it out"
        for flag in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup"):
            if getattr(self, f"prodigy_{flag}") is not None and kind != PRODIGY:
                yield f"--prodigy_{flag} does nothing with {name}: leave it out, or type --optimizer prodigy"
        if kind == PRODIGY and self.scale_lr:
            yield f"--scale_lr multiplies a learning rate that {name} finds by itself: leave it out"
        if kind == PRODIGY and self.adam_epsilon == 0:
            yield f"--adam_epsilon must be positive with {name}"
        if kind == SCHEDULE_FREE_ADAMW and self.adam_beta1 == 0:
            yield f"--adam_beta1 must be positive with {name}, which averages by it"
        if kind == SCHEDULE_FREE_ADAMW and self.lr_scheduler not in ("constant", "constant_with_warmup"):
            yield (
                f"--lr_scheduler {self.lr_scheduler} does not go with {name}, which averages in place of a schedule: "
                "type constant or constant_with_warmup"
            )

    def _rate_faults(self) -> Iterator[str]:
        try:
            rates = self.rates
        except ValueError:
            yield f"--lr_pattern {self.lr_pattern} cannot be read: type for example attn=5e-5,ff.net.2.lora_B=1e-3"
            return
        if self.kind == PRODIGY and any(rate != self.rate for rate in rates.values()):
            yield (
                f"--lr_pattern {self.lr_pattern} does not go with --optimizer {self.kind.name}, which finds one "
                "learning rate for all: leave one of them out"
            )

    def _faults(self) -> Iterator[str]:
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            yield "--lr_scheduler piecewise_constant needs --lr_step_rules, for example 1:100,0.1"
        if not (self.rate > 0 and self.max_grad_norm > 0) or self.lr_warmup_steps < 0:
            yield "--learning_rate and --max_grad_norm must be positive, --lr_warmup_steps not negative"
        if not all(0 <= beta < 1 for beta in self.betas or ()):
            yield "--adam_beta1 and --adam_beta2 must be at least 0 and less than 1"
        if self.prodigy_beta3 is not None and not 0 <= self.prodigy_beta3 < 1:
            yield "--prodigy_beta3 must be at least 0 and less than 1"
        if not (self.adam_weight_decay >= 0 and (self.epsilon or 0) >= 0):
            yield "--adam_weight_decay and --adam_epsilon must not be negative"

    def scaled_rate(self, pictures_per_step: int) -> float:
        """The learning rate, multiplied under --scale_lr."""
        return self.rate * (pictures_per_step if self.scale_lr else 1)

    def scaled_rates(self, pictures_per_step: int) -> dict[str, float]:
        """Those of lr_pattern, likewise."""
        return {layer: rate * (pictures_per_step if self.scale_lr else 1) for layer, rate in self.rates.items()}


@dataclass(frozen=True)
class RunConfig:
    """How long, how large, how precise, and where to."""

    output_dir: str = field(default=LORA_FOLDER, metadata={"help": "Where the LoRA and the checkpoints go."})
    seed: int | None = field(default=None, metadata={"help": "Of every draw. Default: one is drawn and noted."})
    train_batch_size: int = field(
        default=1, metadata={"help": "Pictures in a micro-batch, for each process (diffusers: 4)."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches in an optimizer step."})
    num_train_epochs: int | None = field(
        default=None, metadata={"help": "Passes over the pictures, in place of --max_train_steps (diffusers: 1)."}
    )
    max_train_steps: int | None = field(
        default=None,
        metadata={
            "help": f"Optimizer steps. Default without --num_train_epochs: {DEFAULT_STEPS} (diffusers: one epoch)."
        },
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = field(
        default=None,
        metadata={
            "help": "Of the frozen transformer. Default: accelerate's setting, else fp16 on a GPU (diffusers: no), "
            "fp32 on a CPU."
        },
    )
    allow_tf32: bool = field(default=False, metadata={"help": "Let float32 products use TF32 (Ampere or newer)."})
    checkpointing_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between checkpoints. Default: a tenth of the run, but at least 50 and at most 500 "
            "(diffusers: 500)."
        },
    )
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "How many checkpoints to keep."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "latest (or from the start where there is none), or a checkpoint's folder."}
    )
    export: list[str] = field(
        default_factory=list,
        metadata={
            "action": "extend",
            "help": "Write the LoRA for other programs too, beside it: kohya (sd-scripts, Forge, ComfyUI), a1111.",
        },
    )
    report_to: str = field(
        default="tensorboard",
        metadata={"help": "tensorboard (when installed), wandb, comet_ml, all or none; comma-separated."},
    )
    logging_dir: str = field(
        default="logs", metadata={"help": "For trackers: a folder in the output folder, or a full path."}
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        yield from less_than_one(
            self,
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
        )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            yield f"--seed {self.seed} must be at least 0 and less than 2**63"
        for name in self.exports:
            if name not in get_args(ExportFormat):
                yield f"--export {name} is unknown: type {' or '.join(get_args(ExportFormat))}"
        if os.path.normpath(self.logging_dir).split(os.sep)[0] == os.pardir:
            yield f"--logging_dir {self.logging_dir} leaves the output folder: type a name such as logs, or a full path"
        known = {"tensorboard", "wandb", "comet_ml", "all", "none"}
        for name in self.trackers:
            if name not in known:
                yield f"--report_to {name} is unknown: type tensorboard, wandb, comet_ml, all or none"

    def steps(self, pictures: int, processes: int) -> int:
        """Optimizer steps: as given, or as many as the epochs take, rounded up to whole windows."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        if self.num_train_epochs is None:
            return DEFAULT_STEPS
        return math.ceil(self.num_train_epochs * pictures / self.pictures_per_step(processes))

    def steps_to_checkpoint(self, steps: int) -> int:
        """Optimizer steps between checkpoints of a run of so many.

        Unless a flag says how many, there are about ten: enough that a lost machine costs a tenth of a run, and few
        enough for a disk. They are 50 steps apart at least, so that saving takes no time to speak of, and 500 at most.
        """
        return self.checkpointing_steps or min(500, max(50, steps // 10))

    def pictures_per_step(self, processes: int) -> int:
        """Pictures of an optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    @property
    def exports(self) -> list[str]:
        """The formats of export, each once; commas separate them too."""
        names = (name.strip() for entry in self.export for name in entry.split(","))
        return list(dict.fromkeys(name for name in names if name))

    @property
    def trackers(self) -> list[str]:
        """report_to as a list."""
        return [name.strip() for name in self.report_to.split(",") if name.strip()]


@dataclass(frozen=True)
class FlowConfig:
    """How noise levels are drawn and errors weighted."""

    weighting_scheme: WeightingScheme = field(
        default="logit_normal",
        metadata={
            "help": "logit_normal and mode draw more of the middle noise levels; sigma_sqrt and cosmap weight the "
            "loss; none does neither."
        },
    )
    logit_mean: float = field(
        default=0.0,
        metadata={
            "help": "Of logit_normal. As in diffusers, whose table of timesteps descends: a positive mean draws LESS "
            "noise (the opposite of the paper's sign)."
        },
    )
    logit_std: float = field(default=1.0, metadata={"help": "Of logit_normal."})
    mode_scale: float = field(
        default=1.29, metadata={"help": "Of mode; in diffusers' descending table, as with --logit_mean."}
    )
    precondition_outputs: bool = field(
        default=False,
        metadata={
            "help": "Measure the error of the predicted picture instead of the velocity's: it multiplies the loss by "
            "sigma squared (diffusers: on in train_dreambooth_lora_sd3.py, which --precondition_outputs 1 asks for)."
        },
    )
    timestep_shift: float | None = field(
        default=None, metadata={"help": "Replaces the shift of the model's own scheduler (3.0 in SD3)."}
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if not self.logit_std >= 0:
            yield "--logit_std must not be negative"
        if self.timestep_shift is not None and not self.timestep_shift > 0:
            yield "--timestep_shift must be positive: 3.0 is SD3's own"


@dataclass(frozen=True)
class HubFlags:
    """The upload to the hub. It begins once the LoRA is on disk."""

    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the LoRA, its card and validation pictures after training."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Where to: OWNER/NAME or NAME. Default: your name and that of --output_dir."}
    )
    hub_token: Secret | None = field(
        default=None,
        metadata={"help": "A Write token. Default: that of `hf auth login`, which leaves none in the shell's history."},
    )
    hub_private: bool = field(
        default=False, metadata={"help": "For your eyes only; one that is there and public is refused."}
    )
    hub_checkpoints: Literal["none", "lora", "all"] = field(
        default="none",
        metadata={
            "help": "Checkpoints to upload too: of each its LoRA, or all of it, to resume elsewhere. All of it names "
            "your pictures and their captions."
        },
    )

    def __post_init__(self) -> None:
        require_right(self._faults())

    def _faults(self) -> Iterator[str]:
        if not self.push_to_hub:
            typed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            yield from (
                f"--{name} has no effect without --push_to_hub: add that, or leave --{name} out" for name in typed
            )
        if self.hub_token and not all("!" <= letter <= "~" for letter in self.hub_token.value or " "):
            yield "--hub_token is no token of the hub: type it whole, without spaces, or type `hf auth login` instead"
        if self.hub_model_id is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils import validate_repo_id

            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError:
                yield (
                    f"--hub_model_id {self.hub_model_id} is no name that the hub takes: type OWNER/NAME of letters, "
                    "digits, hyphens, underscores and dots"
                )


HUB_FLAGS = frozenset(f.name for f in fields(HubFlags))  # nobody else's business


@dataclass(frozen=True)
class TrainingFlags:
    """All the flags of training, by group, in the order of `--help`."""

    data: DataConfig
    prior: PriorConfig
    lora: LoraFlags
    optimizer: OptimizerConfig
    average: AverageFlags
    run: RunConfig
    watch: WatchFlags
    base: BaseFlags
    step: StepFlags
    flow: FlowConfig
    model: ModelConfig
    device: DeviceConfig
    budget: BudgetConfig
    hub: HubFlags

    def __post_init__(self) -> None:
        if self.average.use_ema and self.optimizer.kind == SCHEDULE_FREE_ADAMW:
            raise UserError(
                f"--use_ema does not go with --optimizer {SCHEDULE_FREE_ADAMW.name}, whose LoRA is an average of the "
                "run already: leave one of them out"
            )
        if self.prior.prior_term == "preference" and self.data.masked_loss:
            raise UserError(
                "--prior_term preference compares whole pictures, so it does not go with --masked_loss: "
                "type --prior_term prediction, or leave --masked_loss out"
            )
        if self.prior.with_prior_preservation and self.data.concepts_list is None:
            require_right(self.prior.lacking())

    def in_force(self, resolution: int, steps: int, processes: int) -> str:
        """One line with the settings that most decide what is learned, defaults included.

        Args:
            resolution: of the crops, in pixels.
            steps: optimizer steps in all.
            processes: how many.
        """
        run, optimizer, prior = self.run, self.optimizer, self.prior
        weighted = f" (and as many class pictures, weighted {prior.prior_loss_weight:g})"
        class_pictures = weighted if prior.with_prior_preservation else ""
        pictures = run.pictures_per_step(processes)
        rate, rates = optimizer.scaled_rate(pictures), optimizer.scaled_rates(pictures)
        own = f" ({', '.join(f'{layer} {own:g}' for layer, own in rates.items())})" if rates else ""
        kind = "" if optimizer.kind == ADAMW else f"{optimizer.kind.name}, "
        warms_up = optimizer.lr_scheduler not in ("constant", "piecewise_constant") and optimizer.lr_warmup_steps > 0
        return (
            f"{resolution} px, batch {run.train_batch_size}{class_pictures} × accumulation "
            f"{run.gradient_accumulation_steps} × "
            f"processes {processes}, {steps} steps, {kind}learning rate {rate:g}{own} {optimizer.lr_scheduler}"
            + (f" after {optimizer.lr_warmup_steps} steps of warmup" if warms_up else "")
            + f", weighting {self.flow.weighting_scheme}, precondition_outputs "
            + ("on" if self.flow.precondition_outputs else "off")
            + prior.sentence()
        )

    def groups(self) -> list[object]:
        """The groups, to save them."""
        return [getattr(self, f.name) for f in fields(self)]

    @classmethod
    def classes(cls) -> list[type]:
        """The groups' classes, to parse them."""
        return list(get_type_hints(cls).values())
