"""The photos of a project: uploads let in or refused by name, captions beside them, crops as stage one cuts them."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.command_line import UserError, counted, read_text_lines, write_text_atomically
from sd3_lora.common.picture_size import PictureSize
from sd3_lora.projects.names import safe_name
from sd3_lora.stage_one.crop_boxes import crop_boxes, crop_picture
from sd3_lora.stage_one.image_files import RASTER_EXTENSIONS, picture_paths
from sd3_lora.stage_one.images import BrokenImage, open_rgb

from filelock import FileLock

MOST_PHOTOS, MOST_MEGABYTES, MOST_CAPTION = 200, 50, 1000  # photos; of a file; letters of a caption
_SHOWN_PX = 512  # of a crop as it is looked at


@dataclass(frozen=True)
class Upload:
    """A file that somebody drops.

    Attributes:
        path: where it lies now.
        name: as it was called; not to be trusted.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class Photos:
    """A folder of pictures with their captions, as stage one reads it.

    Attributes:
        folder: which holds them.
        crops: the folder of the crops that are shown; they can be made again.
    """

    folder: Path
    crops: Path

    @property
    def paths(self) -> tuple[Path, ...]:
        """The photos, sorted."""
        return picture_paths(self.folder)

    def add(self, uploads: Sequence[Upload]) -> tuple[list[Path], list[str]]:
        """Copies uploads into the folder; those that cannot be trained on are refused.

        Two that add at once, and two files of one name, both keep theirs. A photo that is there already, under
        whatever name, is not added again: training would take the two for one.

        Returns:
            The new photos, and a sentence for each file that was refused.
        """
        added, refused = list[Path](), list[str]()
        for upload in uploads:
            try:
                photo = self._add(upload)
                added += [] if photo is None else [photo]
            except FileNotFoundError:
                refused.append(f"{upload.name} did not arrive whole: drop it again")
            except (UserError, BrokenImage) as error:
                refused.append(str(error).replace(str(upload.path), upload.name))
        return added, refused

    def _add(self, upload: Upload) -> Path | None:
        suffix = Path(upload.name).suffix.lower()
        if suffix not in RASTER_EXTENSIONS:
            raise UserError(f"{upload.name} is not a picture: take .jpg, .png or .webp files")
        if upload.path.stat().st_size > MOST_MEGABYTES * 1_000_000:
            raise UserError(f"{upload.name} is larger than {MOST_MEGABYTES} MB: save it smaller")
        open_rgb(upload.path)  # what does not decode is refused here, and not after the upload
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_name(".photos.lock")):  # of two uploads at once, in this process or another
            if any(filecmp.cmp(path, upload.path, shallow=False) for path in self.paths):
                return None
            stems = {path.stem.lower() for path in self.paths}
            if len(stems) >= MOST_PHOTOS:
                raise UserError(f"{upload.name} is one too many: a project holds {counted(MOST_PHOTOS, 'photo')}")
            stem = safe_name(Path(upload.name).stem) or "photo"
            # Captions and crops go by the name without its extension.
            numbered = (f"{stem}-{number}" for number in count(2))
            name = next(name for name in chain([stem], numbered) if name.lower() not in stems)
            path = self.folder / f"{name}{suffix}"
            with replacing(path) as unfinished:
                shutil.copyfile(upload.path, unfinished)
        return path

    def photo(self, name: str) -> Path:
        """The photo of this name.

        Raises:
            UserError: there is none.
        """
        for path in self.paths:
            if path.name == name:
                return path
        raise UserError(f"there is no photo {name} any more: load the page again")

    def remove(self, name: str) -> None:
        """Deletes a photo, its caption and its crops.

        Raises:
            UserError: there is none of this name.
        """
        path = self.photo(name)
        for each in (*self.crops.glob(f"*/{path.stem}.webp"), _caption_path(path), path):
            each.unlink(missing_ok=True)

    def caption(self, name: str) -> str:
        """A photo's caption; empty where it has none, and the subject's prompt is its."""
        path = _caption_path(self.photo(name))
        return " ".join(read_text_lines(path)) if path.is_file() else ""

    def write_caption(self, name: str, text: str) -> None:
        """Writes a photo's caption, in one line; an empty one takes it away.

        Raises:
            UserError: there is no such photo, or the caption is too long.
        """
        path, line = _caption_path(self.photo(name)), " ".join(text.split())
        if len(line) > MOST_CAPTION:
            raise UserError(f"the caption has {len(line)} letters: {MOST_CAPTION} are the most, and 30 words enough")
        if line:
            write_text_atomically(path, line + "\n")
        else:
            path.unlink(missing_ok=True)

    def crop(self, path: Path, size: PictureSize) -> Path:
        """A small picture of a photo's crop, as stage one cuts it at this size; made where it is not there yet.

        Raises:
            BrokenImage: the photo does not decode.
        """
        shown = self.crops / str(size) / f"{path.stem}.webp"
        if not _is_newer(shown, path):
            shown.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.crops.with_name(".crops.lock")):  # of two that look at once, in one process or two
                if not _is_newer(shown, path):
                    picture = open_rgb(path)
                    (box,) = crop_boxes(picture.width, picture.height, size, num_crops=1, flip=False)
                    crop = crop_picture(picture, box)
                    crop.thumbnail((_SHOWN_PX, _SHOWN_PX))
                    with replacing(shown) as unfinished:
                        crop.save(unfinished, format="WEBP", quality=85)
        return shown


def _is_newer(made: Path, source: Path) -> bool:
    """Whether a file that is made of another is there, and of what that is now."""
    return made.is_file() and made.stat().st_mtime_ns >= source.stat().st_mtime_ns


def _caption_path(photo: Path) -> Path:
    return photo.with_suffix(".txt")
