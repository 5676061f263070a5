"""A picture file and the settings inside it: PNG, JPEG or WebP, readable by this project and by other programs.

In a PNG they are text, in the others EXIF. Other programs show `parameters` (in EXIF: the user's comment), in the form
of AUTOMATIC1111's web interface. This project reads its own JSON, `sd3_lora` (in EXIF: the maker's note).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sd3_lora.drawing.config import SCHEDULERS, PictureFormat

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

_TEXT_KEY = "sd3_lora"
_NOTE_MARK, _COMMENT_MARK = b"sd3_lora\0", b"UNICODE\0"  # the latter by EXIF 2.3, before UTF-16
_EXIF_BYTES = 64_000  # of both: JPEG has room for 64 KiB
# What Pillow is told of each format. JPEG without chroma subsampling, which would blur red edges.
_SAVE: dict[PictureFormat, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 92, "method": 4},
}


def picture_file(
    picture: Image.Image, kind: PictureFormat, settings: Mapping[str, Any], readable: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of a file with the picture and its settings.

    Args:
        picture: RGB.
        kind: of the file.
        settings: all that decides its pixels, as plain JSON types.
        readable: more for other programs, such as the model's name.
    """
    parameters, own = parameters_text(settings, readable), json.dumps(settings, ensure_ascii=False)
    more = dict[str, Any]()
    if kind == "png":
        text = PngInfo()
        _add_text(text, "parameters", parameters)
        _add_text(text, _TEXT_KEY, own)
        more["pnginfo"] = text
    else:
        exif = Image.Exif()
        fields = exif.get_ifd(ExifTags.IFD.Exif)
        note = _NOTE_MARK + own.encode()
        room = _EXIF_BYTES - len(note)
        if room >= 0:  # else the next run draws it again
            fields[ExifTags.Base.MakerNote] = note
        comment = parameters.encode("utf-16-be")[: max(room, 0) // 2 * 2]
        fields[ExifTags.Base.UserComment] = _COMMENT_MARK + comment
        more["exif"] = exif
    return encoded(picture, kind, **more)


def encoded(picture: Image.Image, kind: PictureFormat, **more: Any) -> bytes:
    """The bytes of a file with the picture alone, or with what Pillow is given to write into it."""
    file = io.BytesIO()
    picture.save(file, **_SAVE[kind], **more)
    return file.getvalue()


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a picture of this project; None where it is another file or not whole."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return settings_in(picture)
    except (OSError, UnidentifiedImageError, SyntaxError):
        return None


def settings_in(picture: Image.Image) -> dict[str, Any] | None:
    """The settings in a loaded picture of this project; None where it is another's."""
    try:
        settings = json.loads(_own_text(picture))
    except (AttributeError, KeyError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def _own_text(picture: Image.Image) -> str:
    if picture.format == "PNG":
        text: str = picture.text[_TEXT_KEY]  # type: ignore[attr-defined]
        return text
    note: bytes = picture.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote]
    if not note.startswith(_NOTE_MARK):
        raise ValueError("of another program")
    return note.removeprefix(_NOTE_MARK).decode()


def _add_text(text: PngInfo, key: str, value: str) -> None:
    """As tEXt where every reader agrees on what the bytes mean, else as iTXt, which is UTF-8."""
    (text.add_text if value.isascii() else text.add_itxt)(key, value)


def parameters_text(settings: Mapping[str, Any], readable: Mapping[str, str] | None = None) -> str:
    """The settings as the picture viewers of other programs show them, under the key `parameters`.

    The form is that of AUTOMATIC1111's web interface. (A key `prompt` would be read as ComfyUI's workflow.)
    """
    values = {
        "Steps": settings.get("steps"),
        "Sampler": SCHEDULERS[settings.get("sampler", "euler")],
        "CFG scale": settings.get("guidance"),
        "Seed": settings.get("seed"),
        "Size": f"{settings.get('width')}x{settings.get('height')}",
        **(readable or {}),
    }
    negative = settings.get("negative_prompt")
    lines: Iterable[str] = (
        settings["prompt"],
        *([f"Negative prompt: {negative}"] if negative else []),
        ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items()),
    )
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """In quotes where a reader would take a comma or a colon for the end of the value."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
