"""Pictures on disk: list them, hash them, decode them to the right RGB, crop them, turn them into pixels.

Shapes: H, W pixels of a crop.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from sd3_lora.common.command_line import UserError
from sd3_lora.common.picture_size import PictureSize

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageCms, ImageEnhance, ImageOps, ImageStat, UnidentifiedImageError

T = TypeVar("T")

RASTER_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".qoi",
})  # fmt: skip
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_EXTENSIONS = frozenset({".txt", ".caption"})

# Only these, so that an .eps or .psd under another name never reaches Ghostscript or a flattened preview. TGA has no
# magic number and accepts whatever resembles its header, so it is tried last.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "QOI", "TGA"]
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0{4}|\0\0\0\x0cjP  \r\n\x87\n"
    rb"|.{4}ftyp(avi[fs]|hei[cmsx]|hev[cmsx]|mif1|msf1)",
    re.DOTALL,
)
_TIFF_MAGIC = re.compile(rb"II\*\0|MM\0\*")
_HEIF_BRANDS = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevm", b"hevs", b"hevx"}
_FLIP_SUFFIX = "-flip"
_MASK_SUFFIX = "-masklabel"  # OneTrainer's: dog-masklabel.png beside dog.jpg
_MOST_ENLARGED, _LEAST_SEEN = 2, 0.5  # pictures beyond are told


class BrokenImage(Exception):
    """A picture that does not decode.

    Attributes:
        path: the file.
        reason: why, in words.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} does not decode ({self.reason})"


@dataclass(frozen=True)
class ImageListing:
    """The files of a folder, sorted: the pictures, and what is neither picture, caption nor metadata."""

    images: tuple[Path, ...]
    left_out: tuple[Path, ...]


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


def list_images(folder: Path, recursive: bool = False) -> ImageListing:
    """Lists the pictures of a folder, by extension or, under another name, by their first bytes.

    Dot-files, dot-folders, links to folders and, unless `recursive`, subfolders are left out. A mask that lies beside
    its picture (`mask_stem`) is no picture, and is not named among what is left out.

    Raises:
        UserError: there is no such folder, it cannot be read, or it holds no picture.
    """
    if not folder.exists():
        raise UserError(f"there is no folder {folder}: give the folder of your pictures as --instance_data_dir")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder: type --instance_data_dir {folder.parent}")
    files, left_out = _files(folder, recursive)
    rasters = [path for path in files if _is_image(path)]
    images = _without_masks(rasters)
    if not images:
        nested = not recursive and any(_is_image(path) for path in _files(folder, recursive=True)[0])
        remedy = "add --recursive to read its subfolders" if nested else "put .jpg or .png files into it"
        raise UserError(f"{folder} holds no pictures: {remedy}, or give another --instance_data_dir")
    stems = {folded(stem) for path in images for stem in caption_stems(path)}
    others = set(files).difference(rasters)
    left_out += [path for path in others if path.name not in METADATA_NAMES and not _is_caption(path, stems)]
    return ImageListing(tuple(sorted(images, key=Path.as_posix)), tuple(sorted(left_out, key=Path.as_posix)))


def picture_paths(folder: Path) -> tuple[Path, ...]:
    """The pictures of a folder without its subfolders, sorted; none where there is no such folder.

    Raises:
        UserError: it cannot be read.
    """
    if not folder.is_dir():
        return ()
    return tuple(_without_masks(sorted(filter(_is_image, _files(folder, recursive=False)[0]), key=Path.as_posix)))


def picture_and_mask_paths(folder: Path) -> tuple[Path, ...]:
    """The pictures of a folder and its subfolders, with the masks among them, sorted.

    Raises:
        UserError: it cannot be read.
    """
    return tuple(sorted(filter(_is_image, _files(folder, recursive=True)[0]), key=Path.as_posix))


def _without_masks(paths: Sequence[Path]) -> list[Path]:
    """The pictures among these, without masks that lie beside theirs."""
    stems = {folded(path.with_suffix("")) for path in paths}
    return [path for path in paths if not (is_named_as_mask(path) and folded(mask_stem(path)) in stems)]


def _files(folder: Path, recursive: bool) -> tuple[list[Path], list[Path]]:
    """The visible files, and what is no such file."""
    files: list[Path] = []
    left_out: list[Path] = []
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot list {folder} ({error.strerror}): check its permissions") from error
    for path in entries:
        if path.name.startswith("."):  # .ipynb_checkpoints, .cache, macOS' ._dog.jpg
            left_out.append(path)
        elif path.is_file():
            files.append(path)
        elif recursive and path.is_dir() and not path.is_symlink():  # a link may lead in a circle
            nested_files, nested_left_out = _files(path, recursive)
            files += nested_files
            left_out += nested_left_out
        else:
            left_out.append(path)
    return files, left_out


def caption_stems(image: Path) -> tuple[Path, Path]:
    """The paths of a picture's captions without their extension: `dog` and `dog.jpg` for `dog.jpg`."""
    return image.with_suffix(""), image


def mask_stem(mask: Path) -> Path:
    """The path of a mask's picture without its extension: `dog` for `dog.png` and for `dog-masklabel.png`."""
    return mask.with_name(mask.stem.removesuffix(_MASK_SUFFIX) or mask.stem)


def is_named_as_mask(path: Path) -> bool:
    """Whether a file has the name of a mask that lies beside its picture."""
    return mask_stem(path) != path.with_suffix("")


def folded(path: Path) -> str:
    """One spelling for paths that differ in case, or in how Unicode composes a letter.

    A camera writes `DOG.JPG`; macOS writes an umlaut in a file's name as two characters, an editor as one.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", os.path.abspath(path)).casefold())


def _is_caption(path: Path, stems: set[str]) -> bool:
    return path.suffix.lower() in CAPTION_EXTENSIONS and folded(path.with_suffix("")) in stems


def _is_image(path: Path) -> bool:
    if path.suffix.lower() in RASTER_EXTENSIONS:
        return True
    head = _head(path)
    # Camera raw files (.nef, .dng, .arw) are TIFF inside, and decode to a thumbnail.
    return bool(_MAGIC.match(head) or (not path.suffix and _TIFF_MAGIC.match(head)))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:  # reading the whole file reports it
        return b""


def hash_file(path: Path) -> str:
    """The sha256 of the file's bytes, hexadecimal.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions, or remove it") from error


def open_rgb(path: Path, alpha_background: Literal["white", "mean"] = "white") -> Image.Image:
    """Decodes a picture to 8-bit RGB, upright; of an animation the first frame.

    Args:
        path: the file.
        alpha_background: what shows through transparent pixels: white, or the mean colour of the opaque ones.

    Raises:
        BrokenImage: it does not decode, is cut short, or has more than twice `Image.MAX_IMAGE_PIXELS` pixels.
        UserError: it is HEIC and pillow-heif is not installed.
    """
    return _decode(path, lambda picture: _to_rgb(_upright(picture), alpha_background))


def open_grey(path: Path) -> Image.Image:
    """Decodes a picture to 8-bit grey, upright; what is transparent is black.

    Raises:
        BrokenImage: as `open_rgb`.
        UserError: likewise.
    """
    return _decode(path, lambda picture: _to_grey(_upright(picture)))


def open_alpha(path: Path) -> Image.Image | None:
    """Decodes how opaque a picture is, 8-bit, upright; None where it has no transparency.

    Raises:
        BrokenImage: as `open_rgb`.
        UserError: likewise.
    """
    picture = _decode(path, _upright)
    if not picture.has_transparency_data:
        return None
    return (_to_8_bits(picture) if _is_deep(picture) else picture).convert("RGBA").getchannel("A")


def upright_size(path: Path) -> tuple[int, int]:
    """The width and height in pixels of a picture as `open_rgb` gives it, for which it is decoded.

    Raises:
        BrokenImage: as `open_rgb`.
        UserError: likewise.
    """
    return _decode(path, lambda picture: _upright(picture).size)


def _decode(path: Path, convert: Callable[[Image.Image], T]) -> T:
    """What `convert` makes of a decoded picture."""
    if _is_heif(_head(path)):
        _register_heif(path)
    Image.init()  # HEIF, and AVIF in an old Pillow, are listed only where they are installed
    formats = [name for name in _FORMATS if name in Image.OPEN]
    # Pillow warns from 89 megapixels and refuses from 179: a large scan is no attack.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        with Image.open(path, formats=formats) as file:
            file.load()
            return convert(file)
    except UnidentifiedImageError as error:
        raise BrokenImage(path, "not a picture in a known format") from error
    except Exception as error:  # a malformed file can raise anything in a decoder: SyntaxError, KeyError, struct.error
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise BrokenImage(path, reason) from error


def _is_heif(head: bytes) -> bool:
    """Whether the `ftyp` box names a HEVC brand (ISO/IEC 23008-12); AVIF has the same box, but other brands."""
    box_size = int.from_bytes(head[:4], "big")
    brands = {head[i : i + 4] for i in range(8, min(box_size, len(head)), 4)}
    return head[4:8] == b"ftyp" and not brands.isdisjoint(_HEIF_BRANDS)


def _register_heif(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError(f"{path} is a HEIC picture: type `pip install pillow-heif`, or save it as JPEG") from error
    pillow_heif.register_heif_opener()


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except SyntaxError:  # an EXIF block that does not parse: the orientation is unknown
        return image.copy()


def _to_srgb(image: Image.Image) -> Image.Image:
    """Converts from the file's ICC profile to sRGB: phones write Display P3, scanners Adobe RGB."""
    profile = image.info.get("icc_profile")
    if not profile or "transparency" in image.info or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image  # no rounding where there is nothing to change
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError):  # a profile that does not parse: the colours are unknown
        return image
    return converted or image


def _to_rgb(image: Image.Image, alpha_background: Literal["white", "mean"]) -> Image.Image:
    if _is_deep(image):
        image = _to_8_bits(image)
    image = _to_srgb(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # no copy: it takes a third of the time to decode
    image = image.convert("RGBA")
    color = (255, 255, 255) if alpha_background == "white" else _mean_color(image)
    return Image.alpha_composite(Image.new("RGBA", image.size, (*color, 255)), image).convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("L")


def _is_deep(image: Image.Image) -> bool:
    """Whether grey values have more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 or more bits scaled to 8; Pillow's own `convert` clips them at 255.

    White is 65535; where a picture goes beyond, its largest value. Floats may have 1 or 255 for white too: the
    smallest of these that the picture does not exceed.
    """
    values = np.asarray(image).astype(np.float32)  # (height, width)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    peak = float(values.max())
    white = next((white for white in whites if peak <= white), peak)
    grey = Image.fromarray(np.rint(values.clip(0, white) * (255.0 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")  # the one value that PNG's tRNS makes invisible
    if transparent is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _mean_color(image: Image.Image) -> tuple[int, int, int]:
    """The mean colour of an RGBA picture's pixels that are at least half opaque; white if there are none."""
    opaque = image.getchannel("A").point([0] * 128 + [255] * 128)
    if opaque.getbbox() is None:
        return (255, 255, 255)
    red, green, blue = ImageStat.Stat(image.convert("RGB"), mask=opaque).mean
    return (round(red), round(green), round(blue))


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
