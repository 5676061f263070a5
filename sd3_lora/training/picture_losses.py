"""The loss of each picture at fixed noise: which one is badly captioned, or broken.

All pictures of one shape get the same noise at the same levels, without a sample of the posterior, so that their losses
can be compared. Each picture is predicted with its caption and with the empty prompt. So two things come apart:

- a caption that fits lowers the loss, and one that helps less than those of the others is suspicious;
- a picture is suspicious whose losses without a caption are far from the others' at most noise levels, up or down: one
  of noise alone has low ones where there is much noise, and high ones where there is little.

Shapes: B rows of a forward, H, W pixels.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.stage_one.latent_cache import normalize_latents
from sd3_lora.training.dataset import TrainingData
from sd3_lora.training.flow import NoiseTable, flow_matching_loss, interpolate
from sd3_lora.training.flow_flags import FlowConfig
from sd3_lora.transformer.velocity import VelocityModel

import torch

# Of the modified z-score, beyond which a value is an outlier (Iglewicz and Hoaglin, 1993).
SUSPICIOUS = 3.5
FAR_OFF = 2.0  # times the median loss of a noise level, or that part of it
_UNWEIGHTED = FlowConfig(weighting_scheme="none")


@dataclass(frozen=True)
class FixedNoise:
    """The noise that all pictures get.

    Attributes:
        table: of noise levels.
        levels: how many of them, evenly spread over the table.
        seed: of the noise, which is the same for all pictures of one shape.
    """

    table: NoiseTable
    levels: int
    seed: int

    @property
    def indices(self) -> list[int]:
        """The rows of the table."""
        count = len(self.table.sigmas)
        return [int((level + 0.5) * count / self.levels) for level in range(self.levels)]

    def noise(self, shape: Sequence[int]) -> torch.Tensor:
        """`(16, H/8, W/8)` standard normal float32."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True)
class PictureLoss:
    """A picture's losses with one of its captions.

    Attributes:
        image_id: sha256 of the picture's bytes.
        name: of its file, with its folder where another picture has the same name.
        caption: that it is predicted with.
        losses: at each noise level, from the most noise to the least.
        without_caption: likewise, with the empty prompt.
        score: how far its loss is above the median, as a modified z-score.
        caption_score: how much less its caption helps than the median one, likewise.
        factor: how many times, up or down, its losses without a caption are off the medians: the geometric mean over
            the noise levels, at least 1.
    """

    image_id: str
    name: str
    caption: str
    losses: tuple[float, ...]
    without_caption: tuple[float, ...]
    score: float = 0.0
    caption_score: float = 0.0
    factor: float = 1.0

    @property
    def loss(self) -> float:
        """The mean over the noise levels."""
        return statistics.fmean(self.losses)

    @property
    def caption_gain(self) -> float:
        """By how much its caption lowers the loss."""
        return statistics.fmean(self.without_caption) - self.loss

    @property
    def suspicion(self) -> float:
        """More than 1 where anything is suspicious."""
        return max(self.score / SUSPICIOUS, self.caption_score / SUSPICIOUS, math.log(self.factor) / math.log(FAR_OFF))

    def suspicions(self) -> Iterator[str]:
        """What is suspicious, in words."""
        if self.caption_score > SUSPICIOUS:
            yield f"{self.name}: read its caption {self.caption!r}, which helps far less than those of the others do"
        if self.factor > FAR_OFF:
            yield (
                f"{self.name}: look at the picture, which may be broken or of something else: without a caption its "
                f"losses are {self.factor:.1f} times off the others', up or down"
            )
        elif self.score > SUSPICIOUS >= self.caption_score:
            yield f"{self.name}: look at it and at its caption {self.caption!r}: its loss is far above the others'"

    def to_dict(self) -> dict[str, Any]:
        """For the file."""
        values = {**asdict(self), "loss": self.loss, "caption_gain": self.caption_gain}
        return values | {"suspicions": list(self.suspicions())}


def robust_scores(values: Sequence[float]) -> list[float]:
    """Modified z-scores: the distance from the median, by what is a standard deviation of normal values.

    That is 1.4826 times the median distance, which outliers do not move; where more than half of the values are equal,
    1.2533 times the mean distance. All scores are 0 where all values are equal.
    """
    median = statistics.median(values)
    distances = [abs(value - median) for value in values]
    spread = 1.4826 * statistics.median(distances) or 1.2533 * statistics.fmean(distances)
    return [(value - median) / spread if spread else 0.0 for value in values]


def ranked(losses: Sequence[PictureLoss]) -> list[PictureLoss]:
    """The same with their scores, the most suspicious first."""
    scores = robust_scores([each.loss for each in losses])
    caption_scores = robust_scores([-each.caption_gain for each in losses])
    medians = [statistics.median(level) for level in zip(*(each.without_caption for each in losses), strict=True)]
    scored = [
        replace(each, score=score, caption_score=caption_score, factor=_factor(each.without_caption, medians))
        for each, score, caption_score in zip(losses, scores, caption_scores, strict=True)
    ]
    return sorted(scored, key=lambda each: -each.suspicion)


def _factor(losses: Sequence[float], medians: Sequence[float]) -> float:
    ratios = [abs(math.log(loss / median)) for loss, median in zip(losses, medians, strict=True)]
    return math.exp(statistics.fmean(ratios))


def table(losses: Sequence[PictureLoss]) -> Iterator[str]:
    """The lines of a table of them."""
    width = max(len("picture"), *(len(each.name) for each in losses))
    yield f"{'picture':{width}}    loss  score  caption helps  score  times off  caption"
    for each in losses:
        yield (
            f"{each.name:{width}}  {each.loss:.4f}  {each.score:5.1f}  {each.caption_gain:13.4f}  "
            f"{each.caption_score:5.1f}  {each.factor:9.1f}  {each.caption}"
        )


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The files' names, with as many of the folders around them as tell files of one name apart."""
    names = [path.name for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        counts = Counter(names)
        names = [
            Path(*path.parts[-depth:]).as_posix() if counts[name] > 1 else name
            for path, name in zip(paths, names, strict=True)
        ]
    return names


def measure_losses(
    model: VelocityModel,
    data: TrainingData,
    fixed: FixedNoise,
    vae_config: Mapping[str, Any],
    device: torch.device,
    together: int,
    done: Callable[[int], object] = lambda _: None,
) -> list[PictureLoss]:
    """The losses of every picture with each of its captions, in the order of the data; of its first crop.

    Args:
        model: with a LoRA or without.
        data: the pictures; the empty prompt has its embedding.
        fixed: the noise.
        vae_config: with the shift and the scale of the latents.
        device: that computes.
        together: rows of a forward.
        done: is told how many rows were computed.

    Raises:
        UserError: a loss is not finite.
    """
    captions = [(index, prompt) for index, image in enumerate(data.images) for prompt in image.prompts]
    wanted = dict.fromkeys(pair for index, prompt in captions for pair in ((index, prompt), (index, "")))
    by_size: dict[PictureSize, list[tuple[int, str, int]]] = {}
    for index, prompt in wanted:
        rows = by_size.setdefault(data.sizes[index], [])
        rows += [(index, prompt, level) for level in fixed.indices]
    losses: dict[tuple[int, str, int], float] = {}
    names = distinct_names([image.path for image in data.images])
    for rows in by_size.values():
        for start in range(0, len(rows), together):
            batch = rows[start : start + together]
            losses |= zip(batch, _losses_of(model, data, batch, fixed, vae_config, device), strict=True)
            done(len(batch))
    return [
        PictureLoss(
            data.images[index].image_id,
            names[index],
            prompt,
            tuple(losses[index, prompt, level] for level in fixed.indices),
            tuple(losses[index, "", level] for level in fixed.indices),
        )
        for index, prompt in captions
    ]


@torch.no_grad()
def _losses_of(
    model: VelocityModel,
    data: TrainingData,
    rows: Sequence[tuple[int, str, int]],
    fixed: FixedNoise,
    vae_config: Mapping[str, Any],
    device: torch.device,
) -> list[float]:
    """The loss of each row: a picture's index, a prompt, and a row of the noise table."""
    indices, prompts, levels = (list(column) for column in zip(*rows, strict=True))
    batch = data.batch(indices, torch.zeros(len(rows)), prompts)
    latents = normalize_latents(batch.latent_mean.float(), vae_config).to(device)
    noise = fixed.noise(latents.shape[1:]).expand_as(latents).to(device)
    sigmas = fixed.table.sigmas[levels].view(-1, 1, 1, 1).to(device)
    velocity = model(
        interpolate(latents, noise, sigmas),
        fixed.table.timesteps[levels].to(device),
        batch.prompt_embeds.to(device, model.dtype),
        batch.pooled_prompt_embeds.to(device, model.dtype),
    )
    ones = torch.ones(1, device=device)
    each = zip(*(part.split(1) for part in (velocity, latents, noise, sigmas)), strict=True)
    losses = torch.stack([flow_matching_loss(v, x, e, s, ones, _UNWEIGHTED) for v, x, e, s in each])
    for index, is_finite in zip(indices, losses.isfinite().tolist(), strict=True):
        if not is_finite:
            name = data.images[index].path.name
            remedy = "type --mixed_precision no" if model.dtype == torch.float16 else "compute its latents again"
            raise UserError(f"the loss of {name} is not finite: {remedy}")
    values: list[float] = losses.tolist()
    return values
