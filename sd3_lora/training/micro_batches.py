"""A run's micro-batches: what a step computes from, drawn before its turn."""

from __future__ import annotations

from collections import deque

from sd3_lora.common.devices import one_thread
from sd3_lora.common.records import StepInputs, TrainingBatch
from sd3_lora.stage_one.latent_cache import normalize_latents, sample_posterior
from sd3_lora.training.artefacts import StageOne
from sd3_lora.training.config import FlowConfig
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.flow import load_noise_table, sample_table_indices
from sd3_lora.training.state import Training

import torch


class MicroBatches:
    """A run's micro-batches in their order, drawn on the host before their turn; nothing here waits for the device.

    Args:
        training: whose draws and order they come from.
        data: what stage one left.
        stage_one: the model's configs.
        flow: how noise levels are drawn.
        dtype: of the transformer.
        device: where the step is computed.
    """

    def __init__(
        self,
        training: Training,
        data: TrainingData,
        stage_one: StageOne,
        flow: FlowConfig,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._draws, self._order, self._data = training.draws, training.order, data
        self._flow, self._dtype, self._device = flow, dtype, device
        self._vae_config = stage_one.files.read_config("vae")
        self._table = load_noise_table(stage_one.files.read_scheduler_config(), flow.timestep_shift)
        self._early = 2 if training.ahead else 1  # what is computed for the next one needs to know it
        self._drawn: deque[tuple[StepInputs, list[str]]] = deque()

    def draw_ahead(self, left: int) -> None:
        """Of the `left` that may be drawn, as many as are needed early."""
        while len(self._drawn) < min(left, self._early):
            chosen = self._order.take(self._draws.global_batch_size)[self._draws.mine]
            with one_thread(self._device):
                batch = self._data.batch(chosen, self._draws.uniform())
                inputs = self._draw_inputs(batch)
            self._drawn.append((inputs, [self._data.images[i].path.name for i in chosen]))

    def take(self) -> tuple[StepInputs, list[str], StepInputs | None]:
        """The one whose turn it is, its pictures' names, and the next one if it was drawn."""
        inputs, names = self._drawn.popleft()
        return inputs, names, self._drawn[0][0] if self._drawn else None

    def _draw_inputs(self, batch: TrainingBatch) -> StepInputs:
        """Draws the posterior's sample, the noise and its level."""
        draws, table, flow = self._draws, self._table, self._flow
        posterior_noise, noise = (draws.normal(batch.latent_mean.shape[1:]) for _ in range(2))  # (B, 16, H/8, W/8)
        indices = sample_table_indices(draws.global_batch_size, table, flow, draws.generator)[draws.mine]  # (B,)
        raw_latents = sample_posterior(batch.latent_mean.float(), batch.latent_std.float(), posterior_noise)
        on_host = StepInputs(
            normalize_latents(raw_latents, self._vae_config),
            noise,
            table.sigmas[indices].view(-1, 1, 1, 1),
            table.timesteps[indices],
            batch.prompt_embeds.to(self._dtype),
            batch.pooled_prompt_embeds.to(self._dtype),
            batch.loss_weights,
        )
        if self._device.type != "cuda":
            return on_host
        return StepInputs(*(tensor.pin_memory().to(self._device, non_blocking=True) for tensor in on_host))
