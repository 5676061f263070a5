"""Masks: what of each picture is trained on. A folder of masks, or the pictures' own alpha.

White is trained on, black is not. Shapes: H, W pixels of a crop.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import MOST_SHOWN, UserError, all_of
from sd3_lora.common.config import CropFlags
from sd3_lora.common.records import InstanceImage, LatentMask
from sd3_lora.stage_one.concepts import Concept, Subject
from sd3_lora.stage_one.crop_boxes import CropBox, crop_picture
from sd3_lora.stage_one.image_files import folded, is_named_as_mask, list_images, mask_stem, picture_and_mask_paths
from sd3_lora.stage_one.images import BrokenImage, open_alpha, open_grey, upright_size
from sd3_lora.stage_one.picture_hashes import hash_pictures

import numpy as np
import torch
from PIL import Image

ALPHA = "alpha"  # the source of a mask that is its picture's own alpha


@dataclass(frozen=True)
class Mask:
    """The mask of one picture.

    Attributes:
        image: the picture.
        path: of the mask's file; None for the picture's own alpha.
        source: sha256 of that file, hexadecimal, or `alpha`.
    """

    image: InstanceImage
    path: Path | None = None
    source: str = ALPHA

    def read(self) -> Image.Image:
        """The mask, 8-bit grey, upright, of its picture's size.

        Raises:
            UserError: it does not decode, is of another size, black all over, or the picture has no alpha.
            BrokenImage: the picture itself does not decode.
        """
        picture = self.image.path
        if self.path is None:
            mask = open_alpha(picture)
            if mask is None:
                raise UserError(
                    f"{picture} has no transparency that could be its mask: cut the subject out, or give a folder of "
                    "masks as --mask_data_dir"
                )
        else:
            size = upright_size(picture)
            try:
                mask = open_grey(self.path)
            except BrokenImage as error:
                raise UserError(f"the mask {error}: save it anew") from error
            if mask.size != size:
                raise UserError(
                    f"the mask {self.path} has {mask.width}x{mask.height} pixels, and {picture.name} "
                    f"{size[0]}x{size[1]}: save it in the picture's size"
                )
        if mask.getbbox() is None:
            name = f"the mask {self.path}" if self.path else f"{picture}, by whose alpha it is masked,"
            raise UserError(
                f"{name} shows nothing of {picture.name}: paint white what is to be trained on, or remove the picture"
            )
        return mask


def latent_mask(mask: Image.Image, box: CropBox, source: str, scale: int) -> LatentMask:
    """A mask's part in a crop of its picture, averaged to latent resolution.

    Args:
        mask: 8-bit grey, of the picture's size.
        box: the crop.
        source: of the mask.
        scale: pixels in a latent pixel, along one side.
    """
    grey = torch.from_numpy(np.array(crop_picture(mask, box)))[None]  # (1, H, W)
    values = torch.nn.functional.avg_pool2d(grey.float() / 255, scale)
    return LatentMask(box.name, values.half(), source)


def find_masks(flags: CropFlags, subject: Subject) -> list[Mask]:
    """The mask of each picture of a subject, none where flags name none; nothing is decoded.

    The mask of `dog.jpg` is `dog.png`, or a picture of another extension, in the folder of masks; where that folder is
    the pictures' own, or a folder around it, `dog-masklabel.png` beside the picture. A picture in a subfolder has its
    mask in a subfolder of that name; with several concepts it may lie in a folder of the concept's name.

    Args:
        flags: where the masks are.
        subject: the pictures.

    Raises:
        UserError: there is no such folder; a picture has no mask or two, a mask no picture or two.
    """
    if flags.mask_data_dir is None:
        return [Mask(image) for image in subject.images] if flags.alpha_mask else []
    folder, recursive = Path(flags.mask_data_dir), flags.recursive
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of your masks as --mask_data_dir")
    files = _mask_files(folder, subject.concepts, recursive)
    if not files:
        raise UserError(f"{folder} holds no masks: put one into it for each picture, of the picture's name")
    by_stem = defaultdict[str, list[Path]](list)
    for path in files:
        by_stem[folded(mask_stem(path))].append(path)
    known, faults = set[str](), list[str]()
    masks, pictures = dict[str, Path](), dict[Path, Path]()
    for concept, listed in zip(subject.concepts, subject.folders, strict=True):
        for path in list_images(concept.folder, recursive).images:
            known.update(_stems(path, concept, folder))
        for image in listed.images:
            if image.image_id in masks:  # the same picture in another concept
                continue
            found = [path for stem in _stems(image.path, concept, folder) for path in by_stem.get(stem, ())]
            faults += _faults(image.path, found, pictures, folder)
            if found:
                masks[image.image_id], pictures[found[0]] = found[0], image.path
    for path in files:
        if folded(mask_stem(path)) not in known:
            faults.append(f"the mask {path} has no picture: give it the name of its picture, or remove it")
    if faults:
        raise UserError(all_of(faults, "the masks", MOST_SHOWN))
    paths = [masks[image.image_id] for image in subject.images]
    return [Mask(*each) for each in zip(subject.images, paths, hash_pictures(paths), strict=True)]


def _mask_files(folder: Path, concepts: Sequence[Concept], recursive: bool) -> list[Path]:
    """The masks in a folder; where pictures lie in it too, those by the name of masks."""
    files, folders = picture_and_mask_paths(folder), [concept.folder for concept in concepts]
    if any(other.resolve().is_relative_to(folder.resolve()) for other in folders):
        return [path for path in files if is_named_as_mask(path)]
    pictures = {folded(path) for other in folders for path in list_images(other, recursive).images}
    return [path for path in files if folded(path) not in pictures]


def _stems(picture: Path, concept: Concept, folder: Path) -> list[str]:
    """The paths that a picture's mask may have, without extension: in the folder of masks, and beside the picture."""
    within = picture.relative_to(concept.folder)
    places = (folder / within, folder / concept.folder.name / within, picture)
    return list(dict.fromkeys(folded(place.with_suffix("")) for place in places))


def _faults(picture: Path, found: Sequence[Path], pictures: dict[Path, Path], folder: Path) -> list[str]:
    """What is wrong with a picture's masks, a sentence each.

    Args:
        picture: the picture.
        found: its masks.
        pictures: of the masks that are taken.
        folder: of masks.
    """
    if not found:
        return [f"{folder} has no mask of {picture}: add {picture.stem}.png, or remove the picture"]
    if len(found) > 1:
        return [f"{found[0]} and {found[1]} are both masks of {picture}: remove one of them"]
    if found[0] in pictures:
        return [
            f"{found[0]} is the mask of {pictures[found[0]]} and of {picture}: give the pictures different names, or "
            f"put the masks into {folder / picture.parent.name} and its like"
        ]
    return []


def noted_masks(folder: Path) -> set[tuple[str, str]]:
    """Of each mask in a folder the name of its picture (`picture_name`), and its source."""
    paths = picture_and_mask_paths(folder)
    names = [picture_name(path.with_name(mask_stem(path).name + path.suffix)) for path in paths]
    return set(zip(names, hash_pictures(paths), strict=True))


def picture_name(picture: Path) -> str:
    """A picture's name without folder and extension, in one spelling."""
    return folded(Path(picture.stem))


def require_right_masks(masks: Iterable[Mask], threads: int) -> None:
    """Decodes masks to see that they fit their pictures. Those of pictures that do not decode are left to the reader.

    Raises:
        UserError: as `Mask.read`, of all masks at once.
    """

    def fault(mask: Mask) -> str:
        try:
            mask.read()
        except UserError as error:
            return str(error)
        except BrokenImage:
            return ""
        return ""

    with ThreadPoolExecutor(threads) as pool:
        faults = [sentence for sentence in pool.map(fault, masks) if sentence]
    if faults:
        raise UserError(all_of(faults, "the masks", MOST_SHOWN))
