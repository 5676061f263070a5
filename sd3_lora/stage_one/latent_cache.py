"""The latent cache: the VAE's posterior of every crop of every picture, one safetensors file a picture.

A file is named by its picture's id and holds `<variant>.mean` and `<variant>.std`, `(16, H/8, W/8)` each, raw:
the VAE's shift and scale are applied in training (`normalize_latents`). Where masks were asked for it also holds
`<variant>.mask`, `(1, H/8, W/8)`, and its metadata say of which file each was made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.checksums import Checksums, DamagedError
from sd3_lora.common.command_line import UserError, write_text_atomically
from sd3_lora.common.records import InstanceImage, LatentMask, LatentPosterior, Provenance
from sd3_lora.common.tensor_files import write_tensors
from sd3_lora.stage_one.crop_boxes import number_of_variant

import torch
from safetensors import SafetensorError, safe_open

BROKEN_NAME = "broken.json"  # beside the latents: the pictures that --skip_broken left out
MOST_LATENT = 1000.0  # of a posterior's numbers; those of a picture are about 1, the largest some tens
_METADATA_KEY = "sd3_lora"


def normalize_latents(raw_latents: torch.Tensor, vae_config: Mapping[str, Any]) -> torch.Tensor:
    """Raw VAE latents → the space in which the transformer works: `(raw - shift) * scale`."""
    return (raw_latents - vae_config["shift_factor"]) * vae_config["scaling_factor"]


def sample_posterior(mean: torch.Tensor, std: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A raw sample of the VAE's posterior; `noise` is standard normal of the same shape."""
    return mean + std * noise


def denormalize_latents(latents: torch.Tensor, vae_config: Mapping[str, Any]) -> torch.Tensor:
    """The inverse of `normalize_latents`, for the decoder; as `StableDiffusion3Pipeline` does it."""
    return latents / vae_config["scaling_factor"] + vae_config["shift_factor"]


@dataclass(frozen=True)
class CachedPicture:
    """What the cache holds of one picture.

    Attributes:
        variants: of which it holds posteriors, sorted.
        size: width and height in pixels of the upright picture, before resizing.
        tiles: for each variant that was encoded in tiles, their side in pixels; the others were encoded whole.
        masks: for each variant that has a mask, its source (see `LatentMask`).
        ranges: what its augmented variants differ by (`Augmentation.ranges`); None where there are none.
        made_with: the VAE's provenance.
        alpha_background: what transparent pixels were drawn over.
    """

    variants: tuple[str, ...]
    size: tuple[int, int]
    tiles: dict[str, int]
    masks: dict[str, str]
    ranges: dict[str, float] | None
    made_with: Provenance
    alpha_background: str

    def has_smaller_tiles(self, tile_px: int | None) -> bool:
        """Whether a variant was encoded in tiles smaller than these; None is a whole picture."""
        return any(tile_px is None or side < tile_px for side in self.tiles.values())

    def has_other_tiles(self, tile_px: int | None) -> bool:
        """Whether a variant was encoded in tiles of another side; None is a whole picture."""
        return any(self.tiles.get(variant) != tile_px for variant in self.variants)


@dataclass(frozen=True)
class BrokenPicture:
    """A picture that does not decode.

    Attributes:
        image_id: sha256 of the file's bytes.
        path: of the file.
        reason: why, in words.
    """

    image_id: str
    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} does not decode ({self.reason})"


class LatentCache:
    """A folder of posteriors, keyed by image id and variant.

    Args:
        folder: where the files lie; it need not exist yet.
        wanted: the provenance that every file read must have.
        alpha_background: what transparent pixels were drawn over; None to read either.
        ranges: what augmented variants must differ by (`Augmentation.ranges`), or some of it; None to read any.
    """

    def __init__(
        self,
        folder: Path,
        wanted: Provenance,
        alpha_background: str | None = None,
        ranges: Mapping[str, float] | None = None,
    ):
        self.folder = folder
        self.wanted = wanted
        self.alpha_background = alpha_background
        self.ranges = dict(ranges or {})
        self._read: dict[str, CachedPicture] = {}  # opening 10,000 files takes seconds
        self._provenances: dict[str, Provenance] = {}  # by its text: 10,000 files have one and the same

    @property
    def resolution(self) -> int:
        """The side of the crops in pixels."""
        return self.wanted.size

    def path(self, image_id: str) -> Path:
        """The file of one picture."""
        return self.folder / f"{image_id}.safetensors"

    def remove(self, image_id: str) -> None:
        """Deletes a picture's file."""
        self._read.pop(image_id, None)
        self.path(image_id).unlink()

    def broken(self) -> dict[str, BrokenPicture]:
        """The pictures that were left out because they do not decode, by image id."""
        try:
            notes = json.loads((self.folder / BROKEN_NAME).read_text(encoding="utf-8"))
            pictures = [BrokenPicture(image_id, Path(path), reason) for image_id, (path, reason) in notes.items()]
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
        return {picture.image_id: picture for picture in pictures if not self.path(picture.image_id).is_file()}

    def note_broken(self, pictures: Iterable[BrokenPicture]) -> None:
        """Notes pictures that were left out, beside those that were noted before and still have no latents."""
        known = {**self.broken(), **{picture.image_id: picture for picture in pictures}}
        path = self.folder / BROKEN_NAME
        if known or path.exists():
            notes = {image_id: (str(picture.path), picture.reason) for image_id, picture in known.items()}
            write_text_atomically(path, json.dumps(notes, indent=1, ensure_ascii=False))

    def source(self, image_id: str) -> str | None:
        """The name of the picture's file when its latents were made; None if the cache cannot tell."""
        try:
            with safe_open(self.path(image_id), "pt") as handle:
                return json.loads(handle.metadata()[_METADATA_KEY])["source"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def _open(self, image_id: str) -> tuple[Any, Checksums]:
        path = self.path(image_id)
        try:
            handle = safe_open(path, "pt")
            metadata = json.loads((handle.metadata() or {})[_METADATA_KEY])
            provenance, background = Provenance.from_dict(metadata["provenance"]), metadata["alpha_background"]
            sums = Checksums(handle)
        except DamagedError as error:
            raise self._damaged(image_id, error) from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise self._foreign(image_id, error) from error
        difference = provenance.difference(self.wanted, "resolution")
        if self.alpha_background not in (None, background):
            difference = difference or f"alpha_background {background}, not {self.alpha_background}"
        recorded = metadata.get("augmentation")
        for name, value in self.ranges.items() if recorded else ():
            if recorded[name] != value:
                difference = difference or f"{name} {recorded[name]:g}, not {value:g}"
        if difference:
            raise StaleLatents(path, difference)
        return handle, sums

    def _foreign(self, image_id: str, error: Exception) -> UserError:
        return UserError(
            f"{self.path(image_id)} is not a whole latent file of this project ({type(error).__name__}): delete it and "
            "run precompute_latents.py again"
        )

    def _damaged(self, image_id: str, error: DamagedError) -> UserError:
        return UserError(f"{self.path(image_id)} is damaged, {error}: delete it and run precompute_latents.py again")

    def _tensors(self, image_id: str, *names: str) -> list[torch.Tensor]:
        """Tensors of a picture's file, copied out of the mapped file: Windows cannot replace a mapped file."""
        opened, sums = self._open(image_id)
        with opened as handle:
            known = set(handle.keys())
            if missing := [name for name in names if name not in known]:
                raise UserError(
                    f"{self.path(image_id)} lacks {missing[0]}: delete it and run precompute_latents.py again"
                )
            tensors = {name: handle.get_tensor(name).clone() for name in names}
        try:
            return [sums.require(name, tensor) for name, tensor in tensors.items()]
        except DamagedError as error:
            raise self._damaged(image_id, error) from error

    def look(self, image_id: str) -> CachedPicture | None:
        """What the cache holds of a picture; None if it has no file. A file is opened once, and again after `add`.

        Raises:
            UserError: a truncated or foreign file.
            StaleLatents: a file made with other settings.
        """
        if image_id in self._read:
            return self._read[image_id]
        if not self.path(image_id).is_file():
            return None
        opened, _ = self._open(image_id)
        with opened as handle:
            names = [name.removesuffix(".mean") for name in handle.keys() if name.endswith(".mean")]  # noqa: SIM118
            metadata = json.loads(handle.metadata()[_METADATA_KEY])
        try:
            width, height = map(int, metadata["picture_size"])
            # A file from before tiles were recorded counts as encoded whole.
            tiles, masks = dict(metadata.get("tiles_px", {})), dict(metadata.get("masks", {}))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._foreign(image_id, error) from error
        ranges = metadata.get("augmentation")
        made_with, background = self._shared_provenance(metadata["provenance"]), metadata["alpha_background"]
        picture = CachedPicture(tuple(sorted(names)), (width, height), tiles, masks, ranges, made_with, background)
        self._read[image_id] = picture
        return picture

    def _shared_provenance(self, values: dict[str, Any]) -> Provenance:
        """One object for all files that have the same."""
        return self._provenances.setdefault(json.dumps(values), Provenance.from_dict(values))

    def variants(self, image_id: str) -> tuple[str, ...]:
        """The variants that the cache holds of a picture; none if it has no file.

        Raises:
            UserError: as `look`.
        """
        picture = self.look(image_id)
        return picture.variants if picture else ()

    def tiles(self, image_id: str) -> dict[str, int]:
        """For each variant that was encoded in tiles, their side in pixels.

        Raises:
            UserError: as `look`.
        """
        picture = self.look(image_id)
        return picture.tiles if picture else {}

    def masks(self, image_id: str) -> dict[str, str]:
        """For each variant that has a mask, its source.

        Raises:
            UserError: as `look`.
        """
        picture = self.look(image_id)
        return picture.masks if picture else {}

    def read(self, image_id: str, variant: str) -> LatentPosterior:
        """One posterior.

        Raises:
            UserError: a truncated, damaged or foreign file, or numbers that are not finite.
            StaleLatents: a file made with other settings.
        """
        mean, std = self._tensors(image_id, f"{variant}.mean", f"{variant}.std")
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise UserError(
                f"{self.path(image_id)} holds a NaN or infinity: delete it and run "
                "precompute_latents.py --vae_precision fp32 --overwrite"
            )
        largest = float(torch.maximum(mean.abs().max(), std.max()))
        if largest > MOST_LATENT:
            raise UserError(
                f"{self.path(image_id)} holds {largest:.3g}, where the latents of a picture are about 1: delete it and "
                "run precompute_latents.py again"
            )
        return LatentPosterior(image_id, variant, mean, std)

    def read_mask(self, image_id: str, variant: str) -> LatentMask:
        """The mask of one variant that has one (`CachedPicture.masks`).

        Raises:
            UserError: a truncated or foreign file, or numbers that are not finite.
            StaleLatents: a file made with other settings.
        """
        (mask,) = self._tensors(image_id, f"{variant}.mask")
        if mask.is_floating_point() and not torch.isfinite(mask).all():
            raise UserError(
                f"{self.path(image_id)} holds a NaN or infinity in its mask: delete it and run "
                "precompute_latents.py again"
            )
        return LatentMask(variant, mask, self.masks(image_id)[variant])

    def add(
        self,
        image: InstanceImage,
        size: tuple[int, int],
        posteriors: Iterable[LatentPosterior],
        tile_px: int | None = None,
        masks: Iterable[LatentMask] = (),
    ) -> None:
        """Adds posteriors and masks to a picture's file.

        Args:
            image: the picture.
            size: its width and height in pixels, upright.
            posteriors: of its crops.
            tile_px: side in pixels of the tiles in which these were encoded; None for whole pictures.
            masks: of its crops, in place of those that it has.
        """
        image_id = image.image_id
        tensors: dict[str, torch.Tensor] = {}
        existing = self.look(image_id)
        tiles = dict(existing.tiles) if existing else {}
        for variant in existing.variants if existing else ():
            kept = self.read(image_id, variant)
            tensors |= {f"{variant}.mean": kept.mean, f"{variant}.std": kept.std}
        sources = dict(existing.masks) if existing else {}
        tensors |= {f"{variant}.mask": self.read_mask(image_id, variant).values for variant in sources}
        for mask in masks:
            tensors[f"{mask.variant}.mask"], sources[mask.variant] = mask.values.contiguous(), mask.source
        for posterior in posteriors:
            if tile_px is not None:
                tiles[posterior.variant] = tile_px
            tensors[f"{posterior.variant}.mean"] = posterior.mean.contiguous()
            tensors[f"{posterior.variant}.std"] = posterior.std.contiguous()
        metadata = {
            "provenance": self.wanted.to_dict(),
            "source": image.path.name,
            "picture_size": size,
            "alpha_background": self.alpha_background,
            "tiles_px": tiles,
            **({"masks": sources} if sources else {}),
        }
        ranges = existing.ranges if existing and existing.ranges else self.ranges
        if any(number_of_variant(name.rpartition(".")[0]) for name in tensors):
            metadata["augmentation"] = ranges
        with replacing(self.path(image_id)) as unfinished:
            write_tensors(unfinished, tensors, {_METADATA_KEY: json.dumps(metadata)})
        self._read.pop(image_id, None)


class StaleLatents(UserError):
    """A latent file that was made with other settings than those asked for."""

    def __init__(self, path: Path, difference: str):
        super().__init__(
            f"{path} was made with {difference}: add --overwrite to precompute_latents.py to replace it, "
            "or give another folder"
        )
        self.path = path
        self.difference = difference


def recorded_precision(folder: Path) -> str | None:
    """The VAE precision of the first readable file of a cache, None where there is none."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as handle:
                return json.loads(handle.metadata()[_METADATA_KEY])["provenance"]["precision"]
        except (SafetensorError, KeyError, TypeError, ValueError):
            continue
    return None
