"""Picture files in a folder: which they are, their captions' and masks' names, their hash."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import UserError

RASTER_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".qoi",
})  # fmt: skip
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_EXTENSIONS = frozenset({".txt", ".caption"})
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF.{4}WEBP|BM.{4}\0{4}|\0\0\0\x0cjP  \r\n\x87\n"
    rb"|.{4}ftyp(avi[fs]|hei[cmsx]|hev[cmsx]|mif1|msf1)",
    re.DOTALL,
)
_TIFF_MAGIC = re.compile(rb"II\*\0|MM\0\*")
_MASK_SUFFIX = "-masklabel"  # OneTrainer's: dog-masklabel.png beside dog.jpg


@dataclass(frozen=True)
class ImageListing:
    """The files of a folder, sorted: the pictures, and what is neither picture, caption nor metadata."""

    images: tuple[Path, ...]
    left_out: tuple[Path, ...]


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
    head = first_bytes(path)
    # Camera raw files (.nef, .dng, .arw) are TIFF inside, and decode to a thumbnail.
    return bool(_MAGIC.match(head) or (not path.suffix and _TIFF_MAGIC.match(head)))


def first_bytes(path: Path) -> bytes:
    """Those that tell a picture's format; none where it cannot be read."""
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
