"""How the three text encoders' outputs are joined to a prompt's embedding, by whatever they were computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def join_embeddings(clip_hidden: Sequence[torch.Tensor], t5_hidden: torch.Tensor) -> torch.Tensor:
    """The prompt's embedding of the encoders' hidden states, as `StableDiffusion3Pipeline.encode_prompt` joins them.

    Args:
        clip_hidden: of each CLIP, the penultimate hidden states `(B, C, d)`. Side by side they are narrower than T5's,
            and are padded with zeros.
        t5_hidden: `(B, T, D)`; they follow the CLIPs' tokens.

    Returns:
        `(B, C + T, D)` in the dtype of `t5_hidden`.
    """
    clips = torch.cat(list(clip_hidden), dim=-1)  # (B, C, d1 + d2)
    clips = torch.nn.functional.pad(clips, (0, t5_hidden.shape[-1] - clips.shape[-1]))  # (B, C, D)
    return torch.cat([clips.to(t5_hidden.dtype), t5_hidden], dim=1)
