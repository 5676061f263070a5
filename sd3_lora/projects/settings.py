"""What the page asks of a user, and the flags that it becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import MOST_SHOWN, UserError, all_of, write_text_atomically
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.defaults import MINIATURE_GUIDANCE
from sd3_lora.common.known_models import HUB_IDS
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.projects.names import safe_name

BUNDLED = "miniature"
MODELS = (BUNDLED, *HUB_IDS.values())
MOST_LETTERS = 300  # of a text
RESOLUTIONS = (0, 512, 768, 1024)  # 0: the model's own
# The miniature learns a new object in the layers where a name becomes its looks (docs/methods.md), and quickly.
_FOR_MINIATURE = {
    "lora_layers": "ff_context.net.0.proj,ff_context.net.2",
    "lora_blocks": "0,1,2",
    "learning_rate": "2e-3",
    "validation_num_steps": 20,  # as the demo draws
}
_LIMITS = {
    "max_train_steps": (1, 20_000),
    "photos_per_step": (1, 64),
    "rank": (1, 256),
    "seed": (0, 2**32 - 1),
    "vram_budget_gib": (0, 1000),
    "resolution": (0, 2048),
}


@dataclass(frozen=True)
class Settings:
    """What is asked; each field has a control on the page.

    Attributes:
        identifier: a rare word for the subject.
        subject: the word for its kind.
        model: miniature, a known hub id, or a folder.
        vram_budget_gib: GiB of GPU memory to stay under; 0 takes what is free.
        resolution: side of the crops in pixels; 0 is the model's own.
        max_train_steps: optimizer steps.
        photos_per_step: how many photos each step sees, one in memory at a time.
        rank: of the LoRA.
        seed: for the same LoRA again.
        validation_prompt: what to draw while training; empty draws the subject's prompt.
    """

    identifier: str = "sks"
    subject: str = "dog"
    model: str = BUNDLED
    vram_budget_gib: float = 0
    resolution: int = 0
    max_train_steps: int = 500
    photos_per_step: int = 4
    rank: int = 8
    seed: int = 0
    validation_prompt: str = ""

    @property
    def instance_prompt(self) -> str:
        """The prompt of photos without a caption."""
        return f"a photo of {self.identifier} {self.subject}".strip()

    @property
    def model_name(self) -> str:
        """The model's name as part of a folder's."""
        return safe_name(self.model.rstrip("/\\").replace("\\", "/").rpartition("/")[2]) or "model"

    def require_right(self) -> Settings:
        """These settings.

        Raises:
            UserError: all that is wrong with them.
        """
        faults = list(self._faults())
        if faults:
            raise UserError(all_of(faults, "the settings", MOST_SHOWN))
        return self

    def _faults(self) -> Iterator[str]:
        if not safe_name(self.identifier) or len(self.identifier.split()) != 1:
            yield "the subject's rare word must be one word, such as sks"
        if not self.subject.strip():
            yield "the subject's kind is missing: type a word such as dog"
        for name in ("identifier", "subject", "model", "validation_prompt"):
            value = getattr(self, name)
            if value.startswith("-") or not value.isprintable() or len(value) > MOST_LETTERS:
                what = name.replace("_", " ")
                yield f"the {what} must be one line of at most {MOST_LETTERS} letters, without a hyphen before it"
        if self.model not in MODELS and not Path(self.model).expanduser().is_dir():
            yield f"there is no folder {self.model}: choose a model from the list, or type the path of its folder"
        for name, (least, most) in _LIMITS.items():
            if not least <= getattr(self, name) <= most:
                yield f"{name} must be between {least} and {most}"

    def model_files(self) -> ModelFiles:
        """The model's files; of a known model without its files its shapes, without a download.

        Raises:
            UserError: the folder is no SD3 pipeline.
        """
        return ModelFiles(ModelConfig(None if self.model == BUNDLED else self._model_flag), is_plan=True)

    @property
    def _model_flag(self) -> str:
        return self.model if self.model in MODELS else str(Path(self.model).expanduser().resolve())

    def model_flags(self) -> dict[str, Any]:
        """The flags of every script."""
        return {"pretrained_model_name_or_path": self._model_flag}

    def budget_flags(self) -> dict[str, Any]:
        """The flags of what holds a GPU's memory."""
        return {"vram_budget_gib": f"{self.vram_budget_gib:g}" if self.vram_budget_gib else None}

    def training_flags(self) -> dict[str, Any]:
        """The flags of training that are none of its files."""
        of_miniature = self.model == BUNDLED
        return {
            **self.budget_flags(),
            "resolution": self.resolution or None,
            "gradient_accumulation_steps": self.photos_per_step,
            "max_train_steps": self.max_train_steps,
            "rank": self.rank,
            **(_FOR_MINIATURE if of_miniature else {}),
            "seed": self.seed,
            "validation_prompt": self.drawn_prompt,
            **self.guidance_flags("validation_"),
        }

    def guidance_flags(self, prefix: str = "") -> dict[str, Any]:
        """The flags of how pictures are drawn, where the model wants another guidance than the script's."""
        return {f"{prefix}guidance": f"{MINIATURE_GUIDANCE:g}"} if self.model == BUNDLED else {}

    @property
    def drawn_prompt(self) -> str:
        """What is drawn while training."""
        return self.validation_prompt.strip() or self.instance_prompt

    def save(self, path: Path) -> None:
        """Writes them as JSON."""
        write_text_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Those of values by name, each in its field's type; the defaults for what is not among them.

        Raises:
            ValueError, TypeError: a value cannot be of its field's type.
        """
        default = asdict(cls())
        return cls(**{name: type(default[name])(values[name]) for name in default if name in values})

    @classmethod
    def read(cls, path: Path) -> Settings:
        """Those of a file; the defaults for what it lacks, or where it is not whole."""
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()
