"""The cached crops that are trained on, and their masks: checked, with the command that mends a mismatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sd3_lora.common.command_line import UserError, command, print_in_rank_0
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.buckets import Buckets
from sd3_lora.stage_one.crop_boxes import number_of_variant
from sd3_lora.stage_one.latent_cache import LatentCache, StaleLatents
from sd3_lora.stage_one.masks import ALPHA, noted_masks, picture_name
from sd3_lora.training.dataset import augmented_counts, choose_variants
from sd3_lora.training.stage_one_request import MASK_FLAGS, StageOneRequest


def choose_crops(
    request: StageOneRequest, images: tuple[InstanceImage, ...], cache: LatentCache
) -> dict[str, tuple[str, ...]]:
    """For each picture's id, the cached crops to train on.

    Raises:
        UserError: the cache was made with other settings, lacks a picture or a crop, or has crops of the subject
            with more augmented variants, or others, than those of other pictures.
    """
    remedy, data = request.command("precompute_latents.py"), request.data
    try:
        buckets = Buckets.of(data, request.files)
        chosen = choose_variants(images, cache, buckets, data.center_crop, data.num_crops, data.random_flip, remedy)
    except StaleLatents as error:
        raise UserError(f"{error.path} was made with {error.difference}: type `{remedy} --overwrite`") from error
    chosen |= _augmented(request, [image for image in images if image.role == "instance"], chosen, cache)
    tiled = sum(not cache.tiles(image_id).keys().isdisjoint(variants) for image_id, variants in chosen.items())
    if tiled:
        print_in_rank_0(
            f"note: {tiled} of {len(images)} pictures were encoded in tiles, which differ a little from the whole"
        )
    return chosen


def require_masks(
    request: StageOneRequest, images: Sequence[InstanceImage], variants: Mapping[str, Sequence[str]], cache: LatentCache
) -> None:
    """Checks under --masked_loss that the cache has the mask of each crop, and of the mask that there is now.

    Args:
        request: what is asked of stage one.
        images: the subject's.
        variants: for each picture's id, its crops.
        cache: of the latents.

    Raises:
        UserError: one is missing, or was made of another mask.
    """
    if not request.data.masked_loss:
        return
    flags = request.flags("precompute_latents.py")
    named = {name: flags[name] for name in MASK_FLAGS if flags.get(name)}
    remedy = f"type `{command('precompute_latents.py', **flags)}`"
    if not named:
        remedy = "add --mask_data_dir with the folder of your masks, or --alpha_mask where pictures have an alpha"
    for image in images:
        if not cache.masks(image.image_id).keys() >= set(variants[image.image_id]):
            raise UserError(f"{cache.folder} has no mask of {image.path.name} for --masked_loss: {remedy}")
    folder = Path(named.get("mask_data_dir", ""))
    if request.data.mask_data_dir is not None and not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of your masks as --mask_data_dir")
    # A folder that was told to stage one alone may be gone since.
    notes = noted_masks(folder) if "mask_data_dir" in named and folder.is_dir() else None
    if notes is not None and request.subject is None:  # the pictures may have other names by now
        notes = {(picture_name(image.path), source) for image in images for _, source in notes}
    if "alpha_mask" in named:
        notes = {(picture_name(image.path), ALPHA) for image in images}
    for image in images:
        masks, name = cache.masks(image.image_id), picture_name(image.path)
        if notes is not None and any((name, masks[variant]) not in notes for variant in variants[image.image_id]):
            raise UserError(f"the mask of {image.path.name} is not the one in {cache.folder}: {remedy}")


def _augmented(
    request: StageOneRequest, images: Sequence[InstanceImage], chosen: Mapping[str, tuple[str, ...]], cache: LatentCache
) -> dict[str, tuple[str, ...]]:
    """For the id of each picture of the subject, its crops with as many augmented variants as all others have.

    Raises:
        UserError: there are more of one crop than of another, or than asked for; or they differ by other amounts.
    """
    asked = request.data.num_augmented
    kept = {
        image.image_id: tuple(v for v in chosen[image.image_id] if asked is None or number_of_variant(v) <= asked)
        for image in images
    }
    counts = {image_id: augmented_counts(variants) for image_id, variants in kept.items()}
    most = max((max(each) for each in counts.values()), default=0) if asked is None else asked
    ranges = {image.image_id: entry.ranges or {} for image in images if (entry := cache.look(image.image_id))}
    first = next((each for each in ranges.values() if each), {})
    remedy = request.command("precompute_latents.py", num_augmented=most, **first)
    for image in images if most else ():
        if counts[image.image_id] != {most}:
            fault = f"has {min(counts[image.image_id])} augmented variants of a crop of {image.path.name}, not {most}"
        elif ranges[image.image_id] != first:
            fault = f"has variants of {image.path.name} augmented otherwise than those of other pictures"
            remedy += " --overwrite"
        else:
            continue
        raise UserError(f"{cache.folder} {fault}: type `{remedy}`, or --num_augmented 0 to train without")
    return kept
