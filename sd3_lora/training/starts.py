"""What training begins with: another LoRA, and an identifier's embedding; checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from sd3_lora.common.model_files import ModelFiles
from sd3_lora.training.identifier_start import IdentifierStart
from sd3_lora.training.lora_flags import LoraFlags
from sd3_lora.training.text_encoder_flags import TextEncoderFlags
from sd3_lora.training.trained_parts import lora_kind, lora_targets
from sd3_lora.transformer.base_weights import make_hollow
from sd3_lora.transformer.lora import attach_lora
from sd3_lora.transformer.lora_files import LoraFile, find_lora, read_lora_file
from sd3_lora.transformer.lora_starts import require_clip_start, require_lycoris_start, require_start

import torch


@dataclass(frozen=True)
class Starts:
    """What training begins with.

    Attributes:
        lora: another LoRA, if one was named.
        identifier: of its embedding, if that is trained.
    """

    lora: LoraFile | None
    identifier: IdentifierStart | None


def initial_lora(lora: LoraFlags, text: TextEncoderFlags, files: ModelFiles) -> LoraFile | None:
    """The LoRA to begin with, if any, checked before anything is loaded.

    Raises:
        UserError: it cannot be read, or does not fit what is trained.
    """
    if lora.init_lora is None:
        return None
    config, kind = files.read_config("transformer"), lora_kind(lora)
    read_clip_config = files.read_config if text.train_text_encoder else None
    start = read_lora_file(find_lora(lora.init_lora, "--init_lora"), config, read_clip_config)
    require_clip_start(start, text.rank(lora.rank))
    hollow = make_hollow(config, torch.float32)
    targets = lora_targets(lora, hollow)
    require_start(start, kind.ranks_of(targets, lora.rank), kind)
    if kind.type != "lora":
        with torch.device("meta"):
            attach_lora(hollow, targets, lora.rank, lora.alpha, 0.0, 0, kind)
        require_lycoris_start(start, hollow)
    return start
