"""Noisy latents → velocity: the one way in which a step, its simulation and a picture call the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from sd3_lora.common.records import StepInputs
from sd3_lora.transformer.lora import lora_off
from sd3_lora.transformer.modulations_ahead import ModulationsAhead
from sd3_lora.transformer.trained_clips import TrainedClips

import torch
from diffusers import SD3Transformer2DModel


class VelocityModel(torch.nn.Module):
    """The transformer, called in its precision.

    Shapes: B batch, S text tokens, D joint attention width, P pooled width, H, W pixels.

    Args:
        transformer: with its adapters.
        dtype: that it computes in: float16 or bfloat16 by autocast, under which adapters stay float32; or float32.
        ahead: the modulations that are computed ahead, if any are.
        clips: of which something is trained too, if it is.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        dtype: torch.dtype,
        ahead: ModulationsAhead | None = None,
        clips: TrainedClips | None = None,
    ):
        super().__init__()
        self.transformer = transformer
        self.clips = clips
        self.dtype = dtype
        self._ahead = ahead

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """The autocast under which the transformer is called; on meta tensors the simulation stands in for it."""
        if self.dtype == torch.float32 or device.type == "meta":
            return nullcontext()
        return torch.autocast(device.type, self.dtype)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
    ) -> torch.Tensor:
        """The velocity.

        Args:
            noisy_latents: `(B, 16, H/8, W/8)`, of any dtype.
            timesteps: `(B,)` float32 in (0, 1000].
            prompt_embeds: `(B, S, D)` in the transformer's dtype.
            pooled_prompt_embeds: `(B, P)` likewise.

        Returns:
            `(B, 16, H/8, W/8)`.
        """
        with self.precision(noisy_latents.device):
            velocity: torch.Tensor = self.transformer(
                hidden_states=noisy_latents.to(self.dtype),
                timestep=timesteps,
                encoder_hidden_states=prompt_embeds,
                pooled_projections=pooled_prompt_embeds,
                return_dict=False,
            )[0]
        return velocity

    def conditions(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Timesteps and the prompts' embeddings: encoded by the CLIPs where these are trained, else those given.

        Args:
            inputs: of a micro-step.

        Returns:
            `(R,)`, `(R, S, D)` and `(R, P)`.
        """
        if self.clips is None:
            return inputs.conditions
        with self.precision(inputs.prompt_embeds.device):
            states = inputs.clip_states, inputs.clip_ends, inputs.clip_kept, inputs.clip_places
            return inputs.timesteps, *self.clips(inputs.prompt_embeds, *states)

    @torch.no_grad()
    def base_velocity(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The velocity of the base alone, without gradient: its adapters are off, and on again afterwards.

        To be called before the pass with a gradient: a streamed base prefetches for backward what the last pass that
        began asked for.

        Args:
            inputs: as of `forward`.

        Returns:
            `(B, 16, H/8, W/8)`.
        """
        with lora_off(self.transformer), self._ahead.paused() if self._ahead else nullcontext():
            velocity: torch.Tensor = self(*inputs)
        return velocity


@contextmanager
def left_as_found(transformer: torch.nn.Module) -> Iterator[None]:
    """Puts the transformer into eval mode for the block; its mode and torch's generators are afterwards as before."""
    was_training = transformer.training
    devices = [p.device.index or 0 for p in transformer.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices):
        transformer.eval()
        try:
            yield
        finally:
            transformer.train(was_training)
