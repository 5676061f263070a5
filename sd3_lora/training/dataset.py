"""The training data: each picture's posteriors joined with its prompt's embedding, by the picture's id.

Shapes: B batch, S text tokens, D joint attention width, P pooled width, H, W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sd3_lora.common.command_line import UserError, counted
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.common.records import InstanceImage, LatentPosterior, PromptEmbedding, Provenance, TrainingBatch
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.captions import trigger_of
from sd3_lora.stage_one.crop_boxes import crop_boxes, mirrored, number_of_variant, plain_variant, size_of_variant
from sd3_lora.stage_one.embedding_store import EmbeddingStore
from sd3_lora.stage_one.latent_cache import CachedPicture, LatentCache
from sd3_lora.training.flow import mask_weights
from sd3_lora.training.pool import Pool

import torch

_RESIDENT_BYTES = 1024**3  # a DreamBooth set has some tens of MiB; what exceeds this is read at each use


class TrainingData:
    """The pictures to train on, with their tensors.

    Args:
        pools: the pictures.
        variants: for each image id, the crops to draw from.
        store: the embeddings file.
        cache: the latent cache.
        unmasked_weight: of what the masks of the subject's pictures leave out, in the loss (see `mask_weights`); None
            for a loss without masks. With them each of these variants has one in the cache.
        prior_prompts: with which pictures come once more, where a prior term asks for it.
        clip_tokens: of each prompt that training may use `(2, C)`, where the CLIPs are trained.

    Raises:
        UserError: the crops of a picture show nothing of its mask.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        variants: dict[str, tuple[str, ...]],
        store: EmbeddingStore,
        cache: LatentCache,
        unmasked_weight: float | None = None,
        prior_prompts: Sequence[str] = (),
        clip_tokens: Mapping[str, torch.Tensor] | None = None,
    ):
        self.clip_tokens = dict(clip_tokens or {})
        self.prior_prompts = tuple(prior_prompts)
        self.pools = tuple(pools)
        self.images = tuple(image for pool in pools for image in pool.images)
        self._loss_weights = torch.tensor([pool.weight for pool in pools for _ in pool.images], dtype=torch.float32)
        self.variants = variants
        self._store, self._cache = store, cache
        self._posteriors: dict[tuple[str, str], LatentPosterior] = {}
        self._embeddings: dict[str, PromptEmbedding] = {}
        self._resident_bytes = 0
        self._unmasked_weight = unmasked_weight
        self._masks: dict[tuple[str, str], torch.Tensor] = {}
        self._coverage = {} if unmasked_weight is None else self._measure_coverage()

    def __len__(self) -> int:
        return len(self.images)

    def variants_of(self, index: int) -> tuple[str, ...]:
        """The crops of a picture that are drawn from."""
        return self.variants[self.images[index].image_id]

    def held_back(self, index: int) -> tuple[str, ...]:
        """The crops of a picture, of the shape of those that are drawn from, which the cache has beside them."""
        drawn_from = self.variants_of(index)
        cached = self._cache.variants(self.images[index].image_id)
        size = size_of_variant(drawn_from[0])
        plain = (name for name in cached if not number_of_variant(name))
        return tuple(name for name in plain if name not in drawn_from and size_of_variant(name) == size)

    def posterior(self, index: int, variant: str) -> LatentPosterior:
        """Of one crop of a picture, whether it is drawn from or not."""
        return self._cache.read(self.images[index].image_id, variant)

    def class_prompt(self, asked: str | None) -> str | None:
        """The class prompt that has an embedding: the flag's, else stage one's; None where there is none."""
        known = self._store.prompts_with_role("class") if asked is None else (asked,)
        return next((prompt for prompt in known if prompt in self._store), None)

    def counted(self) -> str:
        """How many pictures of each role, for the user."""
        subject, others = (
            sum(len(pool.images) for pool in self.pools if pool.role == role) for role in ("instance", "class")
        )
        return f"{counted(subject, 'picture')}" + (f" and {counted(others, 'class picture')}" if others else "")

    @property
    def sizes(self) -> tuple[PictureSize, ...]:
        """Of each picture's crops, in pixels."""
        return tuple(size_of_variant(self.variants[image.image_id][0]) for image in self.images)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The distinct captions of the subject's pictures, in the pictures' order."""
        return tuple(dict.fromkeys(self._instance_prompts()))

    def trigger(self, instance_prompt: str | None) -> str:
        """The prompt that draws the subject (see `captions.trigger_of`).

        Args:
            instance_prompt: the flag; None takes the prompts that stage one had for pictures without a caption.
        """
        asked = self._store.uncaptioned_prompts if instance_prompt is None else (instance_prompt,)
        return trigger_of(self._instance_prompts(), asked)

    def _instance_prompts(self) -> Iterator[str]:
        return (prompt for image in self._instance_images() for prompt in image.prompts)

    def _instance_images(self) -> Iterator[InstanceImage]:
        return (image for pool in self.pools if pool.role == "instance" for image in pool.images)

    def prompts_of(
        self, indices: Sequence[int], turns: Sequence[int], dropped: torch.Tensor | None = None
    ) -> tuple[str, ...]:
        """Which prompt each picture comes with.

        Args:
            indices: `B` picture indices.
            turns: how often each picture came before: its captions come in turn.
            dropped: `(B,)` bool, which pictures come with the empty prompt; None for no picture.
        """
        drops = [False] * len(indices) if dropped is None else dropped.tolist()
        captions = [self.images[i].prompts for i in indices]
        return tuple(
            "" if drop else prompts[turn % len(prompts)]
            for prompts, turn, drop in zip(captions, turns, drops, strict=True)
        )

    @property
    def text(self) -> Provenance:
        """The provenance of the embeddings: T5's precision, and the number of its tokens."""
        return self._store.provenance

    def cached(self, role: str) -> list[CachedPicture]:
        """What the cache holds of the pictures of a role."""
        pictures = (
            self._cache.look(image.image_id) for pool in self.pools if pool.role == role for image in pool.images
        )
        return [picture for picture in pictures if picture]

    def prior_embeddings(self) -> list[PromptEmbedding]:
        """Of the prior prompts."""
        return [self.embedding(prompt) for prompt in self.prior_prompts]

    def batch(
        self, indices: Sequence[int], variant_draws: torch.Tensor, prompts: Sequence[str] | None = None
    ) -> TrainingBatch:
        """Stacks some pictures.

        Args:
            indices: `B` picture indices.
            variant_draws: `(B,)` in [0, 1): which of a picture's crops.
            prompts: of each picture (see `prompts_of`); None for the first caption of each.
        """
        images = [self.images[i] for i in indices]
        posteriors = []
        for image, draw in zip(images, variant_draws.tolist(), strict=True):
            variants = self.variants[image.image_id]
            posteriors.append(self._posterior(image.image_id, variants[int(draw * len(variants))]))
        prompts = prompts or [image.prompt for image in images]
        embeddings = [self.embedding(prompt) for prompt in prompts]
        return TrainingBatch(
            image_ids=tuple(image.image_id for image in images),
            latent_mean=torch.stack([p.mean for p in posteriors]),
            latent_std=torch.stack([p.std for p in posteriors]),
            prompt_embeds=torch.stack([e.prompt_embeds for e in embeddings]),
            pooled_prompt_embeds=torch.stack([e.pooled_prompt_embeds for e in embeddings]),
            loss_weights=self._weights(indices, [p.variant for p in posteriors], posteriors[0].mean.shape[1:]),
            clip_tokens=torch.stack([self.clip_tokens[prompt] for prompt in prompts]) if self.clip_tokens else None,
        )

    @property
    def mask_sources(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Of each picture with masks, its id and its variants' masks' sources; empty without masks."""
        return tuple(
            (image_id, tuple(self._cache.masks(image_id)[variant] for variant in self.variants[image_id]))
            for image_id in self._coverage
        )

    def _weights(self, indices: Sequence[int], variants: Sequence[str], size: Sequence[int]) -> torch.Tensor:
        """`(B,)` float32, the weight of each picture; under masks `(B, 1, H/8, W/8)`.

        Args:
            indices: `B` picture indices.
            variants: of each picture, which.
            size: height and width of the latents.
        """
        weights = self._loss_weights[list(indices)]
        if self._unmasked_weight is None:
            return weights
        maps = torch.ones(len(weights), 1, *size)
        for row, index, variant in zip(range(len(weights)), indices, variants, strict=True):
            image_id = self.images[index].image_id
            if image_id in self._coverage:
                mask = self._mask(image_id, variant)
                maps[row] = mask_weights(mask, self._coverage[image_id], self._unmasked_weight)
        return weights.view(-1, 1, 1, 1) * maps

    def _measure_coverage(self) -> dict[str, float]:
        """For the id of each of the subject's pictures, the mean of its crops' masks."""
        coverage = {}
        for image in self._instance_images():
            masks = [self._mask(image.image_id, variant) for variant in self.variants[image.image_id]]
            coverage[image.image_id] = float(torch.stack([mask.float().mean() for mask in masks]).mean())
            if not coverage[image.image_id]:
                raise UserError(
                    f"the crops of {image.path.name} show nothing of its mask: take more of them (--num_crops), cut "
                    "the picture to the subject, or remove it"
                )
        return coverage

    def _mask(self, image_id: str, variant: str) -> torch.Tensor:
        key = (image_id, variant)
        if key in self._masks:
            return self._masks[key]
        mask = self._cache.read_mask(image_id, variant).values
        if self._keep(mask):
            self._masks[key] = mask
        return mask

    def _posterior(self, image_id: str, variant: str) -> LatentPosterior:
        key = (image_id, variant)
        if key in self._posteriors:
            return self._posteriors[key]
        posterior = self._cache.read(image_id, variant)
        if self._keep(posterior.mean, posterior.std):
            self._posteriors[key] = posterior
        return posterior

    def embedding(self, prompt: str) -> PromptEmbedding:
        """Of any prompt that stage one has embedded."""
        if prompt in self._embeddings:
            return self._embeddings[prompt]
        embedding = self._store.read(prompt)
        if self._keep(embedding.prompt_embeds, embedding.pooled_prompt_embeds):
            self._embeddings[prompt] = embedding
        return embedding

    def _keep(self, *tensors: torch.Tensor) -> bool:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._resident_bytes + size > _RESIDENT_BYTES:
            return False
        self._resident_bytes += size
        return True


def images_of_store(store: EmbeddingStore, cache: LatentCache) -> tuple[InstanceImage, ...]:
    """The pictures of the embeddings file, for training without their folder; their paths are names alone.

    Raises:
        UserError: the file has none.
    """
    pairs = sorted(store.prompts_of_images().items())
    if not pairs:
        raise UserError(f"{store.path} knows no pictures: type --instance_data_dir FOLDER")
    return tuple(
        InstanceImage(
            image_id, Path(cache.source(image_id) or cache.path(image_id)), prompts[0], other_prompts=prompts[1:]
        )
        for image_id, prompts in pairs
    )


def require_prompts(store: EmbeddingStore, prompts: Sequence[str], command: str) -> None:
    """Checks that every prompt has its row.

    Raises:
        UserError: one is missing; the sentence ends with `command`.
    """
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in store]
    if missing:
        others = f" and {counted(len(missing) - 1, 'more prompt')}" if len(missing) > 1 else ""
        raise UserError(f"{store.path} lacks {missing[0]!r}{others}: type `{command}`")


def choose_variants(
    images: Sequence[InstanceImage],
    cache: LatentCache,
    buckets: Buckets,
    center_crop: bool,
    num_crops: int | None,
    flip: bool | None,
    command: str,
) -> dict[str, tuple[str, ...]]:
    """For each picture the cached crops to draw from: all, or those that the flags name; and their augmented variants.

    Args:
        images: the pictures.
        cache: the latent cache.
        buckets: the sizes of the crops; those of other sizes in the cache are left alone.
        center_crop: only the central one.
        num_crops: only the crops of a cache with this many a picture; None for all in the cache.
        flip: with (True) or without (False) the mirrored twins; None for all in the cache.
        command: computes the missing ones.

    Raises:
        UserError: a picture has no latents, or lacks an asked crop.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    for image in images:
        entry = cache.look(image.image_id)
        if not entry or not entry.variants:
            raise UserError(
                f"{cache.folder} has no latents of {image.path.name} (a new or changed picture): type `{command}`"
            )
        size = buckets.size_for(*entry.size)
        augmented = tuple(name for name in entry.variants if number_of_variant(name))
        wanted = cached = tuple(
            name for name in entry.variants if size_of_variant(name) == size and name not in augmented
        )
        if not cached:
            other = "" if len(buckets.sizes) > 1 else "add the --use_aspect_ratio_bucket of then, or "
            raise UserError(
                f"{cache.folder} has no crop of {size} px of {image.path.name}, but one of "
                f"{size_of_variant(entry.variants[0])}: {other}type `{command}`"
            )
        if center_crop or num_crops is not None:
            count = 1 if center_crop else num_crops or 1
            boxes = crop_boxes(*entry.size, size, count, flip=True)
            wanted = tuple(box.name for box in boxes if box.name in cached or not box.flip)
        if flip is not None and flip:
            wanted = tuple(dict.fromkeys(v for name in wanted for v in (name, mirrored(name))))
        elif flip is not None:
            wanted = tuple(name for name in wanted if name != mirrored(name))
        lacking = [variant for variant in wanted if variant not in cached]
        if lacking or not wanted:
            raise UserError(
                f"{cache.folder} lacks the crop {lacking[0] if lacking else 'without a mirror'} of {image.path.name}: "
                f"type `{command}`"
            )
        chosen[image.image_id] = (*wanted, *(name for name in augmented if plain_variant(name) in wanted))
    return chosen


def augmented_counts(variants: Sequence[str]) -> set[int]:
    """How many augmented variants the crops among these have: one number where all have as many.

    Args:
        variants: crops, each with those of its augmented variants that are to be counted.
    """
    return {count - 1 for count in Counter(map(plain_variant, variants)).values()}
