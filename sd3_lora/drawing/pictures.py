"""Drawn pictures on disk: names, noise, and which of them are there."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sd3_lora.common.command_line import write_atomically
from sd3_lora.drawing.config import PictureFormat
from sd3_lora.drawing.picture_metadata import picture_file, read_settings

import torch
from PIL import Image

# Settings that pictures of earlier builds do not note; there they are not compared. A picture with LoRAs beside the
# weights notes no "lora_merged" either, and is as good as a merged one.
_LATER_SETTINGS = ("text_encoders", "scheduler", "lora_merged")


@dataclass(frozen=True)
class FileStyle:
    """How picture files are named and written.

    Attributes:
        format: of the files, and their suffix.
        variant: ends their names where the same pictures are drawn in several ways, such as "base".
        readable: what they tell other programs beside their settings.
    """

    format: PictureFormat = "png"
    variant: str = ""
    readable: Mapping[str, str] = field(default_factory=dict)

    def file_name(self, image_index: int, number: int = 1) -> str:
        """A picture's name, the first one or one beside others."""
        parts = [f"img_{image_index:02d}", *([self.variant] if self.variant else [])]
        return "_".join([*parts, *([str(number)] if number > 1 else [])]) + f".{self.format}"


@dataclass(frozen=True)
class PicturePlan:
    """One picture to draw.

    Attributes:
        prompt: the text.
        image_index: which picture of the prompt, from 0.
        path: the file to write; no file has this name, unless it is this very picture.
        settings: all that decides its pixels, as plain JSON types.
        is_drawn: whether the file is there, whole, with these very settings.
        is_beside_another: whether pictures of other settings have the name that it would have had.
        style: of the file.
    """

    prompt: str
    image_index: int
    path: Path
    settings: dict[str, Any]
    is_drawn: bool
    is_beside_another: bool = False
    style: FileStyle = field(default_factory=FileStyle)

    def noise(self, shape: Sequence[int]) -> torch.Tensor:
        """The starting noise, `shape` float32 on the CPU.

        It depends on the seed and the picture's index within its prompt alone: neither the batch, the device nor the
        prompt's place in the list changes it. (The 0 is a place: earlier builds drew the first prompt so.)
        """
        key = f"{self.settings['seed']}/0/{self.image_index}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))

    def file_bytes(self, picture: Image.Image) -> bytes:
        """The file, with the settings in it."""
        return picture_file(picture, self.style.format, self.settings, self.style.readable)

    def save(self, picture: Image.Image) -> None:
        """Writes the file, atomically."""
        self.write(self.file_bytes(picture))

    def write(self, content: bytes) -> None:
        """Writes what `file_bytes` gave, atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, content)


class PictureWriter:
    """Writes pictures in threads, while others are drawn: a PNG of 1024 px takes 0.15 s of a core.

    A context: at its end all are written.

    Args:
        threads: that encode and write.
        also: is given each picture that is written, and its result kept.

    Attributes:
        made: what `also` returned, by the file's path.
    """

    def __init__(self, threads: int, also: Callable[[Image.Image], Image.Image]):
        self._pool, self._most, self._also = ThreadPoolExecutor(threads), 2 * threads, also
        self._pending: deque[Future[None]] = deque()
        self.made: dict[Path, Image.Image] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        while self._pending and kind is None:
            self._pending.popleft().result()

    def add(self, plan: PicturePlan, picture: Image.Image) -> None:
        """Has a picture written; waits where too many wait.

        Raises:
            OSError: one before could not be written.
        """
        self._pending.append(self._pool.submit(self._write, plan, picture))
        while len(self._pending) > self._most:
            self._pending.popleft().result()

    def _write(self, plan: PicturePlan, picture: Image.Image) -> None:
        plan.save(picture)
        self.made[plan.path] = self._also(picture)


def plan_pictures(
    outdir: Path,
    prompts: Sequence[str],
    num_images: int,
    settings: Mapping[str, Any],
    same_models: Collection[str] = (),
    style: FileStyle | None = None,
) -> list[PicturePlan]:
    """All pictures of a run: `NNN_<prompt>/img_XX.png`, or `img_XX_2.png` and so on beside pictures of other settings.

    A picture that is there under any of these names, with these settings, is known again.

    A prompt that is given twice gets twice as many pictures.

    Args:
        outdir: where they go.
        prompts: in their order; NNN is a prompt's first place.
        num_images: of each prompt.
        settings: all that decides their pixels beside prompt and index.
        same_models: what other builds note as `settings["model"]` or `["text_encoders"]` where they are the same.
        style: of the files.
    """
    plans, places, style = [], dict[str, list[int]](), style or FileStyle()
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    for prompt, its_places in places.items():
        folder = outdir / f"{its_places[0]:03d}_{folder_name(prompt)}"
        for index in range(num_images * len(its_places)):
            own = {**settings, "prompt": prompt, "image_index": index}
            drawn = _find_drawn(folder, own, same_models, style)
            names = (style.file_name(index, number) for number in itertools.count(1))
            path = drawn or next(folder / name for name in names if not (folder / name).exists())
            beside = path.name != style.file_name(index)
            plans.append(PicturePlan(prompt, index, path, own, drawn is not None, beside, style))
    return plans


def _find_drawn(
    folder: Path, settings: Mapping[str, Any], same_models: Collection[str], style: FileStyle
) -> Path | None:
    """The file of this very picture, if it is there; nothing else that is there is ever replaced."""
    first = FileStyle(style.format).file_name(settings["image_index"])
    paths = [folder / first, *sorted(folder.glob(f"{Path(first).stem}_*.{style.format}"))]
    return next((path for path in paths if _is_same(read_settings(path), settings, same_models)), None)


def _is_same(drawn: dict[str, Any] | None, wanted: Mapping[str, Any], same_models: Collection[str]) -> bool:
    """Whether a picture with the settings `drawn` has the pixels of `wanted`."""
    if drawn is None or drawn.pop("prompt_index", 0) != 0:  # earlier builds: other noise at other places
        return False
    for name in ("model", "text_encoders"):
        if drawn.get(name) in same_models:
            drawn[name] = wanted[name]
    return drawn == {key: value for key, value in wanted.items() if key in drawn or key not in _LATER_SETTINGS}


def folder_name(prompt: str) -> str:
    """The prompt as a folder name that every system takes: letters, digits and hyphens, at most 60 of them.

    >>> folder_name("A photo of *sks* dog, in a bucket!")
    'a-photo-of-sks-dog-in-a-bucket'
    """
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:60].rstrip("-_") or "empty"
