"""The flags that say what stage one left, and what of it to train on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sd3_lora.common.command_line import less_than_one, require_right
from sd3_lora.common.config import CropFlags
from sd3_lora.common.defaults import EMBEDDINGS_PATH, LATENTS_PATH


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

    def sentence(self) -> str:
        """How masks weight the loss, to be added to a sentence; nothing without them."""
        beside = f" (beside the masks {self.unmasked_weight:g})" if self.unmasked_weight else ""
        return f", masked loss{beside}" if self.masked_loss else ""

    def _mask_faults(self) -> Iterator[str]:
        if not 0 <= self.unmasked_weight <= 1:
            yield f"--unmasked_weight {self.unmasked_weight:g} must be at least 0 and at most 1"
        if not self.masked_loss:
            for name in ("mask_data_dir", "alpha_mask", "unmasked_weight"):
                if getattr(self, name):
                    yield f"--{name} has no effect without --masked_loss: add that, or leave --{name} out"
