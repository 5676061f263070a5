"""Drawn pictures on disk: names, noise, and the settings inside the PNG."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

_TEXT_KEY = "sd3_lora"
# Settings that pictures of earlier builds do not note; there they are not compared.
_LATER_SETTINGS = ("text_encoders", "scheduler")


@dataclass(frozen=True)
class PicturePlan:
    """One picture to draw.

    Attributes:
        prompt: the text.
        image_index: which picture of the prompt, from 0.
        path: the PNG to write; no file has this name, unless it is this very picture.
        settings: all that decides its pixels, as plain JSON types.
        is_drawn: whether the file is there, whole, with these very settings.
    """

    prompt: str
    image_index: int
    path: Path
    settings: dict[str, Any]
    is_drawn: bool

    def noise(self, shape: Sequence[int]) -> torch.Tensor:
        """The starting noise, `shape` float32 on the CPU.

        It depends on the seed and the picture's index within its prompt alone: neither the batch, the device nor the
        prompt's place in the list changes it. (The 0 is a place: earlier builds drew the first prompt so.)
        """
        key = f"{self.settings['seed']}/0/{self.image_index}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))

    @property
    def is_beside_another(self) -> bool:
        """Whether pictures of other settings have the name that it would have had."""
        return self.path.name != _file_name(self.image_index)

    def png(self, picture: Image.Image) -> bytes:
        """The PNG with its settings as text."""
        text, file = PngInfo(), io.BytesIO()
        _add_text(text, "parameters", parameters_text(self.settings))
        _add_text(text, _TEXT_KEY, json.dumps(self.settings, ensure_ascii=False))
        picture.save(file, format="PNG", pnginfo=text)
        return file.getvalue()

    def save(self, picture: Image.Image) -> None:
        """Writes the PNG, atomically."""
        self.write(self.png(picture))

    def write(self, png: bytes) -> None:
        """Writes what `png` gave, atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(png)
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def plan_pictures(
    outdir: Path,
    prompts: Sequence[str],
    num_images: int,
    settings: Mapping[str, Any],
    same_models: Collection[str] = (),
) -> list[PicturePlan]:
    """All pictures of a run: `NNN_<prompt>/img_XX.png`, or `img_XX_2.png` and so on beside pictures of other settings.

    A prompt that is given twice gets twice as many pictures.

    Args:
        outdir: where they go.
        prompts: in their order; NNN is a prompt's first place.
        num_images: of each prompt.
        settings: all that decides their pixels beside prompt and index.
        same_models: what other builds note as `settings["model"]` where it is the same model.
    """
    plans, places = [], dict[str, list[int]]()
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    for prompt, its_places in places.items():
        folder = outdir / f"{its_places[0]:03d}_{folder_name(prompt)}"
        for index in range(num_images * len(its_places)):
            own = {**settings, "prompt": prompt, "image_index": index}
            path, is_drawn = _find_place(folder, index, own, same_models)
            plans.append(PicturePlan(prompt, index, path, own, is_drawn))
    return plans


def _find_place(
    folder: Path, index: int, settings: Mapping[str, Any], same_models: Collection[str]
) -> tuple[Path, bool]:
    """The name of a picture, and whether it is there: nothing else that is there is ever replaced."""
    paths = (folder / _file_name(index, number) for number in itertools.count(1))
    path = next(p for p in paths if not p.exists() or _is_same(_read_settings(p), settings, same_models))
    return path, path.exists()


def _file_name(index: int, number: int = 1) -> str:
    return f"img_{index:02d}.png" if number == 1 else f"img_{index:02d}_{number}.png"


def _read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a PNG of this project; None where it is another file or not whole."""
    try:
        with Image.open(path) as picture:
            picture.load()
            settings = json.loads(picture.text[_TEXT_KEY])  # type: ignore[attr-defined]
            return settings if isinstance(settings, dict) else None
    except (OSError, UnidentifiedImageError, AttributeError, KeyError, ValueError, SyntaxError):
        return None


def _is_same(drawn: dict[str, Any] | None, wanted: Mapping[str, Any], same_models: Collection[str]) -> bool:
    """Whether a picture with the settings `drawn` has the pixels of `wanted`."""
    if drawn is None or drawn.pop("prompt_index", 0) != 0:  # earlier builds: other noise at other places
        return False
    if drawn.get("model") in same_models:
        drawn["model"] = wanted["model"]
    return drawn == {key: value for key, value in wanted.items() if key in drawn or key not in _LATER_SETTINGS}


def _add_text(text: PngInfo, key: str, value: str) -> None:
    """As tEXt where every reader agrees on what the bytes mean, else as iTXt, which is UTF-8."""
    (text.add_text if value.isascii() else text.add_itxt)(key, value)


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The settings as the picture viewers of other programs show them, under the key `parameters`.

    The form is that of AUTOMATIC1111's web interface. (A key `prompt` would be read as ComfyUI's workflow.)
    """
    values = {
        "Steps": settings.get("steps"),
        "Sampler": "Euler",
        "CFG scale": settings.get("guidance"),
        "Seed": settings.get("seed"),
        "Size": f"{settings.get('width')}x{settings.get('height')}",
    }
    negative = settings.get("negative_prompt")
    lines: Iterable[str] = (
        settings["prompt"],
        *([f"Negative prompt: {negative}"] if negative else []),
        ", ".join(f"{name}: {value}" for name, value in values.items()),
    )
    return "\n".join(lines)


def folder_name(prompt: str) -> str:
    """The prompt as a folder name that every system takes: letters, digits and hyphens, at most 60 of them.

    >>> folder_name("A photo of *sks* dog, in a bucket!")
    'a-photo-of-sks-dog-in-a-bucket'
    """
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60].rstrip("-_") or "empty"
