"""Pictures of a model that is being trained: the same prompts from the same noise each time, and a sheet of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.memory import drop_workspaces, free_memory
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.drawing.picture_metadata import read_settings
from sd3_lora.drawing.pictures import PicturePlan, folder_name
from sd3_lora.drawing.sampling import Embeddings, Sampler, SamplingSettings, decode
from sd3_lora.drawing.validation_sheet import ValidationSheet
from sd3_lora.stage_one.vae import load_vae
from sd3_lora.stage_one.vae_tiles import VaeTile
from sd3_lora.transformer.velocity import VelocityModel

import torch
from diffusers import AutoencoderKL
from PIL import Image

VAE_PRECISION = "fp32"  # as inference.py's
WRITING_THREADS = 4  # a PNG of 1024 px takes 0.2 s of a core, the sheet as much and more


@dataclass(frozen=True)
class ValidationTask:
    """What is drawn each time.

    Attributes:
        prompts: distinct, in their order.
        num_images: of each prompt.
        sampling: how they are denoised.
        seed: of the starting noise.
        size: of the pictures.
        together: pictures that are denoised at a time.
        tile: what the VAE decodes at a time.
        settings: more that decides the pixels, as plain JSON types, to be noted in the pictures.
    """

    prompts: tuple[str, ...]
    num_images: int
    sampling: SamplingSettings
    seed: int
    size: PictureSize
    together: int
    tile: VaeTile
    settings: Mapping[str, Any]

    def pictures(self, folder: Path, step: int) -> list[PicturePlan]:
        """All pictures of a step, in the order of the sheet's columns."""
        noted = {
            **self.settings,
            "training_step": step,
            "negative_prompt": self.sampling.negative_prompt,
            "steps": self.sampling.num_steps,
            "guidance": self.sampling.guidance,
            "height": self.size.height,
            "width": self.size.width,
            "seed": self.seed,
            "vae_precision": VAE_PRECISION,
        }
        return [
            PicturePlan(
                prompt,
                index,
                folder / f"{place:02d}_{folder_name(prompt)}_{index:02d}.png",
                {**noted, "prompt": prompt, "image_index": index},
                is_drawn=False,
            )
            for place, prompt in enumerate(self.prompts)
            for index in range(self.num_images)
        ]


@dataclass(frozen=True)
class DrawnPicture:
    """A picture with its prompt."""

    prompt: str
    picture: Image.Image


class Validation:
    """Draws into `samples/step_NNNNNN/`, and keeps the sheet of all steps beside these folders.

    Args:
        task: what is drawn.
        files: the model.
        embeddings: of the task's prompts and of its negative prompt.
        folder: `samples`; it need not exist yet.
        resumed_at: the step that the run was resumed at, with which the sheet goes on; 0 of a new run.
        encode: gives the embeddings anew each time, from the model and its device, where the CLIPs are trained too.
    """

    def __init__(
        self,
        task: ValidationTask,
        files: ModelFiles,
        embeddings: Embeddings,
        folder: Path,
        resumed_at: int = 0,
        encode: Callable[[VelocityModel, torch.device], Embeddings] | None = None,
    ):
        self._encode = encode
        self.task, self.folder, self._resumed_at = task, folder, resumed_at
        self._files, self._embeddings, self._sheet = files, embeddings, ValidationSheet(folder, resumed_at > 0)
        self._sampler: Sampler | None = None
        self._vae: AutoencoderKL | None = None  # on the host between two drawings
        self._threads = ThreadPoolExecutor(WRITING_THREADS)
        self._unfinished: tuple[int, Future[None]] | None = None  # the writing of a step's pictures and of the sheet

    @property
    def sheet_path(self) -> Path:
        """Of the sheet."""
        return self._sheet.path

    def step_folder(self, step: int) -> Path:
        """Where the pictures of a step are."""
        return self.folder / f"step_{step:06d}"

    def has_drawn(self, step: int) -> bool:
        """Whether the run was resumed at this step, and had drawn its pictures before."""
        if not step or step != self._resumed_at:
            return False
        return all(
            read_settings(plan.path) == plan.settings for plan in self.task.pictures(self.step_folder(step), step)
        )

    def write_sheet(self, step: int) -> None:
        """Makes the sheet anew, of a run that was resumed at this step and has its pictures."""
        self._sheet.write(step)

    def draw(
        self, model: VelocityModel, device: torch.device, step: int, stop: Callable[[], bool] = lambda: False
    ) -> list[DrawnPicture]:
        """Draws all pictures. Threads write them and add a row to the sheet, beside the next steps: see `finish`.

        Leaves the model and torch's generators as they were. On the device there is first the transformer's working
        memory, and then, once that is freed, the VAE with its own.

        Args:
            model: with the weights to draw with in place.
            device: where it is.
            step: the optimizer steps that it has taken.
            stop: is asked between two pictures whether to leave out those to come.

        Raises:
            UserError: a picture is not finite; the others are written.
        """
        if self._encode:
            self._embeddings = self._encode(model, device)
        plans = self.task.pictures(self.step_folder(step), step)
        latents = self._denoise(model, plans, stop)
        drop_workspaces(device)
        free_memory(device)
        writing: list[Future[None]] = []
        try:
            return self._decode(plans[: len(latents)], latents, device, writing)
        finally:  # also where one is not finite
            self._unfinished = step, self._threads.submit(self._write_sheet, step, writing)

    def finish(self) -> tuple[int, BaseException] | None:
        """Waits until the last drawing is written; to be called before the next one, and in the end.

        Returns:
            Its step and what went wrong, if anything did.
        """
        if self._unfinished is None:
            return None
        (step, writing), self._unfinished = self._unfinished, None
        error = writing.exception()
        return None if error is None else (step, error)

    def _write_sheet(self, step: int, writing: Sequence[Future[None]]) -> None:
        wait(writing)
        self._sheet.write(step)
        for each in writing:
            each.result()

    def _denoise(
        self, model: VelocityModel, plans: Sequence[PicturePlan], stop: Callable[[], bool]
    ) -> list[torch.Tensor]:
        if self._sampler is None:
            self._sampler = Sampler.of_live(model, self._files.read_scheduler_config())
        channels, vae_scale = self._files.latent_channels_and_scale()
        shape = (channels, *self.task.size.latent(vae_scale))
        latents: list[torch.Tensor] = []
        for start in range(0, len(plans), self.task.together):
            if stop():
                break
            batch = plans[start : start + self.task.together]
            noise = torch.stack([plan.noise(shape) for plan in batch])
            prompts = [plan.prompt for plan in batch]
            latents += self._sampler.denoise(noise, prompts, self._embeddings, self.task.sampling)
        return latents

    def _decode(
        self,
        plans: Sequence[PicturePlan],
        latents: Sequence[torch.Tensor],
        device: torch.device,
        writing: list[Future[None]],
    ) -> list[DrawnPicture]:
        errors, drawn = [], []
        with self._vae_on(device) as vae:
            for plan, each in zip(plans, latents, strict=True):
                try:
                    drawn.append(DrawnPicture(plan.prompt, decode(vae, each)))
                except UserError as error:
                    errors.append(error)
                    continue
                writing.append(self._threads.submit(plan.save, drawn[-1].picture))
        if errors:
            raise errors[0]
        return drawn

    @contextmanager
    def _vae_on(self, device: torch.device) -> Iterator[AutoencoderKL]:
        """The VAE, on the device within the block. What it leaves there is not copied back: it stays on the host."""
        if self._vae is None:
            self._vae = load_vae(self._files, VAE_PRECISION, device, self.task.tile).to("cpu")
        held = [(tensor, tensor.data) for tensor in (*self._vae.parameters(), *self._vae.buffers())]
        try:
            for tensor, data in held:
                tensor.data = data.to(device)
            yield self._vae
        finally:
            for tensor, data in held:
                tensor.data = data
