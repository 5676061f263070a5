"""A run's micro-batches: what a micro-step computes from, drawn on the host ahead of the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sd3_lora.common.devices import one_thread
from sd3_lora.common.records import StepInputs, TrainingBatch
from sd3_lora.stage_one.latent_cache import normalize_latents, sample_posterior
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.draws import DataOrder, GlobalDraws
from sd3_lora.training.encoder_dropout import EncoderDropout
from sd3_lora.training.flow import NoiseTable, sample_table_indices
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.prior_prompts import PriorPrompts
from sd3_lora.transformer.trained_clips import TrainedClips

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
        prior: with which some pictures come once more; None where none do.
        taken: micro-batches of the run before it was resumed.
        clips: that are trained, if they are.

    Attributes:
        sigmas: the noise levels of the pictures of all ranks in the micro-batch that was drawn last, for the log.
    """

    def __init__(
        self,
        draws: GlobalDraws,
        vae_config: Mapping[str, Any],
        table: NoiseTable,
        flow: FlowConfig,
        dtype: torch.dtype,
        device: torch.device,
        prior: PriorPrompts | None = None,
        taken: int = 0,
        clips: TrainedClips | None = None,
    ):
        self._clips = clips
        self.draws, self.device, self._prior, self._number = draws, device, prior, taken
        self._vae_config, self._table, self._flow, self._dtype = vae_config, table, flow, dtype
        self.sigmas: list[float] = []

    def sample(self, batch: TrainingBatch) -> StepInputs:
        """The inputs of the next micro-step, on the device, without a host–device synchronisation."""
        draws, table, count = self.draws, self._table, len(batch.image_ids)
        shape = batch.latent_mean.shape[1:]  # (16, H/8, W/8)
        posterior_noise, noise = (draws.normal(shape, count) for _ in range(2))
        of_all = sample_table_indices(draws.global_batch_size, table, self._flow, draws.generator)
        indices, self.sigmas = of_all[draws.rows(count)], table.sigmas[of_all[draws.all_rows(count)]].tolist()
        conditions = [table.timesteps[indices], batch.prompt_embeds, batch.pooled_prompt_embeds]
        prior_rows, prior_tokens = torch.empty(0, dtype=torch.long), None
        if self._prior:
            prior_rows = self._prior.rows(self._number, draws, count)
            *embeddings, prior_tokens = self._prior.draw(prior_rows, draws, count)
            again = conditions[0][prior_rows], *embeddings
            conditions = [torch.cat(pair) for pair in zip(conditions, again, strict=True)]
        self._number += 1
        timesteps, prompt_embeds, pooled = conditions
        raw_latents = sample_posterior(batch.latent_mean.float(), batch.latent_std.float(), posterior_noise)
        on_host = StepInputs(
            normalize_latents(raw_latents, self._vae_config),
            noise,
            table.sigmas[indices].view(-1, 1, 1, 1),
            timesteps,
            prompt_embeds.to(self._dtype),
            pooled.to(self._dtype),
            batch.loss_weights,
            prior_rows,
            *self._of_clips(batch, prior_tokens),
        )
        if self.device.type != "cuda":
            return on_host
        return StepInputs(*(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in on_host))

    def _of_clips(self, batch: TrainingBatch, prior_tokens: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """`StepInputs.clip_…` of a micro-step's rows; none where the CLIPs are not trained."""
        if self._clips is None:
            return ()
        assert batch.clip_tokens is not None
        tokens, kept = batch.clip_tokens, batch.clip_kept
        kept = torch.ones(len(tokens), 2) if kept is None else kept
        if prior_tokens is not None:
            tokens, kept = torch.cat([tokens, prior_tokens]), torch.cat([kept, torch.ones(len(prior_tokens), 2)])
        states, ends = self._clips.embed(tokens)
        places = self._clips.places(tokens) if self._clips.identifier else torch.empty(0, dtype=torch.long)
        return states.to(self._dtype), ends, kept, places


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch that is drawn.

    Attributes:
        inputs: of its step.
        names: of its pictures' files.
        sigmas: the noise levels of its pictures, those of all ranks.
        of_full: its pictures as a part of a full batch's.
        before: the state of the draws and the order before it was drawn.
    """

    inputs: StepInputs
    names: list[str]
    sigmas: list[float]
    of_full: float
    before: dict[str, Any]


class MicroBatches:
    """A run's micro-batches in their order, drawn on the host before the device needs them.

    Args:
        order: of the pictures.
        data: the pictures.
        sampler: of the inputs.
        early: how many micro-batches are drawn at a time: two where the next one's inputs are needed in this step.
        caption_dropout: the chance that a picture comes with the empty prompt.
        encoder_dropout: which text encoders' parts are dropped from a prompt, with which chance.
    """

    def __init__(
        self,
        order: DataOrder,
        data: TrainingData,
        sampler: InputSampler,
        early: int,
        caption_dropout: float = 0.0,
        encoder_dropout: EncoderDropout | None = None,
    ):
        self._order, self._data, self._sampler, self._early = order, data, sampler, early
        self._caption_dropout, self._encoder_dropout = caption_dropout, encoder_dropout or EncoderDropout()
        self._drawn: deque[MicroBatch] = deque()

    def draw_ahead(self, left: int) -> None:
        """Draws until `early` micro-batches are there, but no more than the `left` that may be drawn."""
        draws = self._sampler.draws
        while len(self._drawn) < min(left, self._early):
            before = self._state()
            taken = self._order.take(draws.global_batch_size)
            turns = self._order.turns(taken)
            # What is computed in one micro-step for the next needs as many rows in each.
            share = draws.share(range(len(taken)), fills=self._early > 1)
            count, indices = len(share.pictures), [taken[place] for place in share.pictures]
            with one_thread(self._sampler.device):
                variant_draws = draws.uniform(count)
                # Without dropout nothing is drawn, so that the numbers are those of a run that does not know it.
                dropped = draws.uniform(count) < self._caption_dropout if self._caption_dropout else None
                prompts = self._data.prompts_of(indices, [turns[place] for place in share.pictures], dropped)
                batch = self._data.batch(indices, variant_draws, prompts)
                batch = self._encoder_dropout.apply(batch, partial(draws.uniform, count))
                if share.weights is not None:
                    batch = batch.weighted(share.weights)
                inputs = self._sampler.sample(batch)
            names = [self._data.images[index].path.name for index in indices]
            self._drawn.append(MicroBatch(inputs, names, self._sampler.sigmas, share.of_full, before))

    def take(self) -> tuple[MicroBatch, StepInputs | None]:
        """The next micro-batch; and the inputs of the one after it, if drawn."""
        return self._drawn.popleft(), self._drawn[0].inputs if self._drawn else None

    def go_back(self, state: Mapping[str, Any]) -> None:
        """Has what was drawn after `state_dict` was taken be drawn again."""
        self._drawn.clear()
        self._sampler.draws.generator.set_state(state["draws"])
        self._order.load_state_dict(state["order"])

    def state_dict(self) -> dict[str, Any]:
        """Where the draws and the order stand, for a checkpoint; what was drawn and not taken is drawn again then."""
        return self._drawn[0].before if self._drawn else self._state()

    def _state(self) -> dict[str, Any]:
        return {"draws": self._sampler.draws.generator.get_state(), "order": self._order.state_dict()}
