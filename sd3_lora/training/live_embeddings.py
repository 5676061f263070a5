"""Prompts encoded by the CLIPs as they are being trained, to look at the run between its steps."""

from __future__ import annotations

from collections.abc import Sequence

from sd3_lora.training.dataset import TrainingData
from sd3_lora.transformer.velocity import VelocityModel

import torch


@torch.no_grad()
def live_embeddings(
    model: VelocityModel, device: torch.device, data: TrainingData, prompts: Sequence[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The prompts' embeddings, `(S, D)` and `(P,)` in the model's dtype on the CPU; T5's part is the cached one.

    Leaves the CLIPs as they were.

    Args:
        model: whose CLIPs are trained.
        device: where it is.
        data: with the cached embeddings and the CLIPs' tokens of the prompts.
        prompts: distinct.
    """
    clips, found = model.clips, {}
    assert clips is not None
    was_training = clips.training
    clips.eval()
    for prompt in prompts:
        cached = data.embedding(prompt).prompt_embeds[None].to(device, model.dtype)
        tokens = data.clip_tokens[prompt][None]
        states = (*clips.embed(tokens), torch.ones(1, 2), clips.places(tokens))
        with model.precision(device):
            prompt_embeds, pooled = clips(cached, *(tensor.to(device) for tensor in states))
        found[prompt] = prompt_embeds[0].cpu(), pooled[0].cpu()
    clips.train(was_training)
    return found
