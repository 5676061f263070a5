"""Noise → latents → pictures, with a transformer that was loaded to draw or with one that is being trained.

Shapes: B pictures, S text tokens, D joint attention width, P pooled width, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.stage_one.latent_cache import denormalize_latents
from sd3_lora.transformer.velocity import VelocityModel

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

# A prompt's `(S, D)` and `(P,)` embeddings, by prompt.
Embeddings = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are denoised.

    Attributes:
        num_steps: denoising steps.
        guidance: of classifier-free guidance; 1 or less is without.
        negative_prompt: what not to draw.
    """

    num_steps: int
    guidance: float
    negative_prompt: str = ""

    @property
    def rows(self) -> int:
        """Rows of a forward for each picture."""
        return 2 if self.guidance > 1 else 1


class Sampler:
    """Denoises by diffusers' pipeline, with the transformer and a scheduler alone.

    Has a scheduler of its own, since drawing changes a scheduler's state.

    Args:
        transformer: that draws.
        scheduler_config: of the model's scheduler.
        precision: the autocast under which the transformer is called; none where its adapters have its dtype.
        dtype_flag: that chose the transformer's dtype, for a message.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler_config: Mapping[str, Any],
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        dtype_flag: str = "--mixed_precision",
    ):
        from diffusers import StableDiffusion3Pipeline  # its import takes a second

        self._transformer, self._precision, self._dtype_flag = transformer, precision, dtype_flag
        self._pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler_config)),
            vae=None,
            text_encoder=None,
            text_encoder_2=None,
            text_encoder_3=None,
            tokenizer=None,
            tokenizer_2=None,
            tokenizer_3=None,
        )
        self._pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def of_live(cls, model: VelocityModel, scheduler_config: Mapping[str, Any]) -> Sampler:
        """Of a model that is being trained, whose LoRA is float32 whatever the base's dtype."""
        device = next(model.transformer.parameters()).device
        return cls(model.transformer, scheduler_config, lambda: model.precision(device))

    @torch.no_grad()
    def denoise(
        self, noise: torch.Tensor, prompts: Sequence[str], embeddings: Embeddings, settings: SamplingSettings
    ) -> torch.Tensor:
        """Denoises a batch; leaves the transformer as it was.

        Args:
            noise: `(B, 16, H/8, W/8)` float32.
            prompts: one for each picture.
            embeddings: of these and of the negative prompt.
            settings: of the denoising.

        Returns:
            Normalized latents of that shape, on the CPU.

        Raises:
            UserError: they are not finite.
        """
        dtype, device = self._transformer.dtype, self._transformer.device

        def stack(names: Sequence[str]) -> list[torch.Tensor]:
            return [torch.stack(part).to(device, dtype) for part in zip(*(embeddings[p] for p in names), strict=True)]

        prompt_embeds, pooled = stack(prompts)  # (B, S, D), (B, P)
        negative_embeds, negative_pooled = stack([settings.negative_prompt] * len(prompts))
        scale = self._pipeline.vae_scale_factor
        with left_as_found(self._transformer), self._precision():
            latents: torch.Tensor = self._pipeline(
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=negative_embeds,
                negative_pooled_prompt_embeds=negative_pooled,
                latents=noise.to(device, dtype),
                num_inference_steps=settings.num_steps,
                guidance_scale=settings.guidance,
                height=scale * noise.shape[2],
                width=scale * noise.shape[3],
                output_type="latent",
            ).images.cpu()
        if not torch.isfinite(latents).all():
            raise UserError(f"the picture came out as NaN (it would be black): {_remedy(dtype, self._dtype_flag)}")
        return latents


def _remedy(dtype: torch.dtype, flag: str) -> str:
    """What to do about a NaN that was computed in this dtype, which the flag chooses."""
    if dtype == torch.float16:
        exact = "fp32" if flag == "--vae_precision" else "no"
        return f"fp16 was too narrow: type {flag} bf16, or {flag} {exact}"
    return "check the model's files and --lora, or lower --lora_scale and --guidance"


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


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> Image.Image:
    """One picture.

    Args:
        vae: on its device.
        latents: `(16, H/8, W/8)`, normalized.

    Raises:
        UserError: the pixels are not finite.
    """
    raw = denormalize_latents(latents[None].float(), vae.config)  # (1, 16, H/8, W/8)
    pixels = vae.decode(raw.to(vae.device, vae.dtype)).sample  # (1, 3, H, W) in [-1, 1]
    if not torch.isfinite(pixels).all():
        raise UserError(f"the VAE decoded a picture to NaN: {_remedy(vae.dtype, '--vae_precision')}")
    picture: Image.Image = VaeImageProcessor().postprocess(pixels.float(), output_type="pil")[0]
    return picture
