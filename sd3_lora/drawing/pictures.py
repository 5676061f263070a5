"""Drawn pictures on disk: names, noise, and the settings inside the PNG."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

_TEXT_KEY = "sd3_lora"


@dataclass(frozen=True)
class PicturePlan:
    """One picture to draw.

    Attributes:
        prompt: the text.
        prompt_index: its place in the list of prompts, from 0.
        image_index: which picture of the prompt, from 0.
        path: the PNG to write.
        settings: all that decides its pixels, as plain JSON types.
    """

    prompt: str
    prompt_index: int
    image_index: int
    path: Path
    settings: dict[str, Any]

    def noise(self, shape: Sequence[int]) -> torch.Tensor:
        """The starting noise, `shape` float32 on the CPU.

        It depends on the seed and the two indices alone, so that neither the batch nor the device changes it.
        """
        key = f"{self.settings['seed']}/{self.prompt_index}/{self.image_index}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))

    def is_drawn(self) -> bool:
        """Whether the file is there, whole, with these very settings."""
        try:
            with Image.open(self.path) as picture:
                picture.load()
                return json.loads(picture.text[_TEXT_KEY]) == self.settings  # type: ignore[attr-defined]
        except (OSError, UnidentifiedImageError, AttributeError, KeyError, ValueError):
            return False

    def save(self, picture: Image.Image) -> None:
        """Writes the PNG with its settings as text, atomically."""
        text = PngInfo()
        text.add_itxt("prompt", self.prompt)
        text.add_itxt(_TEXT_KEY, json.dumps(self.settings, ensure_ascii=False))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        picture.save(temporary, format="PNG", pnginfo=text)
        os.replace(temporary, self.path)


def plan_pictures(outdir: Path, prompts: Sequence[str], num_images: int, settings: dict[str, Any]) -> list[PicturePlan]:
    """All pictures of a run: `NNN_<prompt>/img_XX.png`."""
    return [
        PicturePlan(
            prompt,
            prompt_index,
            image_index,
            outdir / f"{prompt_index:03d}_{folder_name(prompt)}" / f"img_{image_index:02d}.png",
            {**settings, "prompt": prompt, "prompt_index": prompt_index, "image_index": image_index},
        )
        for prompt_index, prompt in enumerate(prompts)
        for image_index in range(num_images)
    ]


def folder_name(prompt: str) -> str:
    """The prompt as a folder name that every system takes: letters, digits and hyphens, at most 60 of them.

    >>> folder_name("A photo of *sks* dog, in a bucket!")
    'a-photo-of-sks-dog-in-a-bucket'
    """
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60].rstrip("-_") or "empty"
