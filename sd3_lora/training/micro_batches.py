"""A run's micro-batches: what a micro-step computes from, drawn on the host ahead of the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from sd3_lora.common.devices import one_thread
from sd3_lora.common.records import PromptEmbedding, StepInputs, TrainingBatch
from sd3_lora.stage_one.latent_cache import normalize_latents, sample_posterior
from sd3_lora.training.config import FlowConfig
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.draws import DataOrder, GlobalDraws
from sd3_lora.training.flow import NoiseTable, sample_table_indices

import torch


class InputSampler:
    """Draws what a micro-step computes from: a sample of the posterior, the noise and its level.

    Args:
        draws: of the run.
        vae_config: with the shift and the scale of the latents.
        table: of the noise levels.
        flow: how noise levels are drawn.
        dtype: of the transformer.
        device: where the step is computed.
        class_prompt: with which the pictures come a second time; None where they do not.
    """

    def __init__(
        self,
        draws: GlobalDraws,
        vae_config: Mapping[str, Any],
        table: NoiseTable,
        flow: FlowConfig,
        dtype: torch.dtype,
        device: torch.device,
        class_prompt: PromptEmbedding | None = None,
    ):
        self.draws, self.device, self._class_prompt = draws, device, class_prompt
        self._vae_config, self._table, self._flow, self._dtype = vae_config, table, flow, dtype

    def sample(self, batch: TrainingBatch) -> StepInputs:
        """The inputs of one micro-step, on the device, without a host–device synchronisation."""
        draws, table = self.draws, self._table
        posterior_noise, noise = (draws.normal(batch.latent_mean.shape[1:]) for _ in range(2))  # (B, 16, H/8, W/8)
        indices = sample_table_indices(draws.global_batch_size, table, self._flow, draws.generator)[draws.rank_slice]
        timesteps, prompt_embeds, pooled = table.timesteps[indices], batch.prompt_embeds, batch.pooled_prompt_embeds
        if self._class_prompt:
            timesteps = timesteps.repeat(2)
            prompt_embeds = _followed_by(prompt_embeds, self._class_prompt.prompt_embeds)
            pooled = _followed_by(pooled, self._class_prompt.pooled_prompt_embeds)
        raw_latents = sample_posterior(batch.latent_mean.float(), batch.latent_std.float(), posterior_noise)
        on_host = StepInputs(
            normalize_latents(raw_latents, self._vae_config),
            noise,
            table.sigmas[indices].view(-1, 1, 1, 1),
            timesteps,
            prompt_embeds.to(self._dtype),
            pooled.to(self._dtype),
            batch.loss_weights,
        )
        if self.device.type != "cuda":
            return on_host
        return StepInputs(*(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in on_host))


def _followed_by(rows: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`(B, …)` rows and, after them, one row B times: `(2 B, …)`."""
    return torch.cat([rows, row.expand_as(rows)])


class MicroBatches:
    """A run's micro-batches in their order, drawn on the host before the device needs them.

    Args:
        order: of the pictures.
        data: the pictures.
        sampler: of the inputs.
        early: how many micro-batches are drawn at a time: two where the next one's inputs are needed in this step.
    """

    def __init__(self, order: DataOrder, data: TrainingData, sampler: InputSampler, early: int):
        self._order, self._data, self._sampler, self._early = order, data, sampler, early
        # Each with the state of the draws and the order before it.
        self._drawn: deque[tuple[StepInputs, list[str], dict[str, Any]]] = deque()

    def draw_ahead(self, left: int) -> None:
        """Draws until `early` micro-batches are there, but no more than the `left` that may be drawn."""
        draws = self._sampler.draws
        while len(self._drawn) < min(left, self._early):
            before = self._state()
            indices = self._order.take(draws.global_batch_size)[draws.rank_slice]
            with one_thread(self._sampler.device):
                batch = self._data.batch(indices, draws.uniform())
                inputs = self._sampler.sample(batch)
            self._drawn.append((inputs, [self._data.images[index].path.name for index in indices], before))

    def take(self) -> tuple[StepInputs, list[str], StepInputs | None]:
        """The next micro-batch, its pictures' names, and the inputs of the one after it if that was drawn."""
        inputs, names, _ = self._drawn.popleft()
        return inputs, names, self._drawn[0][0] if self._drawn else None

    def state_dict(self) -> dict[str, Any]:
        """Where the draws and the order stand, for a checkpoint; what was drawn and not taken is drawn again then."""
        return self._drawn[0][2] if self._drawn else self._state()

    def _state(self) -> dict[str, Any]:
        return {"draws": self._sampler.draws.generator.get_state(), "order": self._order.state_dict()}
