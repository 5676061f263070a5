"""Pictures decoded to the right RGB, grey or alpha: upright, in sRGB, 8 bits."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from sd3_lora.common.command_line import UserError, host_memory_fault
from sd3_lora.stage_one.image_files import first_bytes

import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageStat, UnidentifiedImageError

T = TypeVar("T")

# Only these, so that an .eps or .psd under another name never reaches Ghostscript or a flattened preview. TGA has no
# magic number and accepts whatever resembles its header, so it is tried last.
_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "QOI", "TGA"]
# Of these a picture of one colour, too, takes some bits a block.
_LOSSY_FORMATS = {"JPEG", "MPO", "JPEG2000", "AVIF", "HEIF"}
_PIXELS_PER_BYTE = 512  # a bit for each 8 x 8 pixels: less than any Huffman-coded JPEG has
_LARGE_PIXELS = 16 * 10**6  # a picture of one colour that is smaller costs little
_MOST_BYTES = 2 * 1024**3
_BYTES_PER_PIXEL = {"JPEG2000": 28, "WEBP": 18}  # while these are decoded, with transparency; others take 8 or less
_STRIP_PIXELS = 4 * 1024**2
_HEIF_BRANDS = {b"heic", b"heim", b"heis", b"heix", b"hevc", b"hevm", b"hevs", b"hevx"}


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
    if _is_heif(first_bytes(path)):
        _register_heif(path)
    Image.init()  # HEIF, and AVIF in an old Pillow, are listed only where they are installed
    formats = [name for name in _FORMATS if name in Image.OPEN]
    # Pillow warns from 89 megapixels and refuses from 179: a large scan is no attack.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        with Image.open(path, formats=formats) as file:
            _require_plausible(file, path.stat().st_size)
            file.load()
            return convert(file)
    except UnidentifiedImageError as error:
        raise BrokenImage(path, "not a picture in a known format") from error
    except Exception as error:  # a malformed file can raise anything in a decoder: SyntaxError, KeyError, struct.error
        if fault := host_memory_fault(error):  # no fault of the file's
            raise UserError(f"{fault} while {path} was decoded: close other programs, or remove the picture") from None
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise BrokenImage(path, " ".join(reason.split())) from error  # libheif's ends its line


def _require_plausible(picture: Image.Image, file_bytes: int) -> None:
    """Checks a picture's size before it is decoded: one that lies takes as much memory and time as a large one.

    Raises:
        ValueError: the file is too short for it, or it would take more than 2 GiB to decode.
    """
    pixels, size = picture.width * picture.height, f"{picture.width} x {picture.height} pixels"
    is_jpeg = picture.format in ("JPEG", "MPO")
    is_short = file_bytes * _PIXELS_PER_BYTE < pixels and (is_jpeg or pixels > _LARGE_PIXELS)
    if picture.format in _LOSSY_FORMATS and is_short:
        raise ValueError(f"{file_bytes} bytes are no picture of {size}")
    if pixels * _BYTES_PER_PIXEL.get(picture.format or "", 0) > _MOST_BYTES:
        raise ValueError(f"a {picture.format} of {size} takes more than 2 GiB to decode: save it as PNG or JPEG")


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
    """In place: a copy would be as large as the picture."""
    with contextlib.suppress(SyntaxError):  # an EXIF block that does not parse: the orientation is unknown
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """Converts from the file's ICC profile to sRGB: phones write Display P3, scanners Adobe RGB."""
    profile = image.info.get("icc_profile")
    if not profile or "transparency" in image.info or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image  # no rounding where there is nothing to change
        target, same = ImageCms.createProfile("sRGB"), image.mode != "CMYK"
        converted = ImageCms.profileToProfile(
            image, source, target, outputMode=image.mode if same else "RGB", inPlace=same
        )
    except (ImageCms.PyCMSError, OSError):  # a profile that does not parse: the colours are unknown
        return image
    return converted or image  # None where it was in place


def _strips(image: Image.Image) -> Iterator[tuple[tuple[int, int], Image.Image]]:
    """The picture in strips of a few megapixels, each with its place: what is made of one takes little memory."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield (0, top), image.crop((0, top, image.width, min(top + rows, image.height)))


def _by_strips(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `convert` makes of a picture, in a mode."""
    converted = Image.new(mode, image.size)
    for place, strip in _strips(image):
        converted.paste(convert(strip), place)
    return converted


def _on(color: tuple[int, int, int], image: Image.Image) -> Image.Image:
    """A transparent picture over a colour, RGBA."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*color, 255)), image)


def _to_rgb(image: Image.Image, alpha_background: Literal["white", "mean"]) -> Image.Image:
    if _is_deep(image):
        image = _to_8_bits(image)
    image = _to_srgb(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # no copy: it takes a third of the time to decode
    color = (255, 255, 255) if alpha_background == "white" else _mean_color(image.convert("RGBA"))
    return _by_strips(image, "RGB", lambda strip: _on(color, strip).convert("RGB"))


def _to_grey(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        return _by_strips(image, "L", lambda strip: _on((0, 0, 0), strip).convert("L"))
    return image.convert("L")


def _is_deep(image: Image.Image) -> bool:
    """Whether grey values have more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 or more bits scaled to 8; Pillow's own `convert` clips them at 255.

    White is 65535; where a picture goes beyond, its largest value. Floats may have 1 or 255 for white too: the
    smallest of these that the picture does not exceed.
    """
    peak = max(float(_values(strip).max()) for _, strip in _strips(image))
    whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in whites if peak <= white), peak)
    transparent = image.info.get("transparency")  # the one value that PNG's tRNS makes invisible

    def convert(strip: Image.Image) -> Image.Image:
        values = _values(strip)
        grey = Image.fromarray(np.rint(values.clip(0, white) * (255.0 / white)).astype(np.uint8))
        if transparent is None:
            return grey
        return Image.merge("LA", (grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))

    return _by_strips(image, "L" if transparent is None else "LA", convert)


def _values(image: Image.Image) -> np.ndarray:
    """`(height, width)` float32.

    Raises:
        ValueError: one is not finite.
    """
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    return values


def _mean_color(image: Image.Image) -> tuple[int, int, int]:
    """The mean colour of an RGBA picture's pixels that are at least half opaque; white if there are none."""
    opaque = image.getchannel("A").point([0] * 128 + [255] * 128)
    if opaque.getbbox() is None:
        return (255, 255, 255)
    red, green, blue = ImageStat.Stat(image.convert("RGB"), mask=opaque).mean
    return (round(red), round(green), round(blue))
