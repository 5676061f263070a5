"""The pictures that validation left in the output folder, for the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

SAMPLES = "samples"
_MOST_PICTURES = 12
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class GalleryPicture:
    """A picture and the prompt that drew it.

    Attributes:
        path: of the file.
        prompt: empty where the file does not say.
    """

    path: Path
    prompt: str


def find_pictures(output_dir: Path) -> list[GalleryPicture]:
    """The pictures of the last step that has any, at most 12."""
    for folder in sorted((output_dir / SAMPLES).glob("step_*"), reverse=True):
        paths = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.name[0] != ".")
        pictures = [picture for path in paths[:_MOST_PICTURES] if (picture := _read(path))]
        if pictures:
            return pictures
    return []


def find_sheet(output_dir: Path) -> Path | None:
    """The sheet of all steps, if there is one."""
    return next((path for path in sorted((output_dir / SAMPLES).glob("sheet.*")) if path.suffix in _SUFFIXES), None)


def _read(path: Path) -> GalleryPicture | None:
    """None where the file is not whole."""
    try:
        with Image.open(path) as picture:
            picture.load()
            text = getattr(picture, "text", {})
            prompt = json.loads(text.get("sd3_lora", "{}")).get("prompt", "")
    except (OSError, UnidentifiedImageError, SyntaxError):
        return None
    except (ValueError, AttributeError):
        prompt = ""
    return GalleryPicture(path, str(prompt))
