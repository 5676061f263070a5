"""Class pictures on disk: which ones are missing, and the latents of those that are denoised and wait to be decoded."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.checksums import Checksums
from sd3_lora.common.command_line import UserError, read_text_lines, write_atomically
from sd3_lora.common.tensor_files import write_tensors
from sd3_lora.drawing.picture_metadata import read_settings
from sd3_lora.drawing.pictures import PicturePlan
from sd3_lora.stage_one.captions import class_images

import torch
from safetensors import SafetensorError, safe_open

_METADATA_KEY = "sd3_lora"


def missing_class_pictures(
    folder: Path, prompts: Sequence[str], count: int, settings: Mapping[str, Any]
) -> list[PicturePlan]:
    """The pictures to draw, so that the folder holds `count` distinct ones; each at the first name that is free.

    A picture that was taken out of the middle is drawn again, with its own noise and prompt. Where a caption of another
    text lies, the name is not free.

    Args:
        folder: of class pictures, whoever made them; it need not exist.
        prompts: which they have in turn, by the number in their name.
        count: how many there will be.
        settings: all that decides their pixels beside prompt and index.
    """
    missing = count - len(class_images(folder, prompts[0], count))
    numbered = ((index, prompts[index % len(prompts)]) for index in itertools.count())
    named = ((index, folder / f"class_{index:04d}.png", prompt) for index, prompt in numbered)
    free = (
        (index, path, prompt)
        for index, path, prompt in named
        if not path.exists() and _may_have(path.with_suffix(".txt"), prompt)
    )
    return [
        PicturePlan(prompt, index, path, {**settings, "prompt": prompt, "image_index": index}, is_drawn=False)
        for index, path, prompt in itertools.islice(free, missing)
    ]


def _may_have(caption: Path, prompt: str) -> bool:
    """Whether a caption file is this prompt's, or none is there."""
    try:
        return not caption.exists() or read_text_lines(caption) == [prompt]
    except UserError:  # not to be read: somebody else's
        return False


def write_caption(picture: PicturePlan) -> None:
    """Writes a picture's prompt beside it, where no caption is."""
    path = picture.path.with_suffix(".txt")
    if not path.exists():
        write_atomically(path, f"{picture.prompt}\n".encode())


class WaitingLatents:
    """Normalized latents of pictures that are denoised but not decoded, one file each: an interruption loses none.

    Args:
        folder: where the files lie; it need not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, picture: PicturePlan) -> Path:
        return self.folder / f"{picture.path.stem}.safetensors"

    def add(self, picture: PicturePlan, latents: torch.Tensor) -> None:
        """Writes a picture's `(16, H/8, W/8)` latents, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(picture)) as unfinished:  # safetensors' own writer leaves a file where it is killed
            write_tensors(unfinished, {"latents": latents.contiguous()}, {_METADATA_KEY: json.dumps(picture.settings)})

    def read(self, picture: PicturePlan) -> torch.Tensor | None:
        """The latents of this very picture; None where there are none, those of other settings, or damaged ones."""
        try:
            with safe_open(self._path(picture), "pt") as handle:
                if json.loads(handle.metadata()[_METADATA_KEY]) != picture.settings:
                    return None
                latents: torch.Tensor = handle.get_tensor("latents").clone()
                return Checksums(handle).require("latents", latents)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None

    def remove(self, picture: PicturePlan) -> None:
        """Deletes a picture's file; the folder too where it was the last."""
        self._path(picture).unlink()
        self._remove_if_empty()

    def remove_drawn(self, folder: Path) -> None:
        """Deletes the files of pictures that are in their folder: a run was killed that had just written them."""
        for path in self.folder.glob("*.safetensors"):
            drawn = read_settings(folder / f"{path.stem}.png")
            try:
                with safe_open(path, "pt") as handle:
                    is_drawn = drawn is not None and json.loads(handle.metadata()[_METADATA_KEY]) == drawn
            except (SafetensorError, OSError, KeyError, TypeError, ValueError):
                continue
            if is_drawn:
                path.unlink()
        self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
