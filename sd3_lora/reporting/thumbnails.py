"""Small WebP pictures inside a page: validation pictures by step, and the subject's pictures as training saw them."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sd3_lora.common.command_line import UserError
from sd3_lora.common.defaults import default_folder
from sd3_lora.common.run_record import NotedPicture
from sd3_lora.drawing.picture_metadata import settings_in
from sd3_lora.reporting.run_folder import RunFolder
from sd3_lora.stage_one.crop_boxes import crop_box_of, crop_picture, mirrored, number_of_variant, size_of_variant
from sd3_lora.stage_one.image_files import hash_file
from sd3_lora.stage_one.images import BrokenImage, open_rgb

import numpy as np
from PIL import Image, ImageEnhance, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

MOST_BYTES = 2_400_000  # of the validation pictures; in a page they take a third more
SIDES_PX = (384, 320, 256, 192, 144)  # of a validation picture, tried in this order
MOST_DRAWN = 240  # validation pictures; of more the steps are thinned out
MOST_INSTANCE, MOST_CROPS = 24, 4  # pictures of the subject that are shown, and crops of each
CROP_PX = 224
_QUALITY = 80
_T = TypeVar("_T")
_Columns = dict[tuple[str, int], dict[int, _T]]  # a prompt and the index of its picture → optimizer step → the picture
_BESIDE_MASK = (0.25, 0.45)  # of what is not trained on: how bright, and how much of it grey


def data_uri(content: bytes) -> str:
    """A WebP file as the address of an image."""
    return "data:image/webp;base64," + base64.b64encode(content).decode("ascii")


def small_webp(picture: Image.Image, side_px: int) -> bytes:
    """A WebP file of a picture, no longer than `side_px` on its longer side, and not enlarged."""
    small = picture.convert("RGB")
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="WEBP", quality=_QUALITY, method=4)
    return file.getvalue()


@dataclass(frozen=True)
class DrawnColumn:
    """One of the pictures that validation draws at each step.

    Attributes:
        prompt: that is drawn.
        index: of the picture among those of the prompt.
        uris: optimizer step → the picture.
        width: in pixels, as shown.
        height: in pixels, as shown.
    """

    prompt: str
    index: int
    uris: Mapping[int, str]
    width: int
    height: int


def drawn_columns(step_folders: Mapping[int, Path]) -> list[DrawnColumn]:
    """The validation pictures, by prompt; as large as `MOST_BYTES` has room for.

    Args:
        step_folders: optimizer step → the folder of its pictures.
    """
    found = defaultdict[tuple[str, int], dict[int, Image.Image]](dict)
    with ThreadPoolExecutor() as pool:
        steps = sorted(step_folders)
        for step, pictures in zip(steps, pool.map(_pictures_in, [step_folders[step] for step in steps]), strict=True):
            for key, picture in pictures:
                found[key][step] = picture
    # Prompts in the order of the last step's files; an earlier run's come behind.
    keys = list(found)
    last = max((step for pictures in found.values() for step in pictures), default=0)
    keys.sort(key=lambda key: last not in found[key])
    kept = _thinned(sorted({step for pictures in found.values() for step in pictures}), len(keys))
    files = _fitting({key: {step: found[key][step] for step in found[key] if step in kept} for key in keys})
    columns = []
    for (prompt, index), contents in files.items():
        if contents:
            with Image.open(io.BytesIO(next(iter(contents.values())))) as first:
                width, height = first.size
            uris = {step: data_uri(content) for step, content in contents.items()}
            columns.append(DrawnColumn(prompt, index, uris, width, height))
    return columns


def _fitting(shown: _Columns[Image.Image]) -> _Columns[bytes]:
    """The pictures as files that have no more than `MOST_BYTES` together, if the smallest side allows it."""
    files: _Columns[bytes] = {}
    with ThreadPoolExecutor() as pool:
        for side in SIDES_PX:
            small = partial(small_webp, side_px=side)
            files = {
                key: dict(zip(pictures, pool.map(small, pictures.values()), strict=True))
                for key, pictures in shown.items()
            }
            if sum(len(content) for pictures in files.values() for content in pictures.values()) <= MOST_BYTES:
                break
    return files


def _pictures_in(folder: Path) -> list[tuple[tuple[str, int], Image.Image]]:
    """The pictures of this project in a folder, by prompt and index, no larger than they are shown."""
    pictures = []
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path) as opened:
                opened.load()
                noted = settings_in(opened)
                if noted is None or not {"prompt", "image_index"} <= noted.keys():
                    continue
                picture = opened.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError):
            continue
        picture.thumbnail((SIDES_PX[0], SIDES_PX[0]), Image.Resampling.LANCZOS)
        pictures.append(((str(noted["prompt"]), int(noted["image_index"])), picture))
    return pictures


def _thinned(steps: Sequence[int], columns: int) -> set[int]:
    """As many of the steps as `MOST_DRAWN` has room for, the first and the last among them."""
    most = max(2, MOST_DRAWN // max(columns, 1))
    if len(steps) <= most:
        return set(steps)
    return {steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)}


@dataclass(frozen=True)
class ShownCrop:
    """A crop as training saw it.

    Attributes:
        name: of the variant.
        label: what it is, in words.
        uri: the picture.
        width: of the bucket in pixels.
        height: of the bucket in pixels.
        masked: how much of it counts in the loss, from 0 to 1; None without a mask.
    """

    name: str
    label: str
    uri: str
    width: int
    height: int
    masked: float | None


@dataclass(frozen=True)
class ShownPicture:
    """A picture of the subject.

    Attributes:
        picture: as the run noted it.
        crops: the first few of its crops; empty where the file is not found.
        more: crops beside these.
        sizes: of its crops, as words.
        size: of the upright picture, as words; empty where it is not found.
        missing: why no crop is shown; empty where one is.
    """

    picture: NotedPicture
    crops: tuple[ShownCrop, ...]
    more: int
    sizes: tuple[str, ...]
    size: str = ""
    missing: str = ""


def instance_pictures(run: RunFolder) -> list[NotedPicture]:
    """The subject's pictures by name, without those of its class."""
    of_class = run.value("class_prompt") if run.value("with_prior_preservation") else None
    pictures = [picture for picture in run.pictures or () if of_class is None or picture.prompt != of_class]
    return sorted(pictures, key=lambda picture: picture.name)


def shown_pictures(run: RunFolder) -> list[ShownPicture]:
    """The first pictures of the subject, cut from their files as they lie there now."""
    pictures = instance_pictures(run)[:MOST_INSTANCE]
    folders = list(_picture_folders(run))
    files = _files_by_name(folders, {picture.name for picture in pictures if picture.name})
    latents = next((record for record in run.earlier if record.script == "precompute_latents.py"), None)
    background = (latents.flags.get("alpha_background") if latents else None) or "white"
    cache = Path(run.value("latents_path") or "latents")
    not_found = _why_not_found(run, folders)
    return [_shown(picture, files.get(picture.name, ()), background, cache, not_found) for picture in pictures]


def _why_not_found(run: RunFolder, folders: Sequence[Path]) -> str:
    """Why a picture's file is not found, where none has its name."""
    if not run.training.values:
        return "where its file lies is not noted: an earlier version wrote this checkpoint"
    if absent := [str(folder) for folder in folders if not folder.is_dir()]:
        where = "" if Path(absent[0]).is_absolute() else f" in {Path.cwd()}"
        return f"its folder {absent[0]} is not found{where}"
    return "the file is no longer where it was"


def _shown(picture: NotedPicture, paths: Sequence[Path], background: Any, cache: Path, not_found: str) -> ShownPicture:
    plain = [name for name in picture.crops if not number_of_variant(name)] or list(picture.crops)
    chosen, sizes = plain[:MOST_CROPS], tuple(dict.fromkeys(str(size_of_variant(name)) for name in picture.crops))
    more = len(picture.crops) - len(chosen)
    if not picture.name:
        return ShownPicture(picture, (), more, sizes, missing="its file's name is not known")
    try:
        path = next((path for path in paths if hash_file(path) == picture.image_id), None)
        if path is None:
            missing = "the file has changed since it was trained on" if paths else not_found
            return ShownPicture(picture, (), more, sizes, missing=missing)
        whole = open_rgb(path, background)
    except (BrokenImage, UserError) as error:
        return ShownPicture(picture, (), more, sizes, missing=str(error))
    crops = tuple(_shown_crop(whole, name, _read_mask(cache, picture.image_id, name)) for name in chosen)
    return ShownPicture(picture, crops, more, sizes, f"{whole.width}×{whole.height}")


def _shown_crop(whole: Image.Image, name: str, mask: np.ndarray | None) -> ShownCrop:
    box = crop_box_of(name, *whole.size)
    crop = crop_picture(whole, box)
    if box.brightness != 1:
        crop = ImageEnhance.Brightness(crop).enhance(box.brightness)
    if mask is not None:
        crop = _beside_mask_dimmed(crop, mask)
    share = None if mask is None else float(mask.mean())
    return ShownCrop(name, _label(name), data_uri(small_webp(crop, CROP_PX)), box.size.width, box.size.height, share)


def _label(name: str) -> str:
    _, left, top = name.split("@")[0].removesuffix("-flip").split("+")
    words = [f"{size_of_variant(name).width}×{size_of_variant(name).height} px"]
    if (left, top) != ("0", "0"):
        words.append(f"{left} px from the left" if left != "0" else f"{top} px from the top")
    if name == mirrored(name):
        words.append("mirrored")
    return ", ".join(words)


def _read_mask(cache: Path, image_id: str, name: str) -> np.ndarray | None:
    """`(H/8, W/8)` float32 in [0, 1], as it weighs the loss; None where the crop has none."""
    try:
        with safe_open(cache / f"{image_id}.safetensors", "np") as handle:
            if name not in json.loads(handle.metadata()["sd3_lora"]).get("masks", {}):
                return None
            return np.asarray(handle.get_tensor(f"{name}.mask"), np.float32)[0]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _beside_mask_dimmed(crop: Image.Image, mask: np.ndarray) -> Image.Image:
    """The crop, dark and grey where it is not trained on, in the mask's own squares."""
    bright, grey = _BESIDE_MASK
    dim = Image.blend(crop, crop.convert("L").convert("RGB"), grey)
    dim = ImageEnhance.Brightness(dim).enhance(bright)
    weights = Image.fromarray(np.rint(mask * 255).astype(np.uint8)).resize(crop.size, Image.Resampling.NEAREST)
    return Image.composite(crop, dim, weights)


def _picture_folders(run: RunFolder) -> Iterator[Path]:
    """Where the subject's pictures were when the run began."""
    concepts = run.value("concepts_list")
    if concepts:
        try:
            listed = json.loads(Path(concepts).read_text(encoding="utf-8-sig"))
            yield from (Path(each["instance_data_dir"]).expanduser() for each in listed)
        except (OSError, ValueError, TypeError, KeyError):
            return
    elif run.training.values:
        folder = run.value("instance_data_dir")
        yield Path(folder) if folder else default_folder()


def _files_by_name(folders: Iterable[Path], names: set[str]) -> dict[str, list[Path]]:
    found = defaultdict[str, list[Path]](list)
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.name in names and path.is_file():
                found[path.name].append(path)
    return found
