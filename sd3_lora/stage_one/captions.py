"""Which prompt belongs to which picture: a caption beside it, a row of a metadata file, or the instance prompt."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, read_text_lines
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.images import METADATA_NAMES, list_images
from sd3_lora.stage_one.picture_hashes import hash_pictures

CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Caption:
    """A caption, and the file that holds it."""

    image: Path
    text: str
    source: Path


def read_captions(folder: Path, images: Sequence[Path]) -> dict[Path, str]:
    """The captions of those pictures that have one.

    A caption is the UTF-8 text beside the picture (`dog.txt` for `dog.jpg`), its lines joined by a space, or a row
    of `metadata.jsonl` or `metadata.csv` in the folder or in a picture's own (as `datasets` has it: `file_name`,
    relative to the metadata file, and the first of the columns text, caption and prompt that there is).

    Args:
        folder: the folder of the pictures.
        images: the pictures in it.

    Raises:
        UserError: a caption is empty or not UTF-8; a metadata file is malformed or names a missing file; a picture has
            two different captions.
    """
    captions: dict[Path, Caption] = {}
    for caption in (*_sidecars(images), *_metadata(folder, images)):
        other = captions.setdefault(caption.image, caption)
        if other.text != caption.text:
            raise UserError(
                f"{caption.image} has two captions, {other.text!r} in {other.source.name} and {caption.text!r} in "
                f"{caption.source.name}: remove one of them"
            )
    return {image: captions[image].text for image in images if image in captions}


def _sidecars(images: Sequence[Path]) -> Iterator[Caption]:
    """The captions beside the pictures; a picture that is itself called .txt is none."""
    texts: dict[Path, Path] = {}
    for parent in sorted({image.parent for image in images}):
        for path in sorted(set(parent.iterdir()).difference(images)):
            if path.suffix.lower() == ".txt":
                texts[path.with_suffix("")] = path
    for image in images:
        source = texts.get(image.with_suffix(""))
        if source is None:
            continue
        text = " ".join(read_text_lines(source))
        if not text:
            raise UserError(f"{source} is empty: write the caption of {image.name} into it, or delete it")
        yield Caption(image, text, source)


def _metadata(folder: Path, images: Sequence[Path]) -> Iterator[Caption]:
    """The captions in metadata files. Rows of other existing files are ignored."""
    by_key = {_key(image): image for image in images}
    for parent in sorted({folder, *(image.parent for image in images)}):
        for source in (parent / name for name in METADATA_NAMES):
            if not source.is_file():
                continue
            for number, row in enumerate(_rows(source), start=1):
                where = f"{source}, row {number}"
                path = parent / _text_of(row, ("file_name",), where)
                text = _text_of(row, CAPTION_COLUMNS, where)
                if _key(path) in by_key:
                    yield Caption(by_key[_key(path)], text, source)
                elif not path.exists():
                    raise UserError(
                        f"{where} names {path.name}, which is not there: correct file_name, or delete the row"
                    )


def _key(path: Path) -> str:
    """One spelling for a path: macOS writes an umlaut in a file's name as two characters, an editor as one."""
    return unicodedata.normalize("NFC", os.path.abspath(path))


def _text_of(row: dict[str, Any], columns: Sequence[str], where: str) -> str:
    """The value of the first of the columns that the row has, on one line."""
    column = next((column for column in columns if column in row), None)
    if column is None:
        raise UserError(f"{where} has no column {' or '.join(columns)}: add it, separated by a comma")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} has no text in the column {column}: write it in double quotes, or delete the row")
    return " ".join(line.strip() for line in value.splitlines() if line.strip())


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    lines = read_text_lines(source)
    if source.suffix == ".csv":
        yield from _csv_rows(source, lines)
        return
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{source}, row {number} is not JSON ({error}): correct it") from error
        if not isinstance(row, dict):
            raise UserError(f'{source}, row {number} is not of the form {{"file_name": …, "text": …}}: correct it')
        yield row


def _csv_rows(source: Path, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader((line + "\n" for line in lines), strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            if None in row:  # where DictReader puts surplus cells
                raise UserError(
                    f"{source}, row {number} has more cells than the header: put double quotes around its caption"
                )
            yield row
    except csv.Error as error:
        raise UserError(
            f"{source} is not CSV after line {reader.line_num} ({error}): close its double quotes"
        ) from error


def instance_images(
    folder: Path, instance_prompt: str | None, recursive: bool = False, hashes_path: Path | None = None
) -> tuple[tuple[InstanceImage, ...], tuple[Path, ...]]:
    """The distinct pictures of a folder, each with its caption or else the instance prompt; nothing is decoded.

    Identical files are printed and used once, with the caption that one of them has.

    Args:
        folder: the folder of the pictures.
        instance_prompt: for the pictures without a caption; None if there is none.
        recursive: whether to read subfolders.
        hashes_path: where a large folder's hashes are kept (see `hash_pictures`).

    Returns:
        The pictures, sorted by path, and the files and folders that were left out.

    Raises:
        UserError: as `list_images` and `read_captions` do; a picture has neither a caption nor an instance prompt;
            identical files have different captions.
    """
    listing = list_images(folder, recursive)
    captions = read_captions(folder, listing.images)
    copies: dict[str, list[Path]] = {}
    for path, image_id in zip(listing.images, hash_pictures(listing.images, hashes_path), strict=True):
        copies.setdefault(image_id, []).append(path)
    images = []
    for image_id, paths in copies.items():
        if len(paths) > 1:
            names = ", ".join(path.relative_to(folder).as_posix() for path in paths)
            print(f"identical pictures, used once: {names}")
        prompt = _prompt(paths, captions, instance_prompt)
        images.append(InstanceImage(image_id, paths[0], prompt))
    return tuple(images), listing.left_out


def _prompt(paths: Sequence[Path], captions: dict[Path, str], instance_prompt: str | None) -> str:
    """The prompt of identical files."""
    captioned = [path for path in paths if path in captions]
    for path in captioned[1:]:
        if captions[path] != captions[captioned[0]]:
            raise UserError(
                f"{captioned[0]} and {path} are the same picture with different captions, "
                f"{captions[captioned[0]]!r} and {captions[path]!r}: remove one of them"
            )
    if captioned:
        return captions[captioned[0]]
    if instance_prompt is None:
        raise UserError(
            f"{paths[0]} has no caption: type --instance_prompt 'a photo of sks dog', "
            f"or write {paths[0].with_suffix('.txt').name} beside it"
        )
    return instance_prompt
