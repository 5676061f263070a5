"""Which prompts belong to which picture: captions beside it, a row of a metadata file, or the instance prompt."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd3_lora.common.command_line import (
    MOST_SHOWN,
    UserError,
    all_of,
    counted,
    print_in_rank_0,
    read_text_lines,
    shown,
)
from sd3_lora.common.config import PictureFlags
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.image_files import (
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
TRIGGER = "[trigger]"  # in captions of other trainers too (ai-toolkit)
_NUMBER_AT_END = re.compile(r"[\s_-]*(?:\(\d+\)|(?<![^\s_-])\d+)$")  # of `sks dog_01` and `sks dog (1)`, not of `r2d2`


@dataclass(frozen=True)
class Caption:
    """The captions of a picture, and the file that holds them."""

    image: Path
    texts: tuple[str, ...]
    source: Path


@dataclass(frozen=True)
class CaptionRules:
    """How captions become prompts.

    Attributes:
        prefix: before each caption.
        suffix: behind each caption.
        trigger_word: what stands for [trigger]; None leaves no caption with it.
        labels: "beside" reads captions beside the pictures and in metadata files, "names" takes the pictures' names,
            "txt" reads .txt files alone, of which each picture has one.
        orders: how many orders of a caption's tags; 0 leaves captions as they are.
        kept: how many of the first tags stay first.
    """

    prefix: str = ""
    suffix: str = ""
    trigger_word: str | None = None
    labels: Literal["beside", "names", "txt"] = "beside"
    orders: int = 0
    kept: int = 0

    @classmethod
    def of(cls, flags: PictureFlags) -> CaptionRules:
        """The rules that the flags give."""
        return cls(
            flags.caption_prefix or "",
            flags.caption_suffix or "",
            flags.trigger_word,
            "names" if flags.use_filename_as_label else "txt" if flags.use_txt_as_label else "beside",
            flags.shuffle_tags,
            flags.keep_tags,
        )

    def prompts(self, captions: Sequence[str]) -> tuple[str, ...]:
        """The distinct prompts of a picture with these captions, sorted: the order of lines changes no run.

        Raises:
            UserError: one has [trigger], and nothing says what stands for it.
        """
        prompts = {self._framed(order) for caption in captions for order in tag_orders(caption, self.orders, self.kept)}
        return tuple(sorted(map(self.filled, prompts)))

    def _framed(self, caption: str) -> str:
        """The caption between prefix and suffix, with a space between two words."""
        with_prefix = f"{self.prefix.strip()} {caption}".strip()
        suffix = self.suffix.strip()
        return with_prefix + ("" if not suffix or suffix[0] in ",.;:" else " ") + suffix

    def filled(self, prompt: str) -> str:
        """The prompt with the trigger word for [trigger].

        Raises:
            UserError: there is no trigger word.
        """
        if TRIGGER not in prompt:
            return prompt
        if not self.trigger_word:
            raise UserError(f"{prompt!r} has {TRIGGER}: say what stands for it, for example --trigger_word 'sks dog'")
        return prompt.replace(TRIGGER, self.trigger_word)


def tag_orders(caption: str, count: int, kept: int = 0) -> list[str]:
    """Distinct orders of a comma-separated caption's tags, its own first; the same in every call.

    Args:
        caption: the tags.
        count: how many orders, where there are as many; 0 is its own alone, as it is written.
        kept: how many of the first tags stay first.
    """
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, moving = tags[:kept], tags[kept:]
    if count < 2 or len(set(moving)) < 2:
        return [caption]
    possible = math.factorial(len(moving)) // math.prod(math.factorial(n) for n in Counter(moving).values())
    orders, number = {tuple(moving): None}, 0
    while len(orders) < min(count, possible):
        keys = [hashlib.sha256(f"{number},{place},{caption}".encode()).digest() for place in range(len(moving))]
        orders[tuple(tag for _, tag in sorted(zip(keys, moving, strict=True)))] = None
        number += 1
    return [caption, *(", ".join((*first, *order)) for order in list(orders)[1:])]


def label_of(image: Path) -> str:
    """The caption that a picture's name is: without its number, and with spaces for underscores."""
    return " ".join(_NUMBER_AT_END.sub("", image.stem).replace("_", " ").split())


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


def read_captions(
    folder: Path, images: Sequence[Path], labels: Literal["beside", "names", "txt"] = "beside"
) -> dict[Path, tuple[str, ...]]:
    """The captions of those pictures that have some.

    Captions are the lines of the UTF-8 text beside the picture (`dog.txt`, `dog.caption` or `dog.jpg.txt` for
    `dog.jpg`), or a row of `metadata.jsonl`, `metadata.csv` or `metadata.parquet` in the folder or in a picture's own
    (as `datasets` has it: `file_name`, relative to the metadata file, and the first of the columns text, caption and
    prompt that there is: a text, or a list of them).

    Args:
        folder: the folder of the pictures.
        images: the pictures in it.
        labels: where captions are (see `CaptionRules`).

    Raises:
        UserError: all captions that are empty or not UTF-8; a metadata file that is malformed or names a missing file;
            a picture whose captions in two files differ; a name without letters, or a picture without .txt, where
            captions are to be those.
    """
    captions: dict[Path, Caption] = {}
    faults: list[str] = []
    if labels == "names":
        nameless = [str(image) for image in images if not label_of(image)]
        if nameless:
            faults.append(f"no caption is in the names of {shown(nameless)}: rename them, such as sks dog_1.jpg")
        _refuse(faults)
        return {image: (label_of(image),) for image in images}
    extensions = CAPTION_EXTENSIONS if labels == "beside" else {".txt"}
    metadata = _metadata(folder, images, faults) if labels == "beside" else ()
    for caption in (*_sidecars(images, faults, extensions), *metadata):
        other = captions.setdefault(caption.image, caption)
        if other.texts != caption.texts:
            faults.append(
                f"{caption.image} has two captions, {_few(other.texts)} in {other.source.name} and "
                f"{_few(caption.texts)} in {caption.source.name}: remove one of them"
            )
    if labels == "txt" and not faults:
        without = [str(image) for image in images if image not in captions]
        if without:
            faults.append(f"there is no .txt beside {shown(without)}: write it, or leave out --use_txt_as_label")
    _refuse(faults)
    return {image: captions[image].texts for image in images if image in captions}


def _few(texts: Sequence[str]) -> str:
    return shown([repr(text) for text in texts])


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise UserError(all_of(faults, "the captions", MOST_SHOWN))


def _sidecars(images: Sequence[Path], faults: list[str], extensions: Collection[str]) -> Iterator[Caption]:
    """The captions beside the pictures; a picture that is itself called .txt is none."""
    names = Names((stem, image) for image in images for stem in caption_stems(image))
    for parent in sorted({image.parent for image in images}):
        for source in sorted(set(parent.iterdir()).difference(images)):
            owners = names.find(source.with_suffix("")) if source.suffix.lower() in extensions else []
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
            yield from (Caption(image, tuple(lines), source) for image in dict.fromkeys(owners))


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
    (file_name,) = _texts_of(row, ("file_name",), where)
    texts = _texts_of(row, CAPTION_COLUMNS, where)
    # A table that was written on Windows may have its backslashes, which elsewhere are letters.
    paths = [source.parent / name for name in dict.fromkeys((file_name, file_name.replace("\\", "/")))]
    owners = next((found for path in paths if (found := names.find(path))), [])
    if not owners and not any(path.exists() for path in paths):
        raise UserError(f"{where} names {paths[-1].name}, which is not there: correct file_name, or delete the row")
    yield from (Caption(image, texts, source) for image in owners)


def _texts_of(row: dict[str, Any], columns: Sequence[str], where: str) -> tuple[str, ...]:
    """The value of the first of the columns that the row has, each text on one line; several only of captions."""
    column = next((column for column in columns if column in row), None)
    if column is None:
        raise UserError(f"{where} has no column {' or '.join(columns)}: add it, separated by a comma")
    value = row[column]
    texts = value if isinstance(value, list) and columns == CAPTION_COLUMNS else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where} has no text in the column {column}: write it in double quotes, or delete the row")
    return tuple(" ".join(line.strip() for line in text.splitlines() if line.strip()) for text in texts)


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
        others = f", {counted(len(names), 'other file')} left out" if names else ""
        lines = [f"{counted(len(self.images), 'picture')} in {self.folder}{others}"]
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


def trigger_of(prompts: Iterable[str], instance_prompts: Collection[str]) -> str:
    """The prompt that draws the subject: one that is trained on.

    It is an instance prompt where a picture has it: of several that of most pictures. Else it is the caption of most
    pictures; of several such the shortest, which says least beside the subject.

    Args:
        prompts: of each picture, at least one.
        instance_prompts: of the pictures without a caption; empty if there is none.
    """
    counts = Counter(prompts)
    candidates = [prompt for prompt in counts if prompt in instance_prompts] or list(counts)
    return min(candidates, key=lambda prompt: (-counts[prompt], len(prompt), prompt))


def instance_images(
    folder: Path,
    instance_prompt: str | None,
    recursive: bool = False,
    hashes_path: Path | None = None,
    rules: CaptionRules = CaptionRules(),
    repeats: int = 1,
) -> InstanceFolder:
    """The distinct pictures of a folder, each with its captions or else the instance prompt; nothing is decoded.

    Identical files are printed and used once, with the captions that one of them has.

    Args:
        folder: the folder of the pictures.
        instance_prompt: for the pictures without a caption; None if there is none.
        recursive: whether to read subfolders.
        hashes_path: where a large folder's hashes are kept (see `hash_pictures`).
        rules: how captions become prompts.
        repeats: how many times each picture comes in a pass.

    Raises:
        UserError: as `list_images` and `read_captions` do; [trigger] without its word; a picture has neither a caption
            nor an instance prompt; identical files have different captions.
    """
    listing = list_images(folder, recursive)
    captions = read_captions(folder, listing.images, rules.labels)
    default = None if instance_prompt is None else rules.filled(instance_prompt)
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
        prompts = (default or "",) if caption is None else rules.prompts(caption)
        images.append(InstanceImage(image_id, paths[0], prompts[0], other_prompts=prompts[1:], repeats=repeats))
    if without:
        names = f"{without[0]} has" if len(without) == 1 else f"{shown([str(path) for path in without])} have"
        faults.append(
            f'{names} no caption: type --instance_prompt "a photo of sks dog", '
            f"or write {without[0].with_suffix('.txt').name} beside {without[0].name}"
        )
    _refuse(faults)
    return InstanceFolder(folder, tuple(images), listing.left_out, captioned)


def class_images(
    folder: Path, class_prompt: str, most: int | None, has_captions: bool = False
) -> tuple[InstanceImage, ...]:
    """The first distinct class pictures of a folder, by name.

    Args:
        folder: theirs, without its subfolders; it need not exist.
        class_prompt: of all of them, or of those without a caption.
        most: how many; None for all.
        has_captions: whether captions beside them are read, as those of the subject's pictures are.

    Raises:
        UserError: the folder is a file or cannot be read; a caption is at fault (see `read_captions`).
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a folder: give a folder as --class_data_dir")
    paths, copies = picture_paths(folder), dict[str, list[Path]]()
    for image_id, path in zip(hash_pictures(paths), paths, strict=True):
        copies.setdefault(image_id, []).append(path)  # identical ones are one picture
    captions = read_captions(folder, paths) if has_captions else {}
    images, faults = [], list[str]()
    for image_id, same in list(copies.items())[:most]:
        first, *others = sorted(set(_caption(same, captions, faults) or (class_prompt,)))
        images.append(InstanceImage(image_id, same[0], first, "class", tuple(others)))
    _refuse(faults)
    return tuple(images)


def class_captions_note(folder: Path) -> str | None:
    """A sentence on captions beside class pictures that are not read; None where there are none."""
    try:
        captioned = len(read_captions(folder, picture_paths(folder)))
    except UserError:  # nothing reads them
        return None
    if not captioned:
        return None
    return (
        f"note: {counted(captioned, 'class picture')} of {folder} with a caption, which is not read: all have the "
        "class prompt; add --class_captions to train on their captions"
    )


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


def _caption(
    paths: Sequence[Path], captions: Mapping[Path, tuple[str, ...]], faults: list[str]
) -> tuple[str, ...] | None:
    """The captions of identical files; None if they have none."""
    captioned = [path for path in paths if path in captions]
    if not captioned:
        return None
    first = captions[captioned[0]]
    faults += [
        f"{captioned[0]} and {path} are the same picture with different captions, {_few(first)} and "
        f"{_few(captions[path])}: remove one of them"
        for path in captioned[1:]
        if captions[path] != first
    ]
    return first
