"""Dropout of single text encoders: a prompt comes without the part of CLIP-L, CLIP-G or T5, each with its own chance.

A part that is dropped is zero, as T5's is in diffusers' pipeline without T5, and as sd-scripts drops it. SD3 itself was
trained with each encoder dropped from 46.4 % of the prompts (Esser et al., arXiv 2403.03206).

Shapes: B batch, S text tokens, D joint attention width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.records import TrainingBatch

import torch


@dataclass(frozen=True)
class EncoderPart:
    """Where one encoder's part lies.

    Attributes:
        chance: of being dropped.
        tokens: in the sequence.
        columns: of those tokens.
        pooled: columns of the pooled embedding; an empty slice for T5, which has none there.
        clip: which CLIP it is, 0 or 1; None for T5.
    """

    chance: float
    tokens: slice
    columns: slice
    pooled: slice
    clip: int | None = None


@dataclass(frozen=True)
class EncoderDropout:
    """The parts that may be dropped, those with a chance alone."""

    parts: tuple[EncoderPart, ...] = ()

    @classmethod
    def of(cls, files: ModelFiles, clip_l: float, clip_g: float, t5: float) -> EncoderDropout:
        """The parts of a model's embeddings, which `text_encoders.join_embeddings` put together.

        Args:
            files: the model.
            clip_l: the chance of dropping CLIP-L's part.
            clip_g: of CLIP-G's.
            t5: of T5's.
        """
        clip_tokens = files.clip_tokens()
        column, pooled_column, parts = 0, 0, []
        for clip, (chance, component) in enumerate(((clip_l, "text_encoder"), (clip_g, "text_encoder_2"))):
            config = files.read_config(component)
            end, pooled_end = column + config["hidden_size"], pooled_column + config["projection_dim"]
            columns, pooled = slice(column, end), slice(pooled_column, pooled_end)
            parts.append(EncoderPart(chance, slice(0, clip_tokens), columns, pooled, clip))
            column, pooled_column = end, pooled_end
        parts.append(EncoderPart(t5, slice(clip_tokens, None), slice(None), slice(0, 0)))
        return cls(tuple(part for part in parts if part.chance))

    def apply(self, batch: TrainingBatch, uniform: Callable[[], torch.Tensor]) -> TrainingBatch:
        """The batch with the parts dropped that the draws choose; nothing is drawn where no part has a chance.

        Args:
            batch: of `B` pictures.
            uniform: draws `(B,)` in [0, 1), once for each part.
        """
        if not self.parts:
            return batch
        prompt_embeds, pooled = batch.prompt_embeds.clone(), batch.pooled_prompt_embeds.clone()
        kept = torch.ones(len(pooled), 2)
        for part in self.parts:
            dropped = uniform() < part.chance  # (B,)
            prompt_embeds[:, part.tokens, part.columns].masked_fill_(dropped[:, None, None], 0.0)
            pooled[:, part.pooled].masked_fill_(dropped[:, None], 0.0)
            if part.clip is not None:
                kept[:, part.clip].masked_fill_(dropped, 0.0)
        return replace(batch, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled, clip_kept=kept)
