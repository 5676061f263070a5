"""The early warning: two losses at fixed noise, measured again and again while the run goes on.

- The subject's loss: on crops of its pictures that the run does not train on, where the cache has any; else on crops
  that it does, which cannot show that they are memorized.
- The class's loss: how far the prediction for the class prompt is from that of the base alone. It shows the drift of
  all that the LoRA should leave alone.

Pictures, noise and noise levels are the same each time, so that single values can be compared.

Shapes: B rows of a forward, H, W pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sd3_lora.common.checksums import with_checksum
from sd3_lora.common.command_line import counted
from sd3_lora.stage_one.latent_cache import normalize_latents
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.flow import NoiseTable, flow_matching_loss, interpolate
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.training.live_embeddings import live_embeddings
from sd3_lora.training.loss_log import keep_lines
from sd3_lora.training.picture_losses import FixedNoise
from sd3_lora.transformer.lora import lora_off
from sd3_lora.transformer.velocity import VelocityModel

import torch

NOISE_LEVELS = 4  # evenly spread over the table
MOST_PICTURES, MOST_CLASS_PICTURES = 4, 2  # that are measured: so many rows cost about as much as eight steps
RISE = 0.02  # of a loss: less is not worth a word
WINDOW = 3  # measurements back, to compare what fell with what rose
_NOISE_SEED = 0
_UNWEIGHTED = FlowConfig(weighting_scheme="none")


@dataclass(frozen=True)
class Measurement:
    """One line of `early_warning.jsonl`.

    Attributes:
        step: optimizer steps taken.
        training_loss: the mean of the last steps' losses; None before the first.
        subject_loss: of the subject's crops.
        class_loss: of the class prompt; None where it is not measured.
    """

    step: int
    training_loss: float | None
    subject_loss: float
    class_loss: float | None


_FIELDS = {each.name for each in fields(Measurement)}


@dataclass(frozen=True)
class Probe:
    """A crop that is predicted with a prompt, at each noise level.

    Attributes:
        index: of its picture.
        variant: which crop.
        prompt: that has its embedding.
    """

    index: int
    variant: str
    prompt: str


class EarlyWarning:
    """Measures both losses and says when one falls while the other rises.

    Args:
        data: the pictures of the run.
        table: of noise levels.
        vae_config: with the shift and the scale of the latents.
        together: rows of a forward: those of a micro-batch, which has room for a gradient too.
        class_prompt: of the class; None where its loss is not measured.
        path: of the JSON lines.
        against_drift: what would hold the class back, for the sentence.
    """

    def __init__(
        self,
        data: TrainingData,
        table: NoiseTable,
        vae_config: Mapping[str, Any],
        together: int,
        class_prompt: str | None,
        path: Path,
        against_drift: str,
    ):
        self._against_drift = against_drift
        self._data, self._vae_config, self._together = data, vae_config, together
        self._fixed = FixedNoise(table, NOISE_LEVELS, _NOISE_SEED)
        subject = [index for index, image in enumerate(data.images) if image.role == "instance"]
        others = [index for index, image in enumerate(data.images) if image.role == "class"] or subject
        held_back = [index for index in subject if data.held_back(index)]
        self.has_held_back = bool(held_back)
        self._subject = [
            Probe(index, (data.held_back(index) or data.variants_of(index))[0], data.images[index].prompt)
            for index in (held_back or subject)[:MOST_PICTURES]
        ]
        self._class = [
            Probe(index, data.variants_of(index)[0], class_prompt)
            for index in others[:MOST_CLASS_PICTURES]
            if class_prompt is not None
        ]
        self._base: list[torch.Tensor] = []  # what the base alone predicts for the class prompt, on the host
        self._path, self.history = path, list[Measurement]()
        self._said: set[object] = set()

    def sentence(self) -> str:
        """What is measured, for the user."""
        crops = "that are not trained on" if self.has_held_back else "that are trained on, since none is held back"
        prompt = f"; and drift of the class prompt {self._class[0].prompt!r}" if self._class else ""
        pictures = counted(len(self._subject), "picture")
        return f"early warning: loss at {NOISE_LEVELS} noise levels of {pictures}, on crops {crops}{prompt}"

    def go_on_from(self, step: int) -> None:
        """Keeps what was measured and said up to this step, and drops what is to be measured again; at 0 all."""
        for values in keep_lines(self._path, step or -1):
            self.take(Measurement(**{name: value for name, value in values.items() if name in _FIELDS}))

    def has_measured(self, step: int) -> bool:
        """Whether that was done after this step."""
        return any(each.step == step for each in self.history)

    @torch.no_grad()
    def measure(self, model: VelocityModel, device: torch.device, step: int, training_loss: float) -> list[str]:
        """Measures, and writes the line; the last one is `history[-1]`.

        Leaves the model as it was. It has to be in eval mode.

        Args:
            model: as it trains.
            device: where it is.
            step: the optimizer steps that it has taken.
            training_loss: the mean of the last steps; NaN before the first.

        Returns:
            Sentences for the user: what falls while what rises.

        Raises:
            ValueError: a loss is not finite.
        """
        subject = self._mean(self._losses(model, device, self._subject))
        of_class = None
        if self._class:
            if not self._base:
                with lora_off(model.transformer):
                    self._base = [velocity for *_, velocity in self._predict(model, device, self._class, True)]
            of_class = self._mean(self._distances(model, device))
        if not all(math.isfinite(value) for value in (subject, of_class or 0.0)):
            raise ValueError(f"a loss is {subject if not math.isfinite(subject) else of_class}")
        now = Measurement(step, None if math.isnan(training_loss) else training_loss, subject, of_class)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(with_checksum(asdict(now))) + "\n")
        return self.take(now)

    def take(self, now: Measurement) -> list[str]:
        """Adds a measurement to the history; returns what it shows that was not said before."""
        self.history.append(now)
        new = {key: text for key, text in self._warnings() if key not in self._said}
        self._said.update(new)
        return list(new.values())

    def _mean(self, losses: Iterator[torch.Tensor]) -> float:
        return float(torch.stack(list(losses)).double().mean())

    def _losses(self, model: VelocityModel, device: torch.device, probes: Sequence[Probe]) -> Iterator[torch.Tensor]:
        """The loss of each row."""
        for latents, noise, sigmas, velocity in self._predict(model, device, probes):
            ones = torch.ones(1)
            rows = zip(*(part.split(1) for part in (velocity, latents, noise, sigmas)), strict=True)
            yield from (flow_matching_loss(v, x, e, s, ones, _UNWEIGHTED) for v, x, e, s in rows)

    def _distances(self, model: VelocityModel, device: torch.device) -> Iterator[torch.Tensor]:
        """The mean squared distance of each row from what the base predicts."""
        predicted = (velocity for *_, velocity in self._predict(model, device, self._class))
        for velocity, base in zip(predicted, self._base, strict=True):
            yield from (velocity - base).square().flatten(1).mean(1)

    def _predict(
        self, model: VelocityModel, device: torch.device, probes: Sequence[Probe], is_base: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Latents, noise, sigmas and predicted velocity of some rows at a time, float32 on the host.

        CLIPs that are trained encode the prompts anew, unless the base is to predict.
        """
        fixed, table = self._fixed, self._fixed.table
        prompts = list(dict.fromkeys(probe.prompt for probe in probes))
        if model.clips and not is_base:
            embedded = live_embeddings(model, device, self._data, prompts)
        else:
            rows_of = {prompt: self._data.embedding(prompt) for prompt in prompts}
            embedded = {prompt: (row.prompt_embeds, row.pooled_prompt_embeds) for prompt, row in rows_of.items()}
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, Probe, int]]] = {}
        for probe in probes:
            mean = self._data.posterior(probe.index, probe.variant).mean.float()
            latents = normalize_latents(mean, self._vae_config)
            by_shape.setdefault(latents.shape, []).extend((latents, probe, level) for level in fixed.indices)
        for shape, rows in by_shape.items():
            one_noise = fixed.noise(shape)
            for start in range(0, len(rows), self._together):
                batch = rows[start : start + self._together]
                stacked = torch.stack([latents for latents, *_ in batch])
                noise = one_noise.expand_as(stacked)
                indices = [level for *_, level in batch]
                sigmas = table.sigmas[indices].view(-1, 1, 1, 1)
                embeddings = [embedded[probe.prompt] for _, probe, _ in batch]
                velocity = model(
                    interpolate(stacked, noise, sigmas).to(device),
                    table.timesteps[indices].to(device),
                    torch.stack([prompt_embeds for prompt_embeds, _ in embeddings]).to(device, model.dtype),
                    torch.stack([pooled for _, pooled in embeddings]).to(device, model.dtype),
                )
                yield stacked, noise, sigmas, velocity.float().cpu()

    def _warnings(self) -> Iterator[tuple[object, str]]:
        """What the last measurement shows, each with a key by which it is said once."""
        now, best = self.history[-1], min(self.history, key=lambda each: each.subject_loss)
        learns = now.training_loss is not None and (
            best.training_loss is None or now.training_loss < best.training_loss
        )
        if self.has_held_back and learns and now.subject_loss > (1 + RISE) * best.subject_loss:
            yield (
                ("memorizes", best.step),
                f"early warning: since step {best.step} the loss on held-back crops has risen from "
                f"{best.subject_loss:.4f} to {now.subject_loss:.4f}, while the training loss falls: the pictures are "
                f"being memorized, and the LoRA of step {best.step} may be the better one",
            )
        then = self.history[-1 - WINDOW] if len(self.history) > WINDOW else None
        if then is None or then.class_loss is None or now.class_loss is None:
            return
        fell, rose = max(0.0, then.subject_loss - now.subject_loss), now.class_loss - then.class_loss
        if rose > fell and rose > RISE * self.history[0].subject_loss:
            yield (
                "drifts",
                f"early warning: since step {then.step} the subject's loss has fallen by {fell:.4f}, and that of the "
                f"class prompt {self._class[0].prompt!r} has risen by {rose:.4f}: more is forgotten than learned; pick "
                f"an earlier LoRA, lower --learning_rate, or {self._against_drift}",
            )
