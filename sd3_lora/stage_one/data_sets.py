"""A data set of the library `datasets`, laid out once as a folder of pictures and captions with its provenance."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sd3_lora.common.atomic_files import remove_unfinished, unfinished_path
from sd3_lora.common.command_line import UserError, counted, print_in_rank_0, shown, write_text_atomically
from sd3_lora.common.config import PictureFlags
from sd3_lora.stage_one.image_files import RASTER_EXTENSIONS, list_images

from PIL import Image

LAID_OUT = Path("dataset_pictures")
_PROVENANCE = ".dataset.json"  # a dot-file is no picture, and is not told among what is left out
_FORMAT_VERSION = 1
_Flags = TypeVar("_Flags", bound=PictureFlags)


@dataclass(frozen=True)
class DataSet:
    """Which data set, and which of its columns.

    Attributes:
        name: on the hub, or a folder.
        config: its configuration; None for its only one.
        image_column: None for the first that holds pictures.
        caption_column: None for none.
    """

    name: str
    config: str | None = None
    image_column: str | None = None
    caption_column: str | None = None

    @property
    def folder(self) -> Path:
        """Where it is laid out, in the working folder: the same for the same flags."""
        name = os.path.abspath(self.name) if os.path.exists(self.name) else self.name
        key = json.dumps([name, self.config, self.image_column, self.caption_column])
        stem = re.sub(r"[^\w.-]+", "-", Path(self.name).name).strip(".-") or "data"
        return LAID_OUT / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def with_folder(flags: _Flags, cache_dir: str | None = None) -> _Flags:
    """The flags with the laid-out folder in place of the data set, which is read where it was not yet.

    Args:
        flags: of any script.
        cache_dir: where hub downloads are kept.

    Raises:
        UserError: as `lay_out`.
    """
    if flags.dataset_name is None:
        return flags
    data_set = DataSet(flags.dataset_name, flags.dataset_config_name, flags.image_column, flags.caption_column)
    folder = data_set.folder
    if (folder / _PROVENANCE).is_file():
        print_in_rank_0(f"data set {data_set.name}: laid out in {folder} before; delete that to read it again")
    else:
        lay_out(data_set, cache_dir)
    return replace(
        flags,
        instance_data_dir=str(folder),
        dataset_name=None,
        dataset_config_name=None,
        image_column=None,
        caption_column=None,
    )


def lay_out(data_set: DataSet, cache_dir: str | None = None) -> Path:
    """Writes the pictures of the train split, their captions into `metadata.jsonl`, and the provenance.

    A picture's bytes stay as they are. The folder appears when it is whole.

    Raises:
        UserError: `datasets` is not installed; the data set cannot be read, has no train split, lacks a column, or a
            column holds something else.
    """
    rows = _train_split(data_set, cache_dir)
    image_column, rows = _pictures_undecoded(data_set, rows)
    folder = data_set.folder
    unfinished = unfinished_path(folder)
    remove_unfinished(folder.parent, folder.name)
    try:
        unfinished.mkdir(parents=True)
        captions = list(_write_pictures(data_set, rows, image_column, unfinished))
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in captions if "text" in line]
        if lines:
            (unfinished / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        provenance = {
            "format_version": _FORMAT_VERSION,
            "dataset_name": data_set.name,
            "dataset_config_name": data_set.config,
            "image_column": image_column,
            "caption_column": data_set.caption_column,
            "split": "train",
            "fingerprint": getattr(rows, "_fingerprint", None),
            "pictures": len(captions),
            "captions": len(lines),
            "datasets": _library(data_set).__version__,
        }
        write_text_atomically(unfinished / _PROVENANCE, json.dumps(provenance, indent=1, ensure_ascii=False) + "\n")
        if folder.exists():  # of an interrupted build, or another program's
            raise UserError(f"{folder} is there, and is not what this command laid out: delete or rename it")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print_in_rank_0(
        f"data set {data_set.name}: {counted(len(captions), 'picture')}, {len(lines)} of them with captions, laid out "
        f"in {folder}"
    )
    return folder


def _library(data_set: DataSet) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--dataset_name {data_set.name} needs the library datasets: type `pip install datasets`, or give a "
            "folder of pictures as --instance_data_dir"
        ) from error
    return datasets


def _train_split(data_set: DataSet, cache_dir: str | None) -> Any:
    """The rows of the split train; other splits are told."""
    library = _library(data_set)
    more: dict[str, Any] = {}
    pictures: tuple[Path, ...] = ()
    if Path(data_set.name).is_dir():
        try:
            pictures = list_images(Path(data_set.name)).images
        except UserError:  # parquet files and the like
            pictures = ()
        if pictures:  # else `a test.jpg` among them would be a split of its own, and the others vanish
            more["data_files"] = {"train": "**"}
    try:
        splits = library.load_dataset(data_set.name, data_set.config, cache_dir=cache_dir, **more)
    except Exception as error:  # the library raises whatever its parts raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"cannot read the data set {data_set.name} ({reason.rstrip('.')}): check --dataset_name and "
            "--dataset_config_name"
        ) from error
    if "train" not in splits:
        raise UserError(
            f"the data set {data_set.name} has no split train ({shown(sorted(splits))}): give its pictures as "
            "--instance_data_dir"
        )
    others = [f"{name} ({len(rows)})" for name, rows in splits.items() if name != "train"]
    if others:
        print_in_rank_0(f"note: of the data set only the split train is read, not {shown(others)}")
    rows = splits["train"]
    if pictures and len(rows) < len(pictures):
        print_in_rank_0(
            f"note: the library datasets reads {len(rows)} of {counted(len(pictures), 'picture')} in {data_set.name}; "
            f"--instance_data_dir {data_set.name} reads all"
        )
    return rows


def _pictures_undecoded(data_set: DataSet, rows: Any) -> tuple[str, Any]:
    """The column of the pictures, and the rows with that column as bytes or paths.

    Raises:
        UserError: a column is not there, or holds no pictures; the sentence names those that are.
    """
    library, columns = _library(data_set), list(rows.column_names)
    with_pictures = [name for name, kind in rows.features.items() if isinstance(kind, library.Image)]
    for flag, name in (("image_column", data_set.image_column), ("caption_column", data_set.caption_column)):
        if name is not None and name not in columns:
            raise UserError(f"the data set {data_set.name} has no column {name}: give --{flag} one of {shown(columns)}")
    if not with_pictures:
        raise UserError(f"no column of the data set {data_set.name} holds pictures; it has {shown(columns)}")
    image_column = data_set.image_column or with_pictures[0]
    if image_column not in with_pictures:
        raise UserError(
            f"the column {image_column} of the data set {data_set.name} holds no pictures: give --image_column "
            f"{' or '.join(with_pictures)}"
        )
    kept = [name for name in dict.fromkeys((image_column, data_set.caption_column)) if name is not None]
    return image_column, rows.select_columns(kept).cast_column(image_column, library.Image(decode=False))


def _write_pictures(data_set: DataSet, rows: Any, image_column: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Writes each picture; yields its row of the metadata file, without a text where it has no caption."""
    for number, row in enumerate(rows):
        where = f"row {number + 1} of the data set {data_set.name}"
        picture = row[image_column]
        if picture is None:
            raise UserError(f"{where} has no picture in the column {image_column}: take the row out")
        content = picture["bytes"]
        try:
            content = Path(picture["path"]).read_bytes() if content is None else content
        except OSError as error:
            raise UserError(f"{where} names {picture['path']}, which cannot be read: mend the data set") from error
        name = f"{number:05d}{_extension(picture['path'], content)}"
        (folder / name).write_bytes(content)
        line: dict[str, Any] = {"file_name": name}
        caption = None if data_set.caption_column is None else row[data_set.caption_column]
        texts = [caption] if isinstance(caption, str) else caption
        if texts is not None:
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"{where} has no text in the column {data_set.caption_column}: give another --caption_column"
                )
            texts = [text for text in texts if text.strip()]
            if texts:
                line["text"] = texts if len(texts) > 1 else texts[0]
        yield line


def _extension(path: str | None, content: bytes) -> str:
    """That of the file's name where it is a picture's, else that of its format."""
    suffix = Path(path or "").suffix.lower()
    if suffix in RASTER_EXTENSIONS:
        return suffix
    try:
        with Image.open(io.BytesIO(content)) as file:
            return {"JPEG": ".jpg"}.get(file.format or "", f".{(file.format or 'png').lower()}")
    except Exception:  # what does not decode is told by its name later
        return ".png"
