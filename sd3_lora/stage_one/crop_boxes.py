"""Crops of a picture: where they lie, how the latent cache names them, and their pixels.

Shapes: H, W pixels of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sd3_lora.common.picture_size import PictureSize

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageEnhance, ImageOps

_FLIP_SUFFIX = "-flip"
_MOST_ENLARGED, _LEAST_SEEN = 2, 0.5  # pictures beyond are told


@dataclass(frozen=True)
class CropBox:
    """A crop of a resized picture; all in pixels.

    Attributes:
        resized_width: of the whole picture.
        resized_height: of the whole picture.
        left: of the crop, in the resized picture.
        top: of the crop, in the resized picture.
        flip: whether the crop is mirrored, left to right.
        size: of the crop.
        number: of an augmented variant, from 1; 0 for the crop itself.
        degrees: by which the picture is turned around the crop's centre, counterclockwise; two decimals.
        brightness: by which its values are multiplied; two decimals.
    """

    resized_width: int
    resized_height: int
    left: int
    top: int
    flip: bool
    size: PictureSize
    number: int = 0
    degrees: float = 0.0
    brightness: float = 1.0

    @property
    def name(self) -> str:
        """The variant's name in the latent cache, X11's notation: `512x512+0+171`, `512x512+0+171-flip`.

        That of an augmented variant also has its number, its degrees and its brightness: `512x512+0+171@1:-3.25,1.08`.
        """
        name = f"{self.size}+{self.left}+{self.top}"
        if self.number:
            name += f"@{self.number}:{self.degrees:.2f},{self.brightness:.2f}"
        return mirrored(name) if self.flip else name


def mirrored(name: str) -> str:
    """The name of a variant's mirrored twin; that of a mirrored variant is its own."""
    return name if name.endswith(_FLIP_SUFFIX) else name + _FLIP_SUFFIX


def plain_variant(name: str) -> str:
    """The name of the crop of which this one is an augmented variant, mirrored if it is; else its own."""
    plain = name.removesuffix(_FLIP_SUFFIX).split("@")[0]
    return mirrored(plain) if name == mirrored(name) else plain


def number_of_variant(name: str) -> int:
    """Which augmented variant of its crop it is, from 1; 0 for the crop itself."""
    return int(name.split("@")[1].split(":")[0]) if "@" in name else 0


def size_of_variant(name: str) -> PictureSize:
    """The size of the crop that has this name in the latent cache."""
    return PictureSize.parse(name.split("+")[0])


def crop_boxes(width: int, height: int, size: PictureSize, num_crops: int, flip: bool) -> tuple[CropBox, ...]:
    """The crops of a picture that is resized until it just covers their size.

    The centre of an odd `num_crops` is the crop of `num_crops=1`, to the pixel, so that one cache serves both.

    Args:
        width: of the picture in pixels.
        height: of the picture in pixels.
        size: of the crops.
        num_crops: 1 for the centre, else that many along the side that is cut, both ends included; fewer where they
            coincide, so one of a picture of the crops' shape.
        flip: whether each is followed by its mirrored twin.
    """
    resized_width, resized_height = _covering(width, height, size)
    is_wider = resized_width > size.width
    room = max(resized_width - size.width, resized_height - size.height)
    offsets = dict.fromkeys(i * room // (num_crops - 1) for i in range(num_crops)) if num_crops > 1 else [room // 2]
    return tuple(
        CropBox(resized_width, resized_height, *((offset, 0) if is_wider else (0, offset)), twin, size)
        for offset in offsets
        for twin in ((False, True) if flip else (False,))
    )


def _covering(width: int, height: int, size: PictureSize) -> tuple[int, int]:
    """The width and height of a picture that just covers a size; the side that is cut is rounded to the nearest."""
    is_wider = width * size.height > height * size.width
    scale, whole = (size.height, height) if is_wider else (size.width, width)
    resized_width, resized_height = ((2 * side * scale + whole) // (2 * whole) for side in (width, height))
    return resized_width, resized_height


def crop_box_of(name: str, width: int, height: int) -> CropBox:
    """The crop that has this name in the latent cache (`CropBox.name`).

    Args:
        name: of the variant.
        width: of the picture in pixels.
        height: of the picture in pixels.
    """
    size, (crop, _, augmented) = size_of_variant(name), name.removesuffix(_FLIP_SUFFIX).partition("@")
    _, left, top = crop.split("+")
    box = CropBox(*_covering(width, height, size), int(left), int(top), name == mirrored(name), size)
    if not augmented:
        return box
    degrees, brightness = augmented.partition(":")[2].split(",")
    return replace(box, number=number_of_variant(name), degrees=float(degrees), brightness=float(brightness))


def size_notes(sizes: Mapping[str, tuple[PictureSize, PictureSize]], num_crops: int) -> list[str]:
    """Lines about pictures that are enlarged much, and about those of which the crops see little.

    Args:
        sizes: of each picture and of its crops, by its name.
        num_crops: crops along the side that is cut.
    """
    scales = {name: max(crop.width / own.width, crop.height / own.height) for name, (own, crop) in sizes.items()}
    enlarged = {name: scale for name, scale in scales.items() if scale > _MOST_ENLARGED}
    products = {name: (own.width * crop.height, own.height * crop.width) for name, (own, crop) in sizes.items()}
    seen = {name: num_crops * min(sides) / max(sides) for name, sides in products.items()}
    hidden = {name: share for name, share in seen.items() if share < _LEAST_SEEN}
    lines = []
    if enlarged:
        name = max(enlarged, key=enlarged.__getitem__)
        lines.append(
            f"note: {len(enlarged)} of {len(sizes)} pictures are enlarged more than {_MOST_ENLARGED} times, {name} "
            f"{enlarged[name]:.0f} times: a LoRA learns the blur too; take larger pictures, or a lower --resolution"
        )
    if hidden:
        name = min(hidden, key=hidden.__getitem__)
        lines.append(
            f"note: of {len(hidden)} of {len(sizes)} pictures the crops see less than {_LEAST_SEEN:.0%}, of {name} "
            f"{hidden[name]:.0%}: cut them to the subject, or raise --num_crops"
        )
    return lines


def crop_rgb(image: Image.Image, box: CropBox) -> torch.Tensor:
    """A crop of an RGB picture, in its brightness.

    Returns:
        `(H, W, 3)` uint8, a quarter of the bytes of float32 to be copied to a device.
    """
    crop = crop_picture(image, box)
    return pixels_of(crop if box.brightness == 1 else ImageEnhance.Brightness(crop).enhance(box.brightness))


def crop_picture(image: Image.Image, box: CropBox) -> Image.Image:
    """Resizes (Lanczos, antialiased), crops, turns and mirrors a picture or its mask.

    Only the crop is computed; up to rounding it equals the same part of the whole resized picture. One that is turned
    shows the largest part of that crop, of its shape, that has no empty corner: it is enlarged as far as that takes.
    """
    # Multiplied before divided: the last edge is then exact, and never outside the picture.
    left, right = (x * image.width / box.resized_width for x in (box.left, box.left + box.size.width))
    top, bottom = (y * image.height / box.resized_height for y in (box.top, box.top + box.size.height))
    width, height = around = (box.size.width, box.size.height)
    if box.degrees:
        around = _around_turned(width, height, box.degrees)
    crop = image.resize(around, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    if box.degrees:
        x, y = (around[0] - width) // 2, (around[1] - height) // 2
        crop = crop.rotate(box.degrees, Image.Resampling.BICUBIC).crop((x, y, x + width, y + height))
    return ImageOps.mirror(crop) if box.flip else crop


def _around_turned(width: int, height: int, degrees: float) -> tuple[int, int]:
    """The smallest size of about this shape that, turned around its centre, still covers this one; both differ evenly.

    Args:
        width: to be covered, in pixels.
        height: to be covered, in pixels.
        degrees: of the turn.
    """
    cosine, sine = (abs(function(math.radians(degrees))) for function in (math.cos, math.sin))
    scale = max(cosine + sine * height / width, cosine + sine * width / height)
    larger, higher = (side + 2 * math.ceil((scale - 1) * side / 2) for side in (width, height))
    return larger, higher


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """`(H, W, 3)` uint8 of an RGB picture.

    Copied from Pillow's own memory, four bytes a pixel. NumPy's conversion holds Python's lock for milliseconds, during
    which the thread that launches the GPU's kernels stands still.
    """
    try:
        shared = pa.array(picture)
    except ValueError:  # above 4 megapixels Pillow's rows are not contiguous
        return torch.from_numpy(np.array(picture))
    rgbx = torch.from_dlpack(shared.values).view(picture.height, picture.width, 4)
    return rgbx[..., :3].clone(memory_format=torch.contiguous_format)


def to_pixels(rgb: torch.Tensor) -> torch.Tensor:
    """The VAE's input: `(..., H, W, 3)` uint8 → `(..., 3, H, W)` float32 in [-1, 1], a view in memory order."""
    return rgb.movedim(-1, -3).float() / 127.5 - 1.0
