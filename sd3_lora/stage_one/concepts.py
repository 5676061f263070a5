"""The concepts that a command names: folders of pictures, each with its prompts and repeats."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import MOST_SHOWN, UserError, all_of, counted, read_text_lines
from sd3_lora.common.config import PictureFlags
from sd3_lora.common.defaults import default_subject
from sd3_lora.common.records import InstanceImage
from sd3_lora.stage_one.captions import CaptionRules, InstanceFolder, class_images, instance_images

_REQUIRED = ("instance_prompt", "instance_data_dir")
_TEXTS = (*_REQUIRED, "class_prompt", "class_data_dir")
_KEYS = (*_TEXTS, "repeats")
_REPEATS_IN_NAME = re.compile(r"(\d+)_(.*\S.*)")


@dataclass(frozen=True)
class ClassFolder:
    """Pictures of a class.

    Attributes:
        folder: theirs; it need not exist yet.
        prompt: of all of them, or of those without a caption.
        has_captions: whether captions beside them are read.
    """

    folder: Path
    prompt: str
    has_captions: bool = False

    def images(self, most: int) -> tuple[InstanceImage, ...]:
        """The first `most` that are there, by name."""
        return class_images(self.folder, self.prompt, most, self.has_captions)


@dataclass(frozen=True)
class Concept:
    """A subject or style: its pictures, their prompt, and others of its class.

    Attributes:
        folder: of the pictures.
        instance_prompt: of pictures without a caption; None if there is none.
        repeats: how many times each picture comes in a pass.
        class_prompt: the same without the identifier; None if there is none.
        class_folder: of pictures of the class; None if there is none.
    """

    folder: Path
    instance_prompt: str | None
    repeats: int = 1
    class_prompt: str | None = None
    class_folder: Path | None = None


@dataclass(frozen=True)
class Subject:
    """The pictures of some concepts.

    Attributes:
        concepts: at least one.
        folders: the pictures of each.
        images: the distinct pictures of all.
        rules: how their captions became prompts.
    """

    concepts: tuple[Concept, ...]
    folders: tuple[InstanceFolder, ...]
    images: tuple[InstanceImage, ...]
    rules: CaptionRules

    @property
    def captioned(self) -> int:
        """How many of the pictures have captions of their own."""
        return sum(folder.captioned for folder in self.folders)

    @property
    def instance_prompts(self) -> tuple[str, ...]:
        """The distinct prompts for pictures without a caption."""
        prompts = (concept.instance_prompt for concept in self.concepts)
        return tuple(dict.fromkeys(self.rules.filled(prompt) for prompt in prompts if prompt is not None))

    @property
    def class_prompts(self) -> tuple[str, ...]:
        """The distinct prompts of the concepts' classes."""
        return tuple(dict.fromkeys(c.class_prompt for c in self.concepts if c.class_prompt is not None))

    def sentences(self, about_prompts: bool) -> list[str]:
        """How many pictures there are, what is left out, by name, and which prompts win.

        Args:
            about_prompts: whether to speak of them.
        """
        lines = []
        for concept, folder in zip(self.concepts, self.folders, strict=True):
            lines += folder.sentences(concept.instance_prompt if about_prompts else None)
        word = self.rules.trigger_word
        if about_prompts and word and not any(word in prompt for image in self.images for prompt in image.prompts):
            lines.append(f"note: no prompt has --trigger_word {word!r}: write [trigger] where it is to stand")
        several = sum(len(image.prompts) > 1 for image in self.images)
        if about_prompts and several:
            prompts = sum(len(image.prompts) for image in self.images)
            lines.append(
                f"{counted(several, 'picture')} with several captions, which training takes in turn; {prompts} in all"
            )
        return lines


def concepts_of(flags: PictureFlags) -> tuple[Concept, ...]:
    """The concepts that the flags name: of a list, of a folder's subfolders, or the one folder.

    Raises:
        UserError: the list is not JSON, lacks a key, has one that is not known, or names a missing folder; no
            subfolder has repeats in its name.
    """
    if flags.concepts_list is not None:
        return read_concepts_list(Path(flags.concepts_list), flags.repeats)
    if flags.repeats_from_folders:
        folder, prompt = default_subject(flags.instance_data_dir, flags.instance_prompt or "")
        return _concepts_of_subfolders(folder, prompt or None)
    folder, prompt = default_subject(flags.instance_data_dir, flags.instance_prompt)
    return (Concept(folder, prompt, flags.repeats),)


def read_concepts_list(path: Path, repeats: int = 1) -> tuple[Concept, ...]:
    """The concepts of a JSON file in the form of ShivamShrirao's script, with repeats.

    Args:
        path: the file; folders in it are relative to the working folder.
        repeats: where a concept says none.

    Raises:
        UserError: see `concepts_of`.
    """
    text = "\n".join(read_text_lines(path))
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): correct it") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f'{path} is not a list of concepts: write [{{"instance_prompt": …, "instance_data_dir": …}}]')
    faults: list[str] = []
    for number, entry in enumerate(entries, start=1):
        faults += _faults_of(entry, f"{path}, concept {number}")
    if faults:
        raise UserError(all_of(faults, path.name, MOST_SHOWN))
    return tuple(
        Concept(
            _folder(entry["instance_data_dir"]),
            entry["instance_prompt"],
            entry.get("repeats", repeats),
            entry.get("class_prompt"),
            _folder(entry["class_data_dir"]) if entry.get("class_data_dir") else None,
        )
        for entry in entries
    )


def class_folders_of(concepts: Sequence[Concept], source: str) -> tuple[ClassFolder, ...]:
    """The distinct class folders of some concepts, each of which must have one, with its prompt.

    Args:
        concepts: of a list.
        source: the list, for messages.

    Raises:
        UserError: one has none; two have one folder and different prompts.
    """
    prompts: dict[Path, str] = {}
    faults = []
    for number, concept in enumerate(concepts, start=1):
        where = f"{source}, concept {number}"
        for key, value in (("class_prompt", concept.class_prompt), ("class_data_dir", concept.class_folder)):
            if value is None:
                faults.append(f"{where} has no {key}, which --with_prior_preservation needs: add it")
        if concept.class_prompt is None or concept.class_folder is None:
            continue
        if prompts.setdefault(concept.class_folder, concept.class_prompt) != concept.class_prompt:
            faults.append(f"{where} has the class_data_dir of another with another class_prompt: give it its own")
    if faults:
        raise UserError(all_of(faults, source, MOST_SHOWN))
    return tuple(ClassFolder(folder, prompt) for folder, prompt in prompts.items())


def _folder(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _faults_of(entry: dict[str, Any], where: str) -> list[str]:
    """What is wrong with a concept, a sentence each."""
    faults = [f"{where} has no {key}: add it" for key in _REQUIRED if key not in entry]
    for key, value in entry.items():
        if key not in _KEYS:
            faults.append(f"{where} has {key}, which is not known: take it out; there are {', '.join(_KEYS)}")
        elif key == "repeats" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            faults.append(f"{where} has repeats {value!r}: write a number of at least 1")
        elif key in _REQUIRED and not (isinstance(value, str) and value.strip()):
            faults.append(f"{where} has no text in {key}: write it in double quotes")
        elif key in _TEXTS and not (value is None or isinstance(value, str)):
            faults.append(f"{where} has no text in {key}: write it in double quotes, or take it out")
    folder = entry.get("instance_data_dir")
    if isinstance(folder, str) and folder.strip() and not _folder(folder).is_dir():
        faults.append(f"{where} names the folder {folder}, which is not there: correct instance_data_dir")
    return faults


def _concepts_of_subfolders(folder: Path, prompt: str | None) -> tuple[Concept, ...]:
    """The subfolders with repeats in their names, as kohya's trainers have them; other subfolders are refused.

    Args:
        folder: of the subfolders.
        prompt: in place of those in the names.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of your pictures as --instance_data_dir")
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    matches = {path: _REPEATS_IN_NAME.fullmatch(path.name) for path in subfolders}
    faults = [
        f"{path} has no repeats in its name: rename it, for example to 10_{path.name.split('_')[-1]}"
        for path, match in matches.items()
        if not match or int(match[1]) < 1
    ]
    if not subfolders:
        faults.append(f"{folder} has no subfolder with repeats in its name, such as 10_sks dog: make one")
    beside = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    if beside:
        faults.append(f"{folder} has {beside[0]} beside its subfolders: move its files into one of them")
    if faults:
        raise UserError(all_of(faults, folder.name, MOST_SHOWN))
    return tuple(
        Concept(path, prompt or match[2].replace("_", " ").strip(), int(match[1]))
        for path, match in matches.items()
        if match
    )


def read_subject(
    concepts: Sequence[Concept], flags: PictureFlags, hashes_path: Path | None = None, need_prompts: bool = True
) -> Subject:
    """The distinct pictures of some concepts, with their prompts; nothing is decoded.

    Args:
        concepts: whose pictures.
        flags: how they are read.
        hashes_path: where a large folder's hashes are kept (see `hash_pictures`).
        need_prompts: whether each picture must have one.

    Raises:
        UserError: as `instance_images` does; a picture is in two concepts with different prompts.
    """
    rules, folders = CaptionRules.of(flags), []
    for number, concept in enumerate(concepts):
        notes = hashes_path if number == 0 or hashes_path is None else hashes_path.with_stem(f"pictures-{number}")
        prompt = concept.instance_prompt
        if not need_prompts:
            prompt = prompt or ""
        folders.append(instance_images(concept.folder, prompt, flags.recursive, notes, rules, concept.repeats))
    images: dict[str, InstanceImage] = {}
    faults = []
    for image in (image for folder in folders for image in folder.images):
        other = images.setdefault(image.image_id, image)
        if other is not image and other.prompts != image.prompts:
            faults.append(f"{other.path} and {image.path} are the same picture in two concepts: remove one of them")
    if faults:
        raise UserError(all_of(faults, "the concepts", MOST_SHOWN))
    return Subject(tuple(concepts), tuple(folders), tuple(images.values()), rules)
