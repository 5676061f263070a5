"""Which prompt belongs to which picture: a caption beside it, a row of a metadata file, or the instance prompt."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import MOST_SHOWN, UserError, all_of, print_in_rank_0, read_text_lines, shown
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.images import (
    CAPTION_EXTENSIONS,
    METADATA_NAMES,
    caption_stems,
    folded,
    list_images,
    picture_paths,
)
from sd3_lora.stage_one.picture_hashes import hash_pictures

import pyarrow as pa
import pyarrow.parquet as pq

CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Caption:
    """A caption, and the file that holds it."""

    image: Path
    text: str
    source: Path


class Names:
    """Pictures by their path, as a caption file spells it.

    A path is compared as it stands first, then `folded`.
    """

    def __init__(self, names: Iterable[tuple[Path, Path]]):
        self._exact: dict[str, list[Path]] = {}
        self._loose: dict[str, list[Path]] = {}
        for name, image in names:
            self._exact.setdefault(os.path.abspath(name), []).append(image)
            self._loose.setdefault(folded(name), []).append(image)

    def find(self, name: Path) -> list[Path]:
        """The pictures of that name."""
        return self._exact.get(os.path.abspath(name)) or self._loose.get(folded(name), [])


def read_captions(folder: Path, images: Sequence[Path]) -> dict[Path, str]:
    """The captions of those pictures that have one.

    A caption is the first line of the UTF-8 text beside the picture (`dog.txt`, `dog.caption` or `dog.jpg.txt` for
    `dog.jpg`), or a row of `metadata.jsonl`, `metadata.csv` or `metadata.parquet` in the folder or in a picture's own
    (as `datasets` has it: `file_name`, relative to the metadata file, and the first of the columns text, caption and
    prompt that there is). Texts of several lines are named: other trainers read each line as a caption.

    Args:
        folder: the folder of the pictures.
        images: the pictures in it.

    Raises:
        UserError: all captions that are empty or not UTF-8; a metadata file that is malformed or names a missing file;
            a picture that has two different captions.
    """
    captions: dict[Path, Caption] = {}
    faults: list[str] = []
    for caption in (*_sidecars(images, faults), *_metadata(folder, images, faults)):
        other = captions.setdefault(caption.image, caption)
        if other.text != caption.text:
            faults.append(
                f"{caption.image} has two captions, {other.text!r} in {other.source.name} and {caption.text!r} in "
                f"{caption.source.name}: remove one of them"
            )
    _refuse(faults)
    return {image: captions[image].text for image in images if image in captions}


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise UserError(all_of(faults, "the captions", MOST_SHOWN))


def _sidecars(images: Sequence[Path], faults: list[str]) -> Iterator[Caption]:
    """The captions beside the pictures; a picture that is itself called .txt is none."""
    names = Names((stem, image) for image in images for stem in caption_stems(image))
    several: list[str] = []
    for parent in sorted({image.parent for image in images}):
        for source in sorted(set(parent.iterdir()).difference(images)):
            owners = names.find(source.with_suffix("")) if source.suffix.lower() in CAPTION_EXTENSIONS else []
            if not owners:
                continue
            try:
                lines = read_text_lines(source)
            except UserError as error:
                faults.append(str(error))
                continue
            if not lines:
                faults.append(f"{source} is empty: write the caption of {owners[0].name} into it, or delete it")
                continue
            if len(lines) > 1:
                several.append(source.name)
            yield from (Caption(image, lines[0], source) for image in dict.fromkeys(owners))
    if several:
        print_in_rank_0(f"note: only the first line is the caption, and the other lines are left out: {shown(several)}")


def _metadata(folder: Path, images: Sequence[Path], faults: list[str]) -> Iterator[Caption]:
    """The captions in metadata files. Rows of other existing files are ignored."""
    names = Names((image, image) for image in images)
    for parent in sorted({folder, *(image.parent for image in images)}):
        for source in (parent / name for name in METADATA_NAMES):
            if not source.is_file():
                continue
            try:
                for number, row in enumerate(_rows(source), start=1):
                    try:
                        yield from _captions_of_row(row, source, number, names)
                    except UserError as error:
                        faults.append(str(error))
            except UserError as error:  # the rest of the file cannot be read
                faults.append(str(error))


def _captions_of_row(row: Any, source: Path, number: int, names: Names) -> Iterator[Caption]:
    where = f"{source}, row {number}"
    if isinstance(row, str):
        row = _json_row(row, where)
    if None in row:  # where csv.DictReader puts surplus cells
        raise UserError(f"{where} has more cells than the header: put double quotes around its caption")
    file_name = _text_of(row, ("file_name",), where)
    text = _text_of(row, CAPTION_COLUMNS, where)
    # A table that was written on Windows may have its backslashes, which elsewhere are letters.
    paths = [source.parent / name for name in dict.fromkeys((file_name, file_name.replace("\\", "/")))]
    owners = next((found for path in paths if (found := names.find(path))), [])
    if not owners and not any(path.exists() for path in paths):
        raise UserError(f"{where} names {paths[-1].name}, which is not there: correct file_name, or delete the row")
    yield from (Caption(image, text, source) for image in owners)


def _text_of(row: dict[str, Any], columns: Sequence[str], where: str) -> str:
    """The value of the first of the columns that the row has, on one line."""
    column = next((column for column in columns if column in row), None)
    if column is None:
        raise UserError(f"{where} has no column {' or '.join(columns)}: add it, separated by a comma")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} has no text in the column {column}: write it in double quotes, or delete the row")
    return " ".join(line.strip() for line in value.splitlines() if line.strip())


def _rows(source: Path) -> Iterator[dict[str, Any] | str]:
    """The rows of a metadata file; those of JSON lines are still to be parsed."""
    if source.suffix == ".parquet":
        yield from _parquet_rows(source)
    elif source.suffix == ".csv":
        yield from _csv_rows(source, read_text_lines(source))
    else:
        yield from read_text_lines(source)


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): correct it") from error
    if not isinstance(row, dict):
        raise UserError(f'{where} is not of the form {{"file_name": …, "text": …}}: correct it')
    return row


def _csv_rows(source: Path, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader((line + "\n" for line in lines), strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(
            f"{source} is not CSV after line {reader.line_num} ({error}): close its double quotes"
        ) from error


def _parquet_rows(source: Path) -> Iterator[dict[str, Any]]:
    """The rows without columns of other uses, which may hold the pictures themselves."""
    try:
        known = set(pq.read_schema(source).names).intersection(("file_name", *CAPTION_COLUMNS))
        yield from pq.read_table(source, columns=sorted(known)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source} is not a whole parquet file ({type(error).__name__}): write it again") from error


@dataclass(frozen=True)
class InstanceFolder:
    """The pictures of a folder with their prompts.

    Attributes:
        folder: where they lie.
        images: the distinct pictures, sorted by path.
        left_out: the files and folders that are neither picture nor caption, sorted.
        captioned: how many of the pictures have a caption of their own.
    """

    folder: Path
    images: tuple[InstanceImage, ...]
    left_out: tuple[Path, ...]
    captioned: int

    def sentences(self, instance_prompt: str | None) -> list[str]:
        """How many pictures there are, what is left out, by name, and which prompt wins.

        Args:
            instance_prompt: the flag's, or its default.
        """
        names = [path.relative_to(self.folder).as_posix() for path in self.left_out]
        others = f", {len(names)} other files left out" if names else ""
        lines = [f"{len(self.images)} pictures in {self.folder}{others}"]
        if names:
            lines.append(f"left out: {shown(names)}")
        captions = [
            name for path, name in zip(self.left_out, names, strict=True) if path.suffix.lower() in CAPTION_EXTENSIONS
        ]
        if captions:
            lines.append(f"note: no picture has the name of the caption {shown(captions)}")
        if instance_prompt and self.captioned:
            lines.append(f"note: {captions_win(self.captioned, len(self.images), instance_prompt)}")
        return lines


def captions_win(captioned: int, pictures: int, instance_prompt: str) -> str:
    """Says that captions come before the instance prompt."""
    uncaptioned = pictures - captioned
    use = f"is for the other {uncaptioned}" if uncaptioned else "is not"
    return (
        f"{captioned} of {pictures} pictures have captions, which are trained on; --instance_prompt "
        f"{instance_prompt!r} {use}"
    )


def trigger_of(prompts: Iterable[str], instance_prompt: str | None) -> str:
    """The prompt that draws the subject: one that is trained on.

    It is the instance prompt where a picture has it. Else it is the caption of most pictures; of several such the
    shortest, which says least beside the subject.

    Args:
        prompts: of each picture, at least one.
        instance_prompt: of the pictures without a caption; None if there is none.
    """
    counts = Counter(prompts)
    if instance_prompt is not None and instance_prompt in counts:
        return instance_prompt
    return min(counts, key=lambda prompt: (-counts[prompt], len(prompt), prompt))


def instance_images(
    folder: Path, instance_prompt: str | None, recursive: bool = False, hashes_path: Path | None = None
) -> InstanceFolder:
    """The distinct pictures of a folder, each with its caption or else the instance prompt; nothing is decoded.

    Identical files are printed and used once, with the caption that one of them has.

    Args:
        folder: the folder of the pictures.
        instance_prompt: for the pictures without a caption; None if there is none.
        recursive: whether to read subfolders.
        hashes_path: where a large folder's hashes are kept (see `hash_pictures`).

    Raises:
        UserError: as `list_images` and `read_captions` do; a picture has neither a caption nor an instance prompt;
            identical files have different captions.
    """
    listing = list_images(folder, recursive)
    captions = read_captions(folder, listing.images)
    copies: dict[str, list[Path]] = {}
    for path, image_id in zip(listing.images, hash_pictures(listing.images, hashes_path), strict=True):
        copies.setdefault(image_id, []).append(path)
    images, without, captioned, faults = [], [], 0, list[str]()
    for image_id, paths in copies.items():
        if len(paths) > 1:
            names = ", ".join(path.relative_to(folder).as_posix() for path in paths)
            print_in_rank_0(f"identical pictures, used once: {names}")
        caption = _caption(paths, captions, faults)
        captioned += caption is not None
        if caption is None and instance_prompt is None:
            without.append(paths[0])
        images.append(InstanceImage(image_id, paths[0], instance_prompt or "" if caption is None else caption))
    if without:
        names = f"{without[0]} has" if len(without) == 1 else f"{shown([str(path) for path in without])} have"
        faults.append(
            f'{names} no caption: type --instance_prompt "a photo of sks dog", '
            f"or write {without[0].with_suffix('.txt').name} beside {without[0].name}"
        )
    _refuse(faults)
    return InstanceFolder(folder, tuple(images), listing.left_out, captioned)


def class_images(folder: Path, class_prompt: str, most: int) -> tuple[InstanceImage, ...]:
    """The first distinct class pictures of a folder, by name; captions beside them are not read.

    Args:
        folder: theirs, without its subfolders; it need not exist.
        class_prompt: of all of them.
        most: how many.

    Raises:
        UserError: the folder is a file or cannot be read.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a folder: give a folder as --class_data_dir")
    paths, first = picture_paths(folder), dict[str, Path]()
    for image_id, path in zip(hash_pictures(paths), paths, strict=True):
        first.setdefault(image_id, path)  # identical ones are one picture
    images = [InstanceImage(image_id, path, class_prompt, "class") for image_id, path in first.items()]
    return tuple(images[:most])


def require_apart(subject_ids: Collection[str], others: Sequence[InstanceImage]) -> None:
    """Checks that no class picture is a picture of the subject.

    Raises:
        UserError: one is.
    """
    for image in others:
        if image.image_id in subject_ids:
            raise UserError(
                f"{image.path} is also a picture of the subject: the pictures of --class_data_dir must be others than "
                "those of --instance_data_dir, so remove it from one of them"
            )


def _caption(paths: Sequence[Path], captions: dict[Path, str], faults: list[str]) -> str | None:
    """The caption of identical files; None if they have none."""
    captioned = [path for path in paths if path in captions]
    if not captioned:
        return None
    first = captions[captioned[0]]
    faults += [
        f"{captioned[0]} and {path} are the same picture with different captions, {first!r} and {captions[path]!r}: "
        "remove one of them"
        for path in captioned[1:]
        if captions[path] != first
    ]
    return first
