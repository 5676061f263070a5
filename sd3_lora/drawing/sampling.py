"""Noise → latents → pictures, with a transformer that was loaded to draw or with one that is being trained.

Shapes: B pictures, S text tokens, D joint attention width, P pooled width, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.progress import Progress
from sd3_lora.drawing.config import SchedulerName
from sd3_lora.drawing.pictures import PicturePlan, PictureWriter
from sd3_lora.drawing.schedulers import make_scheduler, set_noise_levels
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.stage_one.latent_cache import denormalize_latents
from sd3_lora.transformer.compiled import Compiled, uncompiled
from sd3_lora.transformer.lora import lora_in
from sd3_lora.transformer.velocity import VelocityModel, left_as_found

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image

# A prompt's `(S, D)` and `(P,)` embeddings, by prompt.
Embeddings = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SkipLayerGuidance:
    """Guidance away from what the transformer would draw without some of its blocks, as SD3.5-Medium was made for.

    `velocity += scale · (velocity of the prompt - velocity of the prompt without the blocks)`, at the noise levels
    between two of the steps. A level counts once, also where Heun's method calls the transformer twice: diffusers'
    pipeline counts calls, and so ends halfway.

    Attributes:
        layers: indices of the blocks.
        scale: of the difference.
        start: the share of the steps after which it begins.
        stop: the share of the steps before which it ends.
    """

    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def is_on(self, level: int, num_steps: int) -> bool:
        """Whether it guides at the noise level of this index."""
        return num_steps * self.start < level < num_steps * self.stop

    def to_dict(self) -> dict[str, Any]:
        """For a picture's settings, as plain JSON types."""
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are denoised.

    Attributes:
        num_steps: denoising steps.
        guidance: of classifier-free guidance; 1 or less is without.
        negative_prompt: what not to draw.
        scheduler: by name.
        timestep_shift: of its noise levels; None for the model's.
        skip_layers: what is guided away from, beside the negative prompt.
        apart: whether the negative prompt has a forward of its own, which takes less memory.
    """

    num_steps: int
    guidance: float
    negative_prompt: str = ""
    scheduler: SchedulerName = "euler"
    timestep_shift: float | None = None
    skip_layers: SkipLayerGuidance | None = None
    apart: bool = False

    @property
    def rows(self) -> int:
        """Rows of a forward for each picture. Without layers there are fewer, in a forward of their own."""
        return 2 if self.guidance > 1 else 1


@dataclass(frozen=True)
class _GuidedVelocity:
    """The velocity of noisy latents under classifier-free and skip-layer guidance.

    Attributes:
        call: that gives it, of `TransformerCall`.
        prompt_embeds: `(B, S, D)`; under guidance `(2B, S, D)`, the negative prompt's first.
        pooled: `(B, P)` or `(2B, P)`.
        settings: of the guidance.
    """

    call: TransformerCall
    prompt_embeds: torch.Tensor
    pooled: torch.Tensor
    settings: SamplingSettings

    def at(self, latents: torch.Tensor, timestep: torch.Tensor, level: int) -> torch.Tensor:
        """`(B, 16, H/8, W/8)`.

        Args:
            latents: of that shape.
            timestep: of all pictures.
            level: the noise level's index.
        """
        settings = self.settings
        if settings.guidance <= 1:
            return self._call(latents, timestep)
        if settings.apart:
            negative, positive = self._call(latents, timestep, is_negative=True), self._call(latents, timestep)
        else:
            negative, positive = self._call(torch.cat([latents] * 2), timestep).chunk(2)
        velocity = negative + settings.guidance * (positive - negative)
        skipping = settings.skip_layers
        if skipping and skipping.is_on(level, settings.num_steps):
            without = self._call(latents, timestep, left_out=skipping.layers)
            velocity = velocity + (positive - without) * skipping.scale
        return velocity

    def _call(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        is_negative: bool = False,
        left_out: Sequence[int] = (),
    ) -> torch.Tensor:
        rows = len(latents)
        given = slice(rows) if is_negative else slice(-rows, None)  # the prompts' are the last
        return self.call(latents, timestep, self.prompt_embeds[given], self.pooled[given], left_out)


class TransformerCall:
    """The transformer as drawing calls it: kernel by kernel, or captured as CUDA graphs: one for each number of rows,
    and for calls without some blocks.

    Shapes: R rows: the pictures of a batch, or twice as many under guidance.

    Args:
        transformer: that is called.
        compiled: whether its blocks are.
        rows: of the largest batch. Compiled blocks compute other calls as they are: torch would compile them anew.
        captures: whether it is captured.
        must_capture: whether that was asked for, so that a failure is an error.
        most_shapes: how many kinds of calls there will be.

    Attributes:
        captured: what is captured, if anything is to be.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        compiled: Compiled = Compiled.NO,
        rows: int = 0,
        captures: bool = False,
        must_capture: bool = False,
        most_shapes: int = 1,
    ):
        self._forward = _Forward(transformer)  # not of this, which holds the graphs
        self._compiled, self._rows = compiled, rows
        self.captured: CapturedCall | None = None
        if captures:
            device = transformer.device
            self.captured = CapturedCall(
                self._forward, device, asked=must_capture, log=Progress.write, most_shapes=most_shapes
            )

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        left_out: Sequence[int] = (),
    ) -> torch.Tensor:
        """The velocity, `(R, 16, H/8, W/8)`.

        Args:
            latents: of that shape.
            timestep: of all rows, a number.
            prompt_embeds: `(R, S, D)`.
            pooled: `(R, P)`.
            left_out: indices of blocks; the same ones each time, or none.
        """
        if left_out and tuple(left_out) != self._forward.left_out:
            self.release()  # the graph without other blocks
            self._forward.left_out = tuple(left_out)
        # Its length alone is read: what the host reads of a tensor, no graph can hold.
        without = torch.empty(len(left_out), dtype=torch.int8, device=latents.device)
        is_usual = len(latents) == self._rows and not left_out
        with nullcontext() if is_usual else uncompiled(self._compiled):
            return (self.captured or self._forward)(latents, timestep, prompt_embeds, pooled, without)

    def release(self) -> None:
        """Frees the graphs; they are captured anew. They hold the strengths of LoRAs that are beside the weights."""
        if self.captured:
            self.captured.release()


class _Forward:
    """What `TransformerCall` captures.

    Attributes:
        left_out: indices of the blocks without which it is called in some steps.
    """

    def __init__(self, transformer: SD3Transformer2DModel):
        self._transformer = transformer
        self.left_out: tuple[int, ...] = ()

    def __call__(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        without: torch.Tensor,
    ) -> torch.Tensor:
        velocity: torch.Tensor = self._transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            skip_layers=list(self.left_out) if len(without) else None,
            return_dict=False,
        )[0]
        return velocity


class Sampler:
    """Denoises, as diffusers' pipeline does, with the transformer alone.

    Args:
        transformer: that draws; its adapters may change between two calls.
        scheduler_config: of the model's scheduler.
        precision: the context in which the transformer is called; none where its adapters have its dtype.
        dtype_flag: that chose the transformer's dtype, for a message.
        call: how the transformer is called; None for kernel by kernel.

    Attributes:
        transformer: that draws.
        call: how it is called.
    """

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler_config: Mapping[str, Any],
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        dtype_flag: str = "--mixed_precision",
        call: TransformerCall | None = None,
    ):
        self.transformer, self._precision, self._dtype_flag = transformer, precision, dtype_flag
        self._scheduler_config = scheduler_config
        self.call = call or TransformerCall(transformer)

    @classmethod
    def of_live(cls, model: VelocityModel, scheduler_config: Mapping[str, Any]) -> Sampler:
        """Of a model that is being trained, whose LoRA is float32 whatever the base's dtype; it draws in the base's."""
        return cls(model.transformer, scheduler_config, lambda: lora_in(model.transformer, model.dtype))

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
        dtype, device = self.transformer.dtype, self.transformer.device
        names = [*([settings.negative_prompt] * len(prompts) if settings.guidance > 1 else []), *prompts]
        parts = zip(*(embeddings[name] for name in names), strict=True)
        prompt_embeds, pooled = (torch.stack(part).to(device, dtype) for part in parts)
        velocity = _GuidedVelocity(self.call, prompt_embeds, pooled, settings)
        # Its own, since drawing changes a scheduler's state.
        scheduler = make_scheduler(settings.scheduler, self._scheduler_config, settings.timestep_shift)
        latents = noise.to(device, dtype)
        tokens = noise.shape[2] * noise.shape[3] // self.transformer.config.patch_size**2
        with left_as_found(self.transformer), self._precision():
            for timestep, level in set_noise_levels(scheduler, settings.num_steps, device, tokens):
                step = scheduler.step(velocity.at(latents, timestep, level), timestep, latents, return_dict=False)
                latents = step[0]
        latents = latents.cpu()
        if not torch.isfinite(latents).all():
            raise UserError(f"the picture came out as NaN (it would be black): {_remedy(dtype, self._dtype_flag)}")
        return latents


def _remedy(dtype: torch.dtype, flag: str) -> str:
    """What to do about a NaN that was computed in this dtype, which the flag chooses."""
    if dtype == torch.float16:
        exact = "fp32" if flag == "--vae_precision" else "no"
        return f"fp16 was too narrow: type {flag} bf16, or {flag} {exact}"
    return "check the model's files and --lora, or lower --lora_scale and --guidance"


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> Image.Image:
    """One picture.

    Args:
        vae: on its device.
        latents: `(16, H/8, W/8)`, normalized.

    Raises:
        UserError: the pixels are not finite.
    """
    return queue_decode(vae, latents).picture()


@dataclass(frozen=True)
class DecodedPicture:
    """A picture that a GPU may still be decoding: nothing has waited for it.

    Attributes:
        pixels: `(H, W, 3)` uint8.
        is_finite: whether they were made of finite numbers, a bool on the device.
        dtype: of the VAE.
    """

    pixels: torch.Tensor
    is_finite: torch.Tensor
    dtype: torch.dtype

    def picture(self) -> Image.Image:
        """The picture, waited for.

        Raises:
            UserError: the pixels are not finite.
        """
        if not self.is_finite:
            raise UserError(f"the VAE decoded a picture to NaN: {_remedy(self.dtype, '--vae_precision')}")
        return Image.fromarray(self.pixels.cpu().numpy())


@torch.no_grad()
def queue_decode(vae: AutoencoderKL, latents: torch.Tensor) -> DecodedPicture:
    """One picture, rounded on the device as diffusers' pipelines do it on the host.

    Args:
        vae: on its device.
        latents: `(16, H/8, W/8)`, normalized.
    """
    raw = denormalize_latents(latents[None].float(), vae.config)  # (1, 16, H/8, W/8)
    pixels = vae.decode(raw.to(vae.device, vae.dtype)).sample  # (1, 3, H, W) in [-1, 1]
    scaled = (pixels[0].float() * 0.5 + 0.5).clamp(0, 1) * 255
    rounded = scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return DecodedPicture(rounded, torch.isfinite(pixels).all(), vae.dtype)


class Decoder:
    """Decodes pictures and has them written.

    Args:
        vae: that decodes, one picture at a time.
        writer: that writes them, while the next are decoded.

    Attributes:
        count: of pictures so far.
        errors: of those that came out as NaN; all others are written.
    """

    def __init__(self, vae: AutoencoderKL, writer: PictureWriter):
        self._vae, self._writer = vae, writer
        self.count = 0
        self.errors: list[UserError] = []

    def decode(self, plans: Sequence[PicturePlan], latents: Sequence[torch.Tensor]) -> None:
        """Decodes and writes pictures."""
        for plan, latent in zip(plans, latents, strict=True):
            self.count += 1
            try:
                self._writer.add(plan, queue_decode(self._vae, latent).picture())
            except UserError as error:
                self.errors.append(error)

    def raise_errors(self) -> None:
        """Raises the first error, if any.

        Raises:
            UserError: pictures were NaN.
        """
        if self.errors:
            others = f" ({len(self.errors)} of {self.count} pictures)" if self.count > 1 else ""
            raise UserError(f"{self.errors[0]}{others}")
